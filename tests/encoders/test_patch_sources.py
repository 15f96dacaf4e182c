"""Tests of patch sources: HDF5 files, annotated slides and folders."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
import tifffile

from nic_core.cohort import CohortError, PatchTask
from nic_core.encoders.patch_sources import open_source, source_files
from nic_core.encoders.patch_tasks import PatchDataset, build_patch_task, load_patch_task
from tests.slides.vendors import write_mirax

from .conftest import write_image


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def build(task: PatchTask, patch: int = 32, **options: object) -> PatchDataset:
    return build_patch_task(task, **({"patch": patch, "mpp": 0.5, "seed": 0} | options))


# --- HDF5 ------------------------------------------------------------------------------------

SIZES = {"train": 40, "validation": 20, "test": 20}


@pytest.fixture
def pcam(tmp_path: Path) -> Path:
    """A small PatchCamelyon: files of images, labels and metadata for each split."""
    for number, (split, size) in enumerate(SIZES.items()):
        stem = f"camelyonpatch_level_2_split_{split}"
        with h5py.File(tmp_path / f"{stem}_x.h5", "w") as file:
            images = noise(number, size, 24, 24)
            file.create_dataset("x", data=images, chunks=(8, 24, 24, 3), compression="gzip")
        with h5py.File(tmp_path / f"{stem}_y.h5", "w") as file:
            file["y"] = (np.arange(size) % 2).astype(np.uint8).reshape(size, 1, 1, 1)
        slides = [f"camelyon16_{split}_{i % 4}" for i in range(size)]
        pl.DataFrame({"coord_x": range(size), "wsi": slides}).write_csv(
            tmp_path / f"{stem}_meta.csv"
        )
    return tmp_path


def pcam_task(folder: Path, *, splits: bool = True, **changes: object) -> PatchTask:
    parts = [
        {kind: folder / f"camelyonpatch_level_2_split_{split}_{name}"
         for kind, name in (("images", "x.h5"), ("labels", "y.h5"), ("meta", "meta.csv"))}
        | ({"split": split} if splits else {})
        for split in SIZES
    ]  # fmt: skip
    values = {"mpp": 1.0, "group_column": "wsi", "classes": ("normal", "tumor"), "hdf5": parts}
    return PatchTask(**({"name": "pcam", "organ": "lymph node"} | values | changes))


def test_patchcamelyon_keeps_splits_groups_and_pixels(pcam: Path):
    dataset = build(pcam_task(pcam), mpp=1.0, patch=24)
    assert dataset.classes == ("normal", "tumor")
    assert dict(dataset.table.group_by("split").len().rows()) == SIZES
    assert dataset.table["group"].n_unique() == 12
    assert np.array_equal(dataset.patches[40:60], noise(1, 20, 24, 24))
    assert dataset.table["label"][:3].to_list() == ["normal", "tumor", "normal"]
    assert dataset.table["source"][41].endswith("validation_x.h5#1")


def test_patchcamelyon_is_resampled_and_cropped(pcam: Path):
    dataset = build(pcam_task(pcam), mpp=0.5, patch=32)  # 24 px at 1.0 are 48 px at 0.5
    assert dataset.patches.shape == (80, 32, 32, 3)
    assert set(dataset.table.select("x", "y").unique().rows()) == {(8, 8)}


def test_without_published_splits_groups_are_split(pcam: Path):
    frame = build(pcam_task(pcam, splits=False)).table
    assert frame.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1
    assert set(frame["split"]) == set(SIZES)


def test_dataset_on_disk_equals_the_one_in_memory(pcam: Path, tmp_path: Path):
    folder = tmp_path / "made"
    folder.mkdir()
    written, held = build(pcam_task(pcam), folder=folder), build(pcam_task(pcam))
    assert isinstance(written.patches, np.memmap)
    for dataset in (written, load_patch_task(folder)):
        assert np.array_equal(dataset.patches, held.patches)
        assert dataset.table.equals(held.table)
        assert dataset.findings.equals(held.findings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "camelyonpatch_level_2_split_test_x.h5").unlink(), "cannot be read"),
        (lambda f: (f / "camelyonpatch_level_2_split_test_y.h5").write_bytes(b"no"), "as HDF5"),
        (lambda f: overwrite(f, "test_y", y=np.zeros(3, np.uint8)), "20 images, .* 3 labels"),
        (lambda f: overwrite(f, "test_y", y=np.full(20, 2)), "class number 2"),
        (lambda f: overwrite(f, "test_x", images=noise(0, 20, 8, 8)), r"no dataset 'x'; .*images"),
        (lambda f: overwrite(f, "test_x", x=np.zeros((20, 8, 8), np.uint8)), r"\(N, H, W, 3\)"),
        (
            lambda f: pl.DataFrame({"wsi": ["a"]}).write_csv(
                f / "camelyonpatch_level_2_split_test_meta.csv"
            ),
            "1 rows, but .*20 images",
        ),
    ],
)  # fmt: skip
def test_invalid_hdf5_files_are_refused(pcam: Path, change, message: str):
    change(pcam)
    with pytest.raises(CohortError, match=f"patch task 'pcam': .*{message}"):
        build(pcam_task(pcam))


def overwrite(folder: Path, name: str, **datasets: np.ndarray) -> None:
    with h5py.File(folder / f"camelyonpatch_level_2_split_{name}.h5", "w") as file:
        file.update(datasets)


def test_a_compressed_hdf5_file_is_refused(pcam: Path):
    task = pcam_task(pcam)
    packed = pcam / "x.h5.gz"
    packed.write_bytes(b"\x1f\x8b")
    part = task.hdf5[0].model_copy(update={"images": packed})
    with pytest.raises(CohortError, match="gunzip"):
        build(task.model_copy(update={"hdf5": (part,)}))


# --- annotated slides ------------------------------------------------------------------------

TUMOUR = [[0, 0], [256, 0], [256, 128], [0, 128], [0, 0]]  # 8 x 4 cells of 32 px


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """Six slides of 16 x 16 tissue cells; five have a tumour in the corner."""
    rows = []
    for number in range(6):
        pixels = noise(number, 512, 512) // 2
        path = tmp_path / f"s{number}.tif"
        tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb")
        write_image(tmp_path / "all.png", np.full((16, 16), 255, np.uint8))
        shape = {"type": "Polygon", "coordinates": [TUMOUR]}
        about = {"classification": {"name": "tumour"}}
        feature = {"type": "Feature", "geometry": shape, "properties": about}
        (tmp_path / f"s{number}.geojson").write_text(json.dumps({"features": [feature]}))
        rows.append(
            (path.name, f"s{number}.geojson" if number else None, f"p{number}", 0.5, "all.png")
        )
    schema = ["path", "annotations", "patient", "mpp", "mask"]
    pl.DataFrame(rows, schema=schema, orient="row").write_csv(tmp_path / "slides.csv")
    return tmp_path / "slides.csv"


def slide_task(table: Path, **slides: object) -> PatchTask:
    slides = {"table": table, "background_label": "normal"} | slides
    return PatchTask(name="cut", organ="breast", slides=slides, group_column="patient")


def test_cells_of_annotated_slides_become_labelled_patches(annotated: Path):
    dataset = build(slide_task(annotated))
    assert dataset.classes == ("normal", "tumour")
    counts = dataset.table.group_by("group", "label").len()
    assert counts.filter(group="p0").rows() == [("p0", "normal", 256)]
    assert sorted(counts.filter(group="p1").rows()) == [("p1", "normal", 224), ("p1", "tumour", 32)]
    row = dataset.table.filter(group="p3", label="tumour").row(9, named=True)
    pixels = tifffile.imread(row["source"])[row["y"] : row["y"] + 32, row["x"] : row["x"] + 32]
    assert np.array_equal(dataset.patches[row["index"]], pixels)
    assert row["x"] < 256
    assert row["y"] < 128


def test_a_cell_is_labelled_from_min_coverage_on(annotated: Path):
    path = annotated.parent / "s1.geojson"
    path.write_text(path.read_text().replace("256", "264"))  # a quarter of the next column

    def tumours(min_coverage: float) -> int:
        frame = build(slide_task(annotated, min_coverage=min_coverage)).table.filter(group="p1")
        assert frame.filter(label="normal").height == 224 - 4  # touched cells are not background
        return frame.filter(label="tumour").height

    assert tumours(0.5) == 32
    assert tumours(0.2) == 36


def test_max_per_slide_limits_patches_of_each_class(annotated: Path):
    frames = [build(slide_task(annotated, max_per_slide=10), seed=seed).table for seed in (0, 0, 1)]
    assert frames[0].group_by("group", "label").len()["len"].unique().to_list() == [10]
    assert frames[0].equals(frames[1])
    places = [frame.select("source", "x", "y").sort("source", "y", "x") for frame in frames]
    assert not places[0].equals(places[2])


def test_without_background_label_each_slide_needs_annotations(annotated: Path):
    with pytest.raises(CohortError, match="1 of the rows used have an empty 'annotations'"):
        build(slide_task(annotated, background_label=None))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image", "5", "image 5"),
        ("image", "0.5", "column 'image': '0.5' is not a whole number"),
        ("image", "first", "column 'image': 'first' is not a finite number"),
        ("mpp", "x", "column 'mpp': 'x' is not a finite number"),
    ],
)
def test_image_and_mpp_of_a_row_are_used(annotated: Path, column, value, message):
    rows = pl.read_csv(annotated, infer_schema=False)
    rows = rows.with_columns(pl.lit("0").alias("image")) if column == "image" else rows
    rows.write_csv(annotated)
    expected = len(build(slide_task(annotated)).table)
    assert expected
    rows.with_columns(pl.lit(value).alias(column)).write_csv(annotated)
    with pytest.raises(CohortError, match=message):
        build(slide_task(annotated))


def test_a_table_without_slides_is_refused(annotated: Path):
    pl.read_csv(annotated).clear().write_csv(annotated)
    with pytest.raises(CohortError, match=r"slides\.csv has no slide"):
        build(slide_task(annotated))


def test_error_names_a_slide_that_cannot_be_opened(annotated: Path):
    (annotated.parent / "s2.tif").write_bytes(b"nothing")
    with pytest.raises(CohortError, match=r"patch task 'cut': .*s2\.tif"):
        build(slide_task(annotated))


def test_cells_that_an_unclassified_region_touches_are_not_background(annotated: Path):
    path = annotated.parent / "s1.geojson"
    collection = json.loads(path.read_text())
    # between the sample points of a cell, and over two cells
    for corner, size in ((300, 0.5), (356, 40)):
        ring = [[corner, corner], [corner + size, corner], [corner + size, corner + size]]
        shape = {"type": "Polygon", "coordinates": [ring]}
        collection["features"].append({"type": "Feature", "geometry": shape})
    path.write_text(json.dumps(collection))
    dataset = build(slide_task(annotated))
    assert dataset.table.filter(group="p1", label="normal").height == 224 - 1 - 3
    (found,) = dataset.found("unclassified").to_dicts()
    assert found["source"] == str(path)
    assert found["detail"] == "2 of 3 features without a class: features 2, 3"


def test_features_that_are_not_used_are_findings(annotated: Path):
    path = annotated.parent / "s1.geojson"
    collection = json.loads(path.read_text())
    tumour = collection["features"][0]
    point = {"type": "Point", "coordinates": [1, 2]}
    cell = {"objectType": "cell", "classification": "tumour"}
    outside = {"type": "Polygon", "coordinates": [[[-400, 0], [100, 0], [100, 50], [-400, 50]]]}
    collection["features"] += [tumour | {"geometry": point}, tumour | {"properties": cell}] + [
        tumour | {"geometry": outside}
    ] * 12
    path.write_text(json.dumps(collection))
    dataset = build(slide_task(annotated))
    details = dict(dataset.findings.select("kind", "detail").rows())
    assert details["outside_tissue"].startswith(
        "12 of 13 regions mostly outside tissue: features 4 (20% in tissue), 5 (20% in tissue), "
    )
    assert details["outside_tissue"].endswith(", ...")
    unused = dataset.found("unused").select("label", "detail").rows()
    assert unused == [
        ("tumour", "1 of 15 features a point, without an area: features 2"),
        ("tumour", "1 of 15 features a cell of QuPath, not an annotation: features 3"),
    ]
    counts = dataset.findings_by_kind().select("kind", "count").rows()
    assert {("unused", 2), ("outside_tissue", 1), ("unclassified", 0)} <= set(counts)


def test_groups_of_camelyon16_are_renamed_and_exclusions_cut_out(annotated: Path):
    def asap(*groups: tuple[str, int]) -> str:
        areas = []
        for group, side in groups:
            points = "".join(
                f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>'
                for i, (x, y) in enumerate([(0, 0), (side, 0), (side, side), (0, side)])
            )
            areas.append(
                f'<Annotation Type="Polygon" PartOfGroup="{group}">'
                f"<Coordinates>{points}</Coordinates></Annotation>"
            )
        return f"<ASAP_Annotations><Annotations>{''.join(areas)}</Annotations></ASAP_Annotations>"

    for number in range(1, 6):
        # the exclusion is before the area that it is cut from
        text = asap(("_2", 64), ("_0" if number < 3 else "Tumor", 256))
        (annotated.parent / f"s{number}.geojson").write_text(text)
    rename = {"_0": "tumour", "_1": "tumour", "Tumor": "tumour", "_2": "normal"}
    table = build(slide_task(annotated, rename=rename)).table
    for patient in ("p1", "p4"):
        cells = table.filter(group=patient)
        assert set(cells["label"]) == {"normal", "tumour"}
        assert cells.filter(label="tumour").height == 64 - 4
        assert set(cells.filter(pl.col("row") < 2, pl.col("column") < 2)["label"]) == {"normal"}


# --- slides with a scanned area --------------------------------------------------------------


@pytest.fixture
def scanned(tmp_path: Path) -> Path:
    """A MIRAX slide of 512 px whose scanned area starts at 128, 128; QuPath drew its left third."""
    levels = [noise(0, 512 // 2**n, 512 // 2**n) // 2 for n in range(3)]
    outside = [i for i in range(16) if i < 4 or i % 4 == 0]
    write_mirax(tmp_path / "a.mrxs", levels, 0.5, picture=levels[2], missing=outside)
    write_image(tmp_path / "all.png", np.full((512, 512), 255, np.uint8))
    areas = {"Tumor": (0, 128), "Stroma": (128, 384)}
    features = [
        {
            "type": "Feature",
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[left, 0], [right, 0], [right, 384], [left, 384]]],
            },
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for name, (left, right) in areas.items()
    ]
    (tmp_path / "a.geojson").write_text(json.dumps({"features": features}))
    (tmp_path / "slides.csv").write_text("path,annotations,mask\na.mrxs,a.geojson,all.png\n")
    return tmp_path / "slides.csv"


def cells_by_label(table: Path, **slides: object) -> dict[str, tuple[int, int, int]]:
    """Number of cells, and smallest and largest x, of each label."""
    task = slide_task(table, background_label=None, **slides)
    task = task.model_copy(update={"group_column": None})
    with open_source(task, patch=32, mpp=0.5, tissue=0.6, seed=0) as source:
        found = source.listing.group_by("label").agg(
            pl.len(), low=pl.col("x").min(), high=pl.col("x").max()
        )
    return {label: tuple(rest) for label, *rest in found.rows()}


FROM_BOUNDS = {"Tumor": (48, 128, 224), "Stroma": (96, 256, 480)}


def test_annotations_count_from_the_scanned_area_if_the_task_states_it(scanned: Path):
    assert cells_by_label(scanned, origin="bounds") == FROM_BOUNDS
    assert cells_by_label(scanned, origin="level0")["Tumor"] == (48, 0, 96)


def test_annotations_count_from_the_scanned_area_if_the_row_states_it(scanned: Path):
    header, row = scanned.read_text().split()
    scanned.write_text(f"{header},origin\n{row},bounds\n")
    assert cells_by_label(scanned) == cells_by_label(scanned, origin="level0") == FROM_BOUNDS
    scanned.write_text(f"{header},origin\n{row},corner\n")
    with pytest.raises(CohortError, match="origin 'corner' must be 'level0' or 'bounds'"):
        cells_by_label(scanned)


def test_annotations_of_a_scanned_area_without_an_origin_are_refused(scanned: Path):
    with pytest.raises(CohortError, match=r"starts at x, y = 128, 128 .* set 'origin' to 'bounds'"):
        cells_by_label(scanned)


def test_a_region_that_covers_both_readings_needs_no_origin(scanned: Path):
    ring = [[-999, -999], [9999, -999], [9999, 9999], [-999, 9999]]
    feature = {"geometry": {"type": "Polygon", "coordinates": [ring]}}
    feature["properties"] = {"classification": "Tumor"}
    (scanned.parent / "a.geojson").write_text(json.dumps(feature))
    assert cells_by_label(scanned) == {"Tumor": (256, 0, 480)}


def test_a_mask_of_regions_counts_from_the_origin_of_its_row(scanned: Path):
    scanned.write_text("path,annotations,mask,origin\na.mrxs,a.geojson,a.geojson,bounds\n")
    assert cells_by_label(scanned) == FROM_BOUNDS
    # without an origin the mask is refused, before the annotations are read
    scanned.write_text("path,annotations,mask\na.mrxs,gone.geojson,a.geojson\n")
    with pytest.raises(CohortError, match=r"set 'origin' to 'bounds'"):
        cells_by_label(scanned)


def test_source_files_are_listed(annotated: Path, pcam: Path):
    names = {path.name for path in source_files(slide_task(annotated))}
    assert names >= {"slides.csv", "s0.tif", "s5.tif", "s1.geojson", "all.png"}
    assert len(source_files(pcam_task(pcam))) == 9


# --- folders, classes, resolution ------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for patient in range(8):
        for number, label in enumerate(("x", "y", "z")):
            name = f"{label}/P{patient}_{number}.png"
            write_image(tmp_path / "f" / name, noise(3 * patient + number, 40, 40))
    return tmp_path / "f"


def folder_task(folder: Path, **changes: object) -> PatchTask:
    values = {"name": "f", "organ": "colon", "mpp": 0.5, "folder": folder}
    return PatchTask(**(values | changes))


def test_group_pattern_reads_the_patient_from_the_file_name(folder: Path):
    table = build(folder_task(folder, group_pattern=r"^(?P<group>P\d)")).table
    assert sorted(table["group"].unique()) == [f"P{number}" for number in range(8)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^Q(?P<group>.)", "does not match the name of .*P0_0"),
        ("P", "has no named group"),
        ("(", "has no named group"),
    ],
)
def test_a_group_pattern_without_match_is_refused(folder: Path, pattern: str, message: str):
    with pytest.raises(CohortError, match=message):
        build(folder_task(folder, group_pattern=pattern))


def test_classes_select_and_order_labels(folder: Path):
    dataset = build(folder_task(folder, classes=("z", "x")))
    assert dataset.classes == ("z", "x")
    assert set(dataset.table.select("label", "class").unique().rows()) == {("z", 0), ("x", 1)}


def test_unknown_resolution_keeps_pixels_and_is_a_finding(folder: Path):
    dataset = build(folder_task(folder, mpp="unknown"), patch=40, mpp=0.25)
    assert np.array_equal(dataset.patches[0], noise(0, 40, 40))
    assert len(dataset.found("unknown_mpp")) == 1


def test_images_too_small_for_mirroring_are_refused(folder: Path):
    with pytest.raises(CohortError, match=r"P0_0\.png is 40 x 40 px .* less than a third"):
        build(folder_task(folder), patch=128)


def test_a_class_of_one_patient_is_a_finding(folder: Path):
    for image in (folder / "z").iterdir():
        if not image.name.startswith("P4"):
            image.unlink()
    dataset = build(folder_task(folder, group_pattern=r"^(?P<group>P\d)"))
    (finding,) = dataset.found("one_group").rows(named=True)
    assert (finding["label"], finding["detail"]) == ("z", "only in group P4")
    assert dataset.found("absent").select("label", "split").rows() == [
        ("z", "validation"),
        ("z", "test"),
    ]


def test_images_are_read_lazily(folder: Path):
    with open_source(folder_task(folder), patch=32, mpp=0.5, tissue=0.6, seed=0) as source:
        (folder / "x" / "P0_0.png").unlink()
        assert np.array_equal(source.read(1), noise(3, 40, 40))
