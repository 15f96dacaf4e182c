"""Composed slides: sections laid out as the painted ones, filled with windows of real tissue.

Every slide has benign glands as its general tissue, three nests, a ring around each nest and as
large a band away from the nests for each of them. What is planted:

- growth: stroma fills the rings (desmoplastic) or the bands (replacement), benign glands fill the
  others. All areas, and the borders of all parts, are the same in both patterns.
- score: the share of the windows in the nests that are malignant glands; the others are benign.
- survival: from both, as on painted slides.

Windows are joined by image quilting. The lattice of windows, the borders of parts and what is mixed
there do not depend on the labels: with one kind of tissue everywhere, the same seed gives the same
pixels whatever the labels. Material and labels are kept apart as :mod:`nic_core.demo.material`
says.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray
from scipy import ndimage, stats

from nic_core.demo.cohort import (
    SIDE,
    SLIDES,
    Progress,
    await_jobs,
    is_made,
    target_entries,
    write_codes,
    write_slide,
)
from nic_core.demo.layout import arrange_slide, truth_points
from nic_core.demo.material import (
    WINDOW,
    Kind,
    Pool,
    density_table,
    material_folds,
    read_material,
    read_pool,
    recoloured,
)
from nic_core.demo.painter import RASTER, Stain, enlarge, ordinary_stain
from nic_core.demo.plan import PlannedSlide, plan_cohort
from nic_core.demo.quilting import OVERLAP, quilt
from nic_core.demo.tissues import Tissue
from nic_core.parallel import process_pool
from nic_core.store import atomic_folder
from nic_core.types import Pixels

SMALLEST_SIDE = 1280
FOLDS = 4
MALIGNANT = (0.15, 1.0)  # smallest and largest share of malignant windows in the nests
CANDIDATES = 4  # windows of which the best fitting one is used
BORDER = 3  # px, standard deviation of the mixing at the border of two parts
LEAST_COVER = 0.5 / 255  # a smaller share of a part in a px is not visible


@dataclass(frozen=True)
class _Recipe:
    """Parameters of a composed cohort, stored with it so that it is not composed again."""

    seed: int
    slides: int
    side: int
    material: str  # digest of the list of regions
    version: int = 1  # of the generator; increase it if pixels, labels or files change


@dataclass(frozen=True)
class _Job:
    """A slide to compose."""

    planned: PlannedSlide
    malignant: float
    regions: tuple[str, ...]  # of the slide's fold


def make_composed(
    root: Path,
    material: Path,
    *,
    seed: int = 0,
    slides: int = SLIDES,
    side: int = SIDE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compose a cohort of slides from real tissue into a folder.

    A complete cohort with the same parameters is not composed again. The same parameters give the
    same pixels and tables for any number of workers.

    Parameters
    ----------
    root : Path
        Folder of the cohort; a demo cohort with other parameters is replaced.
    material : Path
        Folder of the real data (:func:`nic_core.demo.material.read_material`).
    seed : int
        Of everything random.
    slides : int
        Number of slides, at least 8. All are cross-validated, in the folds of their material.
    side : int
        Side of a slide, px at the um/px of the material, at least 1280.
    one_tissue : bool
        Fill all parts with benign glands: the control in which only the borders of the parts and
        windows could give the labels away.
    workers : int, optional
        Number of processes; default: the number of cores.
    progress : callable, optional
        Called with (steps done, total steps, name of the step) after every step.

    Returns
    -------
    Path
        The cohort file, ``cohort.yaml``.

    Raises
    ------
    ValueError
        A size is too small, or the material is incomplete or too little.
    FileNotFoundError
        The material has no manifest, or a file of it does not exist.
    FileExistsError
        ``root`` contains files but no demo cohort.
    """
    if slides < 2 * FOLDS or side < SMALLEST_SIDE:
        raise ValueError(
            f"a composed cohort needs slides >= {2 * FOLDS} and side >= {SMALLEST_SIDE} px; got "
            f"slides {slides}, side {side}"
        )
    regions = read_material(material)
    recipe = _Recipe(seed, slides, side, _digest(material, regions))
    if not is_made(root, vars(recipe)):
        with atomic_folder(root) as folder:
            _write(folder, material, regions, recipe, workers or os.cpu_count() or 1, progress)
    return root / "cohort.yaml"


def _write(
    folder: Path,
    material: Path,
    regions: pl.DataFrame,
    recipe: _Recipe,
    workers: int,
    progress: Progress | None,
) -> None:
    fold_of = material_folds(regions, FOLDS)
    regions = regions.with_columns(fold=pl.col("patient").replace_strict(fold_of))
    planned, labels = plan_cohort(recipe.seed, recipe.slides)
    labels = _with_folds(labels, recipe.seed)
    (mpp,) = regions["mpp"].unique()
    for name in ("slides", "truth"):
        (folder / name).mkdir()
    with process_pool(workers) as pool:
        jobs: dict[Future[Any], str] = {}
        for slide, fold, share in zip(planned, labels["fold"], labels["malignant"], strict=True):
            paths = tuple(regions.filter(fold=fold)["path"])
            job = _Job(slide, share, paths)
            name = _name(slide.slide)
            jobs[pool.submit(_make_slide, folder, material, job, recipe, mpp)] = f"slide {name}"
        await_jobs(jobs, progress)
    names = [_name(s.slide) for s in planned]
    labels = labels.with_columns(slide=pl.Series(names), fold=pl.col("fold") + 1)
    pl.DataFrame(
        {
            "slide": names,
            "path": [f"slides/{name}.tif" for name in names],
            "patient": labels["patient"],
            "truth": [f"truth/{name}.png" for name in names],
        }
    ).write_csv(folder / "slides.csv")
    labels.select("slide", "fold", "score", "growth", "time", "event").write_csv(
        folder / "labels.csv"
    )
    labels.select("slide", "malignant", "signal", "risk").write_csv(folder / "truth" / "causes.csv")
    regions.select("path", "patient", "label", fold=pl.col("fold") + 1).write_csv(
        folder / "truth" / "material.csv"
    )
    write_codes(folder)
    (folder / "cohort.yaml").write_text(_cohort_yaml(recipe.side * mpp))
    (folder / "recipe.json").write_text(json.dumps(vars(recipe)))


def _with_folds(labels: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Add ``fold``, stratified by growth and signal, and ``malignant``, the share in the nests."""
    rng = np.random.default_rng([seed, 4])
    patients = labels.group_by("patient", maintain_order=True).agg(
        pl.col("growth").first(), pl.col("signal").mean()
    )
    folds: dict[str, int] = {}
    for _, own in patients.sort("growth", "signal").group_by("growth", maintain_order=True):
        for start in range(0, own.height, FOLDS):
            some = own["patient"][start : start + FOLDS]
            folds |= zip(some, rng.permutation(FOLDS)[: len(some)].tolist(), strict=True)
    low, high = MALIGNANT
    share = low + (high - low) * stats.norm.cdf(labels["signal"].to_numpy())
    return labels.with_columns(
        fold=pl.col("patient").replace_strict(folds, return_dtype=pl.Int64),
        malignant=pl.Series(share),
    )


def _make_slide(folder: Path, material: Path, job: _Job, recipe: _Recipe, mpp: float) -> None:
    """Compose and write a slide."""
    pixels, truth = compose_slide(
        np.random.default_rng(job.planned.seed),
        _pool(material, job.regions),
        recipe.side,
        capsules=job.planned.capsules,
        malignant=job.malignant,
        stain=job.planned.stain,
    )
    write_slide(folder, _name(job.planned.slide), pixels, truth, mpp)


@lru_cache(maxsize=FOLDS)
def _pool(material: Path, regions: tuple[str, ...]) -> Pool:
    return read_pool(material, read_material(material).filter(pl.col("path").is_in(regions)))


def compose_slide(
    rng: np.random.Generator,
    pool: Pool,
    side: int,
    *,
    capsules: tuple[bool, ...],
    malignant: float,
    stain: Stain,
) -> tuple[Pixels, NDArray[np.uint8]]:
    """Compose a slide.

    Parameters
    ----------
    pool
        The material.
    side
        Side of the slide, px at the um/px of the material.
    capsules
        Nest *i* has its stroma around it if ``capsules[i]``, else in a band.
    malignant
        Share of the area of the nests with malignant glands, 0..1.
    stain
        Its strength in each channel and its glass are used.

    Returns
    -------
    pixels : uint8 (side, side, 3)
    truth : uint8, one point per 64 x 64 px, values of :class:`Tissue`
        TUMOUR: malignant glands, GLAND: benign glands, RIM: stroma.
    """
    arrangement = arrange_slide(rng, side, capsules)
    parts, tissue = arrangement.parts, arrangement.tissue
    shape = len(tissue) * RASTER, len(tissue) * RASTER
    light, truth = np.ones((*shape, 3), np.float32), np.zeros(shape, np.uint8)
    # each ring and band is filled by itself, whatever it is filled with
    layers = [((tissue == Tissue.GLAND) & (parts == 0), 0.0), (tissue == Tissue.TUMOUR, malignant)]
    layers += [(parts == part, 0.0) for part in range(1, parts.max() + 1)]
    for layer, share in layers:
        kind = Tissue.RIM if (tissue[layer] == Tissue.RIM).any() else Tissue.GLAND
        _fill(rng, pool, layer, share, kind, light, truth)
    stained = recoloured(np.rint(255 * light).astype(np.uint8), density_table(_strength(stain)))
    # noise of the glass alone: real pixels have their own
    noise = rng.normal(0, stain.noise, (*shape, 1)) * (light > 254 / 255)
    slide = np.rint(np.clip(stained / 255 * (stain.white + noise), 0, 255)).astype(np.uint8)
    middle = RASTER // 2
    return slide[:side, :side], truth_points(truth[middle::RASTER, middle::RASTER])


def _fill(
    rng: np.random.Generator,
    pool: Pool,
    layer: NDArray[np.bool_],
    malignant: float,
    kind: Kind,
    light: NDArray[np.float32],
    truth: NDArray[np.uint8],
) -> None:
    """Fill a part of the slide with windows, in place.

    Windows over the share ``malignant`` of its area are malignant glands, the others ``kind``.

    Parameters
    ----------
    layer
        The part, one point per RASTER x RASTER px.
    light
        float32 (H, W, 3): light through the tissue, 0..1.
    truth
        uint8 (H, W): the kind of tissue of each px.
    """
    (box,) = ndimage.find_objects(ndimage.binary_dilation(layer, iterations=BORDER).view(np.uint8))
    box_px = tuple(slice(s.start * RASTER, s.stop * RASTER) for s in box)
    cut = layer[box].astype(np.float32)
    cover = ndimage.gaussian_filter(enlarge(cut, slice(0, len(cut) * RASTER)), BORDER)
    core = cover > 0.5
    step = WINDOW - OVERLAP
    start = int(rng.integers(step)), int(rng.integers(step))
    rows, columns = (-(-(n + s) // step) for n, s in zip(core.shape, start, strict=True))
    area = np.zeros((rows * step, columns * step))
    area[start[0] : start[0] + core.shape[0], start[1] : start[1] + core.shape[1]] = core
    area = area.reshape(rows, step, columns, step).sum((1, 3))
    order = rng.permutation(area.size)
    reached = (area.ravel()[order].cumsum() <= malignant * area.sum()) & (malignant > 0)
    kinds = np.full(area.size, kind, np.uint8)
    kinds[order[reached]] = Tissue.TUMOUR
    kinds = kinds.reshape(area.shape)

    def draw(row: int, column: int) -> Pixels:
        return _windows(rng, pool, Tissue(kinds[row, column]))

    pixels, places = quilt(cover > LEAST_COVER, WINDOW, start, draw)
    light[box_px] -= cover[..., None] * (1 - pixels / np.float32(255))
    truth[box_px][core] = kinds[places[..., 0], places[..., 1]][core]


def _windows(rng: np.random.Generator, pool: Pool, kind: Kind) -> Pixels:
    """Draw windows of a kind from random regions, each in a random orientation."""
    found = np.empty((CANDIDATES, WINDOW, WINDOW, 3), np.uint8)
    for i in range(CANDIDATES):
        source = pool[kind][rng.integers(len(pool[kind]))]
        row, column = source.corners[rng.integers(len(source.corners))]
        window = source.pixels[row : row + WINDOW, column : column + WINDOW]
        if rng.integers(2):
            window = window[:, ::-1]
        found[i] = np.rot90(window, int(rng.integers(4)))
    return found


def _strength(stain: Stain) -> NDArray[np.float64]:
    """Return the optical density of a stain relative to the ordinary one, in R, G and B."""
    ordinary = ordinary_stain()
    densities = [
        s.haematoxylin * s.vectors[0].astype(float) + s.eosin * s.vectors[1]
        for s in (stain, ordinary)
    ]
    return np.asarray(densities[0] / densities[1])


def _name(slide: str) -> str:
    return slide.replace("demo-", "composed-")


def _digest(material: Path, regions: pl.DataFrame) -> str:
    """Return a digest of the list of regions and the sizes of their files."""
    sizes = [
        (material / path).stat().st_size for name in ("path", "mask") for path in regions[name]
    ]
    return hashlib.sha256(f"{regions.write_csv()}{sizes}".encode()).hexdigest()[:16]


def _cohort_yaml(field_um: float) -> str:
    cohort: dict[str, Any] = {
        "name": "composed",
        "slides": {"table": "slides.csv"},
        "labels": "labels.csv",
        "encoders": [{"name": "mean-rgb", "objective": "mean_rgb"}],
        "targets": target_entries(),
        "settings": {
            "models": {
                "network": "small",
                "crop_um": round(field_um),
                "folds": "given",
                "epochs": 50,
                "crops_at_test": 1,
            }
        },
    }
    head = (
        "# Slides composed of real tissue, see docs/explanation/composed-slides.md. "
        "Paths are relative to this file.\n"
    )
    return head + yaml.safe_dump(cohort, sort_keys=False, allow_unicode=True)
