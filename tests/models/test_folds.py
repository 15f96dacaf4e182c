"""Folds are by patient, stratified and reproducible."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_core.cohort import ClassificationTarget, CohortError, RegressionTarget, SurvivalTarget
from nic_core.models.folds import check_folds, check_trainable, folds_note, make_folds, split_fold
from nic_core.steps.slide_index import patient_groups

SCORE = RegressionTarget(name="score", kind="regression", column="y")
GROWTH = ClassificationTarget(
    name="growth", kind="classification", column="y", classes=("a", "b", "c")
)
DEATH = SurvivalTarget(name="death", kind="survival", time="time", event="event", unit="days")


def units(**labels):
    count = len(next(iter(labels.values())))
    names = [f"{i:03d}" for i in range(count)]
    return pl.DataFrame(
        {
            "unit": names,
            "patient": names,
            "slides": [[n] for n in names],
            "split": ["cv"] * count,
            **labels,
        }
    )


@given(st.lists(st.integers(0, 2), max_size=50), st.integers(3, 5), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_classes_and_patients_are_divided_evenly(classes, folds, seed):
    table = units(y=classes + [0, 1, 2] * folds)
    dealt = table.join(make_folds(table, target=GROWTH, folds=folds, seed=seed), on="patient")
    per_fold = [dealt.filter(fold=f) for f in range(folds)]
    sizes = [t.height for t in per_fold]
    assert max(sizes) - min(sizes) <= 2
    for c in set(classes):
        counts = [t.filter(y=c).height for t in per_fold]
        assert max(counts) - min(counts) <= 1


@given(st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_neighbours_in_value_go_to_different_folds(seed):
    y = np.random.default_rng(seed).normal(size=40)
    table = units(y=y)
    dealt = table.join(make_folds(table, target=SCORE, folds=4, seed=seed), on="patient").sort("y")
    for start in range(0, 40, 4):
        assert sorted(dealt["fold"][start : start + 4]) == [0, 1, 2, 3]


@given(st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_events_and_their_times_are_divided_evenly(seed):
    random = np.random.default_rng(seed)
    table = units(time=random.exponential(size=41), event=random.random(41) < 0.4)
    dealt = table.join(make_folds(table, target=DEATH, folds=4, seed=seed), on="patient")
    for event in (True, False):
        part = dealt.filter(event=event).sort("time")
        counts = np.bincount(part["fold"], minlength=4)
        assert counts.max() - counts.min() <= 1
        for start in range(0, part.height - 3, 4):
            assert len(set(part["fold"][start : start + 4])) == 4


def test_folds_are_by_patient_and_exclude_the_test_split():
    table = pl.DataFrame(
        {
            "unit": [f"s{i}" for i in range(20)],
            "patient": [f"p{i // 2}" for i in range(20)],
            "split": ["cv"] * 16 + ["test"] * 4,
            "y": [float(i) for i in range(20)],
        }
    )
    folds = make_folds(table, target=SCORE, folds=4, seed=0)
    assert folds["patient"].to_list() == [f"p{i}" for i in range(8)]


def test_folds_depend_on_the_seed_only():
    table = units(y=[i % 3 for i in range(30)])
    first, again, other = (
        make_folds(table, target=GROWTH, folds=4, seed=seed) for seed in (0, 0, 1)
    )
    assert first.equals(again)
    assert not first.equals(other)
    # the order of rows does not matter
    assert first.equals(make_folds(table.reverse(), target=GROWTH, folds=4, seed=0))


def test_check_folds_names_the_wrong_patient():
    table = units(y=[float(i) for i in range(8)])
    folds = make_folds(table, target=SCORE, folds=4, seed=0)
    with pytest.raises(ValueError, match="overlap: patient '000'"):
        check_folds(pl.concat([folds, folds[:1]]), table)
    with pytest.raises(ValueError, match="'000' is in no fold"):
        check_folds(folds[1:], table)
    with pytest.raises(ValueError, match="'007', who is not in split"):
        check_folds(folds, table[:7])


def divided(table, target, wanted):
    """Return the number of folds and the note."""
    folds = make_folds(table, target=target, folds=wanted, seed=0)
    table = table.join(folds, on="patient", how="left")
    return folds["fold"].n_unique(), folds_note(target, table, wanted=wanted)


def test_the_largest_number_of_folds_that_works_is_used():
    assert divided(units(y=[0, 1, 2] * 5), GROWTH, 5) == (5, None)
    count, note = divided(units(y=[0] * 9 + [1] * 4 + [2] * 5), GROWTH, 5)
    assert count == 4
    assert note == "target 'growth': 4 folds instead of 5, since only 4 patients have class 'b'"
    count, note = divided(units(y=[1.0, 2.0, 3.0, 4.0, 5.0]), SCORE, 9)
    assert count == 5
    assert "5 folds instead of 9 (leave-one-patient-out)" in note
    death = units(time=[float(i) for i in range(12)], event=[True] * 3 + [False] * 9)
    assert divided(death, DEATH, 4)[1].endswith("only 3 patients have an event")


@pytest.mark.parametrize(
    ("target", "labels", "message"),
    [
        (GROWTH, {"y": [0, 0, 1, 1, 2]}, "1 of 5 patients in split 'cv' have class 'c'"),
        (SCORE, {"y": [2.0] * 9}, "all 9 labels to train on are 2"),
        (SCORE, {"y": [0.0] * 9 + [1.0]}, "10 patients of split 'cv' cannot be divided"),
        (SCORE, {"y": [1e300, 2e300, 3e300, 4e300]}, "too large"),
        (SCORE, {"y": [1.0, 2.0]}, "2 of 2 patients"),
        (DEATH, {"time": [1.0] * 9, "event": [True] * 2 + [False] * 7}, "2 of 9 patients"),
        (DEATH, {"time": [0.0] * 9, "event": [True] * 9}, "no two can be compared"),
    ],
)
def test_a_target_that_cannot_be_cross_validated_is_refused(target, labels, message):
    with pytest.raises(CohortError, match=message):
        make_folds(units(**labels), target=target, folds=4, seed=0)


def test_few_values_other_than_0_are_never_all_held_out():
    table = units(y=[0.0] * 20 + [3.0, 5.0])
    for seed in range(20):
        folds = make_folds(table, target=SCORE, folds=4, seed=seed)
        check_trainable(SCORE, table.join(folds, on="patient"), 4)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=12, max_size=40),
    st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_no_training_fold_lacks_a_class_where_slides_of_a_patient_differ(slides, seed):
    table = pl.DataFrame(
        {
            "unit": [f"s{i}" for i in range(len(slides))],
            "patient": [f"p{patient}" for patient, _ in slides],
            "split": "cv",
            "y": [y for _, y in slides],
        }
    )
    try:
        folds = make_folds(table, target=GROWTH, folds=4, seed=seed)
    except CohortError:
        return  # refused before anything is trained
    cv, count = table.join(folds, on="patient"), folds["fold"].n_unique()
    for fold in range(count):
        assert split_fold(cv, fold, count)[0]["y"].n_unique() == 3


def test_folds_that_lost_their_grids_are_refused_before_training():
    table = units(y=[0, 1, 2] * 4)
    cv = table.join(make_folds(table, target=GROWTH, folds=4, seed=0), on="patient")
    check_trainable(GROWTH, cv, 4)
    with pytest.raises(CohortError, match="fold 1 of 4 has no unit"):
        check_trainable(GROWTH, cv.filter(pl.col("fold") != 1), 4)
    lost = cv.filter((pl.col("y") != 0) | pl.col("fold").is_in([0, 1]))
    with pytest.raises(CohortError, match="in fold 0 of 4 no unit to train on has class 'a'"):
        check_trainable(GROWTH, lost, 4)


@given(st.lists(st.sets(st.integers(0, 29), min_size=2, max_size=4), max_size=4), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_patients_that_share_slides_are_in_one_fold(shared, seed):
    table = units(y=np.random.default_rng(seed).normal(size=30))
    slides = [f"{i:03d}" for i in range(30)]
    index = pl.DataFrame({"slide": slides, "patient": slides})
    groups = patient_groups(index, [[slides[i] for i in ids] for ids in shared])
    folds = make_folds(table, target=SCORE, folds=4, seed=seed, groups=groups)
    fold = dict(folds.select("patient", "fold").iter_rows())
    assert len(fold) == 30
    for ids in shared:
        assert len({fold[slides[i]] for i in ids}) == 1


def test_patients_that_share_slides_in_both_splits_are_refused():
    table = units(y=np.arange(20.0)).with_columns(
        split=pl.when(pl.col("unit") == "003").then(pl.lit("test")).otherwise("split")
    )
    groups = {"003": "001", "001": "001"}
    with pytest.raises(CohortError, match="patients 001, 003 have slides with the same content"):
        make_folds(table, target=SCORE, folds=4, seed=0, groups=groups)
    assert make_folds(table, target=SCORE, folds=4, seed=0).height == 19


def test_patients_of_one_group_count_once_for_the_number_of_folds():
    table = units(y=np.arange(5.0))
    groups = {"001": "000", "000": "000"}
    folds = make_folds(table, target=SCORE, folds=5, seed=0, groups=groups)
    assert folds["fold"].n_unique() == 4
    note = folds_note(SCORE, table.join(folds, on="patient"), wanted=5, groups=groups)
    assert (
        "(leave-one-patient-out), since only 4 patients have a label (5 patients count as" in note
    )


def test_too_few_patients_after_grouping_are_explained():
    groups = {f"{i:03d}": "000" for i in range(8)}
    with pytest.raises(CohortError, match=r"8 patients count as 1, since slides of theirs have"):
        make_folds(units(y=np.arange(8.0)), target=SCORE, folds=4, seed=0, groups=groups)
