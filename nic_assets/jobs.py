"""Jobs: the layers of a study as a person starts them from the UI."""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from nic_assets.partitions import Partitions


def study_jobs(partitions: Partitions) -> Sequence[UnresolvedAssetJobDefinition]:
    """One job a layer; a layer's assets share their partitions."""
    return [
        dg.define_asset_job("find_slides", selection=["slide_index"]),
        dg.define_asset_job("prepare_slides", selection=["slide", "patch_table"]),
        dg.define_asset_job("train_encoders", selection=["encoder"]),
        dg.define_asset_job("compress_slides", selection=["grid"]),
        *(
            [dg.define_asset_job("train_models", selection=["task_model"])]
            if partitions.cohort.targets
            else []
        ),
    ]
