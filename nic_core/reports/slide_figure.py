"""Figures of a compressed slide: the slide, its grids as colours, its probability maps."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from nic_core.grids import Grid, draw_grid
from nic_core.pictures import WIDTH, new_figure
from nic_core.slides import Slide, SlideError, content_identity
from nic_core.tiling.tissue import TissueMask, tissue_outline
from nic_core.types import Pixels


def compressed_slide(
    slide: Slide, mask: TissueMask, grids: Mapping[str, Grid], maps: Mapping[str, Pixels]
) -> Figure:
    """Draw a slide with its tissue outline, its grids and its probability maps, two in a row.

    A grid shows the first three principal components of its embeddings as colours; its title says
    how many times fewer numbers it has than the slide.

    Parameters
    ----------
    mask
        Tissue mask of the slide.
    grids
        Encoder to grid.
    maps
        Title to picture, uint8 or float (H, W, 3 or 4).
    """
    panels: list[tuple[str, Pixels]] = [
        (
            f"{slide.width} x {slide.height} px at {slide.mpp:.3g} um/px; the line is the tissue's "
            "outline",
            tissue_outline(slide, mask, side=900),
        )
    ]
    for name, grid in grids.items():
        channels, rows, columns = grid.shape
        # compared with the RGB pixels of the slide at the encoder's resolution
        fewer = 3 * grid.provenance.stride**2 / channels
        about = grid.provenance
        title = (
            f"{name}: {rows} x {columns} x {channels}, {fewer:,.0f} times fewer numbers; "
            f"patch {about.patch} px at {about.mpp:g} um/px, stride {about.stride} px"
        )
        panels.append((title, draw_grid(grid, cell=16)))
    panels += list(maps.items())
    rows = -(-len(panels) // 2)
    figure = new_figure(WIDTH, 5 * rows + 0.3)
    places = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes in places:
        axes.set_axis_off()
    for axes, (title, picture) in zip(places, panels, strict=False):
        axes.imshow(picture)
        axes.set_title(fill(title, 56), fontsize=9)
    if grids:
        figure.suptitle(
            "colours of grids: the first three principal components of the embeddings; equal "
            "colours are similar patches",
            fontsize=9,
        )
    return figure


def slide_and_grid(slide: Slide, grid: Grid, *, cell: int) -> Pixels:
    """Draw a slide and its grid's principal components side by side.

    Parameters
    ----------
    cell
        Width of a grid cell in the picture, px.

    Returns
    -------
    uint8 (rows * cell, 2 * columns * cell + 16, 3)

    Raises
    ------
    SlideError
        The grid belongs to another slide.
    """
    about = grid.provenance
    if content_identity(slide.path) != about.slide_identity:
        raise SlideError(
            slide.path, f"is not the slide '{about.slide}' of the grid", "give that slide"
        )
    _, rows, columns = grid.shape
    left = slide.read(*about.origin, columns * cell, rows * cell, about.cell_um / cell)
    gap = np.full((rows * cell, 16, 3), 255, np.uint8)
    return np.concatenate([left, gap, draw_grid(grid, cell=cell)], axis=1)
