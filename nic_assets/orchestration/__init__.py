"""Extensions of Dagster: batches of partitions, staleness, retries, executors."""
