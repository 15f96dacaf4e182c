"""``nic store verify`` finds products that differ from what was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import zarr
from typer.testing import CliRunner

from nic_assets.cli import store_app
from nic_core.grids.store import HASH_ATTRIBUTE
from nic_core.steps.verification import verify_store
from nic_core.store import GridKey, ModelKey, PatchTableKey, Store

pytestmark = pytest.mark.slow

HASHED = {"encoder", "grid", "grid_preview", "slide_model"}
TABLE = PatchTableKey(geometry="128px-0.5um", slide="demo-01-1")


@pytest.fixture
def store(mean_rgb_study, tmp_path) -> Store:
    """A copy of the study's store, which the test may change."""
    shutil.copytree(mean_rgb_study[1].root, tmp_path / "store")
    return Store(tmp_path / "store")


def problems(store: Store) -> dict[str, str]:
    """Product to problem, for damaged products."""
    return {str(v.product): v.problem for v in verify_store(store) if v.problem is not None}


def embeddings(grid: Path) -> Path:
    """The only shard of a small grid's embeddings."""
    [chunks] = (path for path in (grid / "0").rglob("*") if path.name == "0" and path.is_file())
    return chunks


def flip(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_an_unchanged_store_has_no_problems(store):
    calls = []
    results = verify_store(store, lambda *counts: calls.append(counts))
    assert [v.problem for v in results] == [None] * len(results)
    assert {v.product.asset for v in results if v.hashed} == HASHED
    assert {v.product.asset for v in results if not v.hashed} == {
        "slide",
        "patch_table",
        "grid_manifest",
        "embedding_colours",
        "target_folds",
        "target_grids",
    }
    assert calls[-1] == (len(results), len(results))


def test_a_flipped_bit_anywhere_in_a_grid_is_detected(store):
    slides = sorted(path.stem for path in (store.root / "grids" / "mean-rgb").iterdir())
    damaged = {}
    for slide, twelfth in zip(slides, (0, 1, 2, 3, 5, 7, 11), strict=False):
        chunks = embeddings(store.grid(GridKey(encoder="mean-rgb", slide=slide)))
        flip(chunks, chunks.stat().st_size * twelfth // 12)
        damaged[f"grid mean-rgb|{slide}"] = store.grid(GridKey(encoder="mean-rgb", slide=slide))
    found = problems(store)
    assert found.keys() == damaged.keys()
    assert all(str(path) in found[name] for name, path in damaged.items())


def test_a_missing_shard_is_detected_although_it_reads_as_zeros(store):
    embeddings(store.grid(GridKey(encoder="mean-rgb", slide="demo-01-1"))).unlink()
    assert "hash differs" in problems(store)["grid mean-rgb|demo-01-1"]


def test_a_grid_without_a_recorded_hash_is_a_problem(store):
    path = store.grid(GridKey(encoder="mean-rgb", slide="demo-01-1"))
    metadata = json.loads((path / "zarr.json").read_text())
    del metadata["attributes"][HASH_ATTRIBUTE]
    (path / "zarr.json").write_text(json.dumps(metadata))
    assert HASH_ATTRIBUTE not in zarr.open_group(path, mode="r").attrs
    assert "no recorded hash" in problems(store)["grid mean-rgb|demo-01-1"]


def test_changed_weights_and_missing_folds_are_detected(store):
    card = store.encoder("mean-rgb") / "card.json"
    recorded = json.loads(card.read_text())["weights_hash"]
    card.write_text(card.read_text().replace(recorded, recorded[::-1]))
    (
        store.slide_model(ModelKey(encoder="mean-rgb", target="growth")) / "fold-1.safetensors"
    ).unlink()
    fold = store.slide_model(ModelKey(encoder="mean-rgb", target="survival")) / "fold-0.safetensors"
    flip(fold, fold.stat().st_size - 2)
    found = problems(store)
    assert found.keys() == {
        "encoder mean-rgb",
        "slide_model mean-rgb|growth",
        "slide_model mean-rgb|survival",
    }
    assert "hash differs" in found["encoder mean-rgb"]
    assert "hash of its numbers differs" in found["slide_model mean-rgb|survival"]
    assert "fold-1.safetensors" in found["slide_model mean-rgb|growth"]


def test_truncated_tables_and_pictures_are_detected(store):
    table = store.patch_table(TABLE)
    table.write_bytes(table.read_bytes()[:100])
    picture = store.slide("demo-02-1") / "tissue.png"
    picture.write_bytes(picture.read_bytes()[:100])
    assert problems(store).keys() == {f"patch_table {TABLE}", "slide demo-02-1"}


def test_the_command_lists_problems_and_sets_the_exit_status(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a folder without .env
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))

    def verify():
        variables = {"NIC_STORE": str(store.root), "COLUMNS": "200"}
        return CliRunner().invoke(store_app, ["verify"], env=variables)

    assert verify().exit_code == 0
    path = store.patch_table(TABLE)
    path.write_text("")
    result = verify()
    assert result.exit_code == 1
    assert str(path) in result.output
