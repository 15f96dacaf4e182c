"""Steps as jobs of a Slurm cluster: the settings file, the jobs, and Dagster's executor."""
