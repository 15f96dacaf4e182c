"""The slide index of a cohort."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tifffile

from nic_core.cohort import Cohort, CohortError, load_cohort
from nic_core.cohort.index import INDEX_SCHEMA, find_slides, slide_id, slide_index, table_rows
from nic_core.slides.files import SlideFiles
from nic_core.steps.slide_index import make_slide_index, open_indexed
from nic_core.store import Store
from tests.slides import vendors


def cohort(folder: Path, slides: str) -> Cohort:
    path = folder / "cohort.yaml"
    path.write_text(f"name: c\nslides: {slides}\nencoders: [{{name: e, objective: mean_rgb}}]\n")
    return load_cohort(path)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not empty")


def test_files_of_a_folder_are_slides_sorted_by_id(tmp_path):
    touch(tmp_path, "wsi/b.tif", "wsi/sub/a.ome.tif", "wsi/notes.txt", "wsi/.hidden.tif")
    index = slide_index(cohort(tmp_path, "{folders: [{path: wsi}]}"))
    assert dict(index.schema) == INDEX_SCHEMA
    assert index["slide"].to_list() == ["a", "b"]
    assert index["patient"].to_list() == ["a", "b"]
    assert index["path"][0] == str(tmp_path / "wsi/sub/a.ome.tif")
    assert index["mpp"].is_null().all()
    assert index["split"].unique().to_list() == ["cv"]


def test_a_pattern_extracts_the_patient_from_the_slide_id(tmp_path):
    touch(tmp_path, "wsi/P1-a.tif", "wsi/P1-b.tif", "wsi/P2-a.tif")
    rule = "{folders: [{path: wsi, patient: '(?P<patient>P[0-9]+)-'}]}"
    assert slide_index(cohort(tmp_path, rule))["patient"].to_list() == ["P1", "P1", "P2"]
    touch(tmp_path, "wsi/other.tif")
    with pytest.raises(CohortError, match=r"'other'.*finds no patient"):
        slide_index(cohort(tmp_path, rule))
    with pytest.raises(CohortError, match="no group"):
        slide_index(cohort(tmp_path, "{folders: [{path: wsi, patient: '(.*)'}]}"))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_slide_table_gives_ids_paths_and_optional_columns(tmp_path, suffix):
    touch(tmp_path, "x/1.svs", "x/2.svs", "m.png")
    table = pl.DataFrame(
        {
            "slide": ["007", "006"],
            "path": ["x/1.svs", "x/2.svs"],
            "patient": ["1", "1"],
            "mpp": [0.25, None],
            "image": [None, 1],
            "mask": [None, "m.png"],
            "origin": [None, "bounds"],
            "split": ["test", None],
            "exclude": ["out of focus", None],
            "fold": [2, 1],
            "site": ["A", "NA"],
            "scanner": [None, "S60"],
            "grade": [3, 2],
        }
    )
    write = table.write_csv if suffix == ".csv" else table.write_parquet
    write(tmp_path / f"slides{suffix}")
    index = slide_index(cohort(tmp_path, f"{{table: slides{suffix}}}"))
    assert index.rows() == [
        (
            "006",
            str(tmp_path / "x/2.svs"),
            "1",
            None,
            1,
            str(tmp_path / "m.png"),
            "bounds",
            None,
            "cv",
            None,
            *("1", None, "S60", None, None),
        ),
        (
            "007",
            str(tmp_path / "x/1.svs"),
            "1",
            0.25,
            None,
            None,
            None,
            None,
            "test",
            "out of focus",
            *("2", "A", None, None, None),
        ),
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("slide,path\n1,a.tif", "no column 'patient'"),
        (
            "slide,path,patient,origin\n1,a.tif,1,corner",
            "slide '1': origin 'corner' must be 'level0' or 'bounds'",
        ),
        ("slide,path,patient\n1,gone.tif,1", "slide '1': path .*gone.tif does not exist"),
        (
            "slide,path,patient\n1,a.tif,1\n1,b.tif,1",
            "slide id '1' occurs more than once.*a.tif.*b",
        ),
        ("slide,path,patient\n\n1,,1", "no path in row 3"),
        ("slide,path,patient\na b,a.tif,1", "slide 'a b'.*folder and a partition key"),
        ("slide,path,patient\na|b,a.tif,1", "partition key"),
        ("slide,path,patient,split\n1,a.tif,1,train", "split 'train' must be 'cv' or 'test'"),
        ("slide,path,patient,mpp\n1,a.tif,1,fine", "row 2, column 'mpp': 'fine' is not a"),
        ('slide,path,patient,mpp\n1,a.tif,1,"1,234"', "can be read as 1.234"),
        ("slide,path,patient,image\n1,a.tif,1,1.5", "'1.5' is not the number of an image"),
        ("slide,path,patient,image\n1,a.tif,1,-1", "'-1' is not the number of an image"),
        ("slide,path,patient\n1,a.tif,NA\n2,b.tif,None", "no patient in rows 2, 3;"),
        ("slide,path,patient,exclude\n1,a.tif,1,no", "'exclude' of row 2 has no reason"),
        ("slide,path,patient,exclude\n1,a.tif,1,0\n2,b.tif,1,1", "'exclude' of rows 2, 3"),
        ("slide,path,patient,Exclude\n1,a.tif,1,blur", "'Exclude' has no effect: rename it"),
        ("slide,path,patients\n1,a.tif,1", "no column 'patient'.*did you mean 'patients'"),
        ("slide,path,patient,truth\n1,a.tif,1,t.png", "truth .*t.png does not exist"),
        ("slide,path,patient", "no slides found"),
        ("", "the table is empty"),
    ],
)
def test_an_invalid_slide_table_is_refused_with_the_reason(tmp_path, table, message):
    touch(tmp_path, "a.tif", "b.tif")
    (tmp_path / "slides.csv").write_text(table)
    with pytest.raises(CohortError, match=message):
        slide_index(cohort(tmp_path, "{table: slides.csv}"))


def test_missing_folders_and_tables_are_refused(tmp_path):
    with pytest.raises(CohortError, match="wsi is not a folder"):
        slide_index(cohort(tmp_path, "{folders: [{path: wsi}]}"))
    (tmp_path / "wsi").mkdir()
    with pytest.raises(CohortError, match=r"no slides found in .*wsi/\*\*"):
        slide_index(cohort(tmp_path, "{folders: [{path: wsi}]}"))
    with pytest.raises(CohortError, match=r"gone.csv: cannot be read"):
        slide_index(cohort(tmp_path, "{table: gone.csv}"))


def test_equal_ids_of_two_files_are_refused_with_a_remedy(tmp_path):
    touch(tmp_path, "wsi/a.svs", "wsi/a.tif")
    with pytest.raises(CohortError, match=r"'a' occurs more than once: .*a\.svs, .*a\.tif; rename"):
        slide_index(cohort(tmp_path, "{folders: [{path: wsi}]}"))
    rows = "slide,path,patient\na1,wsi/a.svs,p\na2,wsi/a.tif,p\n"
    (tmp_path / "slides.csv").write_text(rows)
    index = slide_index(cohort(tmp_path, "{table: slides.csv}"))
    assert index["slide"].to_list() == ["a1", "a2"]


def test_folders_give_every_format_unless_a_pattern_is_given(tmp_path):
    touch(tmp_path, "wsi/a.svs", "wsi/b.NDPI", "wsi/c.png", "wsi/d.txt")
    found = find_slides(cohort(tmp_path, "{folders: [{path: wsi}]}"))
    assert found.index["slide"].to_list() == ["a", "b"]
    assert [item.path.name for item in found.left_aside] == ["c.png", "d.txt"]
    found = find_slides(cohort(tmp_path, "{folders: [{path: wsi, pattern: '*.ndpi'}]}"))
    assert found.index["slide"].to_list() == ["b"]
    assert [item.path.name for item in found.left_aside] == ["a.svs"]
    with pytest.raises(CohortError, match=r"no slides found .*1 file: PNG and JPEG state no um/px"):
        slide_index(cohort(tmp_path, "{folders: [{path: wsi, pattern: '*.png'}]}"))


@pytest.mark.parametrize(
    ("name", "slide"),
    [
        ("a.b.svs", "a.b"),
        ("a.OME.TIF", "a"),
        ("a.ome.zarr", "a"),
        ("1.2.826.0.1", "1.2.826.0.1"),
        ("1.2.826.0.1.dcm", "1.2.826.0.1"),
        ("IM000001", "IM000001"),
    ],
)
def test_the_last_number_of_a_uid_is_not_a_suffix(name, slide):
    assert slide_id(SlideFiles(Path(name))) == slide


def test_dicom_slides_are_named_by_their_folders_if_they_are_alone(tmp_path):
    pixels = np.zeros((128, 128, 3), np.uint8)
    for name, series in (("a/P1.x", "1.2.5"), ("a/P2", "1.2.6"), ("b", "1.2.7"), ("c", "1.2.8")):
        (tmp_path / "wsi" / name).parent.mkdir(parents=True, exist_ok=True)
        vendors.write_dicom(tmp_path / "wsi" / name, [pixels], 0.5, label=pixels, series=series)
    for path in (tmp_path / "wsi" / "c").iterdir():
        path.rename(tmp_path / "wsi" / "b" / f"c-{path.name}")
    index = slide_index(cohort(tmp_path, "{folders: [{path: wsi}]}"))
    assert index["slide"].to_list() == ["P1.x", "P2", "c-level0", "level0"]
    # more series may come into the folder of all slides
    index = slide_index(cohort(tmp_path, "{folders: [{path: wsi/a/P2}]}"))
    assert index["slide"].to_list() == ["level0"]


def test_a_dicom_series_is_one_slide_whichever_file_a_table_names(tmp_path):
    level0 = vendors.write_dicom(
        tmp_path / "d", [np.zeros((128, 128, 3), np.uint8)], 0.5, label=np.zeros((8, 8, 3), "u1")
    )
    for named in ("d/label.dcm", "d/level0.dcm", "d"):
        (tmp_path / "slides.csv").write_text(f"slide,path,patient\n1,{named},p\n")
        assert slide_index(cohort(tmp_path, "{table: slides.csv}"))["path"].item() == str(level0)
    rows = "slide,path,patient\n1,d/label.dcm,p\n2,d/level0.dcm,p\n"
    (tmp_path / "slides.csv").write_text(rows)
    with pytest.raises(CohortError, match=r"label.dcm and level0.dcm are files of one slide.*keep"):
        slide_index(cohort(tmp_path, "{table: slides.csv}"))
    rows = "slide,path,patient\n1,slides.csv,p\n"
    (tmp_path / "slides.csv").write_text(rows)
    with pytest.raises(CohortError, match="slide '1': not a slide format; name the file"):
        slide_index(cohort(tmp_path, "{table: slides.csv}"))


def test_an_incomplete_slide_is_refused_or_reported(tmp_path):
    touch(tmp_path, "wsi/a.svs", "wsi/m.mrxs")
    (tmp_path / "wsi" / "e.svs").write_bytes(b"")
    study = cohort(tmp_path, "{folders: [{path: wsi}]}")
    with pytest.raises(CohortError, match="slide 'e': the file is empty"):
        slide_index(study)
    found = find_slides(study)
    assert found.index["slide"].to_list() == ["a", "e", "m"]
    assert found.problems == {
        "e": "the file is empty; copy the file again from its source",
        "m": "its folder 'm' is missing; copy the folder together with the file",
    }


def test_mpp_0_in_the_slide_table_is_not_taken_for_missing(tmp_path):
    touch(tmp_path, "a.tif")
    (tmp_path / "slides.csv").write_text("slide,path,patient,mpp\n1,a.tif,1,0\n")
    assert slide_index(cohort(tmp_path, "{table: slides.csv}"))["mpp"].to_list() == [0.0]


def test_two_images_of_one_file_are_two_slides_with_own_versions(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for value in (120, 200):
            writer.write(np.full((64, 64, 3), value, np.uint8), photometric="rgb", metadata=None)
    table = "slide,path,patient,mpp,image\n1,a.tif,p,0.5,0\n2,a.tif,p,0.5,1\n3,a.tif,p,0.5,\n"
    (tmp_path / "slides.csv").write_text(table)
    store = Store(tmp_path / "store")
    scan = make_slide_index(cohort(tmp_path, "{table: slides.csv}"), store)
    assert len(set(scan.versions.values())) == 3
    for slide, value in (("1", 120), ("2", 200), ("3", 120)):
        with open_indexed(store, slide) as opened:
            assert opened.read(0, 0, 8, 8, 0.5).mean() == value


def test_a_patient_with_a_trailing_blank_is_the_same_patient(tmp_path):
    touch(tmp_path, "a.tif", "b.tif")
    rows = "slide ,path,patient\na, a.tif,p00\nb,b.tif ,p00 \n"
    (tmp_path / "slides.csv").write_text(rows)
    index = slide_index(cohort(tmp_path, "{table: slides.csv}"))
    assert index["patient"].to_list() == ["p00", "p00"]


def test_paths_with_special_characters_are_found(tmp_path):
    names = ["a [1]?.tif", "b #%20*.tif", "c ü.tif"]
    touch(tmp_path, *names)
    rows = "".join(f'{name[0]},"{name}",p\n' for name in names)
    (tmp_path / "slides.csv").write_text(f"slide,path,patient\n{rows}")
    index = slide_index(cohort(tmp_path, "{table: slides.csv}"))
    assert [Path(path).name for path in index["path"]] == names


def test_missing_words_and_decimal_commas_of_a_slide_table_are_read(tmp_path):
    touch(tmp_path, "a.tif", "b.tif")
    table = (
        "slide;path;patient;mpp;image;mask;split;exclude\n"
        "1;a.tif;p;0,252;NA;NA;;NA\n"
        "2;b.tif;p;NA;1;;test;blur\n"
    )
    (tmp_path / "slides.csv").write_text(table)
    first, second = table_rows(tmp_path / "slides.csv")
    assert [first[c] for c in ("mpp", "image", "mask", "split", "exclude")] == [
        0.252,
        None,
        None,
        "cv",
        None,
    ]
    assert [second[c] for c in ("mpp", "image", "split", "exclude")] == [None, 1, "test", "blur"]


def test_every_kind_of_wrong_value_of_a_slide_table_is_a_line(tmp_path):
    table = "slide,path,patient,mpp,exclude\n1,a.tif,,x,no\n2,,p,1,"
    (tmp_path / "slides.csv").write_text(table)
    with pytest.raises(CohortError) as raised:
        table_rows(tmp_path / "slides.csv")
    assert len(str(raised.value).splitlines()) == 4


def test_an_exclude_column_of_true_and_false_is_refused(tmp_path):
    table = pl.DataFrame({"slide": ["1"], "path": ["a"], "patient": ["p"], "exclude": [False]})
    table.write_parquet(tmp_path / "slides.parquet")
    with pytest.raises(CohortError, match="has no reason"):
        table_rows(tmp_path / "slides.parquet")
