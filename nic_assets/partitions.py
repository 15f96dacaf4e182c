"""The partitions: one a slide, patch task, encoder, target and map, and their products.

Slides come and go, so theirs is dynamic. The rest is named in the cohort file and known when
the definitions load.
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
    """Every partitions definition of a cohort.

    A key of two dimensions joins them with ``|`` in the alphabetical order of their names:
    ``encoder|slide``, ``encoder|target``, ``map|slide``.
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
        """Patch task -> the encoders that train on it."""
        return dg.StaticPartitionMapping(
            {
                task.name: [e.name for e in self.cohort.encoders if task.name in e.tasks]
                for task in self.cohort.patch_tasks
            }
        )

    @cached_property
    def grids_of_maps(self) -> dg.MultiPartitionMapping:
        """Grid (encoder, slide) -> the maps (map, slide) that are read from it."""
        readers = {
            encoder.name: [item.name for item in self.cohort.maps if item.encoder == encoder.name]
            for encoder in self.cohort.encoders
        }
        return dg.MultiPartitionMapping(
            {
                "slide": dg.DimensionPartitionMapping("slide", dg.IdentityPartitionMapping()),
                "encoder": dg.DimensionPartitionMapping("map", dg.StaticPartitionMapping(readers)),
            }
        )
