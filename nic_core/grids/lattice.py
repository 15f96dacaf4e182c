"""Put the embeddings of other software on a lattice: a grid.

The patches of a slide lie on a lattice if their distances along x and y are whole multiples of one
stride. Its level-0 px are taken from the file or, where the file does not state it, are the
distance that most neighbouring patches have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nic_core.cohort.geometry import Geometry
from nic_core.grids.features import Features, FeaturesError, StatedGrid, check_shapes, few
from nic_core.grids.store import GRID_FORMAT, Grid, GridProvenance
from nic_core.version import __version__

TOLERANCE = 0.02
"""Largest distance of a patch from its place on the lattice, in strides, but at least 1 px
[choice]: software rounds coordinates to whole px, and STAMP's differ by some px within a row."""

MPP_TOLERANCE = 0.2
"""Largest relative difference of the um/px of the patches from that of the encoder [choice].

Software that reads slides at a magnification takes 20x for 0.5 um/px, while scanners have 0.44
to 0.51 um/px at 20x. The grid records the um/px that the coordinates give.
"""

_BEYOND = 1024  # px beyond the slide's edge: STAMP reads squares of up to this side
_SLIDE_TOLERANCE = 0.01  # relative difference of the slide's um/px from that of the file


_Place = tuple[NDArray[np.intp], tuple[int, int], GridProvenance]
"""Column and row of each patch (N, 2), rows and columns of the grid, and its provenance."""


@dataclass(frozen=True)
class SlideFacts:
    """What a grid records of its slide: id, content identity, image, um/px and size at level 0."""

    slide: str
    identity: str
    image: int
    mpp: float
    width: int
    height: int


def features_grid(
    features: Features,
    slide: SlideFacts,
    geometry: Geometry,
    *,
    embedding_size: int,
    encoder: str,
    weights_hash: str,
) -> Grid:
    """Return the grid of a slide's features.

    Its cell (0, 0) is the first row and column with a patch; a grid that this project exported
    keeps its rows and columns. Embeddings are rounded to float16.

    Parameters
    ----------
    geometry : Geometry
        Patch, um/px and stride that the encoder's entry states.
    embedding_size : int
        Length of an embedding that the entry states.
    encoder, weights_hash : str
        Name of the encoder, and the hash of its features.

    Raises
    ------
    FeaturesError
        The file contradicts the entry or the slide, embeddings are not finite in float16, or
        patches are repeated, outside of the slide, or off the lattice.
    """
    check_shapes(features)
    embeddings = _half(features, embedding_size)
    _check_slide(features, slide)
    place = _found_place if features.grid is None else _stated_place
    cells, (rows, columns), provenance = place(features, slide, geometry, encoder, weights_hash)
    _check_distinct(features, cells)
    grid = np.zeros((embedding_size, rows, columns), np.float16)
    valid = np.zeros((rows, columns), bool)
    grid[:, cells[:, 1], cells[:, 0]] = embeddings.T
    valid[cells[:, 1], cells[:, 0]] = True
    return Grid(grid, valid, provenance)


def _found_place(
    features: Features, slide: SlideFacts, geometry: Geometry, encoder: str, weights_hash: str
) -> _Place:
    """Find the lattice of the patches; the grid begins at their first row and column."""
    stride, patch = _stride_and_patch(features, slide, geometry)
    mpp = stride * slide.mpp / geometry.stride
    _check_mpp(features, mpp, geometry)
    corners = _cell_corners(features, slide, stride, patch)
    phase = np.array([_phase(along, stride) for along in corners.T])
    cells = _on_lattice(features, corners, stride, phase)
    first = cells.min(axis=0)
    columns, rows = (int(last) + 1 for last in (cells - first).max(axis=0))
    x, y = (float(along) for along in phase + first * stride)
    provenance = GridProvenance(
        format=GRID_FORMAT,
        slide=slide.slide,
        slide_identity=slide.identity,
        slide_mpp=slide.mpp,
        slide_image=slide.image,
        encoder=encoder,
        weights_hash=weights_hash,
        mpp=mpp,
        patch=geometry.patch,
        stride=geometry.stride,
        origin=(x, y),
        unreadable=0,
        precision=None,
        reading=None,
        colours=None,
        icc_profile=None,
        software=f"nic {__version__}, from features ({features.format})",
    )
    return cells - first, (rows, columns), provenance


def _stated_place(
    features: Features, slide: SlideFacts, geometry: Geometry, encoder: str, weights_hash: str
) -> _Place:
    """Put the patches into the rows and columns of the grid that the file was exported from."""
    stated = features.grid
    assert stated is not None
    _check_stated(features, stated, slide, geometry)
    about = stated.provenance
    patch = about.patch * about.mpp / about.slide_mpp
    corners = _cell_corners(features, slide, about.cell, patch)
    cells = _on_lattice(features, corners, about.cell, np.array(about.origin))
    outside = np.flatnonzero(((cells < 0) | (cells >= (stated.columns, stated.rows))).any(axis=1))
    if len(outside):
        raise FeaturesError(
            f"{features.path}: {few(outside)} outside of the exported grid of {stated.rows} rows "
            f"and {stated.columns} columns; export the grid again"
        )
    own = {
        "slide": slide.slide,
        "slide_identity": slide.identity,
        "slide_image": slide.image,
        "encoder": encoder,
        "weights_hash": weights_hash,
    }
    return cells, (stated.rows, stated.columns), about.model_copy(update=own)


def _cell_corners(
    features: Features, slide: SlideFacts, stride: float, patch: float
) -> NDArray[np.float64]:
    """Top-left corners of the cells, each the central square of its patch, level-0 px (N, 2)."""
    corners = features.points + (-stride / 2 if features.centred else (patch - stride) / 2)
    _check_inside(features, corners, stride, slide)
    return corners


def _half(features: Features, embedding_size: int) -> NDArray[np.float16]:
    found = features.embeddings.shape[1]
    if found != embedding_size:
        raise FeaturesError(
            f"{features.path}: embeddings have {found} numbers, but the encoder's entry states "
            f"'embedding_size: {embedding_size}'; correct one of them"
        )
    with np.errstate(over="ignore"):
        half = features.embeddings.astype(np.float16)
    bad = np.flatnonzero(~np.isfinite(half).all(axis=1))
    if len(bad):
        raise FeaturesError(
            f"{features.path}: {len(bad)} of {len(half)} embeddings are not finite in float16 "
            f"({few(bad)}), whose largest number is 65504; scale the embeddings or leave the rows "
            "out"
        )
    return half


def _check_slide(features: Features, slide: SlideFacts) -> None:
    stated = features.slide_mpp if features.grid is None else features.grid.provenance.slide_mpp
    if stated is not None and abs(stated / slide.mpp - 1) > _SLIDE_TOLERANCE:
        raise FeaturesError(
            f"{features.path}: was made of a slide with {stated:g} um/px at level 0, but slide "
            f"'{slide.slide}' has {slide.mpp:g}; correct 'mpp' of the slide, or name the right file"
        )
    if features.slide_size not in (None, (slide.width, slide.height)):
        raise FeaturesError(
            f"{features.path}: was made of a slide of {features.slide_size} px at level 0, but "
            f"slide '{slide.slide}' has ({slide.width}, {slide.height}); name the right file"
        )


def _check_stated(
    features: Features, stated: StatedGrid, slide: SlideFacts, geometry: Geometry
) -> None:
    found = stated.provenance
    if (found.patch, found.stride) != (geometry.patch, geometry.stride):
        raise FeaturesError(
            f"{features.path}: has patches of {found.patch} px and a stride of {found.stride} px, "
            f"but the encoder's entry states {geometry.patch} and {geometry.stride}; correct "
            "'patch' and 'stride' of the entry"
        )
    if found.slide != slide.slide and features.path.stem != slide.slide:
        raise FeaturesError(
            f"{features.path}: is the grid of slide '{found.slide}', not of '{slide.slide}'; name "
            "the right file"
        )
    _check_mpp(features, found.mpp, geometry)


def _stride_and_patch(
    features: Features, slide: SlideFacts, geometry: Geometry
) -> tuple[float, float]:
    """Return stride and side of the patches, level-0 px, after comparing them with the entry."""
    if features.patch not in (None, geometry.patch):
        raise FeaturesError(
            f"{features.path}: has patches of {features.patch} px, but the encoder's entry states "
            f"'patch: {geometry.patch}'; correct one of them"
        )
    ratio = geometry.stride / geometry.patch
    patch = features.patch_level0
    if patch is not None and patch <= 0:
        raise FeaturesError(
            f"{features.path}: states a patch of {patch:g} px; write the file again"
        )
    expected = geometry.cell_um / slide.mpp if patch is None else ratio * patch
    stride = features.stride_level0
    if stride is None:
        stride = _most_common_distance(features.points, expected)
    # px of the patch, as the entry counts
    found = stride / expected * geometry.stride
    limit = MPP_TOLERANCE * geometry.stride if patch is None else 1.0
    if abs(found - geometry.stride) > limit:
        raise FeaturesError(
            f"{features.path}: patches have a distance of {stride:g} level-0 px, a stride of "
            f"{found:.0f} px, but the encoder's entry states 'stride: {geometry.stride}' (default: "
            "the patch); correct the entry"
        )
    return stride, stride / ratio if patch is None else patch


def _most_common_distance(points: NDArray[np.float64], expected: float) -> float:
    """Return the distance that most patches have to the next one in their row or column.

    A multiple of ``expected`` counts as several strides. Whole numbers are averaged, since
    software rounds coordinates. ``expected`` if no patches have the same x or y.
    """
    distances = np.concatenate([_neighbours(points), _neighbours(points[:, ::-1])])
    if not len(distances):
        return expected
    values, counts = np.unique(np.round(distances), return_counts=True)
    common = float(values[counts.argmax()])
    common /= max(1.0, np.round(common / expected))
    steps = np.round(distances / common)
    near = (steps > 0) & (np.abs(distances - steps * common) <= np.maximum(steps, 1))
    return float(distances[near].sum() / steps[near].sum()) if near.any() else common


def _neighbours(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances along x of patches with the same y, to the next one."""
    x, y = points[np.lexsort((points[:, 0], np.round(points[:, 1])))].T
    distances: NDArray[np.float64] = np.diff(x)[np.diff(np.round(y)) == 0]
    return distances[distances > 0.5]


def _check_mpp(features: Features, found: float, geometry: Geometry) -> None:
    if abs(found / geometry.mpp - 1) > MPP_TOLERANCE:
        raise FeaturesError(
            f"{features.path}: by its coordinates and the um/px of the slide, patches have "
            f"{found:.3g} um/px, but the encoder's entry states {geometry.mpp:g}; correct 'mpp' of "
            "the entry or of the slide"
        )


def _check_inside(
    features: Features, corners: NDArray[np.float64], stride: float, slide: SlideFacts
) -> None:
    centres, beyond = corners + stride / 2, stride + _BEYOND
    inside = (centres >= -beyond) & (centres <= (slide.width + beyond, slide.height + beyond))
    outside = ~inside.all(axis=1)  # also where a coordinate is not a number
    if outside.any():
        raise FeaturesError(
            f"{features.path}: {int(outside.sum())} of {len(corners)} patches "
            f"({few(np.flatnonzero(outside))}) are outside of slide '{slide.slide}' of "
            f"{slide.width} x {slide.height} px; coordinates must be level-0 px of this slide"
        )


def _on_lattice(
    features: Features,
    corners: NDArray[np.float64],
    stride: float,
    origin: NDArray[np.float64],
) -> NDArray[np.intp]:
    """Return the column and row of each patch (N, 2), counted from the corner ``origin``."""
    cells = np.round((corners - origin) / stride)
    distance = np.abs(corners - origin - cells * stride)
    off = np.flatnonzero((distance > _tolerance(stride)).any(axis=1))
    if len(off):
        x, y = features.points[off[0]]
        raise FeaturesError(
            f"{features.path}: {len(off)} of {len(corners)} patches are off the lattice of "
            f"{stride:g} level-0 px ({few(off)}; the first at x {x:g}, y {y:g}); make the "
            "features on one lattice for the whole slide, or leave the rows out"
        )
    return cells.astype(np.intp)


def _tolerance(stride: float) -> float:
    return max(1.0, TOLERANCE * stride)


def _phase(along: NDArray[np.float64], stride: float) -> float:
    """Return the remainder by ``stride`` that most coordinates have, within the tolerance."""
    phases = np.sort(along % stride)
    twice = np.concatenate([phases, phases + stride])
    ends = np.searchsorted(twice, phases + _tolerance(stride), side="right")
    first = int((ends - np.arange(len(phases))).argmax())
    # the median is exact where coordinates are whole multiples
    return float(np.median(twice[first : ends[first]]))


def _check_distinct(features: Features, cells: NDArray[np.intp]) -> None:
    _, inverse, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[inverse.ravel()] > 1)
    if len(repeated):
        x, y = features.points[repeated[0]]
        raise FeaturesError(
            f"{features.path}: {len(repeated)} patches are repeated ({few(repeated)}; the first at "
            f"x {x:g}, y {y:g}); keep one row for each place"
        )
