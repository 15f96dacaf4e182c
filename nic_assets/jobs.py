"""Jobs: the layers of a study as a person starts them from the UI."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from nic_assets.partitions import Partitions


def study_jobs(partitions: Partitions) -> Mapping[str, UnresolvedAssetJobDefinition]:
    """One job a layer, by name; a layer's assets share their partitions."""
    layers = {
        "find_slides": ["slide_index"],
        "prepare_slides": ["slide", "patch_table"],
        "train_encoders": ["encoder"],
        "compress_slides": ["grid"],
        **({"train_models": ["task_model"]} if partitions.cohort.targets else {}),
    }
    return {name: dg.define_asset_job(name, selection=assets) for name, assets in layers.items()}
