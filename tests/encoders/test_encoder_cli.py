"""Tests of the command ``nic encoder``: train, import, info and probe."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from PIL import Image
from typer.testing import CliRunner

from nic_core.cli import app
from nic_core.cohort import EncoderSpec
from nic_core.encoders import load_encoder, save_encoder, save_patch_task, train_encoder
from nic_core.encoders.probes import PROBE_SCHEMA

from .conftest import make_dataset

pytestmark = pytest.mark.slow

run = CliRunner().invoke


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    spec = EncoderSpec(name="mean", objective="mean_rgb")
    folder = tmp_path / "mean"
    save_encoder(folder, train_encoder(spec, [], patch=62, mpp=0.5, embedding_size=3).encoder)
    return folder


def test_info_prints_the_card(encoder: Path):
    done = run(app, ["encoder", "info", str(encoder)])
    assert done.exit_code == 0
    for fact in ("mean_rgb", "62", "0.5", "uint8 RGB / 255 * 2 - 1"):
        assert fact in done.stdout


def lines_of(output: str) -> dict[str, str]:
    """Return the cells of a printed table, joined by a space, by the first one."""
    rows = [line.split() for line in output.splitlines() if line.strip()]
    return {row[0]: " ".join(row[1:]) for row in rows}


def test_list_shows_presets_released_encoders_and_the_store(encoder: Path, tmp_path: Path):
    (tmp_path / "encoders").mkdir()
    encoder.rename(tmp_path / "encoders" / "mine")
    done = run(app, ["encoder", "list"], env={"NIC_STORE": str(tmp_path), "COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    rows = lines_of(done.stdout)
    assert rows["virchow2"] == "preset timm weights CC-BY-NC-ND-4.0 224 0.5 2560"
    assert rows["conch"] == "preset exported graph CC-BY-NC-ND-4.0 448 0.5 512"
    assert rows["encoder_bigan.h5"] == "released Keras MIT 128 0.5 128"
    assert rows["mine"] == "store mean_rgb 62 0.5 3"


def test_list_names_an_encoder_whose_card_is_damaged(encoder: Path, tmp_path: Path):
    damaged = tmp_path / "encoders" / "damaged"
    damaged.mkdir(parents=True)
    (damaged / "card.json").write_text("{")
    done = run(app, ["encoder", "list"], env={"NIC_STORE": str(tmp_path), "COLUMNS": "120"})
    assert done.exit_code == 1
    assert f"{damaged}/card.json: not an encoder card" in done.stdout
    assert "virchow2" in done.stdout


def test_list_gives_the_licence_of_an_imported_preset(encoder: Path, tmp_path: Path):
    card = json.loads((encoder / "card.json").read_text()) | {"preset": "phikon"}
    stored = tmp_path / "encoders" / "p"
    stored.mkdir(parents=True)
    (stored / "card.json").write_text(json.dumps(card))
    done = run(app, ["encoder", "list"], env={"NIC_STORE": str(tmp_path), "COLUMNS": "120"})
    assert lines_of(done.stdout)["p"] == "store mean_rgb Owkin non-commercial 62 0.5 3"


def test_import_names_a_released_encoder_after_its_folder(published: Path, tmp_path: Path):
    file = published / "encoder_bigan.h5"
    done = run(app, ["encoder", "import", str(file), "--out", str(tmp_path / "bigan")])
    assert done.exit_code == 0
    card = load_encoder(tmp_path / "bigan").card
    assert (card.name, card.embedding_size, card.patch, card.mpp) == ("bigan", 128, 128, 0.5)
    assert card.weights_hash in "".join(done.stdout.split())  # the table may fold it


def test_invalid_encoders_print_one_line_and_exit_with_1(tmp_path: Path):
    (tmp_path / "text.h5").write_text("no")
    for command in (
        ["import", str(tmp_path / "text.h5"), "--out", str(tmp_path / "out")],
        ["info", str(tmp_path / "gone")],
        ["probe", str(tmp_path / "gone"), str(tmp_path), "--out", str(tmp_path / "out")],
    ):
        result = run(app, ["encoder", *command])
        assert result.exit_code == 1
        assert "Traceback" not in result.stdout
        assert len(result.stdout.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_probe_writes_table_and_figures(encoder: Path, tmp_path: Path):
    for name, seed in (("first", 1), ("second", 2)):
        save_patch_task(tmp_path / name, make_dataset(name, side=62, seed=seed))
    tasks = [str(tmp_path / name) for name in ("first", "second")]
    out = tmp_path / "probe"
    done = run(app, ["encoder", "probe", str(encoder), *tasks, "--out", str(out)])
    assert done.exit_code == 0, done.stdout
    scores = pl.read_parquet(out / "probes.parquet")
    assert scores.schema == PROBE_SCHEMA
    assert scores["task"].to_list() == ["first", "first", "second", "second"]
    assert scores["in_training"].to_list() == [False] * 4
    for name in ("embeddings.png", "nearest_patches.png"):
        assert Image.open(out / name).size > (100, 100)


def test_probe_refuses_another_resolution_than_in_training(encoder: Path, tmp_path: Path):
    coarse = dataclasses.replace(make_dataset("coarse", side=62), mpp=1.0)
    save_patch_task(tmp_path / "coarse", coarse)
    card = json.loads((encoder / "card.json").read_text())
    encoder = shutil.copytree(encoder, tmp_path / "trained")
    (encoder / "card.json").write_text(json.dumps(card | {"task_mpp": {"coarse": 0.5}}))
    done = run(app, ["encoder", "probe", str(encoder), str(tmp_path / "coarse"), "--out", "never"])
    assert done.exit_code == 1
    assert "'coarse' at 0.5 um/px, but the patch task has 62 px at 1 um/px" in " ".join(
        done.output.split()
    )


def test_train_reads_cohort_and_store_from_the_environment(tiny_cohort, tmp_path):
    places = {"NIC_COHORT": str(tiny_cohort), "NIC_STORE": str(tmp_path)}
    done = run(app, ["encoder", "train", "mean-rgb"], env=places)
    assert done.exit_code == 0, done.output
    assert load_encoder(tmp_path / "encoders" / "mean-rgb").card.name == "mean-rgb"


def test_the_card_of_an_imported_network_is_printed(tmp_path):
    from nic_core.cli.encoder import _show

    _show({"pixels": {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}, "name": "x"})
