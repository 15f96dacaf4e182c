"""Inputs that people of the field reported, from the folder ``shared/cases`` beside the project."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from nic_core.cohort import AnnotatedSlides, Cohort, Geometry, PatchTask, load_cohort
from nic_core.cohort.index import slide_index
from nic_core.encoders.patch_sources import open_source
from nic_core.encoders.patch_tasks import build_patch_task
from nic_core.models.labels import read_labels, target_table
from nic_core.slides import SlideError, open_slide
from nic_core.tiling.annotations import read_annotations
from nic_core.tiling.mask_files import read_mask
from nic_core.tiling.patches import patch_table
from nic_core.tiling.regions import label_patches
from nic_core.tiling.tissue import tissue_mask

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cases() -> Path:
    default = Path(__file__).parents[2] / "shared" / "cases"
    folder = Path(os.environ.get("NIC_CASES") or default)
    if not folder.is_dir():
        pytest.skip(f"no reported inputs at {folder}; set NIC_CASES")
    return folder


@pytest.fixture(scope="module")
def cmu(cases: Path) -> Path:
    """The slide, 2,220 x 2,967 px, that the annotations and masks belong to."""
    path = cases.parent / "real-data" / "slides" / "CMU-1-Small-Region.svs"
    if not path.is_file():
        pytest.skip(f"no real slide at {path}")
    return path


def cohort(folder: Path, slides: str, more: str = "") -> Cohort:
    file = folder / "cohort.yaml"
    file.write_text(
        f"name: case\nslides: {slides}\nencoders: [{{name: rgb, objective: mean_rgb}}]\n{more}"
    )
    return load_cohort(file)


def labelled(cases: Path, folder: Path, case: str, classes: str) -> tuple[Cohort, pl.DataFrame]:
    """Cohort and slide index of a case with a slide table and a label table."""
    tables = cases / "tables" / case
    study = cohort(
        folder,
        f"{{table: '{tables / 'slides.csv'}'}}",
        f"labels: '{tables / 'labels.csv'}'\n"
        f"targets: [{{name: t, kind: classification, column: grade, classes: {classes}}}]\n",
    )
    return study, slide_index(study)


def cell_labels(slide: Path, annotations: Path) -> pl.DataFrame:
    with open_slide(slide) as opened:
        cells = patch_table("s", opened, tissue_mask(opened), Geometry(128, 0.5, 128), tissue=0.6)
    return cells.hstack(
        label_patches(cells, read_annotations(annotations).regions).drop("row", "column")
    )


def test_pixels_and_mpp_are_of_the_scan_not_of_the_macro(cases):
    with open_slide(cases / "ome-macro-first" / "scan.ome.tif") as slide:
        cells = patch_table("s", slide, tissue_mask(slide), Geometry(128, 0.5, 128), tissue=0.6)
        assert slide.mpp == pytest.approx(0.5)
        assert [image.number == slide.image for image in slide.images] == [False, True]
    assert cells["kept"].sum() == pytest.approx(99, abs=2)


def test_a_dicom_series_is_one_slide(cases, tmp_path):
    index = slide_index(cohort(tmp_path, f"{{folders: [{{path: '{cases / 'dicom-series'}'}}]}}"))
    assert index["slide"].to_list() == ["study1", "study2"]
    for name in index["slide"]:
        for file in (cases / "dicom-series" / name).iterdir():
            with open_slide(file) as slide:
                assert str(slide.path) == index.filter(slide=name)["path"].item()


def bounds_task(cases: Path, table: Path, origin: str | None) -> PatchTask:
    scan = cases / "bounds" / "scan.mrxs"
    table.write_text(f"path,annotations,group\n{scan},{scan}.qupath.geojson,p\n")
    slides = AnnotatedSlides.model_validate({"table": table, "origin": origin})
    return PatchTask(name="t", organ="o", slides=slides)


def test_annotations_count_from_the_stated_origin(cases, tmp_path):
    task = bounds_task(cases, tmp_path / "t.csv", "bounds")
    with open_source(task, patch=128, mpp=0.5, tissue=0.6, seed=0) as source:
        sides = source.listing.group_by("label").agg(low=pl.col("x").min(), high=pl.col("x").max())
    tumor, stroma = (sides.filter(label=name) for name in ("Tumor", "Stroma"))
    assert tumor["high"].item() < stroma["low"].item()


def test_annotations_without_an_origin_are_refused_where_it_matters(cases, tmp_path):
    task = bounds_task(cases, tmp_path / "t.csv", None)
    with (
        pytest.raises(ValueError, match="origin"),
        open_source(task, patch=128, mpp=0.5, tissue=0.6, seed=0),
    ):
        pass


@pytest.mark.parametrize(
    ("file", "classes"),
    [("names.geojson", {"Tumor: Positive", "Stroma"}), ("string.geojson", {"Tumor", "Stroma"})],
)
def test_derived_classes_and_bare_strings_are_classes(cases, cmu, file, classes):
    found = {region.label for region in read_annotations(cases / "annotations" / file).regions}
    assert found == classes


def test_touched_cells_have_no_background_label(cases, cmu):
    cells = cell_labels(cmu, cases / "annotations" / "names.geojson")
    left = cells.filter(pl.col("x") + pl.col("size") <= 1110, pl.col("kept"))
    assert left.height
    assert left["touched"].all()
    assert set(left["label"]) == {"Tumor: Positive"}


@pytest.mark.parametrize(
    ("file", "inner"), [("camelyon17.xml", "normal"), ("qupath-Necrosis.geojson", "Necrosis")]
)
def test_the_inner_region_gives_the_label(cases, cmu, file, inner):
    cells = cell_labels(cmu, cases / "nested" / file)
    inside = cells.filter(
        pl.col("x") >= 512, pl.col("y") >= 512, pl.col("x") < 1400, pl.col("y") < 1900
    )
    assert set(inside["label"]) == {inner}
    outside = cells.filter(pl.col("x") + pl.col("size") < 512)["label"].drop_nulls()
    assert len(outside)
    assert inner not in outside


@pytest.mark.parametrize("file", ["palette-voc.png", "rgb-green.png", "padded-to-64.tif"])
def test_masks_of_any_kind_equal_the_grey_one(cases, cmu, file):
    with open_slide(cmu) as slide:
        expected = read_mask(cases / "masks" / "grey.png", slide).array
        found = read_mask(cases / "masks" / file, slide).array
    assert expected.mean() == pytest.approx(0.43, abs=0.015)
    assert (found & expected).sum() / (found | expected).sum() > 0.98


@pytest.mark.parametrize("engine", ["tifffile", "openslide", "libvips"])
def test_transparent_pixels_are_white(cases, engine):
    with open_slide(cases / "rgba" / "straight.tif", engine=engine) as slide:
        cells = patch_table("s", slide, tissue_mask(slide), Geometry(128, 0.5, 128), tissue=0.6)
        corner = slide.read(0, 0, 64, 64, slide.mpp)
    assert cells["kept"].sum() == pytest.approx(99, abs=2)  # 96 with black outside the section
    assert np.all(corner == 255)


def test_blanks_do_not_make_another_patient(cases, tmp_path):
    _, index = labelled(cases, tmp_path, "patient-trailing-space", "[high, low]")
    assert index["patient"].n_unique() == 8


def test_ids_match_after_trimming(cases, tmp_path):
    study, index = labelled(cases, tmp_path, "label-id-trailing-space", "[high, low]")
    matches = read_labels(study, study.target("t"), index).matches
    assert (matches.used, matches.labels_without_slide) == (16, [])


def test_a_class_may_be_called_none(cases, tmp_path):
    study, index = labelled(cases, tmp_path, "class-None", "['None', Mild, Severe]")
    target = study.target("t")
    units = target_table(target, read_labels(study, target, index), index)
    assert units.height == 16
    assert units["y"].value_counts().sort("y")["count"].to_list() == [6, 5, 5]


def test_blanks_make_no_further_classes_or_groups(cases):
    table = cases / "tables" / "patch-task" / "t.csv"
    task = PatchTask(name="t", organ="o", mpp=0.5, table=table)
    dataset = build_patch_task(task, patch=64, mpp=0.5, seed=0)
    assert dataset.classes == ("normal", "tumor")
    assert dataset.table.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1


def test_a_mask_of_regions_needs_an_origin_too(cases):
    scan = cases / "bounds" / "scan.mrxs"
    with open_slide(scan) as slide:
        regions = Path(f"{scan}.qupath.geojson")
        with pytest.raises(SlideError, match="origin"):
            read_mask(regions, slide)
        assert read_mask(regions, slide, origin="bounds").array.mean() == pytest.approx(0.25)
