"""The patch table."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nic_core.slides import open_slide
from nic_core.tiling.patches import (
    MEASURED,
    PATCH_SCHEMA,
    PatchTableError,
    patch_table,
    read_patch_table,
    write_patch_table,
)
from nic_core.tiling.tissue import TissueMask
from tests.slides.conftest import write_tiff

REASON = PATCH_SCHEMA["reason"]


class Plain:
    """A slide as far as the table asks: a size and a scale."""

    def __init__(self, width: int, height: int, mpp: float) -> None:
        self.width, self.height, self.mpp = width, height, mpp


def table_of(width=1000, height=700, mpp=0.25, mask=None, **settings) -> pl.DataFrame:
    if mask is None:
        mask = np.ones((round(height * mpp / 8) + 1, round(width * mpp / 8) + 1), bool)
    settings = {"patch": 64, "mpp": 0.5, "tissue": 0.6} | settings
    return patch_table("s", Plain(width, height, mpp), TissueMask(mask, 8.0), **settings)


def measured(table: pl.DataFrame, **values: float) -> pl.DataFrame:
    """Some quality at every kept cell, as its measurement would leave."""
    return table.with_columns(
        pl.when("kept").then(pl.lit(values.get(name, 1.0), pl.Float32)).alias(name)
        for name in MEASURED
    )


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    mpp=st.sampled_from([0.2498, 0.25, 0.4, 0.5, 1.3]),
    patch=st.sampled_from([32, 64, 128]),
)
def test_cells_cover_the_slide_without_gap_or_overlap(width, height, mpp, patch):
    table = table_of(width, height, mpp, patch=patch)
    assert dict(table.schema) == PATCH_SCHEMA
    size = patch * 0.5 / mpp
    assert table["size"].to_numpy() == pytest.approx(size)
    np.testing.assert_allclose(table["x"], table["column"].to_numpy() * size)
    np.testing.assert_allclose(table["y"], table["row"].to_numpy() * size)
    for axis, length in (("column", width), ("row", height)):
        count = table[axis].max() + 1
        assert count == max(1, np.ceil(length / size - 1e-3))
    assert len(table) == (table["row"].max() + 1) * (table["column"].max() + 1)


def test_tissue_is_the_area_mean_of_the_mask():
    # cells of 32 um on a mask of 8 um/px: 4 x 4 mask px each
    mask = np.zeros((8, 8), bool)
    mask[:4, :3] = True  # 12 of 16
    mask[4:, 4:6] = True  # 8 of 16
    table = table_of(256, 256, mask=mask)
    np.testing.assert_allclose(table["tissue"], [0.75, 0, 0, 0.5])
    assert table["kept"].to_list() == [True, False, False, False]
    assert table["reason"].to_list() == [None, "background", "background", "background"]


@pytest.mark.parametrize(("share", "kept"), [(60, False), (61, True)])
def test_a_cell_is_kept_above_the_threshold_not_at_it(share, kept):
    mask = np.zeros((10, 10), bool)
    mask.ravel()[:share] = True
    table = patch_table(
        "s", Plain(160, 160, 0.5), TissueMask(mask, 8.0), patch=160, mpp=0.5, tissue=0.6
    )
    assert table["tissue"].to_list() == pytest.approx([share / 100])
    assert table["kept"].to_list() == [kept]


def test_what_reaches_outside_the_slide_counts_as_glass():
    # the second column lies three quarters outside
    table = table_of(160, 128, mask=np.ones((4, 5), bool))
    np.testing.assert_allclose(table["tissue"], [1.0, 0.25])


def test_a_table_survives_the_disk(tmp_path, files):
    with open_slide(files["tiff"]) as slide:
        mask = TissueMask(np.ones((22, 29), bool), 8.0)
        table = patch_table("s", slide, mask, patch=64, mpp=0.5, tissue=0.6)
    path = tmp_path / "tables" / "s.parquet"
    for written in (table, measured(table)):
        write_patch_table(path, written)
        assert read_patch_table(path).equals(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop("tissue"), "'tissue': 'missing'"),
        (lambda t: t.with_columns(pl.col("row").cast(pl.Int64)), "'row': 'Int64'"),
        (lambda t: t.with_columns(extra=1), "unknown column"),
        (lambda t: t.head(0), "this one has none"),
        (lambda t: t.head(3), "not one row a cell"),
        (lambda t: t.reverse(), "not one row a cell"),
        (lambda t: t.with_columns(x=pl.lit(None, pl.Float64)), "missing values in x"),
        (lambda t: t.with_columns(reason=pl.lit("dull")), "'reason': 'String'"),
        (lambda t: t.with_columns(reason=pl.lit("background", REASON)), "only if it is not kept"),
        (lambda t: t.with_columns(kept=~pl.col("kept")), "only if it is not kept"),
        (lambda t: t.with_columns(focus=pl.lit(1, pl.Float32)), "at every kept cell"),
        (lambda t: measured(t).with_columns(red=pl.lit(None, pl.Float32)), "at every kept cell"),
        (lambda t: measured(t, focus=np.inf), "finite"),
    ],
)
def test_a_wrong_table_is_refused_on_both_ways(tmp_path, change, message):
    table = change(table_of(256, 256, mask=np.tril(np.ones((8, 8), bool), -2)))
    path = tmp_path / "s.parquet"
    with pytest.raises(PatchTableError, match=message):
        write_patch_table(path, table)
    assert not path.exists()
    table.write_parquet(path)
    with pytest.raises(PatchTableError, match=message):
        read_patch_table(path)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "s.parquet").write_text("slide,row")
    with pytest.raises(PatchTableError, match="cannot be read"):
        read_patch_table(tmp_path / "s.parquet")


def test_a_whole_number_of_cells_has_no_empty_row_for_rounding(tmp_path):
    path = write_tiff(tmp_path / "s.tif", np.full((256, 256, 3), 200, np.uint8), mpp=0.25)
    with open_slide(path) as slide:  # 0.25 as the file's rational may be 0.2500000001
        table = patch_table(
            "s", slide, TissueMask(np.ones((8, 8), bool), 8.0), patch=64, mpp=0.5, tissue=0.6
        )
    assert len(table) == 4
