"""A compressed slide at a glance: what it looked like, and what each encoder made of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nic_core.grids import Grid, grid_preview
from nic_core.slides import Slide, SlideError, content_identity
from nic_core.tiling.tissue import TissueMask, tissue_outline
from nic_core.types import Pixels


def compressed_slide(
    slide: Slide, mask: TissueMask, grids: Mapping[str, Grid], maps: Mapping[str, Pixels]
) -> Figure:
    """Panels side by side: the slide with its tissue, its grids by encoder, its maps by name.

    A grid shows the first three principal components of its embeddings as colours; the title counts
    the numbers that were kept of the slide's.
    """
    panels: list[tuple[str, Pixels]] = [
        (f"{slide.width} x {slide.height} px", tissue_outline(slide, mask, side=900))
    ]
    for name, grid in grids.items():
        channels, rows, columns = grid.shape
        # what the embeddings stand for is the slide at the encoder's resolution, three bytes a pixel
        fewer = 3 * grid.provenance.patch**2 / channels
        title = f"{name}: {rows} x {columns} x {channels}, {fewer:,.0f} times fewer numbers"
        panels.append((title, grid_preview(grid, cell=16)))
    panels += list(maps.items())
    figure = Figure(figsize=(4 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, picture) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        axes.imshow(picture)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    return figure


def slide_and_grid(slide: Slide, grid: Grid, *, cell: int) -> Pixels:
    """A slide and its grid's principal components side by side, each cell ``cell`` px wide.

    Returns
    -------
    uint8 (rows * cell, 2 * columns * cell + 16, 3)

    Raises
    ------
    SlideError
        The grid is that of another slide.
    """
    about = grid.provenance
    if content_identity(slide.path) != about.slide_identity:
        raise SlideError(
            slide.path, f"is not the slide '{about.slide}' of the grid", "give that one"
        )
    _, rows, columns = grid.shape
    scale = about.patch * about.mpp / cell
    left = slide.read(0, 0, columns * cell, rows * cell, scale)
    gap = np.full((rows * cell, 16, 3), 255, np.uint8)
    return np.concatenate([left, gap, grid_preview(grid, cell=cell)], axis=1)
