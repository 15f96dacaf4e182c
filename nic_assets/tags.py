"""Tags that assets and runs carry."""

REFRESH_TAG = "nic/refresh"
"""When an asset is materialized: ``always`` (it scans input files, whose changes Dagster cannot
detect), or ``eager`` (it summarizes a layer in a second, so it follows every change). Without the
tag: when it is missing or stale, in the cohort's hours."""

INPUTS_TAG = "nic/inputs"
PARTIAL_INPUTS = {INPUTS_TAG: "partial"}
"""Marks assets that summarize a layer: they do not wait for partitions that failed."""

HOST_TAG = "nic/host"
"""Tags a run with the names of the machines that its steps ran on, for ``nic doctor``."""
