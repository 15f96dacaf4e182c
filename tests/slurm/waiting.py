"""Definitions of a step that takes a GPU and waits for a file, for tests of its job's fate."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from nic_assets.orchestration.executors import GPU_TAGS, chosen_executor
from nic_assets.orchestration.retries import ends_when_interrupted

FOLDER_VARIABLE = "NIC_TEST_FOLDER"


@dg.asset(op_tags=GPU_TAGS, retry_policy=dg.RetryPolicy(max_retries=2))
@ends_when_interrupted
def waiting() -> Iterator[dg.MaterializeResult[None]]:
    """Write `started` once, and end when there is a file `go`."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    (folder / f"started-{os.environ['SLURM_JOB_ID']}").touch()
    while not (folder / "go").exists():
        time.sleep(0.1)
    yield dg.MaterializeResult(metadata={"gpus": os.environ["CUDA_VISIBLE_DEVICES"]})


defs = dg.Definitions([waiting], executor=chosen_executor())
