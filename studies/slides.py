"""The slides of a cohort, to cross-validate slide models on the grids of any encoder."""

from __future__ import annotations

from pathlib import Path

from nic_core.cohort import Cohort, ModelSettings, Target
from nic_core.compression import compress_slide
from nic_core.encoders.inference import PreparedEncoder
from nic_core.grids import Grid
from nic_core.models.cross_validation import CrossValidation, cross_validate
from nic_core.models.folds import FOLD_COLUMNS
from nic_core.models.networks import crop_cells
from nic_core.slides import open_slide
from nic_core.steps import (
    make_patch_table,
    make_slide,
    make_slide_index,
    make_target_folds,
    read_slide_index,
)
from nic_core.store import PatchTableKey, Store
from nic_core.tiling.patches import read_patch_table


class Slides:
    """Slide index, patch tables and folds of a cohort, kept in a store."""

    def __init__(self, cohort: Cohort, store: Store) -> None:
        self.cohort, self.store = cohort, store
        make_slide_index(cohort, store)
        self.index = read_slide_index(store)
        for slide in self.index["slide"]:
            if not store.patch_table(self._key(slide)).exists():
                make_slide(store, slide)
                make_patch_table(cohort, store, self._key(slide))
        self.folds = {
            target.name: make_target_folds(cohort, store, target.name).table
            for target in cohort.targets
        }

    def compress(self, encoder: PreparedEncoder) -> dict[str, Grid]:
        """Return the grid of every slide, in memory."""
        grids = {}
        for row in self.index.iter_rows(named=True):
            name: str = row["slide"]
            with open_slide(Path(row["path"]), mpp=row["mpp"], image=row["image"]) as slide:
                cells = read_patch_table(self.store.patch_table(self._key(name)))
                grids[name] = compress_slide(
                    slide, cells, encoder, slide_id=name, slide_identity=""
                )
        return grids

    def cross_validate(
        self, target: Target, grids: dict[str, Grid], settings: ModelSettings
    ) -> CrossValidation:
        """Cross-validate a target in the cohort's folds."""
        table = self.folds[target.name]
        folds = table.filter(split="cv").select("patient", "fold", "fold_name").unique()
        cell_um = next(iter(grids.values())).provenance.cell_um
        return cross_validate(
            target,
            table.drop(FOLD_COLUMNS),
            folds.sort("patient"),
            grids.__getitem__,
            settings,
            crop=crop_cells(settings, cell_um),
        )

    def _key(self, slide: str) -> PatchTableKey:
        (geometry,) = self.cohort.geometries
        return PatchTableKey(geometry=geometry, slide=slide)
