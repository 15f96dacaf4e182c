"""Measure tissue detection on painted sections with known tissue, and draw a contact sheet.

python benchmarks/tissue.py --out docs/pictures/tissue.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from nic_core.demo.artefacts import Mask, Section, sections
from nic_core.tiling.tissue import TISSUE_MPP, draw_outline, find_tissue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="contact sheet")
    options = parser.parse_args()
    detected = [(section, find_tissue(section.pixels, TISSUE_MPP)) for section in sections()]
    report = Table("section", "tissue", "detected", "IoU", "fat detected")
    for section, mask in detected:
        either = (mask | section.tissue).sum()
        report.add_row(
            section.name,
            f"{section.tissue.mean():.1%}",
            f"{mask.mean():.1%}",
            f"{(mask & section.tissue).sum() / either:.2f}" if either else "",
            f"{mask[section.fat].mean():.0%}" if section.fat.any() else "",
        )
    Console().print(report)
    sheet(detected).savefig(options.out, dpi=100, pil_kwargs={"quality": 80})


def sheet(detected: list[tuple[Section, Mask]], *, columns: int = 6) -> Figure:
    """Draw the sections with the outlines of the detected tissue."""
    rows = -(-len(detected) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes in figure.subplots(rows, columns).flat:
        axes.set_axis_off()
    for axes, (section, mask) in zip(figure.axes, detected, strict=False):
        # a margin, so that a section full of tissue has an outline; enlarged, so that it is thin
        pixels = np.pad(section.pixels, ((3, 3), (3, 3), (0, 0)), constant_values=255)
        axes.imshow(draw_outline(_larger(pixels), _larger(np.pad(mask, 3)), thick=2))
        axes.set_title(section.name, fontsize=9)
    return figure


def _larger(array: NDArray[Any]) -> NDArray[Any]:
    return array.repeat(3, axis=0).repeat(3, axis=1)


if __name__ == "__main__":
    main()
