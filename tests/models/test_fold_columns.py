"""The columns ``fold`` and ``site`` of the slide table and the label table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nic_core.cohort import Cohort, CohortError
from nic_core.cohort.index import INDEX_SCHEMA
from nic_core.cohort.scan import SNAPSHOT_SCHEMA
from nic_core.models.fold_columns import read_fold_column
from nic_core.steps import find_target_folds
from nic_core.steps.slide_index import SlideScan, target_versions

SLIDES = [f"{patient}{slide}" for patient in "abcdefgh" for slide in "12"]
PATIENTS = list("abcdefgh")
SITES = dict(zip(PATIENTS, "AABBCCDD", strict=True))


def index(values: dict[str, str | None] | None = None) -> pl.DataFrame:
    """Eight patients with two slides each; ``values`` is the column site by slide."""
    rows = [
        {"slide": slide, "patient": slide[0], "split": "cv", "site": (values or {}).get(slide)}
        for slide in SLIDES
    ]
    return pl.DataFrame(rows, schema=INDEX_SCHEMA)


def of_slides(values: dict[str, str]) -> dict[str, str | None]:
    return {slide: values[slide[0]] for slide in SLIDES}


def cohort(folder: Path, folds: object = 3, **columns: list[Any]) -> Cohort:
    """A cohort whose label table has these columns and a score."""
    ids = next(iter(columns.values()))
    table = pl.DataFrame({**columns, "score": [float(i) for i in range(len(ids))]})
    table.write_csv(folder / "labels.csv")
    target = {"name": "t", "kind": "regression", "column": "score", "level": "patient"}
    return Cohort.model_validate(
        {
            "name": "c",
            "slides": {"table": "slides.csv"},
            "labels": "labels.csv",
            "encoders": [{"name": "e", "objective": "mean_rgb"}],
            "targets": [target],
            "settings": {"models": {"folds": folds}},
        },
        context={"base": folder},
    )


def folds_of(folder: Path, found: pl.DataFrame, folds: object, **columns: list[Any]):
    study = cohort(folder, folds, **(columns or {"patient": PATIENTS}))
    return find_target_folds(study, study.target("t"), found)


def test_folds_keep_the_sites_of_the_slide_table_whole(tmp_path):
    made = folds_of(tmp_path, index(of_slides(SITES)), "site")
    assert made.table["site"].to_list() == list("AABBCCDD")
    assert made.table["fold_name"].to_list() == list("AABBCCDD")
    assert made.table["fold"].to_list() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert made.note is None
    first = {"site": "A", "split": "cv", "fold": 0, "fold_name": "A", "slides": 4, "patients": 2}
    assert made.sites.row(0, named=True) == first
    three = folds_of(tmp_path, index(of_slides(SITES)), {"by": "site", "count": 3})
    assert three.table["fold"].n_unique() == 3
    of_sites = three.table.group_by("site").agg(pl.col("fold").n_unique())
    assert of_sites["fold"].to_list() == [1] * 4


def test_published_folds_are_taken_from_the_label_table(tmp_path):
    made = folds_of(tmp_path, index(), "given", patient=PATIENTS, fold=[1, 2, 3, 10] * 2)
    assert made.table["fold_name"].to_list() == ["1", "2", "3", "10"] * 2
    assert made.table["fold"].to_list() == [0, 1, 2, 3] * 2
    assert made.table["site"].null_count() == 8
    assert made.sites.is_empty()


def test_sites_are_shown_by_fold_if_folds_are_not_of_sites(tmp_path):
    found = index(of_slides(SITES) | {"a2": "B", "h1": None, "h2": None})
    made = folds_of(tmp_path, found, 3)
    assert made.table["site"].null_count() == 8
    assert made.sites["slides"].sum() == 14
    fold = made.table.filter(unit="a")["fold"][0]
    assert made.sites.filter(site="B", fold=fold)["slides"].sum() >= 1


def test_a_patient_has_the_site_that_any_of_its_slides_states(tmp_path):
    some = {slide: value for slide, value in of_slides(SITES).items() if slide.endswith("1")}
    assert folds_of(tmp_path, index(some), "site").table["site"].to_list() == list("AABBCCDD")
    half = {slide: value for slide, value in some.items() if slide < "e"}
    columns = {"slide": ["e1", "f2", "g1", "h1", *SLIDES[:8:2]], "site": list("CCDDAABB")}
    made = folds_of(tmp_path, index(half), "site", **columns)
    assert made.table["site"].to_list() == list("AABBCCDD")


@pytest.mark.parametrize(
    ("sites", "columns", "message"),
    [
        (
            of_slides(SITES),
            {"patient": PATIENTS, "site": list("AABBCCDX")},
            r"label table .*labels.csv: 2 slides have another site in the slide table than in the "
            r"label table, for example slide 'h1' 'D' and 'X' \(row 9\), slide 'h2' 'D' and 'X' "
            r"\(row 9\); write the same site in both, or remove the column of one",
        ),
        (
            {},
            {"slide": ["a1", "b1", "a1"], "site": ["A", "B", "C"]},
            r"slide 'a1' has more than one site: 'A' \(row 2\), 'C' \(row 4\); keep one",
        ),
        (
            of_slides(SITES) | {"a2": "B", "c1": "A"},
            {"patient": PATIENTS},
            r"patients with slides of more than one site: a, c; for example slides a1 'A', a2 'B'; "
            r"a patient cannot be in two folds: correct the column, or exclude slides",
        ),
        (
            of_slides(SITES) | dict.fromkeys(["a1", "a2", "h1", "h2"]),
            {"patient": PATIENTS},
            r"patients of split 'cv' without a site: a, h; fill in the column",
        ),
        (
            of_slides(SITES | {"b": "a", "c": "a"}),
            {"patient": PATIENTS},
            r"'A' and 'a' differ only in spelling; write one site in one way",
        ),
        (
            {},
            {"patient": PATIENTS},
            r"column 'site': no value in the slide table or in the label table; fill in",
        ),
    ],
)
def test_sites_that_do_not_fit_together_are_refused(tmp_path, sites, columns, message):
    with pytest.raises(CohortError, match=message):
        # read first, since the labels of a row that repeats an id differ too
        read_fold_column(cohort(tmp_path, "site", **columns), index(sites), "site")
        folds_of(tmp_path, index(sites), "site", **columns)


def test_an_excluded_slide_has_no_part_in_folds_of_sites(tmp_path):
    exclude = pl.when(pl.col("slide") == "a2").then(pl.lit("blurred"))
    found = index(of_slides(SITES) | {"a2": "B"}).with_columns(exclude=exclude)
    assert folds_of(tmp_path, found, "site").table["site"].to_list() == list("AABBCCDD")


def test_words_for_no_value_are_missing_in_both_tables(tmp_path):
    study = cohort(tmp_path, patient=["a", "b"], site=["NA", " B "])
    values = read_fold_column(study, index({"a1": "A"}), "site")
    assert values["site"].to_list() == ["A", None, "B", "B"] + [None] * 12
    assert read_fold_column(study, index(), "fold")["fold"].null_count() == 16


def version(folder: Path, folds: object, found: pl.DataFrame, **columns: list[Any]) -> str:
    """The version of the target, by which its folds become stale."""
    snapshot = pl.DataFrame(schema=SNAPSHOT_SCHEMA)
    scan = SlideScan(found, {}, {}, (), (), [], snapshot)
    return target_versions(cohort(folder, folds, **columns), scan)["t"]


def test_a_target_changes_with_the_sites_and_the_folds_that_it_uses(tmp_path):
    found, labels = index(of_slides(SITES)), {"patient": PATIENTS, "fold": [1, 2, 3, 4] * 2}
    other_labels = labels | {"fold": [1, 2, 3, 3, 1, 2, 3, 4]}
    other_site = index(of_slides(SITES | {"a": "B"}))
    before = version(tmp_path, "given", found, **labels)
    assert version(tmp_path, "given", found, **labels) == before
    assert version(tmp_path, "given", found, **other_labels) != before
    assert version(tmp_path, "given", other_site, **labels) != before
    number = version(tmp_path, 3, found, **labels)
    assert version(tmp_path, 3, found, **other_labels) == number
