"""The label table: accepted forms, and the messages of refused ones."""

import polars as pl
import pytest

from nic_core.cohort import (
    ClassificationTarget,
    Cohort,
    CohortError,
    RegressionTarget,
    SurvivalTarget,
)
from nic_core.models.labels import LabelMatches, read_labels, shuffle_labels
from nic_core.models.labels import target_table as units_of

SCORE = RegressionTarget(name="score", kind="regression", column="score")
GROWTH = ClassificationTarget(
    name="growth", kind="classification", column="growth", classes=("pushing", "invading")
)
DEATH = SurvivalTarget(name="death", kind="survival", time="time", event="event", unit="days")


def target_table(cohort, target, index):
    return units_of(target, read_labels(cohort, target, index), index)


def match_labels(cohort, target, index) -> LabelMatches:
    return read_labels(cohort, target, index).matches


@pytest.fixture
def index():
    """Eight patients with two slides each; the last two are the test split."""
    return pl.DataFrame(
        [(f"{p}{s}", p, "test" if p in "gh" else "cv") for p in "abcdefgh" for s in (1, 2)],
        schema=["slide", "patient", "split"],
        orient="row",
    ).with_columns(exclude=pl.lit(None, pl.String))


@pytest.fixture
def labels(index):
    patient = {p: i for i, p in enumerate("abcdefgh")}
    return index.select(
        "slide",
        score=pl.col("patient").replace_strict(patient).cast(pl.String),
        growth=pl.Series(["pushing", "pushing", "invading", "invading"] * 4),
        time=pl.Series([str(10 * (i // 2 + 1)) for i in range(16)]),
        event=pl.Series(["1"] * 12 + ["0"] * 4),
    )


@pytest.fixture
def cohort(tmp_path):
    def make(labels, folds=3):
        labels.write_csv(tmp_path / "labels.csv")
        return Cohort.model_validate(
            {
                "name": "c",
                "slides": {"table": "slides.csv"},
                "labels": "labels.csv",
                "encoders": [{"name": "e", "objective": "mean_rgb"}],
                "settings": {"models": {"folds": folds}},
            },
            context={"base": tmp_path},
        )

    return make


def patient_level(target):
    return target.model_copy(update={"level": "patient"})


def change(labels, slide, column, value):
    here = pl.col("slide") == slide
    return labels.with_columns(pl.when(here).then(pl.lit(value)).otherwise(column).alias(column))


def test_slide_level_has_one_unit_per_slide(cohort, labels, index):
    table = target_table(cohort(labels), SCORE, index)
    assert table["unit"].to_list() == index["slide"].to_list()
    assert table["y"].to_list() == [float(i // 2) for i in range(16)]
    assert table.filter(pl.col("split") == "test")["patient"].unique().sort().to_list() == [
        "g",
        "h",
    ]


def test_patient_level_has_all_slides_of_a_patient(cohort, labels, index):
    table = target_table(cohort(labels), patient_level(GROWTH), index)
    assert table["unit"].to_list() == list("abcdefgh")
    assert table["slides"].to_list()[0] == ["a1", "a2"]
    assert table["y"].to_list() == [0, 1] * 4


def test_survival_table_has_time_and_event(cohort, labels, index):
    table = target_table(cohort(labels), patient_level(DEATH), index)
    assert table["time"].to_list() == [10.0 * i for i in range(1, 9)]
    assert table["event"].to_list() == [True] * 6 + [False] * 2


@pytest.mark.parametrize("level", ["slide", "patient"])
def test_table_keyed_by_patient_works_at_both_levels(cohort, labels, index, level):
    by_patient = labels[::2].with_columns(patient=pl.col("slide").str.head(1)).drop("slide")
    target = SCORE.model_copy(update={"level": level})
    table = target_table(cohort(by_patient), target, index)
    assert table.height == (16 if level == "slide" else 8)
    assert table.filter(pl.col("patient") == "c")["y"].unique().to_list() == [2.0]


def test_parquet_and_csv_give_equal_tables(cohort, labels, index, tmp_path):
    made = cohort(labels)
    labels.cast({"score": pl.Float64, "time": pl.Int64, "event": pl.Int8}).write_parquet(
        tmp_path / "labels.parquet"
    )
    other = made.model_copy(update={"labels": tmp_path / "labels.parquet"})
    for target in (SCORE, GROWTH, DEATH):
        assert target_table(made, target, index).equals(target_table(other, target, index))


@pytest.mark.parametrize("missing", ["", "NA", "nan", None])
def test_unlabelled_slides_are_left_out_and_listed(cohort, labels, index, missing):
    made = cohort(change(labels, "b1", "score", missing))
    assert target_table(made, SCORE, index).height == 15
    matches = match_labels(made, SCORE, index)
    assert [str(slide) for slide in matches.slides_without_label] == ["b1"]
    assert (matches.used, matches.labels_without_slide) == (15, [])


def test_ids_match_after_trimming_and_normalisation(cohort, labels, index):
    written = labels.with_columns(pl.col("slide") + " ").rename({"slide": " slide"})
    assert target_table(cohort(written), SCORE, index).height == 16


def test_labels_without_a_slide_are_listed_with_suggestions(cohort, labels, index):
    changed = labels.with_columns(slide=pl.col("slide").replace({"a1": "A1", "b2": "zz"}))
    matches = match_labels(cohort(changed), SCORE, index)
    assert list(map(str, matches.labels_without_slide)) == ["A1 (is it a1?)", "zz"]
    assert list(map(str, matches.slides_without_label)) == ["a1 (is it A1?)", "b2"]
    assert matches.used + len(matches.labels_without_slide) == labels.height


def test_no_matching_id_is_an_error_with_an_example(cohort, labels, index):
    changed = labels.with_columns(slide=pl.col("slide") + ".svs")
    with pytest.raises(CohortError, match=r"for example a1\.svs \(is it a1\?\)"):
        target_table(cohort(changed), SCORE, index)


@pytest.mark.parametrize("name", ["None", "NA", "null"])
def test_a_class_may_be_called_like_a_missing_value(cohort, labels, index, name):
    growth = GROWTH.model_copy(update={"classes": (name, "invading")})
    changed = labels.with_columns(growth=pl.col("growth").replace({"pushing": name}))
    table = target_table(cohort(changed), growth, index)
    assert table["y"].to_list() == [0, 0, 1, 1] * 4


def test_patient_keeps_slides_that_have_no_label(cohort, labels, index):
    changed = change(labels, "b1", "score", None)
    table = target_table(cohort(changed), patient_level(SCORE), index)
    assert table.filter(pl.col("unit") == "b")["slides"].to_list() == [["b1", "b2"]]


@pytest.mark.parametrize(
    ("target", "slide", "column", "value", "words"),
    [
        (SCORE, "c1", "score", "high", ["score", "c1", "high", "not a finite number"]),
        (SCORE, "c1", "score", "inf", ["score", "c1", "inf"]),
        (GROWTH, "c2", "growth", "mixed", ["growth", "c2", "mixed", "pushing, invading"]),
        (DEATH, "d1", "time", "-3", ["time", "d1", "negative"]),
        (DEATH, "d1", "event", "2", ["event", "d1", "not 0 or 1"]),
        (DEATH, "d1", "event", "yes", ["event", "d1", "yes", "not a finite number"]),
        (DEATH, "d1", "time", None, ["time", "d1", "no time"]),
        (DEATH, "d1", "event", None, ["event", "d1", "no event"]),
    ],
)
def test_invalid_label_raises_with_target_column_and_slide(
    cohort, labels, index, target, slide, column, value, words
):
    with pytest.raises(CohortError) as caught:
        target_table(cohort(change(labels, slide, column, value)), target, index)
    for word in [target.name, *words]:
        assert word in str(caught.value)


def test_slides_with_different_labels_raise_at_patient_level(cohort, labels, index):
    changed = change(labels, "c1", "growth", "invading")
    assert target_table(cohort(changed), GROWTH, index).height == 16
    with pytest.raises(CohortError, match=r"c1, c2 of patient 'c'"):
        target_table(cohort(changed), patient_level(GROWTH), index)


def test_equal_rows_count_once_and_are_listed(cohort, labels, index):
    blank = labels[:1].with_columns(score=pl.lit(None, pl.String))
    table = pl.concat([labels, labels[:1].with_columns(score=pl.lit("0.0")), blank])
    matches = match_labels(cohort(table), SCORE, index)
    assert (matches.rows, matches.used) == (18, 16)
    assert (matches.repeated, matches.without_label) == ([18], [19])
    assert target_table(cohort(table), SCORE, index).height == 16


def test_rows_of_one_id_with_different_labels_are_refused(cohort, labels, index):
    table = pl.concat([labels, labels[:1].with_columns(score=pl.lit("9"))])
    with pytest.raises(CohortError, match=r"slide 'a1' has different labels in rows 2, 18"):
        match_labels(cohort(table), SCORE, index)


def test_labels_without_an_id_are_listed_by_row(cohort, labels, index):
    table = change(labels, "a2", "slide", None)
    matches = match_labels(cohort(table), SCORE, index)
    assert (matches.used, matches.without_id) == (15, [3])
    assert list(map(str, matches.slides_without_label)) == ["a2"]


def test_patients_without_slides_are_listed(cohort, labels, index):
    by_patient = labels[::2].with_columns(patient=pl.col("slide").str.head(1)).drop("slide")
    extra = by_patient[:1].with_columns(patient=pl.lit("z"))
    matches = match_labels(cohort(pl.concat([by_patient, extra])), SCORE, index)
    assert (matches.key, matches.used) == ("patient", 8)
    assert list(map(str, matches.labels_without_slide)) == ["z"]


@pytest.mark.parametrize("text", ["none", "NONE"])
def test_a_class_in_other_case_is_refused_even_if_it_reads_as_missing(cohort, labels, index, text):
    growth = GROWTH.model_copy(update={"classes": (text, "invading")})
    with pytest.raises(CohortError, match=rf"class 'None'.*\(is it {text}\?\)"):
        target_table(cohort(change(labels, "a1", "growth", "None")), growth, index)


@pytest.mark.parametrize(("yes", "no"), [("TRUE", "FALSE"), ("True", "False"), ("1.0", "0.0")])
def test_events_may_be_written_as_true_and_false(cohort, labels, index, yes, no):
    words = labels.with_columns(event=pl.col("event").replace({"1": yes, "0": no}))
    expected = target_table(cohort(labels), DEATH, index)
    assert target_table(cohort(words), DEATH, index).equals(expected)


def test_columns_that_hold_no_labels_are_refused(cohort, labels, index, tmp_path):
    made = cohort(labels).model_copy(update={"labels": tmp_path / "labels.parquet"})
    dates = pl.date_range(pl.date(2020, 1, 1), pl.date(2020, 1, 16))
    for changed, target, message in (
        (labels.with_columns(time=dates), DEATH, "is a date"),
        (labels.with_columns(growth=pl.concat_list("growth")), GROWTH, "holds List"),
        (labels.with_columns(slide=pl.concat_list("slide")), SCORE, "holds List"),
    ):
        changed.write_parquet(tmp_path / "labels.parquet")
        with pytest.raises(CohortError, match=message):
            target_table(made, target, index)


def test_label_table_without_key_column_or_overlap_raises(cohort, labels, index):
    with pytest.raises(CohortError, match=r"no column 'slide' or 'patient'"):
        target_table(cohort(labels.rename({"slide": "id"})), SCORE, index)
    with pytest.raises(CohortError, match=r"no column 'score'"):
        target_table(cohort(labels.drop("score")), SCORE, index)
    with pytest.raises(
        CohortError, match="none of the 16 labelled ids in column 'slide' is in the slide index"
    ):
        target_table(cohort(labels.with_columns(pl.col("slide") + ".tif")), SCORE, index)


def test_patient_in_both_splits_raises(cohort, labels, index):
    mixed = index.with_columns(
        split=pl.when(pl.col("slide") == "a1").then(pl.lit("test")).otherwise("split")
    )
    with pytest.raises(CohortError, match="patient 'a' has slides in both splits"):
        target_table(cohort(labels), SCORE, mixed)


def test_shuffled_labels_come_from_patients_of_the_same_split(cohort, labels, index):
    table = target_table(cohort(labels), SCORE, index)
    shuffled = shuffle_labels(table, seed=0)
    assert shuffled.drop("y").equals(table.drop("y"))
    assert not shuffled["y"].equals(table["y"])
    for split in ("cv", "test"):
        before, after = (sorted(t.filter(pl.col("split") == split)["y"]) for t in (table, shuffled))
        assert before == after
    # slides of a patient have equal labels before and after
    assert shuffled.group_by("patient").agg(pl.col("y").n_unique())["y"].to_list() == [1] * 8


def test_labels_of_excluded_slides_are_listed(cohort, labels, index):
    reason = pl.when(pl.col("slide").is_in(["a1", "b1", "b2"])).then(pl.lit("blurred"))
    found = match_labels(cohort(labels), SCORE, index.with_columns(exclude=reason))
    assert (found.used, found.excluded) == (13, ["a1", "b1", "b2"])
    by_patient = labels.select(patient=pl.col("slide").str.head(1), score="score").unique()
    found = match_labels(cohort(by_patient), SCORE, index.with_columns(exclude=reason))
    assert (found.used, found.excluded) == (7, ["b"])  # patient a has another slide


def test_other_patients_than_in_the_slide_index_are_refused(cohort, labels, index):
    patients = index["patient"].to_list()
    same = labels.with_columns(patient=pl.Series([f"{p}\u00a0" for p in patients]))
    assert match_labels(cohort(same), SCORE, index).used == 16
    missing = labels.with_columns(patient=pl.Series([None, "NA", *patients[2:]]))
    assert match_labels(cohort(missing), SCORE, index).used == 16
    other = labels.with_columns(patient=pl.Series(["b", "B", *patients[2:]]))
    message = r"2 slides have another patient.*slide 'a1' \(row 2\): 'b' instead of 'a'"
    with pytest.raises(CohortError, match=message):
        match_labels(cohort(other), SCORE, index)
