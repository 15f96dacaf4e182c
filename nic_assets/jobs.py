"""Jobs: one for each asset, to launch in the UI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import dagster as dg

from nic_assets.partitions import Partitions

if TYPE_CHECKING:
    from nic_assets.orchestration.internals import AssetJob


def study_jobs(partitions: Partitions) -> Mapping[str, AssetJob]:
    """Return asset name -> job ``make_<asset>``, in an order that makes inputs first."""
    cohort = partitions.cohort
    assets = [
        "slide_index",
        "slide",
        "patch_table",
        "quality_report",
        *(["patch_task"] if cohort.seen_patch_tasks else []),
        "encoder",
        *(["encoder_probe"] if cohort.seen_patch_tasks else []),
        *(["registered_encoder"] if partitions.own_encoders.get_partition_keys() else []),
        "grid",
        "grid_manifest",
        "embedding_colours",
        "grid_preview",
        *(["target_folds", "target_grids", "slide_model"] if cohort.targets else []),
        *(["registered_model", "explanation"] if cohort.targets else []),
        *(
            ["champion", "prediction_plan", "prediction", "predictions_report"]
            if cohort.targets
            else []
        ),
        *(["external_evaluation"] if cohort.external else []),
        *(["probability_map", "map_scores"] if cohort.maps else []),
        "evaluation_report",
    ]
    return {asset: dg.define_asset_job(f"make_{asset}", selection=[asset]) for asset in assets}
