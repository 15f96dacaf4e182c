from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_core.encoders.splits import SPLITS, split_by_group


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, list[str]]:
    """Draw labels and groups; a group has one or several classes."""
    groups = draw(st.integers(8, 40))
    labels, names = [], []
    for group in range(groups):
        for _ in range(draw(st.integers(1, 12))):
            labels.append(draw(st.integers(0, 2)))
            names.append(f"p{group}")
    return np.array(labels), names


@settings(max_examples=60, deadline=None)
@given(rows(), st.integers(0, 5))
def test_no_group_is_in_two_splits_and_train_has_every_class(data, seed):
    labels, groups = data
    splits = split_by_group(labels, groups, seed=seed)
    of_group: dict[str, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        of_group.setdefault(group, set()).add(split)
    assert all(len(found) == 1 for found in of_group.values())
    assert set(splits) == set(SPLITS)
    trained = {label for label, split in zip(labels, splits, strict=True) if split == "train"}
    assert trained == set(labels)
    assert splits == split_by_group(labels, groups, seed=seed)


def test_fractions_are_60_20_20_in_each_class():
    rng = np.random.default_rng(0)
    groups = [f"p{g}" for g in range(60) for _ in range(20)]
    labels = rng.choice(3, len(groups), p=[0.6, 0.3, 0.1])
    splits = np.array(split_by_group(labels, groups, seed=1))
    for label in range(3):
        shares = [(splits[labels == label] == split).mean() for split in SPLITS]
        assert np.allclose(shares, [0.6, 0.2, 0.2], atol=0.05)


def test_another_seed_gives_another_split():
    groups = [f"p{g}" for g in range(30)]
    labels = np.arange(30) % 2
    assert split_by_group(labels, groups, seed=0) != split_by_group(labels, groups, seed=1)


def test_named_groups_are_the_test_split():
    groups = [f"p{g}" for g in range(20) for _ in range(4)]
    labels = np.arange(80) % 2
    splits = split_by_group(labels, groups, seed=0, test_groups=("p3", "p7"))
    tested = {group for group, split in zip(groups, splits, strict=True) if split == "test"}
    assert tested == {"p3", "p7"}
    assert abs(splits.count("train") / 72 - 0.75) < 0.06


@pytest.mark.parametrize(
    ("groups", "test_groups", "message"),
    [
        (["a", "a", "b", "b"], (), "2 groups cannot"),
        (["a", "b", "c", "d"], ("z",), "do not exist"),
        (["a", "b", "a", "b"], ("a",), "1 groups cannot"),
        (["a", "b", "c", "b"], ("a", "c"), "1 groups cannot"),
    ],
)
def test_impossible_splits_are_refused(groups, test_groups, message):
    with pytest.raises(ValueError, match=message):
        split_by_group(np.array([0, 1, 0, 1]), groups, seed=0, test_groups=test_groups)


def test_a_class_that_only_test_groups_have_is_refused():
    with pytest.raises(ValueError, match="class number 1"):
        split_by_group(np.array([0, 0, 0, 1]), ["a", "b", "c", "d"], seed=0, test_groups=("d",))


def test_one_group_per_class_is_refused():
    with pytest.raises(ValueError, match="too few groups"):
        split_by_group(np.array([0, 1, 2]), ["a", "b", "c"], seed=0)
