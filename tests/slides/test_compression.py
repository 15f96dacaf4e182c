"""Compression of a slide, compared with encoding patch by patch."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import pyvips
import tifffile
import torch
from torch import nn

from nic_core.cohort import Geometry
from nic_core.compression import compress_slide, compress_to_store, is_up_to_date
from nic_core.encoders.inference import PreparedEncoder
from nic_core.grids import grid_hash, open_grid, recorded_hash, write_grid
from nic_core.orientations import orient, undo
from nic_core.slides import SlideError, content_identity, open_slide
from nic_core.slides.icc import describe_profile
from nic_core.store import StoreError
from nic_core.tiling.blocks import plan_blocks, read_block
from nic_core.tiling.patches import PatchTableError, patch_table
from nic_core.tiling.quality import measure_quality
from nic_core.tiling.tissue import TissueMask
from tests.slides.conftest import paint, write_tiff

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Card:
    name: str = "moments"
    patch: int = 32
    mpp: float = 0.5
    embedding_size: int = 6
    weights_hash: str = "0" * 32


class Moments(nn.Module):
    """Mean and standard deviation of each channel: every pixel changes them."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == torch.uint8
        flat = pixels.flatten(2).float()
        return torch.cat([flat.mean(2), flat.std(2)], 1)


def prepared(module=None, card=None, **changes) -> PreparedEncoder:
    card = card or Card()
    return PreparedEncoder(
        card=card,
        module=module or Moments(),
        side=changes.pop("side", card.patch),
        mpp=changes.pop("mpp", card.mpp),
        device=torch.device("cpu"),
        precision="float32",
        reading=changes.pop("reading", "patch"),
    )


def table_of(slide, mask=None, card=None, stride=None) -> pl.DataFrame:
    card = card or Card()
    if mask is None:
        shape = round(slide.height * slide.mpp / 8) + 1, round(slide.width * slide.mpp / 8) + 1
        mask = np.random.default_rng(0).random(shape) < 0.7
    return patch_table(
        "s",
        slide,
        TissueMask(mask, 8.0),
        Geometry(card.patch, card.mpp, stride or card.patch),
        tissue=0.6,
    )


def compress(slide, table, encoder=None, **options):
    return compress_slide(
        slide, table, encoder or prepared(), slide_id="s", slide_identity="ab", **options
    )


@pytest.mark.parametrize(
    ("kind", "mpp"), [("tiff", 0.25), ("single", 0.2498), ("svs", 0.25), ("ome", 0.3), ("png", 0.7)]
)
def test_a_grid_has_the_embedding_of_every_kept_patch(kind, mpp, files):
    with open_slide(files[kind], mpp=mpp) as slide:
        table = table_of(slide)
        grid = compress(slide, table, workers=3)
        assert 0 < table["kept"].sum() < len(table)
        for row in table.iter_rows(named=True):
            cell = row["row"], row["column"]
            assert grid.valid[cell] == row["kept"]
            if row["kept"]:
                pixels = slide.read(row["x"], row["y"], 32, 32, 0.5).reshape(-1, 3)
                expected = np.concatenate([pixels.mean(0), pixels.std(0, ddof=1)])
                # float16 has a precision of 11 bits
                np.testing.assert_allclose(grid.embeddings[:, *cell], expected, rtol=2e-3)
            else:
                assert not grid.embeddings[:, *cell].any()


@pytest.mark.parametrize("stride", [16, 24, 30])
def test_overlapping_patches_are_read_at_their_places(files, stride):
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide, stride=stride)
        grid = compress(slide, table, workers=2)
        assert (grid.provenance.patch, grid.provenance.stride) == (32, stride)
        for row in table.filter("kept").iter_rows(named=True):
            pixels = slide.read(row["x"], row["y"], 32, 32, 0.5).reshape(-1, 3)
            expected = np.concatenate([pixels.mean(0), pixels.std(0, ddof=1)])
            found = grid.embeddings[:, row["row"], row["column"]]
            np.testing.assert_allclose(found, expected, rtol=3e-3)


def test_the_grid_depends_neither_on_threads_nor_on_blocks(files, monkeypatch):
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide)
        first = compress(slide, table, workers=1)
        monkeypatch.setattr(
            "nic_core.compression.stream.plan_blocks", lambda t, side: plan_blocks(t, side=3)
        )
        second = compress(slide, table, workers=4)
    np.testing.assert_array_equal(first.valid, second.valid)
    np.testing.assert_allclose(first.embeddings, second.embeddings, rtol=2e-3)


def test_blocks_contain_every_kept_cell_once(files):
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide)
    kept = table.filter("kept").select("row", "column").rows()
    for side in (1, 3, 8, 100):
        blocks = plan_blocks(table, side=side)
        assert sorted(tuple(c) for b in blocks for c in b.cells.tolist()) == kept
        for block in blocks:
            inside = block.cells - (block.row, block.column)
            assert inside.min() >= 0
            assert (inside < block.shape).all()
            assert max(block.shape) <= side


def test_a_slide_without_tissue_gives_a_grid_without_cells(files, tmp_path):
    with open_slide(files["tiff"]) as slide:
        grid = compress(slide, table_of(slide, np.zeros((22, 29), bool)))
    assert not grid.valid.any()
    assert grid.shape == (6, 11, 15)
    write_grid(tmp_path / "s.zarr", grid)
    assert not open_grid(tmp_path / "s.zarr").valid.any()


def test_provenance_states_slide_encoder_and_settings(files):
    with open_slide(files["tiff"]) as slide:
        identity = content_identity(slide.path)
        grid = compress_slide(
            slide, table_of(slide), prepared(), slide_id="s", slide_identity=identity
        )
    provenance = grid.provenance
    assert (provenance.slide, provenance.slide_identity, provenance.encoder) == (
        "s",
        identity,
        "moments",
    )
    assert (provenance.mpp, provenance.patch, provenance.slide_mpp) == (0.5, 32, 0.25)
    assert provenance.precision == "float32"
    assert (provenance.slide_image, provenance.colours, provenance.icc_profile) == (
        0,
        "stored",
        None,
    )


def test_the_icc_profile_changes_embeddings_only_on_request(tmp_path):
    path, profile = tmp_path / "slide.tif", bytes(pyvips.Operation.call("profile_load", "p3"))
    scale = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(
        path, paint(300, 400), photometric="rgb", iccprofile=profile, metadata=None, **scale
    )
    grids = {}
    for colours in ("stored", "srgb"):
        with open_slide(path, colours=colours) as slide:
            grids[colours] = compress(slide, table_of(slide))
            write_grid(tmp_path / f"{colours}.zarr", grids[colours])
            for other in grids:
                assert is_up_to_date(
                    tmp_path / f"{other}.zarr",
                    slide,
                    table_of(slide),
                    prepared(),
                    slide_identity=grids[other].provenance.slide_identity,
                ) == (other == colours)
    for colours, grid in grids.items():
        assert grid.provenance.colours == colours
        assert grid.provenance.icc_profile == describe_profile(profile)
    assert (grids["stored"].embeddings[:] != grids["srgb"].embeddings[:]).any()


def test_progress_ends_at_the_number_of_kept_cells(files):
    calls = []
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide)
        compress(slide, table, progress=lambda done, total: calls.append((done, total)))
    total = table["kept"].sum()
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize("card", [Card(patch=64), Card(mpp=0.25)], ids=["patch size", "resolution"])
def test_a_patch_table_for_another_encoder_is_refused(files, card):
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide)
        with pytest.raises(PatchTableError, match="does not fit"):
            compress(slide, table, prepared(card=card))


def test_a_patch_table_of_another_slide_is_refused(files):
    with open_slide(files["tiff"]) as slide, pytest.raises(PatchTableError, match="'s'"):
        compress_slide(slide, table_of(slide), prepared(), slide_id="other", slide_identity="ab")


@pytest.mark.parametrize("part", ["tile", "middle"])
def test_cells_of_an_undecodable_tile_are_not_valid(damaged, part):
    with open_slide(damaged(part)) as slide:
        table = table_of(slide, np.ones((32, 32), bool))
        grid = compress(slide, table, max_unreadable=0.1)
        empty = np.argwhere(~grid.valid)
        # tile 5 of 4 x 4 covers cells 4 to 7 of 16 in both axes
        np.testing.assert_array_equal(np.unique(empty), [4, 5, 6, 7])
        assert len(empty) == grid.provenance.unreadable == 16
        pixels = slide.read(3 * 32, 3 * 32, 32, 32, 0.5).reshape(-1, 3)
        np.testing.assert_allclose(grid.embeddings[:3, 3, 3], pixels.mean(0), rtol=2e-3)


def test_cells_marked_unreadable_are_not_read_again(damaged, tmp_path):
    with open_slide(damaged("tile")) as slide:
        table = measure_quality(table_of(slide, np.ones((32, 32), bool)), slide, max_unreadable=0.1)
        grid = compress(slide, table)
        kept = table["kept"].to_numpy().reshape(16, 16)
        np.testing.assert_array_equal(grid.valid, kept)
        assert grid.provenance.unreadable == 0
        write_grid(tmp_path / "s.zarr", grid)
        assert is_up_to_date(tmp_path / "s.zarr", slide, table, prepared(), slide_identity="ab")


def test_a_slide_with_too_many_undecodable_cells_is_refused(damaged):
    with open_slide(damaged("tile")) as slide:
        table = table_of(slide, np.ones((32, 32), bool))
        with pytest.raises(SlideError, match="16 of 256 patches cannot be decoded"):
            compress(slide, table)


class Raises(Moments):
    """Fails at the third batch."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = itertools.count(1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if next(self._calls) == 3:
            raise RuntimeError("no memory")
        return super().forward(pixels)


def test_an_error_of_the_encoder_stops_the_workers(files):
    before, torch_threads = threading.active_count(), torch.get_num_threads()
    with open_slide(files["tiff"]) as slide, pytest.raises(RuntimeError, match="no memory"):
        compress(slide, table_of(slide), prepared(Raises()))
    assert threading.active_count() == before
    assert torch.get_num_threads() == torch_threads


def compress_into(path, slide, table, encoder=None, **options):
    return compress_to_store(
        path, slide, table, encoder or prepared(), slide_id="s", slide_identity="ab", **options
    )


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("reading", ["patch", "input"])
@pytest.mark.parametrize("orientations", [False, True])
def test_a_store_has_the_grid_that_is_made_in_memory(
    files, tmp_path, monkeypatch, chunk, reading, orientations
):
    sides = {} if reading == "patch" else {"side": 16, "mpp": 1.0, "reading": reading}
    encoder, calls = prepared(Pooled(), **sides), []
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide)
        held = compress(slide, table, encoder, orientations=orientations)
        monkeypatch.setattr("nic_core.grids.shards._CHUNK", chunk)
        monkeypatch.setattr("nic_core.grids.shards._SHARD", 2 * chunk)
        stored = compress_into(
            tmp_path / "s.zarr",
            slide,
            table,
            encoder,
            orientations=orientations,
            progress=lambda *cells: calls.append(cells),
        )
    assert grid_hash(stored) == grid_hash(held) == recorded_hash(tmp_path / "s.zarr")
    assert stored.provenance == held.provenance
    assert calls[-1] == (held.valid.sum(), held.valid.sum())
    for k in range(8 if orientations else 1):
        np.testing.assert_array_equal(stored.oriented(k)[:], held.oriented(k))


@pytest.mark.parametrize("problem", ["encoder", "not finite", "undecodable"])
def test_a_slide_that_fails_half_way_keeps_the_old_store(
    files, damaged, tmp_path, monkeypatch, problem
):
    monkeypatch.setattr("nic_core.grids.shards._CHUNK", 2)
    path = tmp_path / "s.zarr"
    with open_slide(files["tiff"]) as slide:
        old = grid_hash(compress_into(path, slide, table_of(slide)))
    bad, encoder, error = files["tiff"], None, SlideError
    if problem == "encoder":
        encoder, error = prepared(Raises()), RuntimeError
    elif problem == "not finite":
        encoder = prepared(Million())
    else:
        bad = damaged("tile")
    before = threading.active_count()
    with open_slide(bad) as slide, pytest.raises(error):
        compress_into(path, slide, table_of(slide, np.ones((32, 32), bool)), encoder)
    assert threading.active_count() == before
    assert not list(tmp_path.glob(".*"))  # neither a temporary folder nor a lock
    assert grid_hash(path) == old


def test_a_disk_that_becomes_full_during_compression(files, mount):
    class Noise(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.randn(len(pixels), 4096)

    folder, before = mount("size=512k"), threading.active_count()
    encoder = prepared(Noise(), Card(embedding_size=4096))
    with open_slide(files["tiff"]) as slide:
        old = grid_hash(compress_into(folder / "s.zarr", slide, table_of(slide)))
        with pytest.raises(StoreError, match=r"s.zarr: .*No space left .*free some space"):
            compress_into(folder / "s.zarr", slide, table_of(slide), encoder)
    assert threading.active_count() == before
    assert list(folder.iterdir()) == [folder / "s.zarr"]
    assert grid_hash(folder / "s.zarr") == old


class Million(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(pixels), 6), 1e6)


def test_embeddings_that_exceed_float16_are_refused(files):
    with open_slide(files["tiff"]) as slide, pytest.raises(SlideError, match="float16"):
        compress(slide, table_of(slide), prepared(Million()))


class Pooled(nn.Module):
    """The first pixels of a patch after pooling: depends on um/px and position."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.avg_pool2d(pixels.float(), pixels.shape[-1] // 4)
        return pooled[:, :2, :, :1].flatten(1)[:, :6]


@pytest.mark.parametrize("kind", ["tiff", "single", "ome"])
def test_reading_at_the_input_resolution_gives_pooled_pixels(kind, files):
    with open_slide(files[kind]) as slide:
        table = table_of(slide)
        published = compress(slide, table, prepared(Pooled()))
        direct = compress(slide, table, prepared(Pooled(), side=16, mpp=1.0, reading="input"))
    assert published.provenance.reading == "patch"
    assert direct.provenance.reading == "input"
    np.testing.assert_array_equal(published.valid, direct.valid)
    # pixels are rounded twice: in the stored level of half size, and when read
    np.testing.assert_allclose(published.embeddings, direct.embeddings, atol=1.0)


def test_jpeg_tiles_shrunk_by_the_decoder_are_almost_equal(tmp_path):
    path = write_tiff(
        tmp_path / "s.tif", paint(512, 640), mpp=0.25, compression="jpeg", pyramid=False
    )
    with open_slide(path) as slide:
        table = table_of(slide, np.ones((16, 20), bool))
        shrinks = []
        region = slide._engine.read_region
        slide._engine.read_region = lambda *args: shrinks.append(args[-1]) or region(*args)
        published = compress(slide, table, prepared(Pooled()))
        assert set(shrinks) == {1}
        shrinks.clear()
        direct = compress(slide, table, prepared(Pooled(), side=16, mpp=1.0, reading="input"))
        assert set(shrinks) == {4}
    assert direct.valid.all()
    np.testing.assert_allclose(published.embeddings, direct.embeddings, atol=6.0)


class Corner(nn.Module):
    """A patch's top-left and top-right pixels: they differ between orientations."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        return torch.cat([pixels[:, :, 0, 0], pixels[:, :, 0, -1]], 1).float()


@pytest.mark.parametrize("k", range(8))
def test_an_orientation_equals_the_grid_of_the_turned_slide(k, tmp_path):
    upright = paint(160, 224)
    turned = np.ascontiguousarray(orient(upright, k, axes=(0, 1)))
    grids = []
    for name, pixels in (("upright", upright), ("turned", turned)):
        path = write_tiff(tmp_path / f"{name}.tif", pixels, mpp=0.5, pyramid=False)
        mask = np.zeros((10, 14), bool)
        mask[:, 2:13] = True
        mask = mask if name == "upright" else orient(mask, k)
        with open_slide(path) as slide:
            table = table_of(slide, mask)
            grids.append(compress(slide, table, prepared(Corner()), orientations=True))
    first, second = grids
    np.testing.assert_array_equal(first.valid, undo(second.valid, k))
    np.testing.assert_array_equal(first.orientations[k], undo(second.embeddings, k))
    assert first.valid.any()


def test_orientations_share_one_read(files, monkeypatch):
    reads = []
    monkeypatch.setattr(
        "nic_core.compression.stream.read_block",
        lambda *a, **k: reads.append(1) or read_block(*a, **k),
    )
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide)
        grid = compress(slide, table, orientations=True)
    assert len(reads) == len(plan_blocks(table))
    assert grid.orientations.shape == (8, *grid.shape)
    np.testing.assert_array_equal(grid.orientations[0], grid.embeddings)


def test_a_device_other_than_the_cpu_is_used_by_one_thread(files, monkeypatch):
    """The code for a GPU, run on the CPU: workers read, the calling thread encodes."""
    threads = set()

    class Recording(Moments):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            threads.add(threading.current_thread())
            return super().forward(pixels)

    with open_slide(files["tiff"]) as slide:
        table = table_of(slide)
        expected = compress(slide, table)
        monkeypatch.setattr(PreparedEncoder, "on_cpu", False)
        found = compress(slide, table, prepared(Recording()))
    assert threads == {threading.current_thread()}
    np.testing.assert_allclose(found.embeddings, expected.embeddings, rtol=2e-3)
