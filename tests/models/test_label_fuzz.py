"""Mutated label tables: every one is refused with a CohortError or accounted for, row by row."""

from __future__ import annotations

import csv
import io
import unicodedata

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nic_core.cohort import ClassificationTarget, CohortError, RegressionTarget, SurvivalTarget
from nic_core.cohort.fields import normalise
from nic_core.cohort.file import Cohort
from nic_core.models.folds import make_folds
from nic_core.models.labels import read_labels, target_table

SLIDES = [f"{i:03d}" for i in range(8)] + ["Präp 1", "b-1.x"]
PATIENTS = ["p1", "p1", "p2", "p3", "p4", "p5", "p6", "P6", "ä", "NA"]
INDEX = pl.DataFrame(
    {
        "slide": SLIDES,
        "patient": PATIENTS,
        "split": ["cv"] * 9 + ["test"],
        "exclude": [None] * 4 + ["blurred"] + [None] * 5,
    }
)
USED = INDEX.filter(pl.col("exclude").is_null())
TARGETS = [
    RegressionTarget(name="score", kind="regression", column="score"),
    RegressionTarget(name="mean", kind="regression", column="score", level="patient"),
    ClassificationTarget(
        name="grade", kind="classification", column="grade", classes=("None", "low", "1")
    ),
    ClassificationTarget(
        name="type", kind="classification", column="grade", classes=("low", "1"), level="patient"
    ),
    SurvivalTarget(name="death", kind="survival", time="time", event="event", unit="days"),
]
SPELLINGS = [
    str,
    str.upper,
    lambda text: f" {text}\u00a0",
    lambda text: f"\u200b{text}",
    lambda text: f"{text}.svs",
    lambda text: text.lstrip("0"),
    lambda text: unicodedata.normalize("NFD", text),
    lambda text: f"{text}\nx",
    lambda text: "",
]
NUMBERS = [
    "1",
    "2.5",
    "0,5",
    "1,234",
    "-3",
    "1e400",
    "inf",
    "nan",
    "",
    "NA",
    "x",
    "٣",
    "1_0",
    " 4 ",
]
GRADES = ["None", "none", "low", " low", "Low", "1", "1.0", "", "null", 'a "b"', "a;b,c"]
EVENTS = ["0", "1", "1.0", "TRUE", "false", "", "2", "yes"]


def mostly(usual: list[str], strange: list[str]) -> st.SearchStrategy[str]:
    """Values of ``usual``, and now and then one of ``strange``."""
    return st.sampled_from(usual * (4 * len(strange)) + strange)


IDS = st.permutations([*SLIDES, "elsewhere"]) | st.permutations([*PATIENTS, "elsewhere"])
SPELLING = st.sampled_from(SPELLINGS[:1] * 30 + SPELLINGS)
VALUES = st.tuples(
    mostly(["1", "2.5", "7"], NUMBERS),
    mostly(["low", "1", "None"], GRADES),
    mostly(["3", "4.5"], NUMBERS),
    mostly(["0", "1"], EVENTS),
)
HEADERS = mostly(["slide", "patient"], [" slide ", "Slide", "\ufeffslide", "id", "score", ""])


@st.composite
def csv_files(draw: st.DrawFn) -> bytes:
    text = io.StringIO(newline="")
    if draw(st.integers(0, 9)) == 0:
        text.write("sep=;\n")
    writer = csv.writer(
        text,
        delimiter=draw(st.sampled_from(",;\t")),
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"])),
    )
    writer.writerow([draw(HEADERS), "score", "grade", "time", "event"])
    ids = draw(IDS)[: draw(st.integers(0, 12))]
    rows = [(draw(SPELLING)(name), *draw(VALUES)) for name in ids]
    rows += [rows[i] for i in draw(st.lists(st.integers(0, 20), max_size=1)) if i < len(rows)]
    writer.writerows(rows)
    data = text.getvalue().encode(
        draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "latin-1"])), "replace"
    )
    if data and draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(data) - 1))
        data = data[:place] + draw(st.binary(max_size=3)) + data[place + 1 :]
    return data


def accounted(path, target) -> int:
    """Read a table as the asset ``target_folds`` does; return the number of rows, 0 if refused."""
    cohort = Cohort.model_construct(labels=path)
    try:
        labels = read_labels(cohort, target, INDEX)
    except CohortError:
        return 0
    found = labels.matches
    unused = (found.labels_without_slide, found.excluded)
    lists = (found.repeated, found.without_label, found.without_id, *unused)
    assert found.rows == found.used + sum(map(len, lists))
    labelled = labels.rows[found.key].to_list()
    assert len(labelled) == len(set(labelled)) == found.used + sum(map(len, unused))
    listed = {item.name for item in found.slides_without_label}
    assert listed == set(USED.filter(~pl.col(found.key).is_in(labelled))["slide"])
    try:
        units = target_table(target, labels, USED)
        folds = make_folds(units, target=target, folds=4, seed=0)
    except CohortError:
        return found.rows
    assert target.level == "patient" or set(units["unit"]) == set(USED["slide"]) - listed
    assert set(folds["patient"]) == set(units.filter(split="cv")["patient"])
    return found.rows


@pytest.mark.slow
@given(csv_files(), st.sampled_from(TARGETS))
@settings(max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
def test_every_row_of_a_mutated_csv_is_used_or_listed(tmp_path_factory, data, target):
    path = tmp_path_factory.getbasetemp() / "labels.csv"
    path.write_bytes(data)
    rows = accounted(path, target)
    if rows:
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = data.decode(encoding)
        lines = [
            row for row in csv.reader(io.StringIO(text, newline="")) if any(map(normalise, row))
        ]
        if "\t" not in text and ";" not in text:
            assert rows == len(lines) - 1
        else:
            assert rows <= len(lines)


COLUMNS = [
    st.sampled_from([1.0, 2.0, float("nan"), None, float("inf")]),
    st.sampled_from([1, 2, None]),
    st.sampled_from([True, False, None]),
    st.sampled_from(["1", "low", "None", " ", None, "2,5"]),
    st.dates(),
    st.binary(max_size=2),
    st.lists(st.integers(0, 2), max_size=2),
]


@pytest.mark.slow
@given(st.data(), st.sampled_from(TARGETS))
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
def test_every_row_of_a_mutated_parquet_is_used_or_listed(tmp_path_factory, data, target):
    rows = data.draw(st.integers(0, 8))

    def column(values: st.SearchStrategy) -> pl.Series:
        drawn = data.draw(st.lists(values, min_size=rows, max_size=rows))
        return pl.Series(drawn, strict=False)

    key = data.draw(st.sampled_from(["slide", "patient"]))
    table = pl.DataFrame(
        {
            key: column(data.draw(st.sampled_from([st.sampled_from(SLIDES), *COLUMNS]))),
            **{
                name: column(data.draw(st.sampled_from(COLUMNS)))
                for name in ("score", "grade", "time", "event")
            },
        }
    )
    if data.draw(st.booleans()):
        text = pl.col(pl.String)
        table = table.with_columns(text.cast(pl.Categorical))
    path = tmp_path_factory.getbasetemp() / "labels.parquet"
    table.write_parquet(path)
    accounted(path, target)
