"""``nic init`` and ``nic check``: the first files of a study, and every mistake of one."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from nic_core.cli import app
from nic_core.cohort import CohortError, load_cohort
from nic_core.cohort.draft import write_study
from nic_core.steps.study_check import check_study
from tests.slides import feature_files
from tests.slides.conftest import paint, write_tiff
from tests.slides.vendors import write_dicom

run = CliRunner().invoke


def without_mpp(path: Path) -> None:
    tifffile.imwrite(path, paint(300, 300), tile=(128, 128), photometric="rgb")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight slides of eight patients with labels, and a valid cohort file."""
    for number in range(8):
        write_tiff(tmp_path / f"s{number}.tif", paint(300, 300, seed=number), mpp=1.0)
    slides = "".join(f"s{n},s{n}.tif,p{n}\n" for n in range(8))
    (tmp_path / "slides.csv").write_text(f"slide,path,patient\n{slides}")
    labels = "".join(f"s{n},{n},{'ab'[n % 2]}\n" for n in range(8))
    (tmp_path / "labels.csv").write_text(f"slide,score,growth\n{labels}")
    (tmp_path / "cohort.yaml").write_text(
        "name: c\n"
        "slides: {table: slides.csv}\n"
        "labels: labels.csv\n"
        "encoders: [{name: rgb, objective: mean_rgb}]\n"
        "targets:\n"
        "  - {name: score, kind: regression, column: score}\n"
        "  - {name: growth, kind: classification, column: growth, classes: [a, b]}\n"
    )
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def problems(folder: Path) -> list[str]:
    return [f"{item.where}: {item.problem}" for item in check_study(folder / "cohort.yaml")]


def test_a_study_without_mistakes_has_no_finding(folder):
    assert problems(folder) == []
    result = run(app, ["check", str(folder / "cohort.yaml")])
    assert result.exit_code == 0
    assert "no mistake found" in result.stdout


def test_slides_without_a_file_of_features_are_reported(folder):
    features = "{name: feat, objective: features, folder: features, embedding_size: 8}"
    edit(folder / "cohort.yaml", "encoders: [", f"encoders: [{features}, ")
    slides = pl.read_csv(folder / "slides.csv")["slide"]
    for slide in slides:
        feature_files.trident(folder / "features" / f"{slide}.h5")
    assert problems(folder) == []
    for slide in slides[:2]:
        (folder / "features" / f"{slide}.h5").unlink()
    [problem] = problems(folder)
    named = f"no grids of 2 of {len(slides)} slides in use ({slides[0]}, {slides[1]}); "
    assert problem.startswith(f"encoder feat: {named}")
    assert f"no file has the features of slide '{slides[0]}'" in problem


def test_every_mistake_is_reported_at_once(folder):
    cohort = folder / "cohort.yaml"
    edit(cohort, "encoders: [", "encoders: [{name: imp, objective: imported, file: gone.h5}, ")
    features = "{name: feat, objective: features, folder: gone, embedding_size: 8}"
    edit(cohort, "encoders: [", f"encoders: [{features}, ")
    edit(cohort, "column: score}", "column: scor}")
    edit(cohort, "classes: [a, b]", "classes: [a, b, c]")
    task = "patch_tasks: [{name: t, organ: o, mpp: 1, table: t.csv}]\n"
    cohort.write_text(cohort.read_text() + task + "setings: {}\n")
    (folder / "t.csv").write_text("path,label,group\ngone.png,a,g\n")
    (folder / "s0.tif").write_text("no slide")
    for number in (1, 2):
        without_mpp(folder / f"s{number}.tif")
    (folder / "s3.tif").unlink()
    edit(folder / "slides.csv", "s4.tif,p4\n", "s4.tif,p4\ns4,s5.tif,p4\n")
    edit(folder / "labels.csv", "s5,5,b", "S5.tif,5,b")
    found = "\n".join(problems(folder))
    for text in (
        "cohort.yaml:9: setings: unknown key 'setings'; did you mean 'settings'?",
        "cohort.yaml:6: targets.0.column: ",
        "cohort.yaml:7: targets.1.classes: no row of the label table has the class 'c'",
        "encoder imp: file ",
        "encoder feat: folder ",
        "patch task t: 1 image(s) do not exist",
        "slide s0: not an image of a known format",
        "slides s1, s2: the file does not state its um/px (mpp)",
        "slide s3: path ",
        "slide s4: the id occurs 2 times",
        "1 of 8 labelled slides have no slide: S5.tif (is it s5?)",
        "1 of 8 slides have no label: s5 (is it S5.tif?)",
    ):
        assert text in found
    result = run(app, ["check", str(cohort)])
    assert result.exit_code == 1
    assert "Traceback" not in result.stdout


def test_a_target_without_any_label_has_one_finding_per_class(folder):
    edit(folder / "cohort.yaml", "classes: [a, b]", "classes: [A, B]")
    found = problems(folder)
    assert len(found) == 2
    assert "no row of the label table has the class 'A'" in found[0]


def test_a_target_that_cannot_be_cross_validated_is_named(folder):
    edit(folder / "labels.csv", "s1,1,b\ns2,2,a\ns3,3,b\ns4,4,a\n", "")
    found = problems(folder)
    assert any(
        "targets.1" in line and "2 of 4 patients in split 'cv' have class 'a'" in line
        for line in found
    )
    assert any("4 of 8 slides have no label: s1, s2, s3 and 1 more" in line for line in found)


def test_a_crop_that_the_network_cannot_take_is_named_with_its_line(folder):
    cohort = folder / "cohort.yaml"
    edit(cohort, "encoders: [", "encoders: [{name: wide, objective: mean_rgb, patch: 224}, ")
    cohort.write_text(cohort.read_text() + "settings:\n  models:\n    crop_um: 25600\n")
    assert problems(folder) == [
        f"{cohort}:10: settings.models.crop_um: encoder 'wide': crop_um 25600 is 229 cells of "
        "112 um: network 'published' takes crops of 383 to 446 cells a side, not 229; use network "
        "'small', 'local' or 'mil', which take crops of any size, or set crop_um to a value from "
        "42896 to 49952"
    ]
    edit(cohort, "crop_um: 25600", "crop: 400")
    (only,) = problems(folder)  # not those of the default, which the invalid entry may replace
    assert "write 'crop_um: 25600'" in only
    edit(cohort, "crop: 400", "network: small")
    assert problems(folder) == []


def test_a_labelled_patient_without_slides_is_counted(folder):
    (folder / "labels.csv").write_text(
        "patient,score,growth\n"
        + "".join(f"p{n},{n},{'ab'[n % 2]}\n" for n in range(8))
        + "p8,1,a\n"
    )
    assert len(found := problems(folder)) == 1
    assert "1 of 9 labelled patients have no slide: p8" in found[0]


def test_a_missing_label_table_is_named_with_its_line(folder):
    (folder / "labels.csv").unlink()
    assert [line.split(" cannot")[0] for line in problems(folder)] == [
        f"{folder / 'cohort.yaml'}:3: labels: label table {folder / 'labels.csv'}:"
    ]


def test_missing_masks_and_files_of_patch_tasks_are_named(folder):
    edit(
        folder / "slides.csv",
        "slide,path,patient\ns0,s0.tif,p0",
        "slide,path,patient,mask\ns0,s0.tif,p0,m.png",
    )
    for n in range(1, 8):
        edit(folder / "slides.csv", f"s{n}.tif,p{n}", f"s{n}.tif,p{n},")
    (folder / "ann.csv").write_text("path,annotations,group\ns0.tif,gone.geojson,p\n")
    cohort = folder / "cohort.yaml"
    cohort.write_text(
        cohort.read_text() + "patch_tasks: [{name: t, organ: o, slides: {table: ann.csv}}]\n"
    )
    found = "\n".join(problems(folder))
    assert "slide s0: mask " in found
    assert f"patch task t: {folder / 'gone.geojson'} does not exist" in found


def test_missing_initial_weights_are_named(folder):
    edit(
        folder / "cohort.yaml",
        "encoders: [",
        "patch_tasks: [{name: t, organ: none, mpp: 0.5, table: t.csv}]\n"
        "encoders: [{name: b, objective: vae, tasks: [t], initial_weights: {file: gone}}, ",
    )
    expected = f"encoder b: initial_weights: {folder / 'gone'} does not exist; correct the path"
    assert expected in problems(folder)


def test_every_mistake_of_annotated_slides_is_reported(folder):
    (folder / "bad.geojson").write_text("{")
    (folder / "no.geojson").write_text("[]")
    Image.new("L", (300, 100), 1).save(folder / "m.png")
    (folder / "s1.tif").write_text("no slide")
    (folder / "ann.csv").write_text(
        "path,annotations,group,mpp,mask,origin\n"
        "s0.tif,bad.geojson,p,,,\n"
        "s1.tif,no.geojson,p,,,\n"
        "s2.tif,no.geojson,p,x,,\n"
        "s3.tif,no.geojson,p,,m.png,\n"
        "s4.tif,no.geojson,p,,,corner\n"
    )
    cohort = folder / "cohort.yaml"
    cohort.write_text(
        cohort.read_text() + "patch_tasks: [{name: t, organ: o, slides: {table: ann.csv}}]\n"
    )
    found = [item.problem for item in check_study(cohort) if item.where == "patch task t"]
    parts = ("bad.geojson: the annotations cannot", "s1.tif: not an image", "column 'mpp': 'x' is")
    for text in (*parts, "300 x 100 px do not fit", "origin 'corner' must be"):
        assert sum(text in problem for problem in found) == 1
    assert len(found) == 5


def test_a_class_without_images_and_images_without_class_are_named(folder):
    for name in ("a", "b", "x"):
        (folder / "task" / name).mkdir(parents=True)
        (folder / "task" / name / "1.png").write_bytes(b"")
    cohort = folder / "cohort.yaml"
    text = "patch_tasks: [{name: t, organ: o, mpp: 1, folder: task, classes: [a, b, c]}]\n"
    cohort.write_text(cohort.read_text() + text)
    found = check_study(cohort)
    assert [item.is_error for item in found] == [True, False]
    assert "class 'c' has no image" in found[0].problem
    assert "1 images of the labels x are left out" in found[1].problem


def test_files_that_a_pattern_leaves_aside_are_a_note(folder):
    edit(folder / "cohort.yaml", "{table: slides.csv}", "{folders: [{path: ., pattern: 's*.tif'}]}")
    (folder / "other.tif").write_bytes(b"")
    wide = {"COLUMNS": "400"}
    result = run(app, ["check", str(folder / "cohort.yaml")], env=wide)
    assert result.exit_code == 0
    assert "does not match the pattern s*.tif" in " ".join(result.stdout.split())
    assert "errors: 0, notes: 1" in result.stdout


def test_slides_with_the_same_content_are_named(folder):
    shutil.copy(folder / "s0.tif", folder / "s1.tif")
    slides = "slides s0, s1: "
    assert problems(folder) == [
        f"{slides}the same content of patients p0, p1, who therefore count as one in folds; "
        "correct the paths, or exclude all but one of them"
    ]
    table = pl.read_csv(folder / "slides.csv")
    split = pl.when(pl.col("slide") == "s1").then(pl.lit("test")).otherwise(pl.lit("cv"))
    table.with_columns(split.alias("split")).write_csv(folder / "slides.csv")
    assert any(
        item.startswith(f"{slides}the same content in both splits") for item in problems(folder)
    )


def test_two_images_of_a_file_that_the_table_names_are_no_copies(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for seed in (1, 2):
            options = {"tile": (128, 128), "photometric": "rgb", "metadata": None}
            writer.write(paint(300, 300, seed), **options)
    table = "slide,path,patient,mpp,image\ns0,a.tif,p0,1,0\ns1,a.tif,{},1,1\n"
    (tmp_path / "cohort.yaml").write_text(
        "name: c\nslides: {table: slides.csv}\nencoders: [{name: rgb, objective: mean_rgb}]\n"
    )
    for patient in ("p0", "p1"):
        (tmp_path / "slides.csv").write_text(table.format(patient))
        assert problems(tmp_path) == []
    (tmp_path / "slides.csv").write_text(table.format("p0").replace("1,0\n", "1,\n"))
    assert [item.partition(";")[0] for item in problems(tmp_path)] == [
        "slides s0, s1: the same content of patient p0"
    ]


def test_a_dicom_series_in_two_folders_is_a_mistake(tmp_path):
    path = write_dicom(tmp_path / "a", [paint(256, 512), paint(128, 256)], 0.5, label=paint(9, 9))
    (tmp_path / "b").mkdir()
    (path.parent / "level1.dcm").rename(tmp_path / "b" / "level1.dcm")
    (tmp_path / "cohort.yaml").write_text(
        "name: c\nslides: {folders: [{path: .}]}\nencoders: [{name: rgb, objective: mean_rgb}]\n"
    )
    assert any("its DICOM series is spread over 2 folders" in item for item in problems(tmp_path))


def test_check_refuses_a_missing_cohort_file_in_one_line(tmp_path):
    result = run(app, ["check", str(tmp_path / "cohort.yaml")])
    assert result.exit_code == 1
    assert "cannot read the cohort file" in result.stdout
    assert "Traceback" not in result.stdout


def test_slides_with_equal_content_of_several_patients_are_an_error(folder):
    (folder / "s7.tif").write_bytes((folder / "s6.tif").read_bytes())
    edit(
        folder / "cohort.yaml",
        "classes: [a, b]}",
        "classes: [a, b]}\nsettings: {models: {folds: 8}}",
    )
    found = check_study(folder / "cohort.yaml")
    assert (found[0].where, found[0].is_error) == ("slides s6, s7", True)
    assert "the same content of patients p6, p7, who therefore count as one" in found[0].problem
    assert "7 folds instead of 8 (leave-one-patient-out)" in found[1].problem
    assert (
        "(8 patients count as 7, since slides of theirs have the same content)" in found[1].problem
    )


def test_a_problem_of_sites_is_reported_once_for_all_targets(folder):
    edit(folder / "cohort.yaml", "classes: [a, b]}", "classes: [a, b]}\nsettings: {models: {}}")
    sites = {"s0": "A", "s1": "A", "s2": "B", "s3": "B", "s4": "C", "s5": "C", "s6": "D"}
    table = pl.read_csv(folder / "slides.csv")
    site = pl.col("slide").replace_strict(sites, default=None)
    table.with_columns(site=site).write_csv(folder / "slides.csv")
    assert problems(folder) == []
    edit(folder / "cohort.yaml", "models: {}", "models: {folds: site}")
    assert problems(folder) == [
        f"{folder}/cohort.yaml:8: settings.models.folds: column 'site': patients of split 'cv' "
        "without a site: p7; fill in the column of the slide table or of the label table, or "
        "exclude their slides"
    ]
    edit(folder / "slides.csv", "s7.tif,p7,", "s7.tif,p7,D")
    assert problems(folder) == []
    edit(folder / "cohort.yaml", "folds: site", "folds: sites")
    (problem,) = problems(folder)
    assert "settings.models.folds: 'sites' is not allowed; write a number of folds" in problem


def test_slides_with_equal_content_of_one_patient_are_a_note(folder):
    (folder / "s7.tif").write_bytes((folder / "s6.tif").read_bytes())
    edit(folder / "slides.csv", "s7.tif,p7", "s7.tif,p6")
    found = [item for item in check_study(folder / "cohort.yaml") if item.where == "slides s6, s7"]
    assert [item.is_error for item in found] == [False]


def test_an_excluded_copy_of_a_slide_joins_no_patients(folder):
    (folder / "s7.tif").write_bytes((folder / "s6.tif").read_bytes())
    rows = "".join(f"s{n},s{n}.tif,p{n},{'copy' if n == 7 else ''}\n" for n in range(8))
    (folder / "slides.csv").write_text(f"slide,path,patient,exclude\n{rows}")
    assert "same content" not in "\n".join(problems(folder))


def test_an_excluded_slide_needs_no_label(folder):
    rows = "".join(f"s{n},s{n}.tif,p{n},{'blur' if n == 7 else ''}\n" for n in range(8))
    (folder / "slides.csv").write_text(f"slide,path,patient,exclude\n{rows}")
    edit(folder / "labels.csv", "s7,7,b\n", "")
    assert "no label" not in "\n".join(problems(folder))


def test_a_mask_that_does_not_fit_its_slide_is_an_error(folder):
    Image.new("L", (300, 100), 1).save(folder / "m.png")
    (folder / "m.geojson").write_text("{")
    masks = {0: "m.png", 1: "m.geojson"}
    rows = "".join(f"s{n},s{n}.tif,p{n},{masks.get(n, '')}\n" for n in range(8))
    (folder / "slides.csv").write_text(f"slide,path,patient,mask\n{rows}")
    found = problems(folder)
    assert len(found) == 2
    assert found[0].startswith("slide s0: mask ")
    assert "300 x 100 px do not fit" in found[0]
    assert found[1].startswith(f"slide s1: mask {folder / 'm.geojson'}: the annotations cannot be")


def test_a_misspelt_optional_column_is_a_note(folder):
    edit(folder / "slides.csv", "slide,path,patient\n", "slide,path,patient,orgin,age\n")
    for n in range(8):
        edit(folder / "slides.csv", f"s{n}.tif,p{n}\n", f"s{n}.tif,p{n},bounds,50\n")
    found = check_study(folder / "cohort.yaml")
    assert [item.is_error for item in found] == [False]
    assert "column 'orgin' has no effect; did you mean 'origin'?" in found[0].problem


def test_every_kind_of_wrong_value_of_the_slide_table_is_a_finding(folder):
    edit(folder / "slides.csv", "s0.tif,p0\n", "s0.tif,NA\n")
    edit(folder / "slides.csv", "s1,s1.tif", "s1,")
    found = problems(folder)
    assert sum(f"slide table {folder / 'slides.csv'}: no " in line for line in found) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("labels: labels.csv", "labels: [labels.csv]", ":3: labels: write a path"),
        ("encoders:", "settings: [1]\nencoders:", ":4: settings: write keys with values (patch"),
        ("encoders:", "automation: [1]\nencoders:", ":4: automation: write keys with values"),
    ],
)
def test_a_list_where_another_type_belongs_is_one_finding(folder, old, new, message):
    edit(folder / "cohort.yaml", old, new)
    assert any(message in line for line in problems(folder))


def test_classes_in_other_case_are_suggested(folder):
    edit(folder / "labels.csv", ",b\n", ",B\n")
    found = problems(folder)
    assert "no row of the label table has the class 'b'; did you mean 'B'?" in found[0]
    assert "has class 'B', which is not one of a, b (is it b?)" in found[1]


def test_a_class_column_of_lists_is_an_error(folder):
    slides = [f"s{n}" for n in range(8)]
    table = pl.DataFrame({"slide": slides, "score": range(8), "growth": [["a"]] * 8})
    table.write_parquet(folder / "labels.parquet")
    edit(folder / "cohort.yaml", "labels.csv", "labels.parquet")
    assert "targets.1.column: the column holds List(String)" in "\n".join(problems(folder))


# --- nic init --------------------------------------------------------------------------------


def test_init_writes_a_study_that_check_accepts(tmp_path):
    slides = tmp_path / "scans"
    (slides / "second").mkdir(parents=True)
    for seed, name in enumerate(("P1-1.tif", "P1-2.tif", "P2.tif", "second/P3.tif")):
        write_tiff(slides / name, paint(300, 300, seed=seed), mpp=1.0)
    (slides / "notes.txt").write_text("x")
    result = run(app, ["init", str(slides)])
    assert result.exit_code == 0
    table = pl.read_csv(slides / "slides.csv")
    assert table.select("slide", "path", "patient", "file_mpp", "mpp_from").rows() == [
        ("P1-1", "P1-1.tif", "P1-1", 1.0, "TIFF resolution"),
        ("P1-2", "P1-2.tif", "P1-2", 1.0, "TIFF resolution"),
        ("P2", "P2.tif", "P2", 1.0, "TIFF resolution"),
        ("P3", "second/P3.tif", "P3", 1.0, "TIFF resolution"),
    ]
    assert table["decide"].to_list() == [
        "patient: the same patient as P1-2?",
        "patient: the same patient as P1-1?",
        None,
        None,
    ]
    assert "1 file: not a slide format (.txt)" in " ".join(result.stdout.split())
    assert len((slides / "cohort.yaml").read_text().splitlines()) == 6
    assert load_cohort(slides / "cohort.yaml").name == "scans"
    assert run(app, ["check", str(slides / "cohort.yaml")]).exit_code == 0


def test_init_lists_what_needs_a_decision(tmp_path):
    without_mpp(tmp_path / "a.tif")
    (tmp_path / "b.svs").write_text("no slide")
    for part in ("x", "y"):
        (tmp_path / part).mkdir()
        write_tiff(tmp_path / part / "my scan.tif", paint(300, 300), mpp=1.0)
    rows = {row["slide"]: row for row in write_study(tmp_path, tmp_path).slides.rows(named=True)}
    assert set(rows) == {"a", "b", "x_my_scan", "y_my_scan"}
    assert "column `mpp`" in rows["a"]["decide"]
    assert "not an image of a known format" in rows["b"]["decide"]
    assert "check this id." in rows["x_my_scan"]["decide"]


def test_init_replaces_no_file(tmp_path):
    write_tiff(tmp_path / "a.tif", paint(300, 300), mpp=1.0)
    (tmp_path / "cohort.yaml").write_text("mine")
    result = run(app, ["init", str(tmp_path)])
    assert result.exit_code == 1
    assert "exists and is not replaced" in result.stdout
    assert (tmp_path / "cohort.yaml").read_text() == "mine"
    assert not (tmp_path / "slides.csv").exists()


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_init_refuses_a_folder_without_slides(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CohortError, match=name):
        write_study(tmp_path / name, tmp_path)
    assert not (tmp_path / "cohort.yaml").exists()
