"""The planted causes of the targets of the demo cohort, cell by cell.

The targets are described in docs/explanation/demo-cohort.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nic_core.demo.layout import CAPSULE, GAP, TRUTH, UNITS
from nic_core.demo.tissues import Tissue

REACH = 1.15 * (CAPSULE + GAP)  # units from a nest; bands keep farther away, capsules do not
CLEAR = 0.43  # standard deviations; the outer thirds of a normal distribution [choice]

Cells = NDArray[np.bool_]


@dataclass(frozen=True)
class Cause:
    """Cells of a slide that cause the value of a target.

    Attributes
    ----------
    name : str
    sign : int
        1 if the cells raise the explained output, -1 if they lower it.
    cells, known : bool (rows, columns)
        The cells of the cause, and those that are scored: the cause's and cells that have no part
        in it. Cells of other causes and cells on the border are not scored.
    """

    name: str
    sign: int
    cells: Cells
    known: Cells


def planted_causes(
    target: str, truth: NDArray[np.uint8], shape: tuple[int, int], signal: float
) -> list[Cause]:
    """Return the causes of a target of the demo cohort in the cells of a slide's grid.

    ``proliferation``: the tumour, whose grade and mitoses make the score, if the absolute
    ``signal`` exceeds ``CLEAR``. ``growth`` (desmoplastic): a capsule of dense stroma
    around a nest speaks for it; a border of a nest without one and a band of dense stroma away from
    nests speak against it. ``survival``: both; growth without capsules has the higher risk.

    Parameters
    ----------
    target
        Name of the target.
    truth : uint8 (points, points)
        Truth image of a slide, a point for 64 x 64 px, values of
        :class:`~nic_core.demo.tissues.Tissue`.
    shape
        Rows and columns of the grid of cells of 128 px.
    signal
        ``signal`` of ``truth/causes.csv``: the score without noise, of mean 0 and deviation 1.
    """
    cell = truth.shape[0] / UNITS  # points of a unit of the layout
    nest = np.isin(truth, (Tissue.TUMOUR, Tissue.NECROSIS))
    distance = ndimage.distance_transform_edt(~nest) / cell
    zone = ~nest & (distance <= CAPSULE) & (truth != Tissue.BACKGROUND)
    dense = truth == Tissue.RIM
    near = distance <= REACH

    def of_cells(points: Cells) -> Cells:
        """Return the cells of which points cover at least half."""
        side = 128 // TRUTH
        rows, columns = shape
        padded = np.zeros((rows * side, columns * side))
        part = points[: rows * side, : columns * side]
        padded[: part.shape[0], : part.shape[1]] = part
        return np.asarray(padded.reshape(rows, side, columns, side).mean((1, 3)) >= 0.5)

    tumour, inside = of_cells(truth == Tissue.TUMOUR), of_cells(nest)
    border = inside & ~ndimage.binary_erosion(inside)
    capsule = of_cells(dense & near)
    bare = of_cells(zone & ~dense) & ~capsule
    band = of_cells(dense & ~near) & ~capsule & ~bare
    arrangement = (("capsule", 1, capsule), ("bare border", -1, bare), ("band", -1, band))
    causes = []
    if target in ("proliferation", "survival") and abs(signal) > CLEAR:
        known = np.ones(shape, bool) if target == "proliferation" else ~(capsule | bare | band)
        causes.append(Cause("tumour", int(np.sign(signal)), tumour, known))
    if target in ("growth", "survival"):
        others = border | (tumour if target == "survival" else False)
        for name, sign, cells in arrangement:
            known = cells | ~(capsule | bare | band | others)
            causes.append(Cause(name, sign if target == "growth" else -sign, cells, known))
    return [cause for cause in causes if cause.cells.any()]
