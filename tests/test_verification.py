"""``nic store verify``: what differs from what was written is found, wherever it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import zarr
from typer.testing import CliRunner

from nic_assets.cli import app
from nic_core.grids.store import HASH
from nic_core.steps.verification import verify_store
from nic_core.store import GridKey, ModelKey, Store

HASHED = {"encoder", "grid", "model"}


@pytest.fixture
def store(mean_rgb_study, tmp_path) -> Store:
    """A whole store of one's own."""
    shutil.copytree(mean_rgb_study[1].root, tmp_path / "store")
    return Store(tmp_path / "store")


def wrong(store: Store) -> dict[str, str]:
    return {str(v.product): v.problem for v in verify_store(store) if v.problem is not None}


def embeddings(grid: Path) -> Path:
    """The one file with a small grid's embeddings."""
    [chunks] = (path for path in (grid / "0").rglob("*") if path.name == "0" and path.is_file())
    return chunks


def flip(path: Path, at: int) -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_whole_store_is_as_recorded(store):
    told = []
    found = verify_store(store, lambda *counts: told.append(counts))
    assert [v.problem for v in found] == [None] * len(found)
    assert {v.product.kind for v in found if v.hashed} == HASHED
    assert {v.product.kind for v in found if not v.hashed} == {"slide", "patch_table", "folds"}
    assert told[-1] == (len(found), len(found))


def test_any_flipped_bit_of_a_grid_is_found(store):
    slides = sorted(path.stem for path in (store.root / "grids" / "mean-rgb").iterdir())
    damaged = {}
    for slide, place in zip(slides, (0, 1, 2, 3, 5, 7, 11), strict=False):
        chunks = embeddings(store.grid(GridKey(encoder="mean-rgb", slide=slide)))
        flip(chunks, chunks.stat().st_size * place // 12)
        damaged[f"grid mean-rgb|{slide}"] = store.grid(GridKey(encoder="mean-rgb", slide=slide))
    found = wrong(store)
    assert found.keys() == damaged.keys()
    assert all(str(path) in found[name] for name, path in damaged.items())


def test_a_lost_chunk_is_found_though_it_reads_as_zeros(store):
    embeddings(store.grid(GridKey(encoder="mean-rgb", slide="demo-01-1"))).unlink()
    assert "hash differs" in wrong(store)["grid mean-rgb|demo-01-1"]


def test_a_grid_of_an_older_version_is_read_and_has_no_hash(store):
    path = store.grid(GridKey(encoder="mean-rgb", slide="demo-01-1"))
    metadata = json.loads((path / "zarr.json").read_text())
    del metadata["attributes"][HASH]
    (path / "zarr.json").write_text(json.dumps(metadata))
    assert HASH not in zarr.open_group(path, mode="r").attrs
    [found] = [v for v in verify_store(store) if v.product.path == path]
    assert found.problem is None
    assert not found.hashed


def test_edited_weights_and_a_lost_fold_are_found(store):
    card = store.encoder("mean-rgb") / "card.json"
    recorded = json.loads(card.read_text())["weights_hash"]
    card.write_text(card.read_text().replace(recorded, recorded[::-1]))
    (
        store.slide_model(ModelKey(encoder="mean-rgb", target="growth")) / "fold-1.safetensors"
    ).unlink()
    fold = store.slide_model(ModelKey(encoder="mean-rgb", target="survival")) / "fold-0.safetensors"
    flip(fold, fold.stat().st_size - 2)
    found = wrong(store)
    assert found.keys() == {
        "encoder mean-rgb",
        "model growth|mean-rgb",
        "model survival|mean-rgb",
    }
    assert "hash differs" in found["encoder mean-rgb"]
    assert "hash differs" in found["model survival|mean-rgb"]
    assert "fold-1.safetensors" in found["model growth|mean-rgb"]


def test_a_truncated_table_and_picture_are_found(store):
    table = store.patch_table("demo-01-1")
    table.write_bytes(table.read_bytes()[:100])
    picture = store.slide("demo-02-1") / "tissue.png"
    picture.write_bytes(picture.read_bytes()[:100])
    assert wrong(store).keys() == {"patch_table demo-01-1", "slide demo-02-1"}


def test_the_command_counts_lists_and_tells_by_its_status(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # there is no .env here
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))

    def verify():
        variables = {"NIC_STORE": str(store.root), "COLUMNS": "200"}
        return CliRunner().invoke(app, ["store", "verify"], env=variables)

    assert verify().exit_code == 0
    path = store.patch_table("demo-01-1")
    path.write_text("")
    result = verify()
    assert result.exit_code == 1
    assert str(path) in result.output
