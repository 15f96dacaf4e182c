"""Slides compared with their cohort: planted faults are found, ordinary slides are not."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nic_core.cohort import CohortError, load_cohort
from nic_core.steps import (
    excluded_slides,
    make_grid_manifest,
    make_patch_table,
    make_quality_report,
    make_slide,
    make_slide_index,
    make_target_folds,
    read_record,
    target_versions,
)
from nic_core.store import PatchTableKey, Store
from nic_core.tiling.slide_quality import (
    MIN_SLIDES,
    QUALITY_SCHEMA,
    blurred_share,
    find_outliers,
    slide_quality,
)
from tests.slides.conftest import GLASS, paint, write_tiff


def cells(rng: np.random.Generator, *, sharpness: float = 1000.0, unreadable: int = 0, **colour):
    """A patch table of 100 cells, with the columns that the quality of a slide needs."""
    count = 100
    kept = np.arange(count) >= unreadable
    values = {"red": 200.0, "green": 140.0, "blue": 190.0} | colour
    return pl.DataFrame(
        {
            "kept": kept,
            "reason": np.where(kept, None, "unreadable"),
            "focus": sharpness * 2 ** rng.normal(0, 0.8, count),
            **{name: value + rng.normal(0, 8, count) for name, value in values.items()},
        }
    )


def row(slide, table, *, mpp=0.25, tissue=0.3, ink=0.0, exclude=None):
    return slide_quality(slide, table, exclude=exclude, mpp=mpp, tissue_share=tissue, ink_share=ink)


@pytest.fixture
def ordinary():
    rng = np.random.default_rng(0)
    return [
        row(
            f"s{i}",
            cells(rng, sharpness=1000 * 2 ** rng.normal(0, 0.3)),
            tissue=rng.uniform(0.2, 0.4),
        )
        for i in range(12)
    ]


def judged(rows, tables=None):
    slides = pl.DataFrame(rows, schema=QUALITY_SCHEMA)
    if tables is not None:
        shares = [
            blurred_share(tables[s], slides, s) if s in tables else None for s in slides["slide"]
        ]
        slides = slides.with_columns(blurred_share=pl.Series(shares, dtype=pl.Float64))
    return find_outliers(slides)


def problems(rows, slide, tables=None):
    found = judged(rows, tables)
    others = found.filter(pl.col("slide") != slide, pl.col("problems") != "")
    assert others.is_empty(), others.select("slide", "problems").rows()
    return found.filter(slide=slide)["problems"].item()


@pytest.mark.parametrize(
    ("table", "about", "problem"),
    [
        ({"sharpness": 20.0}, {}, "focus is lower"),
        ({"red": 240.0, "green": 225.0, "blue": 238.0}, {}, "colour is paler"),
        ({"green": 70.0}, {}, "colour is darker"),
        ({"unreadable": 4}, {}, "4.0% of the tissue cells cannot be decoded"),
        ({}, {"ink": 0.05}, "5.0% of the slide is ink or black"),
        ({}, {"tissue": 0.01}, "little tissue"),
    ],
)
def test_a_planted_fault_is_the_only_outlier(ordinary, table, about, problem):
    odd = row("odd", cells(np.random.default_rng(1), **table), **about)
    assert problems([*ordinary, odd], "odd").startswith(problem)


def test_ordinary_slides_have_no_problems(ordinary):
    assert problems(ordinary, "s0") == ""


def test_the_blurred_half_of_a_slide_is_found(ordinary):
    rng = np.random.default_rng(2)
    half = cells(rng)
    blurred = half.with_columns(
        focus=pl.when(pl.int_range(pl.len()) < 50).then(pl.col("focus") / 200).otherwise("focus")
    )
    tables = {"half": blurred}
    found = judged([*ordinary, row("half", blurred)], tables).filter(slide="half")
    assert found["blurred_share"].item() == pytest.approx(0.5, abs=0.05)
    assert "of the cells are blurred" in found["problems"].item()


def test_a_slide_without_tissue_or_cells_is_a_problem(ordinary):
    none = cells(np.random.default_rng(3)).with_columns(kept=False, reason=pl.lit("background"))
    assert problems([*ordinary, row("none", none, tissue=0.0)], "none") == "no tissue"
    assert problems([*ordinary, row("few", none, tissue=0.3)], "few") == "no kept cell"


def test_focus_is_compared_with_slides_of_about_the_same_mpp(ordinary):
    """Slides scanned coarser are less sharp; among themselves they are ordinary."""
    rng = np.random.default_rng(4)
    coarse = [row(f"c{i}", cells(rng, sharpness=30.0), mpp=1.0) for i in range(6)]
    found = judged([*ordinary, *coarse])
    assert set(found["problems"]) == {""}
    assert found.filter(slide="c0")["compared_with"].item() == 6
    assert judged([*ordinary, *coarse[:1]]).filter(slide="c0")["compared_with"].item() == 0


@pytest.mark.parametrize("count", [1, MIN_SLIDES - 1])
def test_too_few_slides_are_not_compared(ordinary, count):
    odd = row("odd", cells(np.random.default_rng(5), sharpness=1.0), ink=0.1)
    found = judged([*ordinary[: count - 1], odd]).filter(slide="odd")
    assert found["focus_z"].item() is None
    assert found["problems"].item() == "10.0% of the slide is ink or black"


def test_excluded_slides_are_listed_but_not_the_reference(ordinary):
    rng = np.random.default_rng(6)
    bad = [row(f"b{i}", cells(rng, sharpness=5.0), exclude="blurred") for i in range(20)]
    found = judged([*ordinary, *bad])
    assert set(found.filter(pl.col("exclude").is_null())["problems"]) == {""}
    assert found.filter(pl.col("problems") != "").height == 20


@given(order=st.permutations(range(8)), factor=st.floats(0.1, 10))
def test_scores_depend_on_neither_order_nor_the_unit_of_focus(order, factor):
    rng = np.random.default_rng(7)
    tables = [cells(rng, sharpness=1e6 * 2 ** rng.normal(0, 1)) for _ in range(8)]
    scaled = [t.with_columns(pl.col("focus") * factor) for t in tables]
    first = judged([row(str(i), tables[i]) for i in range(8)]).sort("slide")
    second = judged([row(str(i), scaled[i]) for i in order]).sort("slide")
    np.testing.assert_allclose(first["focus_z"], second["focus_z"], atol=1e-4)
    assert first["colour_z"].equals(second["colour_z"])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Six painted slides, one of them with a black border, with all of their products."""
    folder = tmp_path_factory.mktemp("quality")
    (folder / "wsi").mkdir()
    for i in range(6):
        image = np.full((1024, 1024, 3), GLASS, np.uint8)
        image[200:800, 200:800] = paint(600, 600, seed=i)
        if i == 5:
            image[:80] = 3
        write_tiff(folder / "wsi" / f"s{i}.tif", image, mpp=1.0)
    lines = [f"s{i},wsi/s{i}.tif,p{i}," for i in range(6)]
    (folder / "slides.csv").write_text("\n".join(["slide,path,patient,exclude", *lines]))
    (folder / "cohort.yaml").write_text(
        "name: q\nslides: {table: slides.csv}\nencoders: [{name: rgb, objective: mean_rgb}]\n"
        "labels: labels.csv\ntargets: [{name: score, kind: regression, column: score}]\n"
        "settings: {models: {folds: 4}}\n"
    )
    (folder / "labels.csv").write_text(
        "\n".join(["slide,score", *(f"s{i},{i % 3}" for i in range(6))])
    )
    cohort, store = load_cohort(folder / "cohort.yaml"), Store(folder / "store")
    for slide in make_slide_index(cohort, store).index["slide"]:
        make_slide(store, slide)
        make_patch_table(cohort, store, PatchTableKey(geometry="128px-0.5um", slide=slide))
    return folder, cohort, store


def test_the_report_shows_the_slide_with_a_black_border(study):
    _, cohort, store = study
    make_slide_index(cohort, store)
    report = make_quality_report(cohort, store)
    assert report.without_patch_table == []
    assert report.outliers["slide"].to_list() == ["s5"]
    assert "ink or black" in report.outliers["problems"].item()
    assert read_record(store, "s5").ink_share == pytest.approx(80 / 1024, abs=0.04)
    assert pl.read_parquet(store.quality_report / "slides.parquet").equals(report.slides)
    assert (store.quality_report / "outliers.png").is_file()


def test_no_fold_and_no_manifest_has_an_excluded_slide(study):
    folder, cohort, store = study
    table = folder / "slides.csv"
    kept = table.read_text()
    before = target_versions(cohort, make_slide_index(cohort, store))
    table.write_text(kept.replace("s3,wsi/s3.tif,p3,", "s3,wsi/s3.tif,p3,folded"))
    try:
        scan = make_slide_index(cohort, store)
        assert excluded_slides(scan.index) == {"s3": "folded"}
        assert target_versions(cohort, scan) != before
        folds = make_target_folds(cohort, store, "score")
        assert folds.table["unit"].to_list() == ["s0", "s1", "s2", "s4", "s5"]
        assert "s3" not in make_grid_manifest(store, "rgb")["slide"]
        assert (
            make_quality_report(cohort, store).slides.filter(slide="s3")["exclude"].item()
            == "folded"
        )
    finally:
        table.write_text(kept)


def test_the_report_needs_a_patch_table(study, tmp_path):
    _, cohort, _ = study
    store = Store(tmp_path)
    make_slide_index(cohort, store)
    with pytest.raises(CohortError, match="no slide has a patch table; materialize 'patch_table'"):
        make_quality_report(cohort, store)


def test_a_slide_record_of_another_version_is_refused(study, tmp_path):
    store = Store(tmp_path)
    store.slide("s1").mkdir(parents=True)
    (store.slide("s1") / "slide.json").write_text('{"slide": "s1"}')
    with pytest.raises(CohortError, match=r"slide.json: another version wrote it"):
        read_record(store, "s1")
