"""Scans of a cohort's files: stable changes, removed files, hashing, cost."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from nic_core import steps
from nic_core.cohort import Cohort, CohortError, load_cohort
from nic_core.cohort.scan import scan_files
from nic_core.steps.slide_index import patient_groups
from nic_core.store import Store
from tests.slides import vendors


class SmallCohort:
    """A cohort whose slides are small text files."""

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
        """Scan; return the names of stable and of changing files."""
        scan = scan_files(self.cohort, steps.read_file_snapshot(self.store), self.fingerprints)
        self.fingerprints = scan.fingerprints
        self.changing = scan.changing
        return {Path(p).stem for p in scan.stable}, {Path(p).stem for p in scan.changing}

    def index(self, **options: object) -> steps.SlideScan:
        """Scan the slides and write the slide index."""
        scan = steps.scan_slides(self.cohort, self.store, **options)
        steps.write_slide_index(self.store, scan)
        return scan


@pytest.fixture
def cohort(tmp_path: Path) -> SmallCohort:
    cohort = SmallCohort(tmp_path)
    for name in ("a", "b", "c"):
        cohort.put(name, f"slide {name}")
    cohort.index()
    return cohort


def test_a_scan_of_unchanged_files_finds_nothing(cohort):
    assert cohort.scan() == (set(), set())


def test_a_new_file_is_stable_after_two_equal_scans(cohort):
    cohort.put("d", "half")
    assert cohort.scan() == (set(), {"d"})
    cohort.put("d", "half and half")
    assert cohort.scan() == (set(), {"d"})
    assert cohort.scan() == ({"d"}, set())
    assert cohort.scan() == ({"d"}, set()), "stable until the index is written"
    cohort.index()
    assert cohort.scan() == (set(), set())


def test_changed_initial_weights_are_found_by_a_scan(cohort):
    start = cohort.root / "start"
    start.mkdir()
    (start / "card.json").write_text("{}")
    (cohort.root / "cohort.yaml").write_text(
        "name: c\nslides: {folders: [{path: wsi}]}\n"
        "patch_tasks: [{name: t, organ: none, mpp: 0.5, table: t.csv}]\n"
        "encoders:\n"
        "  - {name: a, objective: vae, tasks: [t], initial_weights: {encoder: b}}\n"
        "  - {name: b, objective: vae, tasks: [t], initial_weights: {file: start}}\n"
    )

    def changed(fingerprints: tuple[str, ...] = ()) -> tuple[set[str], tuple[str, ...]]:
        further = steps.initial_weight_files(cohort.cohort, cohort.store)
        scan = scan_files(
            cohort.cohort, steps.read_file_snapshot(cohort.store), fingerprints, further=further
        )
        return {Path(path).parent.name for path in scan.stable}, scan.fingerprints

    cohort.index()
    assert changed(changed()[1])[0] == set()
    (start / "card.json").write_text('{"format": 4}')
    made = cohort.store.encoder("b")
    made.mkdir(parents=True)
    (made / "card.json").write_text("{}")
    assert changed(changed()[1])[0] == {"start", "b"}
    cohort.index()
    assert changed(changed()[1])[0] == set()


def test_a_file_being_written_does_not_delay_others(cohort):
    cohort.put("d", "whole")
    cohort.put("e", "half")
    cohort.scan()
    cohort.put("e", "half and half")
    assert cohort.scan() == ({"d"}, {"e"})
    found = cohort.index(ignore_paths=cohort.changing)
    assert found.index["slide"].to_list() == ["a", "b", "c", "d"]
    assert cohort.scan() == ({"e"}, set())


def test_a_known_file_being_written_keeps_its_version(cohort):
    before = cohort.index().versions
    cohort.put("a", "half")
    cohort.put("d", "new")
    cohort.scan()
    found = cohort.index(ignore_paths=[str(cohort.root / "wsi" / "a.tif")])
    assert found.versions["a"] == before["a"]
    assert "d" in found.versions
    assert cohort.scan() == ({"a"}, set())
    assert cohort.index().versions["a"] != before["a"]


def test_a_deleted_file_is_removed_after_two_scans(cohort):
    (cohort.root / "wsi" / "b.tif").unlink()
    assert cohort.scan() == (set(), {"b"})
    assert cohort.scan() == ({"b"}, set())
    assert cohort.index().removed == ["b"]
    assert cohort.scan() == (set(), set())


def test_a_new_time_of_modification_alone_changes_no_version(cohort):
    before = cohort.index().versions
    os.utime(cohort.root / "wsi" / "a.tif", ns=(1, 1))
    cohort.scan()
    assert cohort.scan() == ({"a"}, set())
    assert cohort.index(rehash=False).versions == before


def test_only_changed_files_are_hashed_unless_rehash_is_set(cohort, monkeypatch):
    read: list[str] = []

    def identity(path: Path) -> str:
        read.append(path.stem)
        return path.read_text()

    monkeypatch.setattr("nic_core.cohort.scan.content_identity", identity)
    cohort.put("b", "changed")
    cohort.index(rehash=False)
    assert read == ["b"]
    cohort.index()
    assert sorted(read[1:]) == ["a", "b", "c"]


def test_a_scan_stats_each_file_once(cohort, monkeypatch):
    paths: list[str] = []
    real = os.stat

    def stat(path, **options):
        paths.append(str(path))
        return real(path, **options)

    monkeypatch.setattr("os.stat", stat)
    scan_files(cohort.cohort, steps.read_file_snapshot(cohort.store))
    slides = [path for path in paths if path.endswith(".tif")]
    assert len(slides) == len(set(slides)) == 3


def test_a_scan_that_misses_most_slides_is_refused(cohort):
    for name in ("a", "b"):
        (cohort.root / "wsi" / f"{name}.tif").unlink()
    with pytest.raises(CohortError, match="2 of 3 slides are missing, for example a"):
        cohort.index()
    assert steps.read_slide_index(cohort.store).height == 3
    assert cohort.index(allow_missing_slides=True).removed == ["a", "b"]


def test_a_slide_with_a_missing_file_is_left_out_and_reported(tmp_path):
    cohort = SmallCohort(tmp_path)
    cohort.put("a", "slide a")
    (tmp_path / "slides.csv").write_text("slide,path,patient\na,wsi/a.tif,P\nb,wsi/b.tif,P\n")
    text = (tmp_path / "cohort.yaml").read_text()
    (tmp_path / "cohort.yaml").write_text(
        text.replace("folders: [{path: wsi}]", "table: slides.csv")
    )
    found = cohort.index()
    assert found.index["slide"].to_list() == ["a"]
    assert found.missing == {"b": f"path {tmp_path / 'wsi/b.tif'} does not exist"}
    assert cohort.scan() == (set(), set())
    cohort.put("b", "slide b")
    cohort.scan()
    assert cohort.scan() == ({"b"}, set())
    (tmp_path / "slides.csv").write_text("slide,path,patient\na,wsi/a.tif,P\nb,wsi/b.tif,Q\n")
    assert cohort.scan() == ({"b"}, {"slides"})


def test_a_changed_part_of_a_slide_changes_its_version(tmp_path):
    cohort = SmallCohort(tmp_path)
    (cohort.root / "wsi" / "m").mkdir()
    cohort.put("m", "key")
    (cohort.root / "wsi" / "m.tif").rename(cohort.root / "wsi" / "m.mrxs")
    for name in ("Slidedat.ini", "Data0000.dat"):
        (cohort.root / "wsi" / "m" / name).write_text(name)
    cohort.put("a", "slide a")
    before = cohort.index().versions
    assert cohort.scan() == (set(), set())
    (cohort.root / "wsi" / "m" / "Data0000.dat").write_text("changed")
    assert cohort.scan() == (set(), {"Data0000"})
    assert cohort.scan() == ({"Data0000"}, set())
    after = cohort.index(rehash=False).versions
    assert after["a"] == before["a"]
    assert after["m"] != before["m"]
    assert cohort.scan() == (set(), set())


def test_a_slide_waits_for_all_of_its_files(tmp_path):
    cohort = SmallCohort(tmp_path)
    cohort.put("a", "slide a")
    before = cohort.index().versions
    levels = [np.full((256, 256, 3), 200, np.uint8)]
    level0 = vendors.write_dicom(tmp_path / "wsi" / "d", levels, 0.5, label=levels[0])
    cohort.scan()
    with (level0.parent / "label.dcm").open("ab") as file:
        file.write(b"more")
    assert cohort.scan() == ({"level0"}, {"label"})
    found = cohort.index(ignore_paths=cohort.changing)
    assert found.versions == before
    assert cohort.scan() == ({"label"}, set())
    assert set(cohort.index(rehash=False).versions) == {"a", "d"}
    assert cohort.scan() == (set(), set())


def test_a_slide_that_is_written_anew_keeps_its_version_while_it_is_empty(cohort):
    before = cohort.index().versions
    for name in ("a", "d"):
        cohort.put(name, "")
    assert cohort.scan() == (set(), {"a", "d"})
    found = cohort.index(ignore_paths=cohort.changing)
    assert found.versions == before
    assert found.missing == {}
    found = cohort.index()
    assert set(found.missing) == {"a", "d"}
    assert found.removed == ["a"]


def test_an_incomplete_slide_is_scanned_again_when_files_are_added(tmp_path):
    cohort = SmallCohort(tmp_path)
    cohort.put("a", "slide a")
    (tmp_path / "wsi" / "m.mrxs").write_text("key")
    found = cohort.index()
    assert list(found.missing) == ["m"]
    assert cohort.scan() == (set(), set())
    (tmp_path / "wsi" / "m").mkdir()
    (tmp_path / "wsi" / "m" / "Slidedat.ini").write_text("")
    cohort.scan()
    assert cohort.scan() == ({"m"}, set())
    assert cohort.index().index["slide"].to_list() == ["a", "m"]


def test_files_left_aside_are_reported_and_scanned_once(cohort):
    (cohort.root / "wsi" / "labels.png").write_bytes(b"png")
    (cohort.root / "wsi" / "IM0001").write_text("no DICOM")
    cohort.scan()
    assert cohort.scan() == ({"IM0001"}, set())
    found = cohort.index()
    assert [item.path.name for item in found.left_aside] == ["labels.png", "IM0001"]
    assert cohort.scan() == (set(), set())


def test_slides_with_the_same_content_are_found_under_any_name(cohort):
    cohort.put("copy", "slide a")
    cohort.put("z", "slide c")
    found = cohort.index()
    assert found.duplicates == (("a", "copy"), ("c", "z"))
    assert patient_groups(found.index, found.duplicates) == {
        "a": "a",
        "copy": "a",
        "c": "c",
        "z": "c",
    }
    assert steps.read_patient_groups(cohort.store)["copy"] == "a"


def test_groups_join_patients_through_common_slides():
    index = pl.DataFrame({"slide": list("abcdefg"), "patient": list("PQQRSSS")})
    assert patient_groups(index, [("a", "b"), ("c", "d"), ("e", "f")]) == dict.fromkeys("PQR", "P")


def test_a_snapshot_of_another_version_is_refused(cohort):
    old = steps.read_file_snapshot(cohort.store).drop("part_of")
    old.write_parquet(cohort.store.file_snapshot)
    with pytest.raises(CohortError, match="another version wrote it; delete the file"):
        cohort.index()
