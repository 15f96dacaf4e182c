"""Looking at a cohort's files: what counts as a change, and what it costs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nic_core import steps
from nic_core.cohort import Cohort, CohortError, load_cohort
from nic_core.slides.watch import look
from nic_core.store import Store


class Folder:
    """A folder of files that stand for slides, looked at again and again."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Store(root / "store")
        (root / "wsi").mkdir()
        (root / "cohort.yaml").write_text(
            "name: c\nslides: {folders: [{path: wsi}]}\n"
            "encoders: [{name: rgb, objective: mean_rgb}]\n"
        )
        self.marks: tuple[str, ...] = ()

    @property
    def cohort(self) -> Cohort:
        return load_cohort(self.root / "cohort.yaml")

    def put(self, name: str, content: str) -> None:
        (self.root / "wsi" / f"{name}.tif").write_text(content)

    def look(self) -> tuple[set[str], set[str]]:
        """Names of the files that are settled, and of those that move."""
        found = look(self.cohort, steps.read_seen(self.store), self.marks)
        self.marks = found.marks
        self.moving = found.moving
        return {Path(p).stem for p in found.settled}, {Path(p).stem for p in found.moving}

    def find(self, **options: object) -> steps.Found:
        """Find the slides, and take in what was found."""
        found = steps.find_slides(self.cohort, self.store, **options)
        steps.write_found(self.store, found)
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    for name in ("a", "b", "c"):
        folder.put(name, f"slide {name}")
    folder.find()
    return folder


def test_nothing_has_changed(folder):
    assert folder.look() == (set(), set())


def test_a_new_file_is_settled_once_two_looks_found_the_same(folder):
    folder.put("d", "half")
    assert folder.look() == (set(), {"d"})
    folder.put("d", "half and half")
    assert folder.look() == (set(), {"d"})
    assert folder.look() == ({"d"}, set())
    assert folder.look() == ({"d"}, set()), "until it is taken in"
    folder.find()
    assert folder.look() == (set(), set())


def test_a_file_that_is_being_written_does_not_hold_up_another(folder):
    folder.put("d", "whole")
    folder.put("e", "half")
    folder.look()
    folder.put("e", "half and half")
    assert folder.look() == ({"d"}, {"e"})
    found = folder.find(leave=folder.moving)
    assert found.index["slide"].to_list() == ["a", "b", "c", "d"]
    assert folder.look() == ({"e"}, set())


def test_a_known_file_that_is_being_written_stays_what_it_was(folder):
    before = folder.find().versions
    folder.put("a", "half")
    folder.put("d", "new")
    folder.look()
    found = folder.find(leave=[str(folder.root / "wsi" / "a.tif")])
    assert found.versions["a"] == before["a"]
    assert "d" in found.versions
    assert folder.look() == ({"a"}, set())
    assert folder.find().versions["a"] != before["a"]


def test_a_vanished_file_is_gone_at_the_second_look(folder):
    (folder.root / "wsi" / "b.tif").unlink()
    assert folder.look() == (set(), {"b"})
    assert folder.look() == ({"b"}, set())
    assert folder.find().gone == ["b"]
    assert folder.look() == (set(), set())


def test_content_counts_not_time_alone(folder):
    before = folder.find().versions
    os.utime(folder.root / "wsi" / "a.tif", ns=(1, 1))
    folder.look()
    assert folder.look() == ({"a"}, set())
    assert folder.find(reread=False).versions == before


def test_only_what_differs_is_read_unless_everything_is_to_be(folder, monkeypatch):
    read: list[str] = []

    def identity(path: Path) -> str:
        read.append(path.stem)
        return path.read_text()

    monkeypatch.setattr("nic_core.slides.watch.content_identity", identity)
    folder.put("b", "changed")
    folder.find(reread=False)
    assert read == ["b"]
    folder.find()
    assert sorted(read[1:]) == ["a", "b", "c"]


def test_a_look_asks_once_of_each_file(folder, monkeypatch):
    asked: list[str] = []
    real = os.stat

    def stat(path, **options):
        asked.append(str(path))
        return real(path, **options)

    monkeypatch.setattr("os.stat", stat)
    look(folder.cohort, steps.read_seen(folder.store))
    slides = [path for path in asked if path.endswith(".tif")]
    assert len(slides) == len(set(slides)) == 3


def test_most_slides_gone_at_once_is_taken_for_a_fault(folder):
    for name in ("a", "b"):
        (folder.root / "wsi" / f"{name}.tif").unlink()
    with pytest.raises(CohortError, match="2 of 3 slides are gone at once, a among them"):
        folder.find()
    assert steps.read_index(folder.store).height == 3
    assert folder.find(accept_loss=True).gone == ["a", "b"]


def test_a_slide_of_the_table_without_a_file_is_left_out_and_named(tmp_path):
    folder = Folder(tmp_path)
    folder.put("a", "slide a")
    (tmp_path / "slides.csv").write_text("slide,path,patient\na,wsi/a.tif,P\nb,wsi/b.tif,P\n")
    text = (tmp_path / "cohort.yaml").read_text()
    (tmp_path / "cohort.yaml").write_text(
        text.replace("folders: [{path: wsi}]", "table: slides.csv")
    )
    found = folder.find()
    assert found.index["slide"].to_list() == ["a"]
    assert found.absent == {"b": f"path {tmp_path / 'wsi/b.tif'} does not exist"}
    assert folder.look() == (set(), set())
    folder.put("b", "slide b")
    folder.look()
    assert folder.look() == ({"b"}, set())
    (tmp_path / "slides.csv").write_text("slide,path,patient\na,wsi/a.tif,P\nb,wsi/b.tif,Q\n")
    assert folder.look() == ({"b"}, {"slides"})
