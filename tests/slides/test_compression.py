"""Streaming compression against patch by patch."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from nic_core.compression import compress_slide, up_to_date
from nic_core.grids import open_grid, write_grid
from nic_core.patches import PatchTableError, patch_table
from nic_core.quality import measure_quality
from nic_core.slides import SlideError, content_identity, open_slide
from nic_core.slides.blocks import plan_blocks
from nic_core.tissue import TissueMask


@dataclass(frozen=True)
class Card:
    name: str = "moments"
    patch: int = 32
    mpp: float = 0.5
    code: int = 6
    weights_hash: str = "0" * 32


class Moments(nn.Module):
    """Mean and spread of each channel: sensitive to every pixel and to nothing else."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == torch.uint8
        flat = pixels.flatten(2).float()
        return torch.cat([flat.mean(2), flat.std(2)], 1)


@dataclass(frozen=True)
class Stub:
    card: Card = Card()

    def inference_module(self, device: str = "auto") -> nn.Module:
        return Moments()


def table_of(slide, mask=None, card=None) -> pl.DataFrame:
    card = card or Card()
    if mask is None:
        shape = round(slide.height * slide.mpp / 8) + 1, round(slide.width * slide.mpp / 8) + 1
        mask = np.random.default_rng(0).random(shape) < 0.7
    return patch_table(
        "s", slide, TissueMask(mask, 8.0), patch=card.patch, mpp=card.mpp, tissue=0.6
    )


def compress(slide, table, encoder=None, **options):
    return compress_slide(
        slide, table, encoder or Stub(), slide_id="s", slide_identity="ab", **options
    )


@pytest.mark.parametrize(
    ("kind", "mpp"), [("tiff", 0.25), ("single", 0.2498), ("svs", 0.25), ("ome", 0.3), ("png", 0.7)]
)
def test_a_grid_is_every_kept_patch_at_its_place(kind, mpp, files):
    with open_slide(files[kind], mpp=mpp) as slide:
        table = table_of(slide)
        grid = compress(slide, table, workers=3)
        assert 0 < table["kept"].sum() < len(table)
        for row in table.iter_rows(named=True):
            place = row["row"], row["column"]
            assert grid.valid[place] == row["kept"]
            if row["kept"]:
                pixels = slide.read(row["x"], row["y"], 32, 32, 0.5).reshape(-1, 3)
                code = np.concatenate([pixels.mean(0), pixels.std(0, ddof=1)])
                # float16 has 11 bits
                np.testing.assert_allclose(grid.codes[:, *place], code, rtol=2e-3)
            else:
                assert not grid.codes[:, *place].any()


def test_the_result_depends_neither_on_threads_nor_on_blocks(files, monkeypatch):
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide)
        first = compress(slide, table, workers=1)
        monkeypatch.setattr(
            "nic_core.compression.plan_blocks", lambda t, side: plan_blocks(t, side=3)
        )
        second = compress(slide, table, workers=4)
    np.testing.assert_array_equal(first.valid, second.valid)
    np.testing.assert_allclose(first.codes, second.codes, rtol=2e-3)


def test_blocks_hold_every_kept_cell_once(files):
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


def test_no_tissue_gives_a_valid_empty_grid(files, tmp_path):
    with open_slide(files["tiff"]) as slide:
        grid = compress(slide, table_of(slide, np.zeros((22, 29), bool)))
    assert not grid.valid.any()
    assert grid.shape == (6, 11, 15)
    write_grid(tmp_path / "s.zarr", grid)
    assert not open_grid(tmp_path / "s.zarr").valid.any()


def test_provenance_says_where_it_comes_from(files):
    with open_slide(files["tiff"]) as slide:
        identity = content_identity(slide.path)
        grid = compress_slide(slide, table_of(slide), Stub(), slide_id="s", slide_identity=identity)
    about = grid.provenance
    assert (about.slide, about.slide_identity, about.encoder) == ("s", identity, "moments")
    assert (about.mpp, about.patch, about.slide_mpp) == (0.5, 32, 0.25)
    assert about.precision == "float32"


def test_progress_reaches_the_total(files):
    seen = []
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide)
        compress(slide, table, progress=lambda done, total: seen.append((done, total)))
    total = table["kept"].sum()
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("card", [Card(patch=64), Card(mpp=0.25)], ids=["patch size", "resolution"])
def test_a_table_for_another_encoder_is_refused(files, card):
    with open_slide(files["tiff"]) as slide:
        table = table_of(slide)
        with pytest.raises(PatchTableError, match="does not fit"):
            compress(slide, table, Stub(card))


def test_a_table_of_another_slide_is_refused(files):
    with open_slide(files["tiff"]) as slide, pytest.raises(PatchTableError, match="'s'"):
        compress_slide(slide, table_of(slide), Stub(), slide_id="other", slide_identity="ab")


@pytest.mark.parametrize("how", ["tile", "middle"])
def test_an_undecodable_tile_leaves_its_cells_empty_and_the_rest_right(scratched, how):
    with open_slide(scratched(how)) as slide:
        table = table_of(slide, np.ones((32, 32), bool))
        grid = compress(slide, table, max_unreadable=0.1)
        empty = np.argwhere(~grid.valid)
        # tile 5 of 4 x 4 is that of cells 4 to 7 of 16, both ways
        np.testing.assert_array_equal(np.unique(empty), [4, 5, 6, 7])
        assert len(empty) == grid.provenance.unreadable == 16
        pixels = slide.read(3 * 32, 3 * 32, 32, 32, 0.5).reshape(-1, 3)
        np.testing.assert_allclose(grid.codes[:3, 3, 3], pixels.mean(0), rtol=2e-3)


def test_cells_that_the_patch_table_found_undecodable_are_not_tried_again(scratched, tmp_path):
    with open_slide(scratched("tile")) as slide:
        table = measure_quality(table_of(slide, np.ones((32, 32), bool)), slide, max_unreadable=0.1)
        grid = compress(slide, table)
        kept = table["kept"].to_numpy().reshape(16, 16)
        np.testing.assert_array_equal(grid.valid, kept)
        assert grid.provenance.unreadable == 0
        write_grid(tmp_path / "s.zarr", grid)
        assert up_to_date(tmp_path / "s.zarr", slide, table, Stub(), slide_identity="ab")


def test_too_many_undecodable_tiles_fail_the_slide(scratched):
    with open_slide(scratched("tile")) as slide:
        table = table_of(slide, np.ones((32, 32), bool))
        with pytest.raises(SlideError, match="16 of 256 patches cannot be decoded"):
            compress(slide, table)


def test_a_failing_encoder_ends_the_workers(files):
    class Broken(Stub):
        def inference_module(self, device: str = "auto") -> nn.Module:
            class Raises(nn.Module):
                def forward(self, pixels: torch.Tensor) -> torch.Tensor:
                    raise RuntimeError("no memory")

            return Raises()

    before, torch_threads = threading.active_count(), torch.get_num_threads()
    with open_slide(files["tiff"]) as slide, pytest.raises(RuntimeError, match="no memory"):
        compress(slide, table_of(slide), Broken())
    assert threading.active_count() == before
    assert torch.get_num_threads() == torch_threads


def test_codes_that_float16_cannot_hold_are_an_error(files):
    class Huge(Stub):
        def inference_module(self, device: str = "auto") -> nn.Module:
            class Million(nn.Module):
                def forward(self, pixels: torch.Tensor) -> torch.Tensor:
                    return torch.full((len(pixels), 6), 1e6)

            return Million()

    with open_slide(files["tiff"]) as slide, pytest.raises(SlideError, match="float16"):
        compress(slide, table_of(slide), Huge())
