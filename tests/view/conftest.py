"""A study to look at: the tiny cohort with heatmaps, a map, predictions, and slides that fail."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nic_core.view.study import ViewedStudy


@pytest.fixture(scope="session")
def viewed_study(mean_rgb_study, tmp_path_factory: pytest.TempPathFactory) -> ViewedStudy:
    """The mean-RGB study with the explanation of growth and a map; tests must not change it."""
    import numpy as np
    import polars as pl

    from nic_core import steps
    from nic_core.grids import open_grid
    from nic_core.maps import MAP_SCHEMA
    from nic_core.steps.probability_maps import CELLS
    from nic_core.store import GridKey, MapKey, ModelKey, Store
    from nic_core.view.study import open_study

    cohort, made = mean_rgb_study
    store = Store(tmp_path_factory.mktemp("viewed") / "store with spaces")
    shutil.copytree(made.root, store.root)
    steps.make_explanation(cohort, store, ModelKey(encoder="mean-rgb", target="growth"))
    # the encoder of the map is not trained here: the map's values are those of a formula
    [item] = cohort.maps
    for slide in steps.read_slide_index(store)["slide"]:
        grid = store.grid(GridKey(encoder="mean-rgb", slide=slide))
        shutil.copytree(grid, store.grid(GridKey(encoder=item.encoder, slide=slide)))
        rows, columns = np.nonzero(open_grid(grid).valid)
        cells = pl.DataFrame(
            {
                "slide": slide,
                "row": rows,
                "column": columns,
                "probability": (rows + columns) / (rows + columns).max(),
                "truth": None,
            },
            schema=MAP_SCHEMA,
        )
        folder = store.probability_map(MapKey(map=item.name, slide=slide))
        folder.mkdir(parents=True)
        cells.write_parquet(folder / CELLS)
    return open_study(cohort, store)


def plain_study(folder: Path, slides: dict[str, Path], more: str = "") -> ViewedStudy:
    """A study of slide files with one encoder and no product but the slide index."""
    from nic_core import steps
    from nic_core.cohort import load_cohort
    from nic_core.store import Store
    from nic_core.view.study import open_study

    rows = [f"{name},{path},{name}" for name, path in slides.items()]
    (folder / "slides.csv").write_text("\n".join(["slide,path,patient", *rows]) + "\n")
    (folder / "cohort.yaml").write_text(
        "name: plain\nslides: {table: slides.csv}\n"
        "encoders: [{name: mean-rgb, objective: mean_rgb}]\n" + more
    )
    cohort, store = load_cohort(folder / "cohort.yaml"), Store(folder / "store")
    steps.make_slide_index(cohort, store)
    return open_study(cohort, store)
