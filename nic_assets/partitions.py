"""Partitions: one for each slide, patch task, encoder, target and map, and for some pairs.

Slides are added and removed while the definitions are loaded, so their partitions are dynamic. The
others are named in the cohort file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import dagster as dg

from nic_core.cohort import Cohort, RegisteredEncoder
from nic_core.steps import patch_task_keys
from nic_core.store import PatchTaskKey

SLIDES = dg.DynamicPartitionsDefinition(name="slides")


def _static(items: Iterable[str]) -> dg.StaticPartitionsDefinition:
    return dg.StaticPartitionsDefinition(list(items))


@dataclass(frozen=True)
class Partitions:
    """The partitions definitions of a cohort.

    The keys of pairs are those of :mod:`nic_core.store.keys`: ``geometry|slide``,
    ``geometry|task``, ``encoder|slide``, ``encoder|target``, ``champion|slide``, ``cohort|target``
    and ``map|slide``.
    """

    cohort: Cohort
    slides = SLIDES

    @cached_property
    def patch_tables(self) -> dg.MultiPartitionsDefinition:
        geometries = _static(self.cohort.geometries)
        return dg.MultiPartitionsDefinition({"geometry": geometries, "slide": self.slides})

    @cached_property
    def task_sources(self) -> dg.StaticPartitionsDefinition:
        return _static(task.name for task in self.cohort.patch_tasks)

    @cached_property
    def patch_tasks(self) -> dg.StaticPartitionsDefinition:
        """Each patch task in every geometry that an encoder sees it at.

        Not a product of two dimensions, since tasks with ``train_mpp`` have their own geometries.
        """
        return _static(map(str, self._tasks_by_encoder))

    @cached_property
    def encoders(self) -> dg.StaticPartitionsDefinition:
        return _static(encoder.name for encoder in self.cohort.encoders)

    @cached_property
    def networks(self) -> dg.StaticPartitionsDefinition:
        """The encoders that have a network: probes apply it to patches."""
        return _static(encoder.name for encoder in self.cohort.networks)

    @cached_property
    def own_encoders(self) -> dg.StaticPartitionsDefinition:
        """The encoders that the study registers: not those from a registry, nor features."""
        return _static(
            encoder.name
            for encoder in self.cohort.networks
            if not isinstance(encoder, RegisteredEncoder)
        )

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
    def external(self) -> dg.StaticPartitionsDefinition:
        return _static(entry.name for entry in self.cohort.external)

    @cached_property
    def external_evaluations(self) -> dg.MultiPartitionsDefinition:
        return dg.MultiPartitionsDefinition({"cohort": self.external, "target": self.targets})

    @cached_property
    def predictions(self) -> dg.MultiPartitionsDefinition:
        return dg.MultiPartitionsDefinition({"champion": self.targets, "slide": self.slides})

    @cached_property
    def slide_maps(self) -> dg.MultiPartitionsDefinition:
        return dg.MultiPartitionsDefinition({"map": self.maps, "slide": self.slides})

    @cached_property
    def _tasks_by_encoder(self) -> dict[PatchTaskKey, list[str]]:
        """Each patch task, in the geometries that it is seen at, with the encoders that see it."""
        found: dict[PatchTaskKey, list[str]] = {}
        for encoder in self.cohort.networks:
            for key in patch_task_keys(self.cohort, encoder.name).values():
                found.setdefault(key, []).append(encoder.name)
        return found

    @cached_property
    def patch_tasks_of_sources(self) -> dg.StaticPartitionMapping:
        """Mapping of the images of each patch task to the patch task in each geometry."""
        sources: dict[str, list[str]] = {task.name: [] for task in self.cohort.patch_tasks}
        for key in self._tasks_by_encoder:
            sources[key.task].append(str(key))
        return dg.StaticPartitionMapping(sources)

    @cached_property
    def patch_tasks_of_encoders(self) -> dg.StaticPartitionMapping:
        """Mapping of each patch task to the encoders that train on it."""
        return dg.StaticPartitionMapping(
            {
                str(key): [name for name in names if key.task in self.cohort.encoder(name).tasks]
                for key, names in self._tasks_by_encoder.items()
            }
        )

    @cached_property
    def patch_tasks_of_probes(self) -> dg.StaticPartitionMapping:
        """Mapping of each patch task to the encoders that are probed on it."""
        return dg.StaticPartitionMapping(
            {str(key): names for key, names in self._tasks_by_encoder.items()}
        )

    @cached_property
    def patch_tables_of_grids(self) -> dg.MultiPartitionMapping:
        """Mapping of each patch table (geometry, slide) to the grids (encoder, slide) made of it.

        The grids of embeddings that other software computed are made of none.
        """
        encoders: dict[str, list[str]] = {name: [] for name in self.cohort.geometries}
        for encoder in self.cohort.networks:
            encoders[self.cohort.geometry(encoder.name).name].append(encoder.name)
        return dg.MultiPartitionMapping(
            {
                "slide": dg.DimensionPartitionMapping("slide", dg.IdentityPartitionMapping()),
                "geometry": dg.DimensionPartitionMapping(
                    "encoder", dg.StaticPartitionMapping(encoders)
                ),
            }
        )

    @cached_property
    def networks_of_encoders(self) -> dg.StaticPartitionMapping:
        """Mapping of each encoder that has a network to itself."""
        return dg.StaticPartitionMapping(
            {name: name for name in self.networks.get_partition_keys()}
        )

    @cached_property
    def own_of_encoders(self) -> dg.StaticPartitionMapping:
        """Mapping of each encoder that the study registers to itself."""
        return dg.StaticPartitionMapping(
            {name: name for name in self.own_encoders.get_partition_keys()}
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
