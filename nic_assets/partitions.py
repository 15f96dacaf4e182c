"""Partitions: one for each slide, patch task, encoder, target and map, and for some pairs.

Slides are added and removed while the definitions are loaded, so their partitions are dynamic. The
others are named in the cohort file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import dagster as dg

from nic_core.cohort import Cohort

SLIDES = dg.DynamicPartitionsDefinition(name="slides")


def _static(items: Iterable[str]) -> dg.StaticPartitionsDefinition:
    return dg.StaticPartitionsDefinition(list(items))


@dataclass(frozen=True)
class Partitions:
    """The partitions definitions of a cohort.

    The keys of pairs are those of :mod:`nic_core.store.keys`: ``encoder|slide``,
    ``encoder|target`` and ``map|slide``.
    """

    cohort: Cohort
    slides = SLIDES

    @cached_property
    def patch_tasks(self) -> dg.StaticPartitionsDefinition:
        return _static(task.name for task in self.cohort.patch_tasks)

    @cached_property
    def encoders(self) -> dg.StaticPartitionsDefinition:
        return _static(encoder.name for encoder in self.cohort.encoders)

    @cached_property
    def targets(self) -> dg.StaticPartitionsDefinition:
        return _static(target.name for target in self.cohort.targets)

    @cached_property
    def maps(self) -> dg.StaticPartitionsDefinition:
        return _static(item.name for item in self.cohort.maps)

    @cached_property
    def grids(self) -> dg.MultiPartitionsDefinition:
        return dg.MultiPartitionsDefinition({"encoder": self.encoders, "slide": self.slides})

    @cached_property
    def models(self) -> dg.MultiPartitionsDefinition:
        return dg.MultiPartitionsDefinition({"encoder": self.encoders, "target": self.targets})

    @cached_property
    def slide_maps(self) -> dg.MultiPartitionsDefinition:
        return dg.MultiPartitionsDefinition({"map": self.maps, "slide": self.slides})

    @cached_property
    def tasks_of_encoders(self) -> dg.StaticPartitionMapping:
        """Mapping of each patch task to the encoders that train on it."""
        return dg.StaticPartitionMapping(
            {
                task.name: [e.name for e in self.cohort.encoders if task.name in e.tasks]
                for task in self.cohort.patch_tasks
            }
        )

    @cached_property
    def grids_of_maps(self) -> dg.MultiPartitionMapping:
        """Mapping of each grid (encoder, slide) to its probability maps (map, slide)."""
        maps = {
            encoder.name: [item.name for item in self.cohort.maps if item.encoder == encoder.name]
            for encoder in self.cohort.encoders
        }
        return dg.MultiPartitionMapping(
            {
                "slide": dg.DimensionPartitionMapping("slide", dg.IdentityPartitionMapping()),
                "encoder": dg.DimensionPartitionMapping("map", dg.StaticPartitionMapping(maps)),
            }
        )
