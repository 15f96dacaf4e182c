"""The HTML report: what it contains, and what it must not contain."""

from __future__ import annotations

import base64
import re
import shutil
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from typer.testing import CliRunner

from nic_core import steps
from nic_core.cli import app
from nic_core.reports.html import (
    DataTable,
    Document,
    Flow,
    Heading,
    Items,
    PdfError,
    Picture,
    Section,
    Stage,
    Text,
    drawn_figure,
    pdf_of_html,
    photograph,
    render_html,
)
from nic_core.steps.report_sections import WITHHELD, FailedCheck, public_text
from nic_core.store import Store

HOSTILE = "<script>alert('x')</script> & \"quoted\""
SECTIONS = (
    *("Cohort", "Splits and folds", "Encoders", "Results", "Comparisons"),
    *("Checks that failed", "Methods", "Limits", "All metrics", "Software and hashes"),
)


@dataclass
class Page(HTMLParser):
    """Elements and text of an HTML page."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, *names: str) -> list[str]:
        return [v for _, attrs in self.elements for k, v in attrs.items() if k in names and v]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def page(html: str) -> Page:
    parsed = Page()
    parsed.feed(html)
    parsed.close()
    return parsed


def check_is_self_contained(html: str) -> Page:
    """Check that nothing is loaded, and that links and pictures are complete."""
    parsed = page(html)
    loading = {"script", "link", "iframe", "object", "base"}
    assert not {tag for tag, _ in parsed.elements} & loading
    assert all(
        v.startswith("data:image/") for v in parsed.values("src", "srcset", "data", "poster")
    )
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in parsed.values("href")} <= set(ids)
    assert all(link.startswith("#") for link in parsed.values("href"))
    assert all(attrs.get("alt") for tag, attrs in parsed.elements if tag == "img")
    [style] = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in parsed.values("content")[-1]
    return parsed


def document(text: str) -> Document:
    """A document in which a text stands in every place that holds one."""
    blocks = (
        Heading(text),
        Text(text),
        Items((text, text)),
        DataTable(text, (text, text), ((text, text),)),
        Picture(photograph(np.zeros((4, 6, 3), np.uint8), side=4), text, text),
        Flow((Stage(text, 3, 2, ((text, 1),)), Stage(text, 2, 1))),
        Heading(text),
    )
    return Document(text, text, (Section(text, blocks), Section(text, blocks)))


def test_a_hostile_text_is_shown_as_text():
    html = render_html(document(HOSTILE))
    parsed = check_is_self_contained(html)
    assert "<script" not in html
    assert HOSTILE in parsed.text


@settings(max_examples=30)
@given(st.text(min_size=1).filter(str.strip))
def test_any_text_leaves_the_page_self_contained(text):
    assert len(check_is_self_contained(render_html(document(text))).elements) > 40


def test_equal_figures_give_equal_pictures_and_many_points_a_png():
    def figure(points: int) -> Figure:
        drawn = Figure()
        drawn.subplots().plot(np.random.default_rng(0).random(points), "o", rasterized=False)
        return drawn

    assert drawn_figure(figure(5)) == drawn_figure(figure(5))
    assert drawn_figure(figure(5)).startswith("data:image/svg+xml;base64,")
    assert drawn_figure(figure(20_000)).startswith("data:image/png;base64,")


def test_a_photograph_is_scaled_down_to_its_longest_side():
    uri = photograph(np.full((300, 600, 3), 200, np.uint8), side=100)
    content = base64.b64decode(uri.partition(",")[2])
    assert content[:2] == b"\xff\xd8"
    assert len(content) < 2000


# --- what people wrote ------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["blurred", "pen ink", "no consent", "60 %"]), min_size=1)


@given(WORDS, st.integers(0, 5), st.sampled_from(["T-0042", "Jansen, P.", "s 1", "é.svs"]))
def test_a_reason_with_an_id_is_withheld(words, place, name):
    reason = " ".join([*words[:place], name, *words[place:]])
    assert public_text(reason, {name, "other"}) == WITHHELD
    assert public_text(" ".join(words), {name, "other"}) == " ".join(words)


@pytest.mark.parametrize(
    "reason",
    [
        *("see /data/a.svs", "C:\\scans\\a.svs is cut", "copy in ../old/b.tif", "'~/x y' is bad"),
        *("scans/2020/c.ndpi cannot be read", "\\\\server\\share\\x"),
    ],
)
def test_a_reason_with_a_path_is_withheld(reason):
    assert public_text(reason, set()) == WITHHELD


@pytest.mark.parametrize(
    "reason", ["H/E stain failed", "blurred and/or folded", "1/2 of it, 3.5 %"]
)
def test_a_slash_in_a_reason_is_no_path(reason):
    assert public_text(reason, set()) == reason


# --- the report of a study --------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(mean_rgb_study, tmp_path_factory):
    """A copy of the store whose index has excluded slides, and one slide without a record."""
    cohort, made = mean_rgb_study
    store = Store(tmp_path_factory.mktemp("report") / "Jansen" / "store")
    shutil.copytree(made.root, store.root)
    index = pl.read_parquet(store.slide_index)
    first, second, third, fourth = index["slide"][:4]
    reasons = {first: f"withdrawn by {index['patient'][0]}", second: "blurred", third: HOSTILE}
    index.with_columns(
        exclude=pl.col("slide").replace_strict(reasons, default=None, return_dtype=pl.String),
        site=pl.lit("<b>North</b>"),
    ).write_parquet(store.slide_index)
    shutil.rmtree(store.slide(fourth))
    return cohort, store


@pytest.fixture(scope="module")
def report(study):
    return steps.collect_report(*study)


FAILED = FailedCheck("grid", "embeddings_finite", HOSTILE, 2, 24)


@pytest.fixture(scope="module")
def made(study, report):
    return steps.report_document(*study, report, [FAILED])


def test_the_report_has_every_section_and_loads_nothing(made):
    parsed = check_is_self_contained(render_html(made))
    assert tuple(section.title for section in made.sections) == SECTIONS
    assert "Spearman" in parsed.text
    assert len(render_html(made)) < 10e6


def test_the_report_names_no_slide_patient_or_path(study, made):
    cohort, store = study
    html = render_html(made)
    index = pl.read_parquet(store.slide_index)
    names = {*index["slide"], *index["patient"]} - {""}
    assert not {name for name in names if name in html}
    assert not {p for p in (store.root, cohort.file.parent, Path.home()) if str(p) in html}
    assert "Jansen" not in html
    assert "&lt;b&gt;North&lt;/b&gt;" in html


def test_slides_that_leave_the_flow_are_counted(study, made):
    (flow,) = (block for block in made.sections[0].blocks if isinstance(block, Flow))
    slides = pl.read_parquet(study[1].slide_index).height
    assert [stage.slides for stage in flow.stages] == [slides, slides, slides - 3, slides - 4]
    for stage, following in zip(flow.stages, flow.stages[1:], strict=False):
        assert stage.slides - sum(count for _, count in stage.left_out) == following.slides
    excluded = dict(flow.stages[1].left_out)
    wanted = (WITHHELD, "blurred", HOSTILE)
    assert excluded == {f"excluded: {reason}": 1 for reason in wanted}
    assert dict(flow.stages[2].left_out) == {"not processed yet, or its processing failed": 1}


def test_the_folds_add_up_to_the_labelled_units(study, made):
    cohort, store = study
    tables = [b for b in made.sections[1].blocks if isinstance(b, DataTable)]
    assert len(tables) == len(cohort.targets)
    for target, shown in zip(cohort.targets, tables, strict=True):
        folds = pl.read_parquet(store.target_folds(target.name))
        units = [int(row[shown.columns.index("units")]) for row in shown.rows]
        assert sum(units) == folds.height
        assert len(shown.rows) == folds.select("split", "fold").unique().height
        if target.kind == "classification":
            classes = [sum(int(c) for c in row[-len(target.classes) :]) for row in shown.rows]
            assert classes == units
        if target.kind == "survival":
            events = sum(int(row[shown.columns.index("events")]) for row in shown.rows)
            assert events == folds["event"].sum()


def test_the_values_are_those_of_the_table_of_results(report, made):
    shown = render_html(made)
    for row in report.results.filter(kind="target").drop_nulls("value").iter_rows(named=True):
        assert f"{row['value']:.3f}" in shown


def test_the_methods_name_the_settings_and_their_source(study, made):
    text = page(render_html(Document("", "", (made.sections[SECTIONS.index("Methods")],)))).text
    models = study[0].settings.models
    for part in (
        f"{models.epochs} epochs",
        f"{models.bootstrap} bootstrap samples",
        f"{models.crop_um:g} um",
        f"{models.folds} folds",
        "[A]",
        "[B]",
        "[choice]",
        "Cox partial likelihood",
    ):
        assert part in text


def test_the_checks_of_the_orchestrator_are_listed(made):
    (table,) = made.sections[SECTIONS.index("Checks that failed")].blocks
    assert table.rows == (("grid", "embeddings_finite", HOSTILE, "2 of 24"),)


def test_the_command_writes_the_report_and_leaves_the_store(study, tmp_path):
    cohort, store = study
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    arguments = ["--cohort", str(cohort.file), "--store", str(store.root)]
    done = CliRunner().invoke(app, ["report", *arguments, "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    check_is_self_contained((tmp_path / "r.html").read_text())
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


def test_a_store_without_slide_index_is_one_line(study, tmp_path):
    arguments = ["--cohort", str(study[0].file), "--store", str(tmp_path)]
    done = CliRunner().invoke(app, ["report", *arguments, "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 1
    assert "slide_index" in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "r.html").exists()


def test_a_pdf_without_weasyprint_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    with pytest.raises(PdfError, match=r"pip install 'nic-pathology\[pdf\]'"):
        pdf_of_html("<p>x</p>")


def test_the_pdf_holds_the_report():
    try:
        pdf = pdf_of_html(render_html(document(HOSTILE)))
    except PdfError as error:
        pytest.skip(str(error))
    assert pdf.startswith(b"%PDF-")
    assert len(pdf) > 5000
