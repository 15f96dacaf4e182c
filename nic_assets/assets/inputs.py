"""The files that come from outside, as external assets with data versions.

Slides, patch-task sources, encoder entries and label tables are the user's. Whoever looks
(the ``slide_index`` asset, which a sensor asks for) reports a new version only for what changed, so
everything downstream of it, and nothing else, becomes stale.
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


class ScanConfig(dg.Config):
    """How ``slide_index`` looks; the defaults are those of a person who asks for it."""

    ignore_paths: list[str] = Field(default=[], description="paths that are still being written")
    rehash: bool = Field(
        default=True, description="read every slide's identity, not only where size or time differ"
    )
    allow_missing_slides: bool = Field(
        default=False, description="more than half of the slides may be gone since the last look"
    )


def external_assets(partitions: Partitions) -> list[dg.AssetSpec]:
    """Declare what the user provides."""
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
                description="Labelled patch images as the user keeps them.",
                group_name="encoders",
                kinds={"file"},
                partitions_def=partitions.patch_tasks,
            )
        )
    if partitions.cohort.targets:
        specs.append(
            dg.AssetSpec(
                TARGET_ENTRY,
                description="A target's entry in the cohort file, with its columns of the labels.",
                group_name="models",
                kinds={"table"},
                partitions_def=partitions.targets,
            )
        )
    return specs


def report_versions(
    instance: dg.DagsterInstance, asset: dg.AssetKey, versions: Mapping[str, str]
) -> list[str]:
    """Record the versions that differ from the last recorded; returns their partition keys."""
    known = known_versions(instance, asset, list(versions))
    changed = sorted(key for key, version in versions.items() if known.get(key) != version)
    for key in changed:
        tags = {DATA_VERSION_TAG: versions[key]}
        # The UI's staleness reads an external asset's observations, automation conditions read
        # its materializations. Provenance points at the latter, so they must be the later ones.
        for event in (dg.AssetObservation, dg.AssetMaterialization):
            instance.report_runless_asset_event(event(asset, partition=key, tags=tags))
    return changed


def add_slides(instance: dg.DagsterInstance, slides: Sequence[str]) -> list[str]:
    """Make a partition of every new slide, in sorted order; returns the new ones.

    Sorted in one call: a range of neighbouring partitions is what one run can take.
    """
    known = set(instance.get_dynamic_partitions(str(SLIDES.name)))
    new = sorted(set(slides) - known)
    instance.add_dynamic_partitions(str(SLIDES.name), new)
    return new


def drop_slides(instance: dg.DagsterInstance, slides: Sequence[str]) -> list[str]:
    """Forget the partitions of slides that are no longer in the cohort; returns them.

    Their recorded history and their products stay.
    """
    gone = sorted(set(instance.get_dynamic_partitions(str(SLIDES.name))) - set(slides))
    for slide in gone:
        instance.delete_dynamic_partition(str(SLIDES.name), slide)
    return gone


def known_versions(
    instance: dg.DagsterInstance, asset: dg.AssetKey, keys: Sequence[str]
) -> dict[str, str]:
    """The versions that were last recorded, of those partitions that have one."""
    tags = instance.event_log_storage.get_latest_tags_by_partition(
        asset, dg.DagsterEventType.ASSET_MATERIALIZATION, [DATA_VERSION_TAG], list(keys)
    )
    return {key: found[DATA_VERSION_TAG] for key, found in tags.items()}
