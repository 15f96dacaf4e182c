"""Material of composed slides: patches of real tissue, by kind and by fold.

The source is the GlaS collection: regions of colon tissue with masks of their glands, each benign
or malignant, of known patients. Square windows of it are benign glands, malignant glands, or stroma
(next to no gland, from regions of both labels).

Two rules keep the material from giving labels away. Whole patients are assigned to folds, and a
slide consists of windows of its own fold only: no model is tested on tissue that it was trained on.
And the mean colour of the windows of each kind in each region is made the same, by a factor of the
optical density of each channel, which leaves the glass white: what remains is morphology.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import ndimage, optimize

from nic_core.demo.tissues import Tissue
from nic_core.libvips import pyvips
from nic_core.types import Pixels

TASK = "glas_grade"
LABELS = ("benign", "malignant")
WINDOW = 128  # px, at the um/px of the regions
STRIDE = 4  # px between two places of windows
GLANDS = 0.35  # least share of gland in a window of glands
STROMA = 0.05  # largest share of gland in a window of stroma
WHITE = 215  # grey level above which all channels are empty glass or lumen
EMPTY = {Tissue.GLAND: 0.5, Tissue.TUMOUR: 0.5, Tissue.RIM: 0.15}  # largest share of white
MEAN_LIGHT = (198.0, 132.0, 196.0)  # R, G, B of every kind; about the mean of all regions

Kind = Tissue  # GLAND: benign glands, TUMOUR: malignant glands, RIM: stroma
KINDS = (Tissue.GLAND, Tissue.TUMOUR, Tissue.RIM)
MATERIAL_SCHEMA = pl.Schema(
    {
        "path": pl.String(),
        "mask": pl.String(),
        "patient": pl.String(),
        "label": pl.String(),
        "mpp": pl.Float64(),
    }
)


@dataclass(frozen=True)
class Source:
    """The windows of one kind in one region.

    Attributes
    ----------
    pixels
        uint8 (H, W, 3), with the colour of this kind's windows made equal to that of all others.
    corners
        int64 (n, 2): rows and columns of the upper left corners of the windows.
    """

    pixels: Pixels
    corners: NDArray[np.int64]


Pool = Mapping[Kind, tuple[Source, ...]]


def read_material(folder: Path) -> pl.DataFrame:
    """Find the regions and their masks in the manifest of a folder of real data.

    Parameters
    ----------
    folder
        Has ``MANIFEST.csv`` with the columns path, kind, task, label, group (the patient) and mpp.
        Regions have the task ``glas_grade`` and the label ``benign`` or ``malignant``; the mask of
        ``A/glas/B.jpg`` is ``A/glas_mask/B.png``, 255 where there is a gland.

    Returns
    -------
    polars.DataFrame
        :data:`MATERIAL_SCHEMA`, sorted by path; paths are relative to ``folder``.

    Raises
    ------
    FileNotFoundError
        There is no manifest.
    ValueError
        The manifest lacks a column, regions or masks, or a region lacks its patient, its um/px or a
        known label, or the regions differ in um/px.
    """
    manifest = folder / "MANIFEST.csv"
    if not manifest.is_file():
        raise FileNotFoundError(
            f"{manifest} does not exist; give the folder of the real data, which contains it"
        )
    table = pl.read_csv(manifest, infer_schema=False)
    columns = ("path", "kind", "task", "label", "group", "mpp")
    if missing := [name for name in columns if name not in table.columns]:
        raise ValueError(f"{manifest}: no column {', '.join(missing)}; correct the manifest")
    rows = table.filter(task=TASK)
    masks = set(rows.filter(kind="mask")["path"])
    regions = (
        rows.filter(pl.col("kind") != "mask")
        .select(
            "path",
            mask=pl.col("path").str.replace("/glas/", "/glas_mask/").str.replace(r"\.\w+$", ".png"),
            patient=pl.col("group"),
            label=pl.col("label"),
            mpp=pl.col("mpp").cast(pl.Float64, strict=False),
        )
        .sort("path")
    )
    if regions.is_empty():
        raise ValueError(
            f"{manifest}: no regions of task {TASK}; composed slides need GlaS regions"
        )
    for row in regions.iter_rows(named=True):
        problem = None
        if row["mask"] not in masks:
            problem = f"its mask {row['mask']} is not in the manifest"
        elif row["label"] not in LABELS:
            problem = f"its label {row['label']!r} is not one of {', '.join(LABELS)}"
        elif row["patient"] is None or row["mpp"] is None:
            problem = "it has no patient (column group) or no um/px (column mpp)"
        if problem is not None:
            raise ValueError(f"{manifest}: region {row['path']}: {problem}; correct the manifest")
    if regions["mpp"].n_unique() > 1:
        raise ValueError(
            f"{manifest}: regions of task {TASK} have {regions['mpp'].n_unique()} different um/px; "
            "resample them to one"
        )
    return regions.match_to_schema(MATERIAL_SCHEMA)


def material_folds(material: pl.DataFrame, folds: int) -> dict[str, int]:
    """Assign the patients of the material to folds, 0 to ``folds`` - 1.

    Patients with most regions come first. Each goes to a fold that lacks most of its labels, and
    among these to the one in which the numbers of regions of both labels stay most equal.

    Raises
    ------
    ValueError
        A fold would have no regions of a label.
    """
    counts = (
        material.group_by("patient")
        .agg((pl.col("label") == label).sum().alias(label) for label in LABELS)
        .sort(pl.sum_horizontal(LABELS), "patient", descending=[True, False])
    )
    totals = np.zeros((folds, len(LABELS)))
    found = {}
    for patient, *numbers in counts.iter_rows():
        known = ((totals > 0) | (np.array(numbers) == 0)).sum(1)
        unequal = ((totals + numbers) ** 2 - totals**2).sum(1)
        fold = int(np.lexsort((unequal, known))[0])
        totals[fold] += numbers
        found[patient] = fold
    if (totals == 0).any():
        patients = ", ".join(
            f"{material.filter(label=label)['patient'].n_unique()} {label}" for label in LABELS
        )
        raise ValueError(
            f"the patients of the material ({patients}) cannot be divided into {folds} folds with "
            "both labels; use more material or fewer folds"
        )
    return found


def read_pool(folder: Path, regions: pl.DataFrame) -> Pool:
    """Read regions and find their windows.

    Raises
    ------
    ValueError
        A mask has another size than its region, or there is no window of a kind.
    """
    found: dict[Kind, list[Source]] = {kind: [] for kind in KINDS}
    for row in regions.iter_rows(named=True):
        pixels, mask = (_read(folder / row[name]) for name in ("path", "mask"))
        if mask.shape[:2] != pixels.shape[:2]:
            raise ValueError(
                f"{folder / row['mask']}: {mask.shape[1]} x {mask.shape[0]} px, but its region has "
                f"{pixels.shape[1]} x {pixels.shape[0]}; give the mask of this region"
            )
        glands = Tissue.TUMOUR if row["label"] == "malignant" else Tissue.GLAND
        for kind in (glands, Tissue.RIM):
            source = find_windows(pixels, mask[..., 0] > 0, kind)
            if source is not None:
                found[kind].append(source)
    for kind, sources in found.items():
        if not sources:
            patients = ", ".join(regions["patient"].unique().sort())
            raise ValueError(
                f"{folder}: no window of {WINDOW} px of {kind.name.lower()} in the regions of "
                f"{patients}; use more material or fewer folds"
            )
    return {kind: tuple(sources) for kind, sources in found.items()}


def find_windows(pixels: Pixels, glands: NDArray[np.bool_], kind: Kind) -> Source | None:
    """Find the windows of a kind in a region; None if there are none.

    Parameters
    ----------
    pixels : uint8 (H, W, 3)
    glands : bool (H, W)
    kind
        GLAND or TUMOUR: windows of glands; RIM: windows of stroma.
    """
    if min(glands.shape) < WINDOW:
        return None
    gland = _window_means(glands)
    # single bright px are noise, not lumen
    white = _window_means(ndimage.uniform_filter(pixels.min(2), 5) > WHITE)
    wanted = gland <= STROMA if kind is Tissue.RIM else gland >= GLANDS
    corners = STRIDE * np.argwhere((wanted & (white <= EMPTY[kind]))[::STRIDE, ::STRIDE])
    if not len(corners):
        return None
    return Source(_equalised(pixels, corners), corners)


def density_table(factors: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the grey levels after multiplying optical densities by ``factors``, (256, channels).

    White, 255, stays white.
    """
    light = np.linspace(0, 1, 256)[:, None] ** factors
    return np.rint(255 * light).astype(np.uint8)


def recoloured(pixels: Pixels, table: NDArray[np.uint8]) -> Pixels:
    """Apply :func:`density_table`, uint8 (256, 3), to uint8 (..., 3)."""
    return np.stack([table[pixels[..., c], c] for c in range(3)], axis=-1)


def _equalised(pixels: Pixels, corners: NDArray[np.int64]) -> Pixels:
    """Give the windows at ``corners`` the mean colour :data:`MEAN_LIGHT`."""
    # how many windows contain a px: +1 and -1 at the corners of each, summed twice
    cover = np.zeros((pixels.shape[0] + 1, pixels.shape[1] + 1))
    for down, right, sign in ((0, 0, 1), (0, WINDOW, -1), (WINDOW, 0, -1), (WINDOW, WINDOW, 1)):
        np.add.at(cover, (corners[:, 0] + down, corners[:, 1] + right), sign)
    cover = cover.cumsum(0).cumsum(1)[:-1, :-1]
    levels = np.arange(256) / 255
    factors = np.empty(3)
    for c, wanted in enumerate(MEAN_LIGHT):
        counts = np.bincount(pixels[..., c].ravel(), cover.ravel(), minlength=256)
        share = counts / counts.sum()

        def excess(
            log_factor: float, share: NDArray[np.float64] = share, to: float = wanted
        ) -> float:
            return float(255 * share @ levels ** np.exp(log_factor) - to)

        factors[c] = np.exp(optimize.brentq(excess, -4, 4))
    return recoloured(pixels, density_table(factors))


def _window_means(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the mean of ``mask`` in the window of each upper left corner."""
    total = np.pad(mask.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    w = WINDOW
    return np.asarray((total[w:, w:] - total[:-w, w:] - total[w:, :-w] + total[:-w, :-w]) / w**2)


def _read(path: Path) -> Pixels:
    image = pyvips.Image.new_from_file(str(path)).numpy()
    return np.ascontiguousarray(np.atleast_3d(image), np.uint8)
