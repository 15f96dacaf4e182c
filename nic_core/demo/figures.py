"""Pictures of a demo cohort: example patches and thumbnails of slides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

from nic_core.demo.morphology import MORPHOLOGY_TASKS
from nic_core.demo.painted import paint_task
from nic_core.demo.patches import TASKS, DemoTask
from nic_core.demo.variety import PATCH, WIDE, Variety
from nic_core.libvips import pyvips


def contact_sheet(root: Path, *, columns: int = 12, seed: int = 0) -> Figure:
    """Show random patches of the demo cohort at ``root``, one row per class of every task."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, NDArray[np.uint8]]] = []
    for task in TASKS:
        folder = root / "patch_tasks"
        table = pl.read_parquet(folder / f"{task.name}.parquet", glob=False)
        for label in task.classes:
            paths = table.filter(pl.col("label") == label)["path"].to_list()
            chosen = rng.permutation(paths)[:columns]
            row = [pyvips.Image.new_from_file(str(folder / path)).numpy() for path in chosen]
            row += [np.full((PATCH, PATCH, 3), 255, np.uint8)] * (columns - len(row))
            rows.append((f"{task.name}\n{label}", np.hstack(row)))
    return _rows_of_patches(rows, columns)


def painted_sheet(
    tasks: Sequence[DemoTask] = MORPHOLOGY_TASKS,
    *,
    columns: int = 14,
    seed: int = 0,
    variety: Variety = WIDE,
) -> Figure:
    """Paint and show patch tasks, one row per class and one column per painted patient."""
    rows = []
    for task in tasks:
        classes = len(task.classes)
        painted = paint_task(
            task, patches=classes * columns, patients=columns, seed=seed, variety=variety
        )
        for c, label in enumerate(task.classes):
            row = np.hstack(list(painted.pixels[painted.labels == c]))
            rows.append((f"{task.name}\n{label}", row))
    return _rows_of_patches(rows, columns)


def _rows_of_patches(rows: Sequence[tuple[str, NDArray[np.uint8]]], columns: int) -> Figure:
    figure = Figure(figsize=(columns * 0.75 + 1.6, len(rows) * 0.78), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, picture) in zip(
        figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True
    ):
        axes.imshow(picture)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
    return figure


def slide_sheet(root: Path, slides: int, *, side: int = 640) -> NDArray[np.uint8]:
    """Return thumbnails of the first slides in one row, uint8 (side, side * slides, 3)."""
    paths = sorted((root / "slides").glob("*.tif"))[:slides]
    thumbnails = [pyvips.Image.thumbnail(str(path), side).numpy() for path in paths]
    return np.ascontiguousarray(np.hstack(thumbnails), np.uint8)


def save_pictures(root: Path, folder: Path) -> list[Path]:
    """Write pictures of the demo cohort at ``root`` into ``folder``, created if necessary.

    Returns
    -------
    list of Path
        ``demo-patches.png`` and ``demo-slides.png``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    patches, slides = folder / "demo-patches.png", folder / "demo-slides.png"
    contact_sheet(root).savefig(patches, dpi=110)
    imsave(slides, slide_sheet(root, 4))
    return [patches, slides]
