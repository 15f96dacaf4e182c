"""The cohort file: defaults, paths, and errors with line and field."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nic_core.cohort import CohortError, Geometry, ImportedEncoder, load_cohort
from nic_core.cohort.file import read_cohort_file, valid_part

MINIMAL = """\
name: study
slides:
  table: slides.csv
encoders:
  - name: mean-rgb
    objective: mean_rgb
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "cohort.yaml"
    path.write_text(text)
    return path


def test_default_settings_are_those_of_the_paper(tmp_path):
    settings = load_cohort(write(tmp_path, MINIMAL)).settings
    assert (settings.patch, settings.mpp, settings.embedding_size, settings.tissue) == (
        128,
        0.5,
        128,
        0.6,
    )
    assert (settings.models.crop_um, settings.models.folds) == (25_600, 4)


def test_relative_paths_are_relative_to_the_cohort_file(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert load_cohort(write(tmp_path, MINIMAL)).slides.table == tmp_path / "slides.csv"


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "reason"),
    [
        (
            "objective: mean_rgb",
            "objective: magic",
            6,
            "encoders.0.objective",
            "allowed: mean_rgb, mtl",
        ),
        ("  table: slides.csv", "  patern: x", 3, "slides.patern", "unknown key"),
        ("name: mean-rgb", "name: mean/rgb", 5, "encoders.0.name", "partition key"),
        ("name: study\n", "name: study\nsettings: {patch: -1}\n", 2, "settings.patch", "greater"),
        (
            "objective: mean_rgb",
            "objective: mtl",
            5,
            "encoders.0",
            "needs at least one task",
        ),
        (
            "objective: mean_rgb",
            "objective: vae\n    tasks: [a]\nsettings: {patch: 100}\n"
            "patch_tasks: [{name: a, organ: none, mpp: 0.5, folder: a}]",
            5,
            "encoders.0",
            "vae with tellez2020 needs patches of 64, 96, 128, ... px, not 100",
        ),
    ],
)
def test_an_error_names_the_line_and_the_field(tmp_path, old, new, line, field, reason):
    path = write(tmp_path, MINIMAL.replace(old, new))
    with pytest.raises(CohortError) as error:
        load_cohort(path)
    assert str(error.value).startswith(f"{path}:{line}: {field}: ")
    assert reason in str(error.value)


IMPORTED = MINIMAL.replace("mean_rgb", "imported\n    file: {file}")
NETWORK = """
    network:
      patch: 128
      mpp: 0.5
      embedding_size: 1024
      preprocess: {resize: 224, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
"""


def test_an_imported_encoder_has_a_file_of_a_known_kind(tmp_path):
    text = IMPORTED.format(file="uni.pt2") + NETWORK
    entry = load_cohort(write(tmp_path, text)).encoder("mean-rgb")
    assert isinstance(entry, ImportedEncoder)
    assert (entry.file, entry.kind, entry.tasks) == (tmp_path / "uni.pt2", "torch.export", ())
    (tmp_path / "mtl-4.v2").mkdir()
    entry = load_cohort(write(tmp_path, IMPORTED.format(file="mtl-4.v2"))).encoder("mean-rgb")
    assert isinstance(entry, ImportedEncoder)
    assert entry.kind == "folder"


@pytest.mark.parametrize(
    ("file", "network", "line", "field", "reason"),
    [
        ("uni.pt2", "", 5, "encoders.0", "uni.pt2 needs 'preset'"),
        ("released.h5", NETWORK, 5, "encoders.0", "leave 'network' out"),
        ("uni.onnx", NETWORK, 5, "encoders.0", "is not an encoder file"),
        ("uni.bin", NETWORK, 5, "encoders.0", "is required for files of weights"),
        (
            "u.pt2",
            NETWORK.replace("1024", "-1"),
            12,
            "encoders.0.network.embedding_size",
            "greater than 0",
        ),
        (
            "u.pt2",
            NETWORK.replace("embedding_size: 1024", ""),
            9,
            "encoders.0.network.embedding_size",
            "required",
        ),
        ("u.pt2", "\n    seed: 1\n", 9, "encoders.0.seed", "unknown key"),
    ],
)
def test_an_incomplete_imported_encoder_is_refused(tmp_path, file, network, line, field, reason):
    path = write(tmp_path, IMPORTED.format(file=file) + network)
    with pytest.raises(CohortError) as error:
        load_cohort(path)
    first = next(text for text in str(error.value).splitlines() if reason in text)
    assert first.startswith(f"{path}:{line}: {field}: ")


SEVERAL = """\
name: study
slides: {table: slides.csv}
patch_tasks:
  - {name: colon, organ: colon, mpp: 0.5, table: colon.csv, train_mpp: 1}
  - {name: lung, organ: lung, mpp: 0.5, table: lung.csv, classes: [a, b]}
encoders:
  - {name: mtl, objective: mtl, tasks: [colon, lung]}
  - {name: overlapping, objective: mtl, tasks: [lung], patch: 64, mpp: 0.25, stride: 32}
  - {name: coarse, objective: reused, encoder: mtl, mpp: 1.0}
  - {name: uni, objective: imported, preset: uni, file: uni.bin}
  - {name: far, objective: imported, preset: virchow2, file: far.bin, mpp: 1.0}
maps:
  - {name: map, encoder: coarse, task: colon, label: a}
"""


def test_each_encoder_has_its_own_geometry(tmp_path):
    cohort = load_cohort(write(tmp_path, SEVERAL))
    assert list(cohort.geometries) == [
        "128px-0.5um",
        "64px-0.25um-stride32",
        "128px-1um",
        "224px-0.5um",
        "224px-1um",
    ]
    assert cohort.geometry("overlapping") == Geometry(patch=64, mpp=0.25, stride=32)
    assert cohort.geometry_named("128px-1um") == cohort.geometry("coarse")
    with pytest.raises(CohortError, match="no encoder of the cohort has the geometry '9px-1um'"):
        cohort.geometry_named("9px-1um")


def test_a_patch_task_is_cut_at_its_own_or_the_encoders_resolution(tmp_path):
    cohort = load_cohort(write(tmp_path, SEVERAL))
    assert set(cohort.task_geometries["colon"]) == {"128px-1um", "64px-1um", "224px-1um"}
    assert set(cohort.task_geometries["lung"]) == {
        "128px-0.5um",
        "64px-0.25um",
        "224px-0.5um",
        "224px-1um",
    }
    for task in ("colon", "lung"):
        assert cohort.task_geometry("coarse", task) == cohort.task_geometry("mtl", task)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "encoder: coarse, task: colon",
            "encoder: mtl, task: colon",
            "maps.0.encoder: encoder 'mtl' saw the patches of task 'colon' at 1 um/px, but the "
            "grids of 'mtl' are at 0.5; add an encoder with 'objective: reused', 'encoder: mtl' "
            "and 'mpp: 1'",
        ),
        (
            "encoder: coarse, task: colon",
            "encoder: coarse, task: lung",
            "maps.0.encoder: encoder 'mtl' saw the patches of task 'lung' at 0.5 um/px",
        ),
        ("encoder: mtl, mpp: 1.0", "encoder: mlt", "'mlt' is not defined; did you mean 'mtl'?"),
        (
            "encoder: mtl, mpp: 1.0",
            "encoder: coarse",
            "encoders.2.encoder: encoder that can be reused 'coarse' is not defined",
        ),
        ("stride: 32", "stride: 31", "a cell of 31 px is not the central square of a patch"),
        ("stride: 32", "stride: 66", "a cell of 66 px is not the central square of a patch"),
        ("patch: 64", "patch: 48", "needs patches of 62, 64, 66, ... px, not 48"),
        ("preset: uni,", "preset: uni, patch: 128,", "leave 'patch' out, since 'preset' states it"),
        (
            "mpp: 0.5, table: colon.csv",
            "mpp: unknown, table: colon.csv",
            "leave 'train_mpp' out, since images of unknown um/px are not rescaled",
        ),
    ],
)
def test_a_geometry_that_does_not_fit_is_refused(tmp_path, old, new, message):
    assert old in SEVERAL
    with pytest.raises(CohortError) as error:
        load_cohort(write(tmp_path, SEVERAL.replace(old, new)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ("24", "write 'crop_um: 1536' (24 cells of 64 um: 128 px at 0.5 um/px)"),
        ("many", "write 'crop_um: <cells x 64>' (64 um: 128 px at 0.5 um/px)"),
    ],
)
def test_a_crop_in_cells_is_refused_with_its_line_and_the_um(tmp_path, value, remedy):
    text = MINIMAL + f"settings:\n  models:\n    epochs: 3\n    crop: {value}\n"
    path, line = write(tmp_path, text), text.count("\n")
    with pytest.raises(CohortError) as error:
        load_cohort(path)
    assert str(error.value) == (
        f"{path}:{line}: settings.models.crop: crops have a side in um instead of cells: {remedy}"
    )


@pytest.mark.parametrize("value", ["0", "-64", ".inf", ".nan", "wide"])
def test_a_crop_without_a_positive_side_is_refused(tmp_path, value):
    path = write(tmp_path, MINIMAL + f"settings:\n  models: {{crop_um: {value}}}\n")
    with pytest.raises(CohortError, match=r"settings\.models\.crop_um: Input should be"):
        load_cohort(path)


def test_all_problems_are_reported_at_once(tmp_path):
    text = MINIMAL.replace("table: slides.csv", "tabel: x").replace("mean_rgb", "magic")
    with pytest.raises(CohortError) as error:
        load_cohort(write(tmp_path, text))
    assert len(str(error.value).splitlines()) == 2


def test_an_encoder_with_an_undefined_task_is_refused(tmp_path):
    text = MINIMAL.replace("objective: mean_rgb", "objective: mtl\n    tasks: [liver]")
    text += "patch_tasks:\n  - {name: colon, organ: colon, mpp: 0.5, table: colon.csv}\n"
    with pytest.raises(CohortError, match="'liver' is not defined; defined: colon"):
        load_cohort(write(tmp_path, text))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("mpp: 0.5", "give exactly one of 'table', 'folder', 'hdf5' and 'slides'"),
        ("mpp: 0.5, table: a.csv, folder: b", "give exactly one of"),
        ("table: a.csv", "if it is not known, write 'mpp: unknown'"),
        ("mpp: 0.5, slides: {table: a.csv}", "slides state their um/px"),
        ("mpp: 0.5, table: a.csv, group_pattern: x", "'group_pattern' needs 'folder'"),
        ("mpp: 0.5, table: a.csv, classes: [a, a]", "'a'.*more than once"),
        ("mpp: 1, group_column: null, hdf5: [{images: x, labels: y}]", "under 'classes'"),
        ("mpp: 1, classes: [a, b], hdf5: [{images: x, labels: y}]", "'group_column: null'"),
        (
            "mpp: 1, group_column: null, classes: [a, b], "
            "hdf5: [{images: x, labels: y, split: test}, {images: x, labels: y}]",
            "'split' for every part",
        ),
    ],
)
def test_an_inconsistent_patch_task_is_refused(tmp_path, entry, reason):
    text = MINIMAL + f"patch_tasks:\n  - {{name: t, organ: o, {entry}}}\n"
    with pytest.raises(CohortError, match=reason):
        load_cohort(write(tmp_path, text))


def test_a_duplicate_name_is_refused(tmp_path):
    text = MINIMAL + "  - name: mean-rgb\n    objective: mean_rgb\n"
    with pytest.raises(CohortError, match="mean-rgb.*more than once"):
        load_cohort(write(tmp_path, text))


def test_a_missing_file_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(CohortError, match="make demo"):
        load_cohort(tmp_path / "cohort.yaml")


def test_invalid_yaml_is_reported_with_its_line(tmp_path):
    with pytest.raises(CohortError, match="cohort.yaml:3: not valid YAML"):
        load_cohort(write(tmp_path, "name: study\nslides: [\n"))


@pytest.mark.parametrize("text", ["", "just words", "- a\n- list"])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path, text):
    with pytest.raises(CohortError):
        load_cohort(write(tmp_path, text))


TWO_TASKS = (
    MINIMAL
    + """\
  - name: mtl
    objective: mtl
    tasks:
      - colon
      - {task}
patch_tasks:
  - {{name: colon, organ: colon, mpp: 0.5, table: colon.csv, classes: [a, b]}}
  - {{name: liver, organ: liver, mpp: 0.5, table: liver.csv}}
labels: labels.csv
maps:
  - {{name: m, encoder: {encoder}, task: {of_map}, label: {label}}}
"""
)


@pytest.mark.parametrize(
    ("values", "place", "message"),
    [
        (("livr", "mtl", "colon", "a"), "11: encoders.1.tasks.1", "'livr' is not defined; did you"),
        (("liver", "mlt", "colon", "a"), "17: maps.0.encoder", "did you mean 'mtl'?"),
        (("liver", "mtl", "colno", "a"), "17: maps.0.task", "did you mean 'colon'?"),
        (("liver", "mtl", "colon", "c"), "17: maps.0.label", "'c' is not defined; defined: a, b"),
    ],
)
def test_a_wrong_reference_is_reported_in_its_own_line(tmp_path, values, place, message):
    names = dict(zip(("task", "encoder", "of_map", "label"), values, strict=True))
    path = write(tmp_path, TWO_TASKS.format(**names))
    with pytest.raises(CohortError) as error:
        load_cohort(path)
    assert str(error.value).startswith(f"{path}:{place}: ")
    assert message in str(error.value)


STARTS = (
    MINIMAL
    + """\
  - {{name: a, objective: {objective}, tasks: [colon], initial_weights: {a}}}
  - {{name: b, objective: mtl, tasks: [colon], initial_weights: {b}}}
patch_tasks:
  - {{name: colon, organ: colon, mpp: 0.5, table: colon.csv}}
"""
)
A_FROM, B_FROM = "encoders.1.initial_weights", "encoders.2.initial_weights"


@pytest.mark.parametrize(
    ("a", "b", "place", "message"),
    [
        (
            "{encoder: a}",
            "null",
            f"7: {A_FROM}.encoder",
            "no encoder can start from itself: a <- a",
        ),
        ("{encoder: b}", "{encoder: a}", f"7: {A_FROM}.encoder", "a <- b <- a; start one of them"),
        ("{version: encoder-b@candidate}", "{encoder: a}", f"7: {A_FROM}.version", "a <- b <- a"),
        ("null", "{encoder: aa}", f"8: {B_FROM}.encoder", "'aa' is not defined; did you mean 'a'?"),
        ("null", "{encoder: mean-rgb}", f"8: {B_FROM}.encoder", "mean_rgb, which has no weights"),
        ("{}", "null", f"7: {A_FROM}", "give one of encoder (a name), file (a path) and version"),
        ("{encoder: b, file: x}", "null", f"7: {A_FROM}", "not encoder and file"),
        ("{file: x.pt}", "null", f"7: {A_FROM}", "x.pt is neither a Keras file of a released"),
        ("{version: mtl@best}", "null", f"7: {A_FROM}.version", "match pattern"),
        ("{encoder: b, freeze: 5}", "null", "7: encoders.1", "more than the 4 convolution blocks"),
        ("{encoder: b, freeze: -1}", "null", f"7: {A_FROM}.freeze", "greater than or equal to 0"),
        ("{encoder: b, frozen: 1}", "null", f"7: {A_FROM}.frozen", "did you mean 'freeze'?"),
        ("a", "null", f"7: {A_FROM}", "write keys with values"),
    ],
)
def test_wrong_initial_weights_are_reported_in_their_line(tmp_path, a, b, place, message):
    path = write(tmp_path, STARTS.format(objective="mtl", a=a, b=b))
    with pytest.raises(CohortError) as error:
        load_cohort(path)
    assert str(error.value).startswith(f"{path}:{place}: ")
    assert message in str(error.value)


def test_initial_weights_may_come_from_every_origin(tmp_path):
    for start in (
        "{encoder: b}",
        "{file: released.h5, freeze: 4}",
        "{file: encoders/a}",
        "{version: encoder-a@champion}",
        "{version: encoder-other@candidate}",
    ):
        cohort = load_cohort(write(tmp_path, STARTS.format(objective="mtl", a=start, b="null")))
        assert cohort.encoder("a").initial_weights is not None
    (tmp_path / "named.v2").mkdir()
    load_cohort(write(tmp_path, STARTS.format(objective="vae", a="{file: named.v2}", b="null")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("objective: mean_rgb, refit: all", "'mean_rgb' is not trained; leave 'refit' out"),
        (
            "objective: mean_rgb, initial_weights: {file: a.h5}",
            "'mean_rgb' is not trained; leave 'initial_weights' out",
        ),
        ("objective: bigan, tasks: [colon], refit: all", "no number of steps to repeat"),
        ("objective: mean_rgb, embedding: both", "needs the feature maps of architecture"),
        (
            "objective: vae, tasks: [colon], architecture: tellez2019, embedding: pooled",
            "needs the feature maps of architecture 'tellez2020'",
        ),
        ("objective: mtl, tasks: [colon], refit: some", "allowed: all"),
        ("objective: mtl, tasks: [colon], embedding: pooledd", "did you mean 'pooled'?"),
        ("objective: imported, file: a.pt2, preset: uni, embedding: both", "leave it out"),
    ],
)
def test_settings_that_do_not_fit_the_encoder_are_refused(tmp_path, fields, message):
    text = f"{MINIMAL}  - {{name: x, {fields}}}\n"
    tasks = "patch_tasks: [{name: colon, organ: c, mpp: 0.5, table: c.csv}]\n"
    with pytest.raises(CohortError, match=re.escape(message)):
        load_cohort(write(tmp_path, text + tasks))


def test_pooled_numbers_need_larger_patches_and_maps_need_the_code(tmp_path):
    text = STARTS.format(objective="mtl, embedding: pooled", a="null", b="null")
    load_cohort(write(tmp_path, text))
    with pytest.raises(CohortError, match="of 94, 96, 98, ... px for embedding pooled, not 64"):
        load_cohort(write(tmp_path, text + "settings: {patch: 64}\n"))
    with pytest.raises(CohortError, match=r"maps.0.encoder: .*set 'embedding: both'"):
        load_cohort(
            write(tmp_path, text + "maps: [{name: m, encoder: a, task: colon, label: x}]\n")
        )


def test_references_are_checked_beside_invalid_entries(tmp_path):
    text = TWO_TASKS.format(task="livr", encoder="mtl", of_map="colon", label="a")
    path = write(tmp_path, text.replace("organ: liver", "orgn: liver"))
    with pytest.raises(CohortError) as error:
        load_cohort(path)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "encoders.1.tasks.1",
        "patch_tasks.1.organ",
        "patch_tasks.1.orgn",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("table:", "tabel:", "unknown key 'tabel'; did you mean 'table'?; known: folders, table"),
        ("objective: mean_rgb", "objectiv: mean_rgb", "add 'objective'"),
        ("mean_rgb", "Mean_RGB", "did you mean 'mean_rgb'?"),
        ("mean_rgb", "mean_rgb\n    sed: 1", "did you mean 'seed'?"),
        ("encoders:", "settings: {models: {fold: 3}}\nencoders:", "did you mean 'folds'?"),
        ("  table: slides.csv", "  table: a\n  table: b", "the key is also in line 3"),
        ("  table: slides.csv", "  folders: {path: a}", "write a list"),
    ],
)
def test_a_misspelt_field_is_reported_with_a_suggestion(tmp_path, old, new, message):
    with pytest.raises(CohortError) as error:
        load_cohort(write(tmp_path, MINIMAL.replace(old, new)))
    assert message in str(error.value)


def test_a_column_that_the_label_table_lacks_is_named_with_its_line(tmp_path):
    (tmp_path / "labels.csv").write_text("slide,score\na,1\n")
    text = MINIMAL + (
        "labels: labels.csv\ntargets:\n  - name: t\n    kind: regression\n    column: scor\n"
    )
    cohort = load_cohort(write(tmp_path, text))
    with pytest.raises(CohortError) as error:
        cohort.check_label_columns(cohort.target("t"), ["slide", "score"])
    assert str(error.value).startswith(f"{tmp_path / 'cohort.yaml'}:11: targets.0.column: ")
    assert "did you mean 'score'?" in str(error.value)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "cohort.yaml"
    path.write_bytes(MINIMAL.replace("study", "étude").encode("latin-1"))
    with pytest.raises(CohortError, match="save it as UTF-8"):
        load_cohort(path)
    path.write_text(MINIMAL, encoding="utf-8-sig")
    assert load_cohort(path).name == "study"


def test_the_valid_entries_of_an_invalid_file_are_found(tmp_path):
    text = MINIMAL + "  - {name: bad, objective: magic}\nsettings: {patch: -1}\n"
    part = valid_part(read_cohort_file(write(tmp_path, text)))
    assert part is not None
    assert [encoder.name for encoder in part.encoders] == ["mean-rgb"]
    assert part.settings.patch == 128
    assert part.slides.table == tmp_path / "slides.csv"


_KEYS = st.sampled_from(
    ["name", "slides", "table", "folders", "encoders", "objective", "tasks", "targets", "kind"]
    + ["patch_tasks", "maps", "encoder", "task", "label", "settings", "mtl", "survival", "classes"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | _KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_KEYS, _VALUES, max_size=6))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_is_valid_or_has_problems_with_lines(tmp_path, data):
    text = yaml.safe_dump(data, allow_unicode=True)
    path = tmp_path / "cohort.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_cohort(path)
    except CohortError as error:
        for line in str(error).splitlines():
            number = line.removeprefix(f"{path}:").split(":")[0]
            assert 1 <= int(number) <= max(1, len(text.splitlines()))
    valid_part(read_cohort_file(path))
