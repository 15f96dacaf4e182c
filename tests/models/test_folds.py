"""Folds are by patient, stratified and reproducible; folds of sites and published folds."""

from itertools import product

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from nic_core.cohort import (
    ClassificationTarget,
    CohortError,
    RegressionTarget,
    SiteFolds,
    SurvivalTarget,
)
from nic_core.models.folds import (
    ORDERS,
    _deal_sites,
    check_folds,
    check_trainable,
    folds_note,
    make_folds,
    make_site_folds,
    named_folds,
    split_fold,
)
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


# --- sites and published folds -----------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=9, max_size=60),
    st.integers(3, 5),
    st.integers(0, 9),
)
@settings(max_examples=100)
def test_a_site_is_in_one_fold_and_every_patient_is_assigned(patients, count, seed):
    table = units(y=[y for _, y in patients])
    sites = {f"{i:03d}": f"site {site}" for i, (site, _) in enumerate(patients)}
    try:
        folds = make_site_folds(table, target=GROWTH, sites=sites, count=count, seed=seed)
    except CohortError:
        return  # too few sites, or some fold cannot be trained
    check_folds(folds, table)
    found = folds["fold"].n_unique()
    assert found <= min(count, len(set(sites.values())))
    check_trainable(GROWTH, table.join(folds, on="patient"), found)
    of_site = folds.with_columns(site=pl.col("patient").replace_strict(sites))
    assert (of_site.group_by("site").agg(pl.col("fold").n_unique())["fold"] == 1).all()
    again = make_site_folds(table.reverse(), target=GROWTH, sites=sites, count=count, seed=seed)
    assert again.equals(folds)


@given(st.lists(st.integers(1, 40), min_size=5, max_size=30), st.integers(3, 5), st.integers(0, 9))
def test_sizes_of_folds_differ_by_at_most_the_largest_site(sizes, folds, seed):
    counts = np.array(sizes, float)[:, None]
    assigned, imbalance = _deal_sites(counts, folds, np.random.default_rng(seed))
    totals = np.bincount(assigned, weights=sizes, minlength=folds)
    assert np.ptp(totals) <= max(sizes)
    share = sum(sizes) / folds
    assert imbalance == pytest.approx(((totals - share) ** 2 / share).sum())


def other_imbalance(counts: np.ndarray) -> float:
    """The imbalance of scikit-learn's division of the sites into 3 folds, the best of 16."""
    strata = counts.shape[1]
    site, y = np.indices(counts.shape).reshape(2, -1).repeat(counts.astype(int).ravel(), axis=1)
    imbalances, share = [], counts.sum(0) / 3
    for seed in range(ORDERS):
        splits = StratifiedGroupKFold(3, shuffle=True, random_state=seed).split(site, y, site)
        totals = np.array([np.bincount(y[test], minlength=strata) for _, test in splits])
        imbalances.append(((totals - share) ** 2 / share).sum())
    return min(imbalances)


def test_labels_are_balanced_over_folds_of_sites_nearly_as_well_as_possible():
    found, optimal, other = [], [], []
    for seed in range(6):
        random = np.random.default_rng(seed)
        sizes = random.integers(3, 40, 8)
        counts = np.array([random.multinomial(n, random.dirichlet([3, 2])) for n in sizes]) + 1.0
        share = counts.sum(0) / 3
        found.append(
            min(_deal_sites(counts, 3, np.random.default_rng(s))[1] for s in range(ORDERS))
        )
        every = np.array(list(product(range(3), repeat=8)))
        totals = np.stack([(every == fold) @ counts for fold in range(3)], 1)
        optimal.append(((totals - share) ** 2 / share).sum((1, 2)).min())
        other.append(other_imbalance(counts))
    assert np.mean(found) <= 1.5 * np.mean(optimal)
    assert np.mean(other) > 2 * np.mean(found)
    assert (np.array(found) >= np.array(optimal) - 1e-9).all()


def test_each_class_is_divided_over_folds_of_equal_sites():
    # 12 sites of 4 patients; half of the sites have class 0 only, and the others 1 and 2
    y = [0, 0, 0, 0] * 6 + [1, 1, 2, 2] * 6
    sites = {f"{i:03d}": f"{i // 4}" for i in range(48)}
    table = units(y=y)
    folds = make_site_folds(table, target=GROWTH, sites=sites, count=3, seed=0)
    counts = table.join(folds, on="patient").group_by("fold", "y").len()
    assert counts.sort("y", "fold")["len"].to_list() == [8, 8, 8, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("target", "labels"),
    [
        (SCORE, {"y": np.arange(60.0)}),
        (DEATH, {"time": np.arange(60.0), "event": [i % 3 == 0 for i in range(60)]}),
    ],
)
def test_numbers_and_events_are_balanced_over_folds_of_sites(target, labels):
    # the labels rise with the number of the site
    table = units(**labels)
    sites = {f"{i:03d}": f"{i // 4}" for i in range(60)}
    folds = make_site_folds(table, target=target, sites=sites, count=3, seed=0)
    dealt = table.join(folds, on="patient")
    value = labels.get("event", labels.get("y"))
    means = [np.mean(np.array(value)[dealt["fold"].to_numpy() == fold]) for fold in range(3)]
    assert np.ptp(means) < 0.5 * np.std(value)


def test_a_fold_of_each_site_is_validated_on_the_next_one():
    table = units(y=[0, 1, 2] * 4)
    names = {f"{i:03d}": f"centre {(2, 10, 1, 9)[i // 3]}" for i in range(12)}
    folds = named_folds(table, target=GROWTH, names=names, column="site")
    assert folds["fold_name"].to_list() == [names[patient] for patient in folds["patient"]]
    ordered = folds.unique("fold").sort("fold")["fold_name"].to_list()
    assert ordered == ["centre 1", "centre 2", "centre 9", "centre 10"]
    train, validation, test = split_fold(table.join(folds, on="patient"), 3, 4)
    assert set(test["fold_name"]) == {"centre 10"}
    assert set(validation["fold_name"]) == {"centre 1"}
    assert set(train["fold_name"]) == {"centre 2", "centre 9"}


@given(st.lists(st.sampled_from(["A", "B", "C", "3", "10", "²"]), min_size=6, max_size=30))
def test_published_folds_are_kept(given_folds):
    table = units(y=np.arange(float(len(given_folds))))
    names = {f"{i:03d}": name for i, name in enumerate(given_folds)}
    try:
        folds = named_folds(table, target=SCORE, names=names, column="fold")
    except CohortError:
        return  # fewer than three folds, or too few training labels
    check_folds(folds, table)
    assert dict(folds.select("patient", "fold_name").iter_rows()) == names
    pairs = set(folds.select("fold", "fold_name").iter_rows())
    assert [fold for fold, _ in sorted(pairs)] == list(range(len(set(given_folds))))


def refused(message, function, table, target=GROWTH, **options):
    with pytest.raises(CohortError, match=message):
        function(table, target=target, **options)


def test_sites_and_folds_that_cannot_be_used_are_refused_with_a_remedy():
    table = units(y=[0, 1, 2] * 4)
    two = {f"{i:03d}": "AB"[i % 2] for i in range(12)}
    message = (
        "column 'site': the labelled patients of split 'cv' have 2 sites \\('A', 'B'\\); "
        "cross-validation needs at least 3; set settings.models.folds to a number"
    )
    refused(message, make_site_folds, table, sites=two, count=3, seed=0)
    refused(message, named_folds, table, names=two, column="site")
    refused("have 2 folds", named_folds, table, names=two, column="fold")
    one_class_each = {f"{i:03d}": "ABC"[i % 3] for i in range(12)}
    message = "in fold 0 of 3 \\(test 'A', validation 'B'\\) no unit to train on has class 'a'"
    refused(f"{message}; correct", named_folds, table, names=one_class_each, column="fold")
    refused(f"{message}; write small", named_folds, table, names=one_class_each, column="site")
    refused(
        "the 3 sites of split 'cv' cannot be divided into 3 or more folds: in fold 0 of 3 no unit",
        *(make_site_folds, table),
        sites=one_class_each,
        count=3,
        seed=0,
    )
    events = units(time=np.arange(12.0), event=[i % 4 > 0 for i in range(12)])
    sites = {f"{i:03d}": "ABCD"[i % 4] for i in range(12)}
    message = "validation 'A'\\) none of the 3 units to validate on has an event; write small sites"
    refused(message, named_folds, events, target=DEATH, names=sites, column="site")


def test_patients_that_share_slides_in_two_sites_or_folds_are_refused():
    table, groups = units(y=[0, 1, 2] * 4), {"000": "000", "001": "000"}
    names = {f"{i:03d}": "ABCD"[i % 4] for i in range(12)}
    message = "patients 000 and 001 have slides with the same content and are in two {}s, 'A' and"
    refused(message.format("fold"), named_folds, table, names=names, column="fold", groups=groups)
    refused(
        message.format("site"),
        *(make_site_folds, table),
        sites=names,
        count=3,
        seed=0,
        groups=groups,
    )
    both = table.with_columns(split=pl.when(unit="001").then(pl.lit("test")).otherwise("split"))
    refused("both splits", named_folds, both, names=names, column="site", groups=groups)


def test_sites_of_the_test_split_alone_make_no_fold():
    table = units(y=[0, 1, 2] * 4 + [0]).with_columns(
        split=pl.when(unit="012").then(pl.lit("test")).otherwise("split")
    )
    names = {f"{i:03d}": "ABCD"[i // 3] for i in range(12)}
    assert named_folds(table, target=GROWTH, names=names, column="site").height == 12
    sites = make_site_folds(table, target=GROWTH, sites=names, count=4, seed=0)
    assert sites.height == 12


def test_fewer_folds_of_sites_than_requested_are_explained():
    table = units(y=[0, 1, 2] * 4)
    sites = {f"{i:03d}": "ABCD"[i // 3] for i in range(12)}

    def note(y):
        labelled = table.with_columns(y=pl.Series(y))
        folds = make_site_folds(labelled, target=GROWTH, sites=sites, count=5, seed=0)
        site = pl.col("patient").replace_strict(sites)
        labelled = labelled.join(folds, on="patient").with_columns(site=site)
        return folds_note(GROWTH, labelled, wanted=SiteFolds(by="site", count=5))

    assert note([0, 1, 2] * 4) == (
        "target 'growth': 4 folds instead of 5, since there are only 4 sites"
    )
    assert folds_note(GROWTH, table, wanted="site") is None
