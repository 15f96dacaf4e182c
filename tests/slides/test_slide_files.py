"""Which files are a slide: formats of several files, and folders of mixed content."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import tifffile
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from nic_core.slides import SlideError, content_identity, open_slide
from nic_core.slides.files import LeftAside, SlideFiles, files_of_slide
from nic_core.slides.folders import find_slide_files, list_candidates, summarize_left_aside
from tests.slides import vendors
from tests.slides.conftest import paint, reduced, write_tiff

MPP = 0.25
SLIDE = paint(256, 512)
LEVELS = [SLIDE, reduced(SLIDE, 2)]
PICTURE = paint(64, 128, seed=9)
WSI = "1.2.840.10008.5.1.4.1.1.77.1.6"


def dicom(folder: Path, series: str = "1.2.5", levels: list[np.ndarray] = LEVELS) -> Path:
    return vendors.write_dicom(folder, levels, MPP, label=PICTURE, series=series)


def write_header(
    path: Path, *, sop_class: str = WSI, syntax: str = ExplicitVRLittleEndian, **tags: object
) -> Path:
    """Write a DICOM file without pixels, in any transfer syntax."""
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = sop_class, f"1.2.9.{crc32(path.name.encode())}"
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.SeriesInstanceUID = "1.2.5"
    data.TotalPixelMatrixColumns = data.TotalPixelMatrixRows = 1000
    for name, value in tags.items():
        setattr(data, name, value)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def found(folder: Path, pattern: str | None = None) -> dict[str, SlideFiles]:
    slides, _ = find_slide_files(folder, pattern)
    return {slide.path.relative_to(folder).as_posix(): slide for slide in slides}


def left(folder: Path, pattern: str | None = None) -> dict[str, str]:
    _, aside = find_slide_files(folder, pattern)
    return {item.path.relative_to(folder).as_posix(): item.reason for item in aside}


def names(slide: SlideFiles | LeftAside) -> set[str]:
    assert isinstance(slide, SlideFiles)
    return {part.name for part in slide.parts}


def problem(slide: SlideFiles | LeftAside) -> str:
    assert isinstance(slide, SlideFiles)
    assert slide.problem is not None
    return str(slide.problem)


# one slide, several files


@pytest.mark.parametrize("kind", ["dicom", "mirax", "vms", "ome", "companion"])
def test_any_file_of_a_slide_gives_the_same_slide(tmp_path, kind):
    if kind == "dicom":
        main = dicom(tmp_path / "d")
    elif kind == "mirax":
        main = vendors.write_mirax(tmp_path / "a.b.mrxs", LEVELS, MPP, picture=PICTURE)
    elif kind == "vms":
        main = vendors.write_vms(tmp_path / "a.vms", SLIDE)
    else:
        images = {"macro.ome.tif": PICTURE[:, :64], "scan.ome.tif": SLIDE}
        vendors.write_ome_set(tmp_path, images, companion=kind == "companion")
        main = tmp_path / "scan.ome.tif"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for path in files:
        slide = files_of_slide(path)
        assert slide.path == main
        assert {main, *slide.parts} == set(files)
        assert content_identity(path) == content_identity(main)
        if kind != "vms":  # the written one has no restart markers, which OpenSlide requires
            with open_slide(path) as opened:
                assert (opened.path, opened.width, opened.mpp) == (main, 512, pytest.approx(MPP))
    assert list(found(tmp_path)) == [main.relative_to(tmp_path).as_posix()]
    assert left(tmp_path) == {}


def test_dicom_series_in_one_folder_are_slides_of_their_own(tmp_path):
    for series in ("1.2.5", "1.2.6"):
        for number, path in enumerate(sorted(dicom(tmp_path / "d", series).parent.iterdir())):
            path.rename(tmp_path / f"{series}.{number}")  # archives export without a suffix
        (tmp_path / "d").rmdir()
    slides = found(tmp_path)
    assert list(slides) == ["1.2.5.1", "1.2.6.1"]  # level 0; 0 is the label and 2 level 1
    assert names(slides["1.2.6.1"]) == {"1.2.6.0", "1.2.6.2"}
    for pattern in ("*.0", "*.2", "**/*"):
        assert list(found(tmp_path, pattern)) == list(slides)


def test_copies_of_a_series_in_two_folders_are_two_slides(tmp_path):
    dicom(tmp_path / "study1")
    shutil.copytree(tmp_path / "study1", tmp_path / "study2")
    slides = found(tmp_path)
    assert list(slides) == ["study1/level0.dcm", "study2/level0.dcm"]
    assert all(slide.problem is None for slide in slides.values())
    assert content_identity(tmp_path / "study1") == content_identity(tmp_path / "study2")


def test_a_series_spread_over_folders_is_one_slide_and_refused(tmp_path):
    path = dicom(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "level1.dcm").rename(tmp_path / "b" / "level1.dcm")
    [slide] = find_slide_files(tmp_path)[0]
    assert slide.path == path
    assert "spread over 2 folders" in problem(slide)
    assert "put all files of a series into one folder" in problem(slide)


@pytest.mark.parametrize(
    ("syntax", "words"),
    [
        (ImplicitVRLittleEndian, "implicit VR little endian"),
        (DeflatedExplicitVRLittleEndian, "deflated"),
        (ExplicitVRBigEndian, "big endian"),
    ],
)
def test_dicom_tags_are_read_in_every_transfer_syntax(tmp_path, syntax, words):
    write_header(tmp_path / "small.dcm", syntax=syntax, TotalPixelMatrixRows=10)
    write_header(tmp_path / "large.dcm", syntax=syntax)
    write_header(tmp_path / "other.dcm", syntax=syntax, SeriesInstanceUID="1.2.6")
    slides = found(tmp_path)
    assert list(slides) == ["large.dcm", "other.dcm"]
    assert names(slides["large.dcm"]) == {"small.dcm"}
    assert f"the transfer syntax is {words}" in problem(slides["large.dcm"])
    with pytest.raises(SlideError, match=r"convert its files .*dcmconv"):
        open_slide(tmp_path / "small.dcm")


def test_a_concatenation_is_refused(tmp_path):
    for number in (1, 2):
        tags = {"ConcatenationUID": "1.2.7", "InConcatenationNumber": number}
        write_header(tmp_path / f"{number}.dcm", **tags)
    [slide] = find_slide_files(tmp_path)[0]
    assert "concatenation" in problem(slide)


def test_two_files_of_one_level_are_refused_unless_they_are_copies(tmp_path):
    path = dicom(tmp_path / "d")
    shutil.copy(path, path.with_name("copy.dcm"))
    with open_slide(path) as slide:
        assert slide.width == 512
    for name in ("near.dcm", "far.dcm"):  # focal planes
        write_header(tmp_path / "planes" / name)
    with pytest.raises(SlideError, match=r"(near|far).dcm are the same level of its series.*keep"):
        open_slide(tmp_path / "planes" / "near.dcm")


def test_dicom_that_is_not_a_slide_is_left_aside_with_its_kind(tmp_path):
    write_header(tmp_path / "DICOMDIR", sop_class="1.2.840.10008.1.3.10")
    write_header(tmp_path / "report.dcm", sop_class="1.2.840.10008.5.1.4.1.1.88.33")
    write_header(tmp_path / "alone" / "label.dcm", ImageType=["ORIGINAL", "PRIMARY", "LABEL"])
    dicom(tmp_path / "slide")
    assert list(found(tmp_path)) == ["slide/level0.dcm"]
    assert left(tmp_path) == {
        "DICOMDIR": "DICOM, but not a whole-slide image (Media Storage Directory Storage)",
        "report.dcm": "DICOM, but not a whole-slide image (Comprehensive SR Storage)",
        "alone/label.dcm": "DICOM: label, overview or thumbnail; its series has no scan here",
    }


def test_dicom_that_is_no_slide_is_refused_with_its_kind(tmp_path):
    report = write_header(tmp_path / "report.dcm", sop_class="1.2.840.10008.5.1.4.1.1.88.33")
    with pytest.raises(SlideError, match=r"not a whole-slide image \(Comprehensive SR Storage"):
        open_slide(report)
    label = write_header(tmp_path / "label.dcm", ImageType=["ORIGINAL", "PRIMARY", "LABEL"])
    with pytest.raises(SlideError, match="its series has no scan in its folder"):
        open_slide(label)


def test_a_label_in_a_series_of_its_own_does_not_count(tmp_path):
    path = dicom(tmp_path / "d")
    write_header(
        tmp_path / "d" / "other.dcm",
        ImageType=["ORIGINAL", "PRIMARY", "LABEL"],
        SeriesInstanceUID="1.2.6",
    )
    assert files_of_slide(tmp_path / "d").path == path
    assert found(tmp_path)["d/level0.dcm"].folder == "d"


def test_a_dicom_file_completed_after_its_folder_was_read_is_refused(tmp_path):
    path = dicom(tmp_path / "d")
    slide = files_of_slide(path, series_of=lambda folder: {})
    assert "run this again when the folder is copied" in problem(slide)


def test_a_damaged_file_of_another_series_does_not_matter(tmp_path):
    path = dicom(tmp_path / "d")
    data = path.read_bytes()
    (path.parent / "other.dcm").write_bytes(data[:140] + b"\xff" * 40 + data[180:])
    with open_slide(path) as slide:
        assert slide.width == 512
    slides = found(tmp_path)
    assert slides["d/level0.dcm"].problem is None
    assert "damaged DICOM header" in problem(slides["d/other.dcm"])


def test_a_folder_names_the_one_series_in_it(tmp_path):
    path = dicom(tmp_path / "d")
    assert files_of_slide(tmp_path / "d").path == path
    for other in dicom(tmp_path / "e", "1.2.6").parent.iterdir():
        other.rename(tmp_path / "d" / f"e{other.name}")
    with pytest.raises(SlideError, match="a folder with 2 DICOM series; name a file"):
        open_slide(tmp_path / "d")


def test_an_incomplete_mirax_slide_is_refused_with_the_reason(tmp_path):
    path = vendors.write_mirax(tmp_path / "a.mrxs", LEVELS, MPP, picture=PICTURE)
    (tmp_path / "a" / "Slidedat.ini").rename(tmp_path / "Slidedat.ini")
    assert "has no Slidedat.ini" in problem(files_of_slide(path))
    shutil.rmtree(tmp_path / "a")
    assert "its folder 'a' is missing; copy the folder" in problem(files_of_slide(path))
    path.write_bytes(b"")
    assert "the file is empty" in problem(files_of_slide(path))
    path.rename(tmp_path / "a.MRXS")
    assert "rename it to .mrxs" in problem(files_of_slide(tmp_path / "a.MRXS"))


def test_a_link_to_a_mirax_slide_finds_its_folder(tmp_path):
    path = vendors.write_mirax(tmp_path / "a.mrxs", LEVELS, MPP, picture=PICTURE)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.mrxs").symlink_to(path)
    assert files_of_slide(tmp_path / "links" / "b.mrxs").path == path


def test_a_vms_slide_without_an_image_is_refused(tmp_path):
    path = vendors.write_vms(tmp_path / "a.vms", SLIDE)
    (tmp_path / "a-map.jpg").unlink()
    assert "its file a-map.jpg is missing" in problem(files_of_slide(path))


def test_an_incomplete_ome_set_is_refused_with_the_reason(tmp_path):
    images = {"macro.ome.tif": PICTURE[:, :64], "scan.ome.tif": SLIDE}
    vendors.write_ome_set(tmp_path, images, companion=True)
    (tmp_path / "set.companion.ome").rename(tmp_path / "elsewhere")
    message = "its OME metadata are in 'set.companion.ome', which is missing"
    assert message in problem(files_of_slide(tmp_path / "scan.ome.tif"))
    (tmp_path / "elsewhere").rename(tmp_path / "set.companion.ome")
    (tmp_path / "scan.ome.tif").unlink()
    message = "its scan is in 'scan.ome.tif' of its OME-TIFF set, which is missing"
    assert message in problem(files_of_slide(tmp_path / "macro.ome.tif"))


def test_a_damaged_companion_file_is_refused_for_each_tiff(tmp_path):
    images = {"macro.ome.tif": PICTURE[:, :64], "scan.ome.tif": SLIDE}
    vendors.write_ome_set(tmp_path, images, companion=True)
    (tmp_path / "set.companion.ome").write_bytes(b"")
    message = "the OME metadata in 'set.companion.ome' cannot be parsed"
    assert all(message in problem(slide) for slide in found(tmp_path).values())
    assert list(left(tmp_path)) == ["set.companion.ome"]


@pytest.mark.parametrize("companion", [False, True])
def test_each_scan_of_an_ome_set_is_a_slide(tmp_path, companion):
    images = {"a.ome.tif": SLIDE, "b.ome.tif": SLIDE[:, :256], "macro.ome.tif": PICTURE[:, :64]}
    vendors.write_ome_set(tmp_path, images, companion=companion)
    slides = found(tmp_path)
    assert list(slides) == ["a.ome.tif", "b.ome.tif"]
    shared = {"macro.ome.tif", "set.companion.ome"} if companion else {"macro.ome.tif"}
    assert names(slides["a.ome.tif"]) == names(slides["b.ome.tif"]) == shared
    for name, slide in slides.items():
        with open_slide(slide.path) as opened:
            assert (opened.path.name, opened.width) == (name, images[name].shape[1])
    macro = files_of_slide(tmp_path / "macro.ome.tif")
    assert isinstance(macro, LeftAside)
    assert macro.reason == "a file of an OME-TIFF set with several scans: a.ome.tif, b.ome.tif"
    assert left(tmp_path) == {}


def test_a_renamed_ome_tiff_is_still_its_own_slide(tmp_path, files):
    uuid = "urn:uuid:00000000-0000-0000-0000-000000000001"
    xml = tifffile.TiffFile(files["ome"]).ome_metadata
    assert xml is not None
    xml = xml.replace("<OME ", f'<OME UUID="{uuid}" ', 1)
    old = f'<UUID FileName="old.ome.tif">{uuid}</UUID></TiffData>'
    xml = xml.replace('PlaneCount="1"/>', f'PlaneCount="1">{old}')
    assert old in xml
    path = tmp_path / "new.ome.tif"
    tifffile.imwrite(path, SLIDE, photometric="rgb", description=xml.encode(), metadata=None)
    assert files_of_slide(path) == SlideFiles(path)


# folders


def test_a_mixed_folder_gives_every_slide_and_lists_the_other_files(tmp_path, files):
    for source, name in (
        ("svs", "A.SVS"),
        ("tiff", "b.TIFF"),
        ("ome", "sub/c.ome.tif"),
        ("png", "b_labels.png"),
        ("tiff", "._b.tif"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(files[source], tmp_path / name)
    vendors.write_mirax(tmp_path / "d.mrxs", LEVELS, MPP, picture=PICTURE)
    dicom(tmp_path / "e")
    options = {"axes": "cyx", "version": "0.5", "unit": "micrometer"}
    vendors.write_ome_zarr(tmp_path / "f.zarr", LEVELS, MPP, **options)
    tifffile.imwrite(tmp_path / "mask.tif", np.zeros((64, 64), np.uint8))
    (tmp_path / "empty.svs").touch()
    (tmp_path / "slide.svs.part").write_text("half")
    (tmp_path / "README").write_text("slides")
    (tmp_path / "scan.isyntax").write_text("philips")
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "g.zarr" / "0").mkdir(parents=True)
    (tmp_path / "g.zarr" / "0" / "0.0").write_text("a chunk")
    (tmp_path / ".trash").mkdir()
    slides = found(tmp_path)
    assert [name for name in slides if slides[name].problem is None] == [
        "A.SVS",
        "b.TIFF",
        "d.mrxs",
        "e/level0.dcm",
        "f.zarr",
        "sub/c.ome.tif",
    ]
    assert "the file is empty" in problem(slides["empty.svs"])
    assert left(tmp_path) == {
        "._b.tif": "a hidden file",
        ".trash": "a hidden folder",
        "README": "a file without a suffix that is not DICOM",
        "b_labels.png": "PNG and JPEG state no um/px: a slide table can name it, with its um/px "
        "in column mpp",
        "g.zarr": "a .zarr folder without Zarr metadata: copy it again from its source",
        "mask.tif": "a TIFF without RGB pixels: a mask or label image, not a slide",
        "scan.isyntax": "no library here reads .isyntax: convert it to OME-TIFF or DICOM",
        "slide.svs.part": "not a slide format (.part)",
    }


def test_a_pattern_ignores_case_and_lists_what_it_leaves_aside(tmp_path, files):
    for name in ("a.TIF", "b.tif", "c.svs", "sub/d.tif", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(files["tiff"], tmp_path / name)
    assert list(found(tmp_path, "**/*.tif")) == ["a.TIF", "b.tif", "sub/d.tif"]
    assert left(tmp_path, "**/*.tif") == {"c.svs": "does not match the pattern **/*.tif"}
    assert list(found(tmp_path, "*.{svs,tif}")) == ["a.TIF", "b.tif", "c.svs"]
    assert list(found(tmp_path, "sub/*")) == ["sub/d.tif"]
    # what a file is shows its content, whatever its suffix
    assert list(found(tmp_path, "*.txt")) == ["notes.txt"]
    (tmp_path / "notes.txt").write_text("no slide")
    assert left(tmp_path, "*.txt")["notes.txt"] == "not a slide format"


def test_links_are_followed_once(tmp_path, files):
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "z").mkdir(parents=True)
    outside.mkdir()
    shutil.copy(files["tiff"], inside / "z" / "a.tif")
    shutil.copy(files["svs"], outside / "b.svs")
    (inside / "loop").symlink_to(inside)
    (inside / "again").symlink_to(inside / "z")
    (inside / "other").symlink_to(outside)
    (inside / "a2.tif").symlink_to(inside / "z" / "a.tif")
    (inside / "gone.tif").symlink_to(tmp_path / "gone.tif")
    (inside / "itself.tif").symlink_to(inside / "itself.tif")
    (inside / "b2.svs").symlink_to(outside / "b.svs")
    shutil.copy(files["svs"], tmp_path / "0a1b2c")
    (inside / "c.svs").symlink_to(tmp_path / "0a1b2c")
    os.mkfifo(inside / "pipe.tif")
    assert list(found(inside)) == ["c.svs", "other/b.svs", "z/a.tif"]
    assert left(inside) == {
        "again": "a link to a folder that is searched already",
        "loop": "a link to a folder that is searched already",
        "a2.tif": "a link to a file that is listed already",
        "b2.svs": "a link to a file that is listed already",
        "gone.tif": "a link to a file that does not exist",
        "itself.tif": "a link to a file that does not exist",
        "pipe.tif": "not a regular file",
    }


def test_a_name_that_is_not_utf8_is_left_aside(tmp_path, files):
    shutil.copy(files["svs"], tmp_path / "a.svs")
    shutil.copy(files["svs"], os.fsencode(tmp_path) + b"/\xe9.svs")
    assert list(found(tmp_path)) == ["a.svs"]
    assert left(tmp_path) == {"\\xe9.svs": "its path is not valid UTF-8: rename it"}


def test_candidates_are_listed_without_opening_a_file(tmp_path, files, monkeypatch):
    dicom(tmp_path / "d")
    shutil.copy(files["tiff"], tmp_path / "a.tif")

    def no_open(*arguments: object, **options: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("builtins.open", no_open)
    monkeypatch.setattr(Path, "open", no_open)
    listed = [path.name for path in list_candidates(tmp_path).candidates]
    assert listed == ["a.tif", "label.dcm", "level0.dcm", "level1.dcm"]


def test_files_left_aside_are_summarized_by_reason(tmp_path, files):
    for name in ("a.png", "b.png", "c.lif"):
        shutil.copy(files["png"], tmp_path / name)
    first, second = summarize_left_aside(find_slide_files(tmp_path)[1])
    assert first.startswith("2 files: PNG and JPEG state no um/px")
    assert first.endswith("a.png")
    assert second.startswith("1 file: no library here reads .lif")


def test_a_tiff_that_cannot_be_parsed_stays_a_slide(tmp_path):
    write_tiff(tmp_path / "a.tif", SLIDE, mpp=MPP)
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[:200])
    assert list(found(tmp_path)) == ["a.tif"]
    with pytest.raises(SlideError, match="copy the file again"):
        open_slide(tmp_path / "a.tif")
