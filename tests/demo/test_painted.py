"""Tests of painted patch tasks: balance, reproducibility, colour, and the parts of variety."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nic_core.demo.morphology import MORPHOLOGY_TASKS
from nic_core.demo.painted import PAINTED_TASKS, PaintedTask, paint_task
from nic_core.demo.patches import TASKS, DemoTask
from nic_core.demo.variety import (
    MPP,
    ORDINARY,
    PATCH,
    WIDE,
    WIDE_MPP,
    Variety,
    draw_form,
    draw_jpeg_quality,
    draw_stain,
    exchange_colours,
)

pytestmark = pytest.mark.slow

PARTS = [part.name for part in fields(Variety)]
BY_NAME = {task.name: task for task in PAINTED_TASKS}


@pytest.fixture(scope="module", params=MORPHOLOGY_TASKS, ids=lambda task: task.name)
def painted(request: pytest.FixtureRequest) -> PaintedTask:
    """40 patches of each class, of 4 patients; ordinary shapes, which are quick to paint."""
    task = request.param
    variety = replace(WIDE, shapes=False)
    return paint_task(task, patches=40 * len(task.classes), patients=4, seed=1, variety=variety)


def test_classes_and_patients_are_balanced(painted: PaintedTask) -> None:
    classes = len(painted.task.classes)
    counts = np.zeros((4, classes), int)
    np.add.at(counts, (painted.groups, painted.labels), 1)
    assert (counts == 10).all()


def test_mean_colour_does_not_tell_classes_of_other_patients(painted: PaintedTask) -> None:
    classes = len(painted.task.classes)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    colours = painted.pixels.mean((1, 2))
    guesses = cross_val_predict(
        model, colours, painted.labels, groups=painted.groups, cv=GroupKFold(4)
    )
    # three standard errors of a guess
    limit = 1 / classes + 3 * ((1 - 1 / classes) / classes / len(guesses)) ** 0.5
    assert balanced_accuracy_score(painted.labels, guesses) < limit


@pytest.mark.parametrize("task", PAINTED_TASKS, ids=lambda task: task.name)
def test_patches_of_a_wide_patient_differ_from_each_other(task: DemoTask) -> None:
    count = 2 * len(task.classes)
    patches = paint_task(task, patches=count, patients=1, seed=3, variety=WIDE).pixels
    assert patches.shape == (count, PATCH, PATCH, 3)
    assert patches.dtype == np.uint8
    assert len(np.unique(patches.reshape(count, -1), axis=0)) == count


def test_pixels_do_not_depend_on_the_number_of_processes() -> None:
    one, two = (
        paint_task(
            BY_NAME["cell_kind"], patches=12, patients=3, seed=8, variety=WIDE, processes=processes
        )
        for processes in (1, 2)
    )
    np.testing.assert_array_equal(one.pixels, two.pixels)
    np.testing.assert_array_equal(one.labels, two.labels)
    np.testing.assert_array_equal(one.groups, two.groups)


def test_another_seed_gives_other_patches() -> None:
    first, second = (
        paint_task(BY_NAME["stroma_fibres"], patches=4, patients=1, seed=seed).pixels
        for seed in (0, 1)
    )
    assert (first != second).mean() > 0.5


# Mean R, G, B of these patches before tasks had a variety. Rounding of other processors changes
# single pixels only.
BEFORE = {
    "lymph_node": (167.997, 120.498, 166.092),
    "breast_mitosis": (165.688, 126.260, 164.235),
    "prostate_epithelium": (186.236, 135.526, 177.262),
    "colorectal": (194.204, 154.691, 184.624),
}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_patches_of_the_demo_stay_as_they_were(task: DemoTask) -> None:
    counts = (40,) * 2 if len(task.classes) == 2 else (9,) * len(task.classes)
    means = [
        pixels.mean((0, 1))
        for patient in range(2)
        for _, pixels in task.cut(
            np.random.default_rng((0, 3, TASKS.index(task), patient)), counts, ORDINARY
        )
    ]
    np.testing.assert_allclose(np.mean(means, axis=0), BEFORE[task.name], atol=0.02)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_variety_changes_pixels(part: str) -> None:
    task = BY_NAME["nuclear_grade"]
    plain = paint_task(task, patches=6, patients=1, seed=4)
    varied = paint_task(task, patches=6, patients=1, seed=4, variety=Variety(**{part: True}))
    assert (plain.pixels != varied.pixels).mean() > 0.3


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_parts_of_variety_are_drawn_independently(seed: int) -> None:
    def drawn(variety: Variety) -> dict[str, object]:
        rng = np.random.default_rng(seed)
        form, stain = draw_form(rng, variety), draw_stain(rng, variety)
        quality = draw_jpeg_quality(rng.spawn(1)[0], variety)
        return {
            "stain": (stain.vectors.tolist(), stain.haematoxylin, stain.eosin, list(stain.white)),
            "optics": (stain.blur, stain.noise, quality),
            "scale": form.window,
            "shapes": (form.shapes.nuclei, form.shapes.spacing, form.shapes.mottle, form.glands),
            "next": rng.random(),
        }

    ordinary, wide = drawn(ORDINARY), drawn(WIDE)
    assert wide["next"] == ordinary["next"]
    for part in PARTS:
        alone = drawn(Variety(**{part: True}))
        without = drawn(replace(WIDE, **{part: False}))
        for name in PARTS:
            assert alone[name] == (wide if name == part else ordinary)[name]
            assert without[name] == (ordinary if name == part else wide)[name]


def test_wide_patients_cover_the_range_of_scale() -> None:
    forms = [draw_form(np.random.default_rng(seed), WIDE) for seed in range(200)]
    mpp = np.array([form.side / PATCH * MPP for form in forms])
    step = 2 * MPP / PATCH  # half a raster point of a patch
    assert WIDE_MPP[0] - step <= mpp.min() < WIDE_MPP[0] + 0.05
    assert WIDE_MPP[1] - 0.05 < mpp.max() <= WIDE_MPP[1] + step


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_exchanged_mean_colours_are_a_permutation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    white = np.array([240, 238, 242], np.float32)
    light = white * np.exp(-rng.gamma(2, rng.uniform(0.15, 0.3, (9, 1, 1, 1)), (9, 16, 16, 3)))
    patches = np.rint(light).astype(np.uint8)
    patches[:, :3] = white  # glass
    out = exchange_colours(patches, white, rng)
    assert (out[:, :3] == white).all()
    before, after = (p.mean((1, 2)) for p in (patches, out))
    order = np.argmin(np.abs(after[:, None] - before).max(2), axis=1)
    assert sorted(order) == list(range(9))
    np.testing.assert_allclose(after, before[order], atol=0.6)


@pytest.mark.parametrize(("patches", "patients"), [(3, 2), (10, 0), (0, 1)])
def test_too_few_patches_or_patients_are_refused(patches: int, patients: int) -> None:
    with pytest.raises(ValueError, match=f"gland_grade: {patches} patches of {patients} patients"):
        paint_task(BY_NAME["gland_grade"], patches=patches, patients=patients, seed=0)
