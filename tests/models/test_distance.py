"""Distance of slides to a training cohort: its calibration, and planted shifts of slides."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, stats
from torch import nn

from nic_core.cohort import Cohort, Geometry
from nic_core.compression import compress_slide
from nic_core.encoders.inference import PreparedEncoder
from nic_core.encoders.keras_import import import_keras_encoder
from nic_core.grids import open_grid
from nic_core.grids.moments import GridMoments, grid_moments
from nic_core.models.distance import (
    FAR_PERCENTILE,
    TrainingReference,
    fit_reference,
    load_reference,
    save_reference,
)
from nic_core.models.files import load_model
from nic_core.models.prediction import predict_grids
from nic_core.slides import open_slide
from nic_core.steps import read_slide_index
from nic_core.store import GridKey, ModelKey, Store
from nic_core.tiling.patches import patch_table
from nic_core.tiling.tissue import tissue_mask

PROJECT = Path(__file__).parents[2]
SHARED = PROJECT.parent / "shared"
REAL = Path(os.environ.get("NIC_REAL_DATA") or SHARED / "real-data")
PUBLISHED = SHARED / "published-encoders" / "encoder_multitask-4.h5"
SIZE = 8  # numbers per embedding


def cohort(random: np.random.Generator, slides: int, shift: float = 0) -> list[GridMoments]:
    """Moments of slides of 20 cells, whose means differ between slides."""
    found = []
    for number in range(slides):
        mean = random.normal(size=(SIZE, 1, 1)) * np.linspace(1, 0.1, SIZE)[:, None, None] + shift
        cells = mean + random.normal(size=(SIZE, 4, 5))
        found.append(grid_moments(f"s{number}", cells, np.ones((4, 5), bool)))
    return found


def reference(slides: int = 40, seed: int = 0) -> TrainingReference:
    moments = cohort(np.random.default_rng(seed), slides)
    return fit_reference(moments, [number % 4 for number in range(slides)])


@pytest.mark.parametrize("slides", [12, 40, 200])
def test_few_slides_of_the_same_kind_are_beyond_the_percentile(slides):
    new = cohort(np.random.default_rng(1), 500)
    share = np.mean(
        [
            found.percentile(found.distance(m.mean)) > FAR_PERCENTILE
            for seed in range(4)
            for found in [reference(slides, seed)]
            for m in new
        ]
    )
    assert share < 0.03


def test_shifted_slides_are_beyond_the_percentile():
    found = reference()
    shifted = cohort(np.random.default_rng(1), 50, shift=2)
    assert all(found.percentile(found.distance(m.mean)) > FAR_PERCENTILE for m in shifted)


def test_the_distance_is_that_of_the_inverse_covariance():
    found = reference()
    covariance = (
        found.rest[0] * (np.eye(SIZE) - found.axes.T @ found.axes)
        + (found.axes.T * found.variances) @ found.axes
    )
    for moments in cohort(np.random.default_rng(2), 5):
        scaled = (moments.mean - found.mean) / found.scale
        expected = np.sqrt(scaled @ np.linalg.solve(covariance, scaled))
        assert found.distance(moments.mean) == pytest.approx(expected)


def test_the_percentile_is_that_of_a_prediction_interval():
    found = replace(reference(), held_out=np.exp([0.0, 1.0, 2.0, 3.0]))
    spread = np.std([0, 1, 2, 3], ddof=1) * np.sqrt(1 + 1 / 4)
    expected = 100 * stats.t.cdf((2.5 - 1.5) / spread, 3)
    assert found.percentile(np.exp(2.5)) == pytest.approx(expected)
    assert found.percentile(found.limit) == pytest.approx(FAR_PERCENTILE)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=20))
def test_a_larger_distance_has_no_smaller_percentile(distances):
    found = reference(12)
    percentiles = [found.percentile(distance) for distance in sorted(distances)]
    assert percentiles == sorted(percentiles)
    assert all(0 <= percentile <= 100 for percentile in percentiles)


@given(st.floats(0.5, 1e3), st.floats(-100, 100))
def test_units_of_the_embedding_do_not_change_the_distance(factor, offset):
    def changed(moments: GridMoments) -> GridMoments:
        squares = factor**2 * moments.squares + 2 * factor * offset * moments.total
        total = factor * moments.total + offset * moments.cells
        return GridMoments(moments.cells, total, squares + offset**2 * moments.cells)

    moments = cohort(np.random.default_rng(0), 12)
    folds = [number % 4 for number in range(12)]
    first, second = fit_reference(moments, folds), fit_reference(list(map(changed, moments)), folds)
    np.testing.assert_allclose(second.held_out, first.held_out, rtol=1e-3)


def test_identical_slides_have_a_reference():
    moments = cohort(np.random.default_rng(0), 1) * 6
    found = fit_reference(moments, [0, 0, 1, 1, 2, 2])
    assert found.percentile(found.distance(moments[0].mean)) <= 50
    assert found.percentile(found.distance(moments[0].mean + 1)) > FAR_PERCENTILE


def test_a_saved_reference_is_read_back(tmp_path):
    first = reference()
    written = save_reference(tmp_path, first)
    second, read = load_reference(tmp_path)
    assert read == written
    for name, numbers in vars(first).items():
        np.testing.assert_array_equal(getattr(second, name), numbers)


@pytest.mark.slow
def test_predictions_state_the_farthest_slide_of_a_patient(mean_rgb_study: tuple[Cohort, Store]):
    _, store = mean_rgb_study
    model = load_model(store.slide_model(ModelKey(encoder="mean-rgb", target="survival")))

    def grid(slide):
        return open_grid(store.grid(GridKey(encoder="mean-rgb", slide=slide)))

    slides = read_slide_index(store)["slide"].to_list()[:2]
    units = pl.DataFrame(
        {
            "unit": [*slides, "both"],
            "patient": ["p"] * 3,
            "slides": [[s] for s in slides] + [slides],
        }
    )
    found = predict_grids(model, units, grid)
    assert found["distance"][2] == max(found["distance"][:2])
    assert found["distance_percentile"].is_between(0, 100).all()
    assert model.card.training.mpp == (0.5,)
    assert model.card.training.without_scanner == len(model.card.training.slides)


# --- planted shifts of slides ------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    name: str = "colours and edges"
    patch: int = 128
    mpp: float = 0.5
    embedding_size: int = 12
    weights_hash: str = "0" * 32


class ColoursAndEdges(nn.Module):
    """Mean and deviation of each channel, and the contrast between pixels 1 and 8 px apart."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.float() / 255
        flat = values.flatten(2)
        edges = [
            (values[..., step:] - values[..., :-step]).abs().mean((2, 3)).log1p() for step in (1, 8)
        ]
        return torch.cat([flat.mean(2), flat.std(2), *edges], 1)


ENCODER = PreparedEncoder(
    card=Card(),  # type: ignore[arg-type]
    module=ColoursAndEdges(),
    side=128,
    mpp=0.5,
    device=torch.device("cpu"),
    precision="float32",
    reading="patch",
)


def slide_moments(path: Path, encoder: PreparedEncoder, mpp: float | None = None) -> GridMoments:
    with open_slide(path, mpp=mpp) as slide:
        geometry = Geometry(patch=128, mpp=0.5, stride=128)
        cells = patch_table("one", slide, tissue_mask(slide), geometry, tissue=0.6)
        grid = compress_slide(slide, cells, encoder, slide_id="one", slide_identity="x")
    return grid_moments("one", grid.embeddings, grid.valid)


def stained(pixels: np.ndarray) -> np.ndarray:
    return (255 * (pixels / 255) ** np.array([1.6, 0.8, 1.3])).astype(np.uint8)


def blurred(pixels: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(pixels, (4, 4, 0))


def unchanged(pixels: np.ndarray) -> np.ndarray:
    return pixels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "mpp", "far"),
    [(unchanged, 0.5, False), (stained, 0.5, True), (blurred, 0.5, True), (unchanged, 2.0, True)],
    ids=["unchanged", "stain", "blur", "scale"],
)
def test_planted_shifts_of_demo_slides_are_far(demo, tmp_path, change, mpp, far):
    found, held_back = demo
    for path in held_back:
        tifffile.imwrite(
            tmp_path / "slide.tif",
            change(tifffile.imread(path)),
            photometric="rgb",
            tile=(256, 256),
            resolution=(1e4 / mpp, 1e4 / mpp),
            resolutionunit="CENTIMETER",
        )
        distance = found.distance(slide_moments(tmp_path / "slide.tif", ENCODER).mean)
        assert (found.percentile(distance) > FAR_PERCENTILE) == far, (
            path.stem,
            distance,
            found.limit,
        )


@pytest.fixture(scope="module")
def demo(tiny_cohort: Path) -> tuple[TrainingReference, list[Path]]:
    """A reference of ten demo slides, and two others."""
    *training, second, last = sorted((tiny_cohort.parent / "slides").glob("*.tif"))
    moments = [slide_moments(path, ENCODER) for path in training]
    return fit_reference(moments, [number % 4 for number in range(len(moments))]), [second, last]


@pytest.mark.slow
@pytest.mark.skipif(
    not (PUBLISHED.exists() and (REAL / "MANIFEST.csv").exists()),
    reason=f"published encoder or real slides not found at {SHARED}",
)
def test_real_slides_of_another_organ_are_far(tmp_path):
    encoder = import_keras_encoder(PUBLISHED, "published").prepare("cpu", "float32", "patch")
    regions = pl.read_csv(REAL / "MANIFEST.csv", infer_schema=False)
    regions = regions.filter(task="glas_grade", kind="region775").sort("group").gather_every(2)
    patients = regions["group"].unique().sort().to_list()
    trained: list[GridMoments] = []
    folds, held_back = [], []
    for row in regions.iter_rows(named=True):
        path = tmp_path / f"{Path(row['path']).stem}.tif"
        save_tiled(path, REAL / row["path"], float(row["mpp"]))
        patient = patients.index(row["group"])
        if patient < len(patients) - 3:
            trained.append(slide_moments(path, encoder))
            folds.append(patient % 4)
        else:
            held_back.append(slide_moments(path, encoder))
    colon = fit_reference(trained, folds)
    inside = [colon.percentile(colon.distance(m.mean)) <= FAR_PERCENTILE for m in held_back]
    assert np.mean(inside) > 0.95
    for breast in ("her2st_C2.tif", "idc_8863.tif", "idc_8865.tif", "idc_8913.tif"):
        distance = colon.distance(slide_moments(REAL / "slides" / breast, encoder).mean)
        assert colon.percentile(distance) > FAR_PERCENTILE, (breast, distance, colon.limit)


def save_tiled(path: Path, image: Path, mpp: float) -> None:
    """Save an image as a tiled TIFF that states its um/px."""
    import pyvips

    opened = pyvips.Image.new_from_file(str(image)).copy(xres=1000 / mpp, yres=1000 / mpp)
    opened.tiffsave(str(path), tile=True, compression="deflate", resunit="cm")
