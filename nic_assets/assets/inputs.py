"""External assets: the user's files, each with a data version.

Slides, patch-task sources, encoder entries, target entries and external cohorts belong to the user.
The asset ``slide_index`` scans them and reports a new data version for each one that changed, so
exactly the assets downstream of a changed file become stale. It does the same for the champion of
each target in the registry. The asset ``prediction_plan`` reports the inputs of each prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import dagster as dg
from pydantic import Field

from nic_assets.orchestration.internals import DATA_VERSION_TAG
from nic_assets.partitions import SLIDES, Partitions

SLIDE_FILE = dg.AssetKey("slide_file")
PATCH_TASK_SOURCE = dg.AssetKey("patch_task_source")
ENCODER_ENTRY = dg.AssetKey("encoder_entry")
TARGET_ENTRY = dg.AssetKey("target_entry")
EXTERNAL_COHORT = dg.AssetKey("external_cohort")
REGISTERED_CHAMPION = dg.AssetKey("registered_champion")
PREDICTION_INPUTS = dg.AssetKey("prediction_inputs")


class ScanConfig(dg.Config):
    """Run config of ``slide_index``."""

    ignore_paths: list[str] = Field(
        default=[],
        description="Files that are still being written. A new slide among them is left out; a "
        "known slide keeps its last state.",
    )
    rehash: bool = Field(
        default=True,
        description="Compute the content identity of every file again, not only of files whose "
        "size or time changed.",
    )
    allow_missing_slides: bool = Field(
        default=False, description="Accept that more than half of the known slides are missing."
    )


def external_assets(partitions: Partitions) -> list[dg.AssetSpec]:
    """Return the declarations of the user's files."""
    specs = [
        dg.AssetSpec(
            SLIDE_FILE,
            description="A whole-slide image. Its data version is its content identity.",
            group_name="slides",
            kinds={"file"},
            partitions_def=SLIDES,
        ),
        dg.AssetSpec(
            ENCODER_ENTRY,
            description="An encoder's entry in the cohort file, and the file that it imports.",
            group_name="encoders",
            kinds={"yaml"},
            partitions_def=partitions.encoders,
        ),
    ]
    if partitions.cohort.patch_tasks:
        specs.append(
            dg.AssetSpec(
                PATCH_TASK_SOURCE,
                description="The labelled patch images of a patch task.",
                group_name="encoders",
                kinds={"file"},
                partitions_def=partitions.task_sources,
            )
        )
    if partitions.cohort.targets:
        specs.append(
            dg.AssetSpec(
                TARGET_ENTRY,
                description="A target's entry in the cohort file, and its columns of the label "
                "table.",
                group_name="models",
                kinds={"table"},
                partitions_def=partitions.targets,
            )
        )
        specs += [
            dg.AssetSpec(
                REGISTERED_CHAMPION,
                description="The registered version that predicts a target: its champion, or the "
                "one that the target's entry names.",
                group_name="predictions",
                kinds={"mlflow"},
                partitions_def=partitions.targets,
            ),
            dg.AssetSpec(
                PREDICTION_INPUTS,
                deps=["prediction_plan"],
                description="The champion, and the grids of the slide's unit that it predicts.",
                group_name="predictions",
                partitions_def=partitions.predictions,
            ),
        ]
    if partitions.cohort.external:
        specs.append(
            dg.AssetSpec(
                EXTERNAL_COHORT,
                description="Slides and tables of another hospital, which only test the models.",
                group_name="predictions",
                kinds={"file", "table"},
                partitions_def=partitions.external,
            )
        )
    return specs


def report_versions(
    instance: dg.DagsterInstance, asset: dg.AssetKey, versions: Mapping[str, str]
) -> list[str]:
    """Record the data versions that changed, and return their partition keys."""
    known = known_versions(instance, asset, list(versions))
    changed = sorted(key for key, version in versions.items() if known.get(key) != version)
    for key in changed:
        tags = {DATA_VERSION_TAG: versions[key]}
        # The UI's staleness reads an external asset's observations, automation conditions read
        # its materializations. Provenance points at a materialization, so that must come later.
        for event in (dg.AssetObservation, dg.AssetMaterialization):
            instance.report_runless_asset_event(event(asset, partition=key, tags=tags))
    return changed


def add_slides(instance: dg.DagsterInstance, slides: Sequence[str]) -> list[str]:
    """Add a partition for every new slide, and return the new slides, sorted.

    They are added in sorted order by one call, because a run takes a range of neighbouring
    partitions.
    """
    known = set(instance.get_dynamic_partitions(str(SLIDES.name)))
    new = sorted(set(slides) - known)
    instance.add_dynamic_partitions(str(SLIDES.name), new)
    return new


def drop_slides(instance: dg.DagsterInstance, slides: Sequence[str]) -> list[str]:
    """Delete the partitions of slides that are not among ``slides``, and return those, sorted.

    Their records and products stay.
    """
    removed = sorted(set(instance.get_dynamic_partitions(str(SLIDES.name))) - set(slides))
    for slide in removed:
        instance.delete_dynamic_partition(str(SLIDES.name), slide)
    return removed


def known_versions(
    instance: dg.DagsterInstance, asset: dg.AssetKey, keys: Sequence[str]
) -> dict[str, str]:
    """Return the last recorded data version of each partition that has one."""
    tags = instance.event_log_storage.get_latest_tags_by_partition(
        asset, dg.DagsterEventType.ASSET_MATERIALIZATION, [DATA_VERSION_TAG], list(keys)
    )
    return {key: found[DATA_VERSION_TAG] for key, found in tags.items()}
