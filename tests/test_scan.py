"""Scan of a cohort's files: what counts as a change, and what it costs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nic_core import steps
from nic_core.cohort import Cohort, CohortError, load_cohort
from nic_core.cohort.scan import scan_files
from nic_core.store import Store


class Folder:
    """A folder of files in place of slides."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Store(root / "store")
        (root / "wsi").mkdir()
        (root / "cohort.yaml").write_text(
            "name: c\nslides: {folders: [{path: wsi}]}\n"
            "encoders: [{name: rgb, objective: mean_rgb}]\n"
        )
        self.fingerprints: tuple[str, ...] = ()

    @property
    def cohort(self) -> Cohort:
        return load_cohort(self.root / "cohort.yaml")

    def put(self, name: str, content: str) -> None:
        (self.root / "wsi" / f"{name}.tif").write_text(content)

    def scan(self) -> tuple[set[str], set[str]]:
        """Names of the files that changed and are stable, and of those still changing."""
        found = scan_files(self.cohort, steps.read_file_snapshot(self.store), self.fingerprints)
        self.fingerprints = found.fingerprints
        self.changing = found.changing
        return {Path(p).stem for p in found.stable}, {Path(p).stem for p in found.changing}

    def index(self, **options: object) -> steps.SlideScan:
        """Write the slide index."""
        found = steps.scan_slides(self.cohort, self.store, **options)
        steps.write_slide_index(self.store, found)
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    for name in ("a", "b", "c"):
        folder.put(name, f"slide {name}")
    folder.index()
    return folder


def test_a_scan_of_unchanged_files_finds_nothing(folder):
    assert folder.scan() == (set(), set())


def test_a_new_file_is_stable_after_two_equal_scans(folder):
    folder.put("d", "half")
    assert folder.scan() == (set(), {"d"})
    folder.put("d", "half and half")
    assert folder.scan() == (set(), {"d"})
    assert folder.scan() == ({"d"}, set())
    assert folder.scan() == ({"d"}, set()), "until the index is written"
    folder.index()
    assert folder.scan() == (set(), set())


def test_a_file_being_written_does_not_delay_another(folder):
    folder.put("d", "whole")
    folder.put("e", "half")
    folder.scan()
    folder.put("e", "half and half")
    assert folder.scan() == ({"d"}, {"e"})
    found = folder.index(ignore_paths=folder.changing)
    assert found.index["slide"].to_list() == ["a", "b", "c", "d"]
    assert folder.scan() == ({"e"}, set())


def test_a_known_file_being_written_keeps_its_version(folder):
    before = folder.index().versions
    folder.put("a", "half")
    folder.put("d", "new")
    folder.scan()
    found = folder.index(ignore_paths=[str(folder.root / "wsi" / "a.tif")])
    assert found.versions["a"] == before["a"]
    assert "d" in found.versions
    assert folder.scan() == ({"a"}, set())
    assert folder.index().versions["a"] != before["a"]


def test_a_deleted_file_is_removed_after_two_scans(folder):
    (folder.root / "wsi" / "b.tif").unlink()
    assert folder.scan() == (set(), {"b"})
    assert folder.scan() == ({"b"}, set())
    assert folder.index().removed == ["b"]
    assert folder.scan() == (set(), set())


def test_a_new_time_with_equal_content_changes_no_version(folder):
    before = folder.index().versions
    os.utime(folder.root / "wsi" / "a.tif", ns=(1, 1))
    folder.scan()
    assert folder.scan() == ({"a"}, set())
    assert folder.index(rehash=False).versions == before


def test_only_changed_files_are_hashed_unless_rehash_is_set(folder, monkeypatch):
    read: list[str] = []

    def identity(path: Path) -> str:
        read.append(path.stem)
        return path.read_text()

    monkeypatch.setattr("nic_core.cohort.scan.content_identity", identity)
    folder.put("b", "changed")
    folder.index(rehash=False)
    assert read == ["b"]
    folder.index()
    assert sorted(read[1:]) == ["a", "b", "c"]


def test_a_scan_stats_each_file_once(folder, monkeypatch):
    asked: list[str] = []
    real = os.stat

    def stat(path, **options):
        asked.append(str(path))
        return real(path, **options)

    monkeypatch.setattr("os.stat", stat)
    scan_files(folder.cohort, steps.read_file_snapshot(folder.store))
    slides = [path for path in asked if path.endswith(".tif")]
    assert len(slides) == len(set(slides)) == 3


def test_an_index_that_loses_most_slides_is_refused(folder):
    for name in ("a", "b"):
        (folder.root / "wsi" / f"{name}.tif").unlink()
    with pytest.raises(CohortError, match="2 of 3 slides are missing, for example a"):
        folder.index()
    assert steps.read_slide_index(folder.store).height == 3
    assert folder.index(allow_missing_slides=True).removed == ["a", "b"]


def test_a_slide_without_its_file_is_left_out_and_reported(tmp_path):
    folder = Folder(tmp_path)
    folder.put("a", "slide a")
    (tmp_path / "slides.csv").write_text("slide,path,patient\na,wsi/a.tif,P\nb,wsi/b.tif,P\n")
    text = (tmp_path / "cohort.yaml").read_text()
    (tmp_path / "cohort.yaml").write_text(
        text.replace("folders: [{path: wsi}]", "table: slides.csv")
    )
    found = folder.index()
    assert found.index["slide"].to_list() == ["a"]
    assert found.missing == {"b": f"path {tmp_path / 'wsi/b.tif'} does not exist"}
    assert folder.scan() == (set(), set())
    folder.put("b", "slide b")
    folder.scan()
    assert folder.scan() == ({"b"}, set())
    (tmp_path / "slides.csv").write_text("slide,path,patient\na,wsi/a.tif,P\nb,wsi/b.tif,Q\n")
    assert folder.scan() == ({"b"}, {"slides"})
