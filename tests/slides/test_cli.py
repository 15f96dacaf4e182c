"""The ``nic`` commands for slides, grids and compression."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tifffile
import torch
import zarr
from PIL import Image
from typer.testing import CliRunner

from nic_core.cli import app
from nic_core.cohort import EncoderSpec
from nic_core.encoders.encoder import (
    Encoder,
    EncoderCard,
    build_encoder,
    encoder_tensors,
    weights_hash,
)
from nic_core.encoders.files import save_encoder
from nic_core.encoders.training import train_encoder
from nic_core.grids import open_grid, read_colours, verify_preview
from tests.slides.conftest import GLASS, paint, write_tiff
from tests.slides.vendors import write_scn

pytestmark = pytest.mark.slow

run = CliRunner().invoke


@pytest.fixture
def section(tmp_path) -> Path:
    """A slide of 1.2 x 1.2 mm whose left half is tissue."""
    image = np.full((1200, 1200, 3), GLASS, np.uint8)
    image[:, :600] = paint(1200, 600)
    return write_tiff(tmp_path / "section.tif", image, mpp=1.0)


def test_inspect_prints_the_metadata_of_a_slide(section):
    result = run(app, ["inspect", str(section)])
    assert result.exit_code == 0
    for text in (
        "tifffile (TIFF tiles read directly)",
        "1200 x 1200 px",
        "1 um/px (TIFF resolution)",
        "1.44 mm2",
        "level 2",
        "1/4",
        "4 um/px, tiles of 128 x 128",
        "images left  none",
    ):
        assert text in result.stdout
    assert "0.5 um/px (slide table)" in run(app, ["inspect", str(section), "--mpp", "0.5"]).stdout


def test_inspect_prints_bounds_power_and_names_of_other_images(tmp_path):
    image = paint(256, 384)
    path = write_scn(tmp_path / "a.scn", [image], 0.25, macro=image[:64, :64])
    result = run(app, ["inspect", str(path)])
    for text in (
        "openslide (leica format)",
        "0.25 um/px (leica metadata)",
        "20x",
        "384 x 256 px at 128, 64",
        "macro",
    ):
        assert text in result.stdout


def test_image_names_another_image_of_a_file(tmp_path):
    path = tmp_path / "two.tif"
    with tifffile.TiffWriter(path) as writer:
        for side in (256, 128):
            scale = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
            writer.write(paint(side, side), photometric="rgb", metadata=None, **scale)
    first = run(app, ["inspect", str(path)]).stdout
    assert "0 (the largest brightfield scan)" in first
    assert "1: 128 x 128 px, 0.5 um/px" in first
    second = run(app, ["inspect", str(path), "--image", "1"]).stdout
    assert "1 (named by --image)" in second
    assert "0: 256 x 256 px, 0.5 um/px" in second
    missing = run(app, ["inspect", str(path), "--image", "2"])
    assert (missing.exit_code, missing.stdout.count("\n")) == (1, 1)


def test_an_unusable_slide_gives_one_line_and_exit_status_1(tmp_path):
    (tmp_path / "text.svs").write_text("no slide")
    for command in (["inspect"], ["tissue", "--out", str(tmp_path / "x.png")]):
        result = run(app, [*command, str(tmp_path / "text.svs")])
        assert result.exit_code == 1
        assert "known format" in result.stdout
        assert "Traceback" not in result.stdout
    assert not (tmp_path / "x.png").exists()


def test_advice_about_um_per_px_names_the_option(section, encoder, tmp_path):
    path = tmp_path / "unknown.tif"
    tifffile.imwrite(path, paint(300, 300), tile=(128, 128), photometric="rgb")
    advice = "give the um/px at level 0 with --mpp"
    for command in (["inspect"], ["tissue", "--out", str(tmp_path / "x.png")]):
        result = run(app, [*command, str(path)])
        assert result.exit_code == 1
        assert advice in result.stdout
        assert "slide table" not in result.stdout
    out = ["--encoder", str(encoder), "--out", str(tmp_path / "grids")]
    assert run(app, ["compress", str(path), *out]).exit_code == 1
    assert advice in (tmp_path / "grids" / "report.csv").read_text()
    impossible = run(app, ["inspect", str(path), "--mpp", "300"]).stdout
    assert "mpp 300 um/px, given by the user, is impossible" in impossible


def test_tissue_draws_the_outline_of_the_tissue(section, tmp_path):
    out = tmp_path / "pictures" / "tissue.png"
    result = run(app, ["tissue", str(section), "--out", str(out)])
    assert result.exit_code == 0
    assert "50." in result.stdout or "49." in result.stdout
    assert Image.open(out).size == (1200, 1200)


def test_a_missing_grid_gives_one_line_and_exit_status_1(tmp_path):
    for command in (["info"], ["preview", "--out", str(tmp_path / "x.png")]):
        result = run(app, ["grid", *command, str(tmp_path / "gone.zarr")])
        assert result.exit_code == 1
        assert "not a grid store" in result.stdout


@pytest.fixture
def encoder(tmp_path) -> Path:
    spec = EncoderSpec(name="mean", objective="mean_rgb")
    trained = train_encoder(spec, [], patch=64, mpp=1.0, embedding_size=3, tracker=None)
    save_encoder(tmp_path / "mean", trained.encoder)
    return tmp_path / "mean"


def test_compress_continues_after_failures_and_skips_stores(section, encoder, tmp_path):
    (tmp_path / "text.svs").write_text("no slide")
    command = ["compress", "--encoder", str(encoder), "--out", str(tmp_path / "grids")]
    first = run(app, [*command, str(tmp_path / "text.svs"), str(section)])
    assert first.exit_code == 1
    assert "1 compressed, 0 up to date, 1 failed" in first.stdout
    assert "text.svs" in first.stdout
    second = run(app, [*command, str(section)])
    assert second.exit_code == 0
    assert "0 compressed, 1 up to date" in second.stdout
    changed = run(app, [*command, "--mpp", "0.9", str(section)])
    assert "1 compressed" in changed.stdout
    stricter = run(app, [*command, "--mpp", "0.9", "--tissue", "0.99", str(section)])
    assert "1 compressed" in stricter.stdout
    again = [*command, "--mpp", "0.9", "--tissue", "0.99", str(section)]
    assert "0 compressed, 1 up to date" in run(app, [*again, "--resume"]).stdout
    assert "1 compressed" in run(app, [*again, "--no-resume"]).stdout
    report = pl.read_csv(tmp_path / "grids" / "report.csv")
    assert report.select("slide", "status").rows() == [("section", "compressed")]

    store = tmp_path / "grids" / "section.zarr"
    info = run(app, ["grid", "info", str(store)])
    assert "3 numbers x" in info.stdout
    picture = tmp_path / "preview.png"
    assert run(app, ["grid", "preview", str(store), "--out", str(picture)]).exit_code == 0
    assert Image.open(picture).mode == "RGB"


def test_previews_share_colours_with_earlier_grids_of_the_folder(section, encoder, tmp_path):
    command = ["compress", "--encoder", str(encoder), "--out", str(tmp_path / "grids")]
    assert run(app, [*command, str(section)]).exit_code == 0
    previews = tmp_path / "grids" / "previews"
    alone = verify_preview(previews / "section.zarr")
    other = section.with_name("other.png")
    Image.open(section).transpose(Image.Transpose.ROTATE_90).crop((0, 0, 900, 1200)).save(other)
    (tmp_path / "grids" / "notes.zarr").mkdir()
    done = run(app, [*command, "--mpp", "1", str(other)])
    assert done.exit_code == 0
    assert "no preview: " in done.stdout
    assert "notes.zarr: not a grid store" in done.stdout
    hashes = {zarr.open_group(p).attrs["nic_colours"] for p in previews.glob("*.zarr")}
    assert hashes == {read_colours(previews / "colours.json").hash}
    assert len(list(previews.glob("*.zarr"))) == 2
    assert verify_preview(previews / "section.zarr") != alone


def test_a_slide_without_tissue_has_a_grid_but_no_preview(encoder, tmp_path):
    Image.new("RGB", (900, 900), (242, 241, 243)).save(tmp_path / "glass.png")
    command = ["compress", "--encoder", str(encoder), "--out", str(tmp_path / "grids")]
    done = run(app, [*command, "--mpp", "1", str(tmp_path / "glass.png")])
    assert done.exit_code == 0
    assert not (tmp_path / "grids" / "previews").exists()
    assert not open_grid(tmp_path / "grids" / "glass.zarr").valid.any()


def test_an_encoder_is_found_by_its_name_in_the_store(section, encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("NIC_STORE", str(tmp_path / "store"))
    (tmp_path / "store" / "encoders").mkdir(parents=True)
    encoder.rename(tmp_path / "store" / "encoders" / "mean-rgb")
    command = ["compress", str(section), "--out", str(tmp_path / "grids"), "--encoder"]
    assert run(app, [*command, "mean-rgb"]).exit_code == 0
    missing = run(app, [*command, "mtl"])
    assert missing.exit_code == 2
    assert "mean-rgb" in missing.stderr  # the existing encoders are listed


@pytest.fixture
def network(tmp_path) -> Path:
    """The published network with random weights, for patches of 64 um."""
    torch.manual_seed(0)
    module = build_encoder("tellez2020", patch=128, embedding_size=8)
    tensors = encoder_tensors(module, {})
    card = EncoderCard(
        name="random",
        architecture="tellez2020",
        objective="mtl",
        patch=128,
        mpp=0.5,
        embedding_size=8,
        weights_hash=weights_hash("tellez2020", tensors),
    )
    save_encoder(tmp_path / "random", Encoder(card, module))
    return tmp_path / "random"


def test_changed_settings_compress_a_slide_again(section, network, tmp_path):
    command = ["compress", "--encoder", str(network), "--out", str(tmp_path), str(section)]
    store = tmp_path / "section.zarr"
    for options, precision, reading, orientations in (
        (["--precision", "float32", "--reading", "patch"], "float32", "patch", False),
        (["--precision", "bfloat16", "--reading", "patch"], "bfloat16", "patch", False),
        (["--precision", "bfloat16", "--reading", "input"], "bfloat16", "input", False),
        (
            ["--precision", "float32", "--reading", "input", "--orientations", "8"],
            "float32",
            "input",
            True,
        ),
    ):
        assert "1 compressed" in run(app, [*command, *options]).stdout
        assert "1 up to date" in run(app, [*command, *options]).stdout
        grid = open_grid(store)
        assert (grid.provenance.precision, grid.provenance.reading) == (precision, reading)
        assert (grid.orientations is not None) == orientations
    info = " ".join(run(app, ["grid", "info", str(store)]).stdout.split())
    assert "orientations 8" in info
    assert "precision float32 reading input" in info
    assert open_grid(store).provenance.weights_hash in info.replace(" ", "")  # it may be wrapped


@pytest.mark.usefixtures("can_run_int8")
def test_int8_grids_are_a_product_of_their_own(section, network, tmp_path):
    command = ["compress", "--encoder", str(network), "--out", str(tmp_path), str(section)]
    for precision in ("int8", "float32", "int8"):
        options = ["--precision", precision, "--device", "cpu"]
        assert "1 compressed" in run(app, [*command, *options]).stdout
        assert "1 up to date" in run(app, [*command, *options]).stdout
        assert open_grid(tmp_path / "section.zarr").provenance.precision == precision
    automatic = run(app, [*command, "--device", "cpu"])
    assert "1 compressed" in automatic.stdout
    assert open_grid(tmp_path / "section.zarr").provenance.precision != "int8"


def test_similarity_compares_a_setting_with_float32_on_slides(section, network):
    command = ["encoder", "similarity", str(network), "--device", "cpu", str(section)]
    exact = run(app, [*command, "--precision", "float32"])
    assert "float32 171 1.0000 1.0000 0.0%" in " ".join(exact.stdout.split())
    reduced = run(app, [*command, "--precision", "bfloat16"])
    assert "section.tif bfloat16 171 " in " ".join(reduced.stdout.split())
    assert "0.0%" not in reduced.stdout
    missing = run(app, [*command, str(section.with_name("gone.tif"))])
    assert missing.exit_code == 1
    assert "gone.tif" in missing.stdout


def test_int8_without_openvino_is_refused_before_any_work(section, network, tmp_path, monkeypatch):
    monkeypatch.setattr("nic_core.encoders.int8.cpu_has_vnni", lambda: True)
    monkeypatch.setattr("nic_core.encoders.int8.find_spec", lambda name: None)
    command = ["compress", "--encoder", str(network), "--out", str(tmp_path / "grids")]
    refused = run(app, [*command, str(section), "--precision", "int8", "--device", "cpu"])
    assert refused.exit_code == 2
    assert "nic-pathology[openvino]" in refused.stderr
    assert not (tmp_path / "grids").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--device", "toaster"),
        ("--device", "cuda:99"),
        ("--orientations", "4"),
        ("--precision", "int4"),
        ("--reading", "fast"),
    ],
)
def test_an_invalid_setting_is_refused_before_any_work(section, encoder, tmp_path, option, value):
    command = ["compress", "--encoder", str(encoder), "--out", str(tmp_path / "grids")]
    result = run(app, [*command, str(section), option, value])
    assert result.exit_code == 2
    assert value in result.stderr
    assert not (tmp_path / "grids").exists()


def test_a_full_disk_is_reported_with_the_slides_not_tried(section, encoder, mount):
    folder = mount("size=64k")
    (folder / "ballast").write_bytes(bytes(56_000))
    other = section.rename(section.with_name("other.tif"))
    command = ["compress", "--encoder", str(encoder), "--out", str(folder)]
    result = run(app, [*command, str(other), str(section)])
    assert result.exit_code == 1
    assert "0 compressed, 0 up to date, 1 failed, 1 not tried" in result.stdout
    assert "No space left on device" in result.stdout
    assert "Traceback" not in result.stdout
    assert not list(folder.glob("*.zarr"))


def test_preview_draws_the_grid_beside_its_slide(section, encoder, tmp_path):
    command = ["compress", "--encoder", str(encoder), "--out", str(tmp_path)]
    assert run(app, [*command, str(section)]).exit_code == 0
    preview = ["grid", "preview", str(tmp_path / "section.zarr"), "--out", str(tmp_path / "p.png")]
    assert run(app, [*preview, "--slide", str(section)]).exit_code == 0
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    rows, columns, cell = 19, 19, 43  # cells of 64 um in 1200 um; the picture has 800 px or more
    assert picture.shape == (rows * cell, 2 * columns * cell + 16, 3)
    left, right = picture[:, : columns * cell], picture[:, -columns * cell :]
    tissue = left[:, : 9 * cell].mean(axis=(0, 1))
    assert tissue[1] < 200 < left[:, 10 * cell :].mean()
    assert (right[:, 10 * cell :] == 255).all()
    assert not (right[:, : 9 * cell] == 255).all(axis=2).any()
    other = write_tiff(tmp_path / "other.tif", paint(600, 600, seed=5), mpp=1.0)
    refused = run(app, [*preview, "--slide", str(other)])
    assert refused.exit_code == 1
    assert "is not the slide 'section' of the grid" in " ".join(refused.stdout.split())


def test_compress_refuses_a_missing_encoder_and_equal_slide_ids(section, encoder, tmp_path):
    out = ["--out", str(tmp_path / "grids")]
    missing = run(app, ["compress", "--encoder", str(tmp_path / "gone"), *out, str(section)])
    assert missing.exit_code == 2
    other = tmp_path / "other" / section.name
    equal = run(app, ["compress", "--encoder", str(encoder), *out, str(section), str(other)])
    assert equal.exit_code == 2
    assert not (tmp_path / "grids").exists()
