"""The judgements of the checks: each finds its fault and passes a sound product."""

from __future__ import annotations

import inspect

import dagster as dg
import numpy as np
import polars as pl
import pytest

from nic_assets.assets import checks
from nic_assets.build import build_defs
from nic_core.cohort import ModelSettings, RegressionTarget, load_cohort
from nic_core.encoders import EncoderCard, PatchDataset
from nic_core.encoders.patch_tasks import FINDINGS_SCHEMA
from nic_core.encoders.scores import TaskScores
from nic_core.grids import Grid
from nic_core.models.comparison import Verdict
from nic_core.models.cross_validation import CrossValidation
from nic_core.steps import SlideRecord, SlideScan
from nic_core.store import PatchTableKey, Store
from nic_core.tiling.patches import MEASURED, PATCH_SCHEMA, write_patch_table
from tests.provenance import provenance

pytestmark = pytest.mark.slow


def record(**changes: object) -> SlideRecord:
    values = {
        "slide": "s",
        "identity": "i",
        "engine": "tifffile",
        "width": 100,
        "height": 100,
        "mpp": 0.25,
        "levels": (),
        "image": 0,
        "images": (),
        "icc_profile": None,
        "scanner": None,
        "tissue_mpp": 8.0,
        "tissue_mm2": 1.0,
        "ink_share": 0.0,
    }
    return SlideRecord.model_validate(values | changes)


def grid(embeddings: np.ndarray, valid: np.ndarray, unreadable: int = 0) -> Grid:
    about = provenance(unreadable=unreadable)
    return Grid(embeddings.astype(np.float16), valid, about)


def cells(kept: np.ndarray) -> pl.DataFrame:
    columns = kept.shape[1]
    row, column = np.divmod(np.arange(kept.size), columns)
    table = {
        "slide": ["s"] * kept.size,
        "row": row,
        "column": column,
        "x": column * 128.0,
        "y": row * 128.0,
        "size": np.full(kept.size, 128.0),
        "stride": np.full(kept.size, 128.0),
        "mpp": np.full(kept.size, 0.5),
        "tissue": kept.ravel().astype(float),
        **dict.fromkeys(MEASURED),
        "kept": kept.ravel(),
        "reason": [None if keep else "background" for keep in kept.ravel()],
    }
    frame = pl.DataFrame(table)
    return frame.select(pl.col(name).cast(kind) for name, kind in PATCH_SCHEMA.items())


def test_slides_coarser_than_the_study_are_found():
    assert checks.resolution_suffices(record(mpp=0.503), 0.5) is None
    assert "1.000" in str(checks.resolution_suffices(record(mpp=1.0), 0.5))


def test_missing_and_removed_slide_files_are_found():
    def scan(missing: dict[str, str], removed: list[str]) -> SlideScan:
        return SlideScan(pl.DataFrame(), {}, missing, (), (), removed, pl.DataFrame())

    assert checks.slide_files_present(scan({}, [])) is None
    assert checks.slide_files_present(scan({"a": "a.tif is cut"}, ["a", "b"])) == (
        "a: a.tif is cut; b: removed since the last scan"
    )


def test_slides_with_the_same_content_are_found():
    index = pl.DataFrame({"slide": ["a", "b", "c"], "patient": ["P", "Q", "Q"]})

    def scan(*duplicates: tuple[str, ...]) -> SlideScan:
        return SlideScan(index, {}, {}, (), duplicates, [], pl.DataFrame())

    assert checks.slides_distinct(scan()) is None
    assert checks.slides_distinct(scan(("a", "b"))) == (
        "the same content: a (patient P) = b (patient Q)"
    )


def test_slides_without_tissue_are_found():
    assert checks.tissue_found(record()) is None
    assert checks.tissue_found(record(tissue_mm2=0.0)) is not None


def test_damaged_patch_tables_are_found(tmp_path):
    store, key = Store(tmp_path), PatchTableKey(geometry="8px-0.5um", slide="s")
    table = cells(np.ones((2, 2), bool))
    write_patch_table(store.patch_table(key), table)
    assert checks.schema_valid(store, key) is None
    store.patch_table(key).write_bytes(b"half")
    assert checks.schema_valid(store, key) is not None


def test_patients_in_two_splits_are_found():
    def dataset(groups: list[str]) -> PatchDataset:
        table = pl.DataFrame({"group": groups, "split": ["train", "validation", "test"]})
        return PatchDataset("t", "organ", ("a", "b"), 0.5, np.zeros((3, 8, 8, 3), np.uint8), table)

    assert checks.splits_disjoint_by_group(dataset(["p", "q", "r"])) is None
    assert "'p'" in str(checks.splits_disjoint_by_group(dataset(["p", "q", "p"])))


def test_findings_of_a_patch_task_are_reported():
    def dataset(**finding: str) -> PatchDataset:
        findings = pl.DataFrame([finding] if finding else [], schema=FINDINGS_SCHEMA)
        return PatchDataset(
            "t", "o", ("a", "b"), 0.5, np.zeros((0, 8, 8, 3)), pl.DataFrame(), findings
        )

    for check, finding, message in (
        (checks.labels_agree, {"kind": "conflict", "source": "i.png", "label": "b"}, "i.png (b)"),
        (
            checks.no_near_duplicates_across_splits,
            {"kind": "near_duplicate", "source": "i", "split": "test"},
            "i (test)",
        ),
        (checks.classes_present, {"kind": "absent", "label": "a", "split": "test"}, "a in test"),
        (checks.images_readable, {"kind": "unreadable", "source": "i", "detail": "cut"}, "i (cut)"),
        (checks.regions_clear, {"kind": "unclassified", "source": "i", "detail": "1"}, "i: 1"),
        (checks.neighbours_unlike, {"kind": "ordered", "detail": "r = 0.7"}, "r = 0.7"),
        (checks.regions_clear, {"kind": "outside_tissue", "source": "i", "detail": "1"}, "i: 1"),
    ):
        assert check(dataset()) is None
        assert check(dataset(kind="copy")) is None
        assert message in str(check(dataset(**finding)))


def test_encoders_no_better_than_chance_are_found():
    def card(accuracy: float) -> EncoderCard:
        scores = TaskScores(n=4, balanced_accuracy=accuracy, auc=None, f1=0.0, confusion=())
        return EncoderCard(
            name="e",
            architecture="tellez2020",
            objective="mtl",
            tasks={"t": ("a", "b")},
            patch=128,
            mpp=0.5,
            embedding_size=128,
            weights_hash="w",
            scores={"t": scores},
        )

    assert checks.beats_chance(card(0.6)) is None
    assert "'t': 0.5" in str(checks.beats_chance(card(0.5)))


def test_grids_that_miss_readable_cells_are_found():
    kept = np.array([[True, True], [True, False]])
    embeddings = np.ones((4, 2, 2))
    assert checks.covers_patch_table(grid(embeddings, kept), cells(kept)) is None
    fewer = kept & [[True, False], [True, True]]
    assert "1 kept cells" in str(checks.covers_patch_table(grid(embeddings, fewer), cells(kept)))
    assert checks.covers_patch_table(grid(embeddings, fewer, unreadable=1), cells(kept)) is None
    assert "1 embeddings outside" in str(
        checks.covers_patch_table(grid(embeddings, ~fewer), cells(~kept))
    )


def test_embeddings_that_are_not_finite_are_found():
    embeddings = np.ones((4, 2, 2))
    assert checks.embeddings_finite(grid(embeddings, np.ones((2, 2), bool))) is None
    embeddings[2, 1, 1] = np.nan
    assert checks.embeddings_finite(grid(embeddings, np.ones((2, 2), bool))) is not None


def test_collapsed_embeddings_are_found():
    valid = np.ones((3, 3), bool)
    varied = np.random.default_rng(0).normal(size=(4, 3, 3))
    assert checks.embeddings_not_collapsed(grid(varied, valid)) is None
    assert "100%" in str(checks.embeddings_not_collapsed(grid(np.ones((4, 3, 3)), valid)))


def test_patients_in_two_folds_are_found():
    folds = pl.DataFrame({"patient": ["p", "p", "q", "r"], "fold": [0, 0, 1, None]})
    assert checks.folds_disjoint_by_patient(folds) is None
    shared = pl.DataFrame({"patient": ["p", "p"], "fold": [0, 1]})
    assert "'p'" in str(checks.folds_disjoint_by_patient(shared))


def evaluated(prediction: np.ndarray, label: np.ndarray) -> CrossValidation:
    units = [f"u{i:02}" for i in range(len(label))]
    rows = pl.DataFrame(
        {
            "model": "network",
            "split": "cv",
            "unit": units,
            "patient": units,
            "y": label,
            "prediction": prediction,
        }
    )
    target = RegressionTarget(name="t", kind="regression", column="y")
    nothing = pl.DataFrame()
    return CrossValidation(target, ModelSettings(), rows, nothing, (), nothing, ())


def test_all_checks_of_assets_by_slide_are_listed(tiny_cohort, tmp_path):
    graph = build_defs(load_cohort(tiny_cohort), Store(tmp_path)).resolve_asset_graph()
    by_slide: dict[str, set[str]] = {}
    for key in graph.asset_check_keys:
        if "'slides'" in repr(graph.get(key.asset_key).partitions_def):
            by_slide.setdefault(key.asset_key.to_user_string(), set()).add(key.name)
    assert by_slide == {
        asset: {check.name for check in listed} for asset, listed in checks.OF_SLIDES.items()
    }


def test_every_check_has_a_description(tiny_cohort, tmp_path):
    defs = build_defs(load_cohort(tiny_cohort), Store(tmp_path))
    specs = {
        check.name: check.description
        for assets in defs.assets or ()
        if isinstance(assets, dg.AssetsDefinition)
        for check in assets.check_specs
    }
    assert len(specs) > 12
    assert all((about or "").endswith(".") for about in specs.values()), specs
    assert specs["beats_chance"] == inspect.getdoc(checks.beats_chance.judge)


def test_test_patients_in_the_training_of_another_task_are_found():
    assert checks.test_patients_unseen([]) is None
    assert checks.test_patients_unseen(["one", "two"]) == "one; two"


def test_models_that_a_person_must_compare_are_found():
    assert checks.compared_with_champion(Verdict(True, "the first of its name")) is None
    undecided = Verdict(False, "no unit is predicted by both", compared=False)
    assert checks.compared_with_champion(undecided) == "no unit is predicted by both"
