"""Where steps run: one vocabulary of tags, and the executor.

GPU-bound work is tagged for every engine and takes a slot of the pool ``gpu``, so that two
trainings never fight for one device. The pool has one slot (``dagster.yaml``); a machine
with several GPUs raises it with ``dagster instance concurrency set gpu N``.
"""

from __future__ import annotations

import dagster as dg

DEVICE_TAG = "nic/device"
GPU_POOL = "gpu"
GPU_TAGS = {DEVICE_TAG: "gpu"}
CPU_TAGS = {DEVICE_TAG: "cpu"}


def local_executor() -> dg.ExecutorDefinition:
    """A process a step, forked from a server that has the slow imports behind it."""
    return dg.multiprocess_executor.configured(
        {
            "start_method": {
                "forkserver": {"preload_modules": ["torch", "mlflow", "nic_assets.definitions"]}
            }
        }
    )
