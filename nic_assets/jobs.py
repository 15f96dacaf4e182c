"""Jobs: the layers of a study as a person starts them from the UI."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from nic_assets.partitions import Partitions


def study_jobs(partitions: Partitions) -> Mapping[str, UnresolvedAssetJobDefinition]:
    """One job a layer, by name, in the order in which they can be run.

    A job's assets share their partitions, so that it can be started for any of them.
    """
    cohort = partitions.cohort
    layers = {
        "find_slides": ["slide_index"],
        "prepare_slides": ["slide", "patch_table"],
        **({"make_patch_tasks": ["patch_task"]} if cohort.patch_tasks else {}),
        "train_encoders": ["encoder", *(["encoder_probe"] if cohort.patch_tasks else [])],
        "compress_slides": ["grid"],
        "gather_grids": ["encoded_cohort"],
        **({"divide_patients": ["target_folds"]} if cohort.targets else {}),
        **({"train_models": ["task_model", "explanation"]} if cohort.targets else {}),
        **(
            {"map_slides": ["probability_map"], "score_maps": ["map_scores"]} if cohort.maps else {}
        ),
        "write_report": ["evaluation_report"],
    }
    return {name: dg.define_asset_job(name, selection=assets) for name, assets in layers.items()}
