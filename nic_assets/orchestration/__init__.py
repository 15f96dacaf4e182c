"""What this project adds to Dagster: batches of partitions, staleness, retries, executors."""
