"""Neural image compression as Dagster data assets.

The Dagster declarations (assets, checks, partitions, resources, jobs, sensors), the extensions of
Dagster that they need, experiment tracking with MLflow, and the commands that maintain a study.
The computations are in ``nic_core``, which does not import this package.

``import nic_assets`` itself does not import Dagster.
"""
