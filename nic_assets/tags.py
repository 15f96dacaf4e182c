"""Tags of assets and runs, and metadata of assets."""

REFRESH_TAG = "nic/refresh"
"""When Dagster materializes an asset.

``always``: at every refresh, since the asset reads files whose changes Dagster cannot see.
``eager``: after every change of its inputs, since it summarizes a layer within a second.
``hourly``: after every change of its inputs, and every hour after a failure, since it waits for a
server.
Without this tag: when the asset is missing or stale, within the cohort's hours.
"""

INPUTS_TAG = "nic/inputs"
PARTIAL_INPUTS = {INPUTS_TAG: "partial"}
"""Marks assets that summarize a layer: failed partitions of the layer do not block them."""

EARLIER_PARTITIONS = "nic/earlier_partitions"
"""Metadata of an asset: the partition that each of its partitions is made from, if any.

Dagster has no dependencies between partitions of one asset.
"""

HOST_TAG = "nic/host"
"""Tag of a run with the host names of its steps' machines, for ``nic doctor``."""

RUN_OUTPUT_TAG = "nic/run-output"
"""Tag of the materializations that Dagster records for the output of a batch: one for each
partition of the run, with one data version for all. Each partition's own record follows."""

WORKER_TAG = "nic/run-worker"
"""Tag of a run with host and process id of its worker, as a JSON object
(:mod:`nic_assets.orchestration.run_workers`)."""
