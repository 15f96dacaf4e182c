"""The patch table."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nic_core.cohort import Geometry
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


class PlainSlide:
    """The attributes of a slide that the patch table uses."""

    def __init__(self, width: int, height: int, mpp: float) -> None:
        self.width, self.height, self.mpp = width, height, mpp


def table_of(
    width=1000, height=700, mpp=0.25, mask=None, patch=64, stride=None, tissue=0.6
) -> pl.DataFrame:
    if mask is None:
        mask = np.ones((round(height * mpp / 8) + 1, round(width * mpp / 8) + 1), bool)
    geometry = Geometry(patch, 0.5, stride or patch)
    return patch_table(
        "s", PlainSlide(width, height, mpp), TissueMask(mask, 8.0), geometry, tissue=tissue
    )


def with_quality(table: pl.DataFrame, **values: float) -> pl.DataFrame:
    """Set the quality columns at every kept cell."""
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


def test_the_tissue_fraction_is_the_area_mean_of_the_mask():
    # cells of 32 um and a mask of 8 um/px: 4 x 4 mask px per cell
    mask = np.zeros((8, 8), bool)
    mask[:4, :3] = True  # 12 of 16
    mask[4:, 4:6] = True  # 8 of 16
    table = table_of(256, 256, mask=mask)
    np.testing.assert_allclose(table["tissue"], [0.75, 0, 0, 0.5])
    assert table["kept"].to_list() == [True, False, False, False]
    assert table["reason"].to_list() == [None, "background", "background", "background"]


@pytest.mark.parametrize(("pixels", "kept"), [(60, False), (61, True)])
def test_a_cell_is_kept_above_the_tissue_limit_not_at_it(pixels, kept):
    mask = np.zeros((10, 10), bool)
    mask.ravel()[:pixels] = True
    table = patch_table(
        "s", PlainSlide(160, 160, 0.5), TissueMask(mask, 8.0), Geometry(160, 0.5, 160), tissue=0.6
    )
    assert table["tissue"].to_list() == pytest.approx([pixels / 100])
    assert table["kept"].to_list() == [kept]


def test_area_outside_the_slide_counts_as_glass():
    # three quarters of the second column are outside the slide
    table = table_of(160, 128, mask=np.ones((4, 5), bool))
    np.testing.assert_allclose(table["tissue"], [1.0, 0.25])


def test_a_patch_table_is_read_back_unchanged(tmp_path, files):
    with open_slide(files["tiff"]) as slide:
        mask = TissueMask(np.ones((22, 29), bool), 8.0)
        table = patch_table("s", slide, mask, Geometry(64, 0.5, 64), tissue=0.6)
    path = tmp_path / "tables" / "s.parquet"
    for written in (table, with_quality(table)):
        write_patch_table(path, written)
        assert read_patch_table(path).equals(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop("tissue"), "'tissue': 'missing'"),
        (lambda t: t.with_columns(pl.col("row").cast(pl.Int64)), "'row': 'Int64'"),
        (lambda t: t.with_columns(extra=1), "unknown column"),
        (lambda t: t.head(0), "the patch table is empty"),
        (lambda t: t.head(3), "must have one row for each"),
        (lambda t: t.reverse(), "must have one row for each"),
        (lambda t: t.with_columns(x=pl.lit(None, pl.Float64)), "missing values in x"),
        (lambda t: t.with_columns(reason=pl.lit("dull")), "'reason': 'String'"),
        (
            lambda t: t.with_columns(reason=pl.lit("background", REASON)),
            "exactly where a cell is not kept",
        ),
        (lambda t: t.with_columns(kept=~pl.col("kept")), "exactly where a cell is not kept"),
        (lambda t: t.with_columns(focus=pl.lit(1, pl.Float32)), "exactly where a cell is kept"),
        (
            lambda t: with_quality(t).with_columns(red=pl.lit(None, pl.Float32)),
            "exactly where a cell is kept",
        ),
        (lambda t: with_quality(t, focus=np.inf), "finite"),
    ],
)
def test_an_invalid_table_is_refused_when_written_and_read(tmp_path, change, message):
    table = change(table_of(256, 256, mask=np.tril(np.ones((8, 8), bool), -2)))
    path = tmp_path / "s.parquet"
    with pytest.raises(PatchTableError, match=message):
        write_patch_table(path, table)
    assert not path.exists()
    table.write_parquet(path, metadata={"nic_format": "3"})
    with pytest.raises(PatchTableError, match=message):
        read_patch_table(path)


@given(
    st.integers(1, 900),
    st.integers(1, 900),
    st.sampled_from([0.2498, 0.25, 0.5]),
    st.sampled_from([2, 16, 30, 64]),
)
def test_with_overlap_each_cell_is_the_centre_of_its_patch(width, height, mpp, stride):
    table = table_of(width, height, mpp, stride=stride)
    cells = table_of(width, height, mpp, patch=stride)
    assert len(table) == len(cells)
    for axis in ("x", "y"):
        centre = table[axis] + table["size"] / 2
        np.testing.assert_allclose(centre, cells[axis] + cells["size"] / 2, rtol=1e-9)
    assert table["stride"].unique().to_list() == cells["size"].unique().to_list()


def test_the_tissue_fraction_is_that_of_the_whole_patch():
    # tissue is the left half of a slide of 4 x 4 cells of 16 um; a patch has twice their side
    mask = np.repeat([[True, False]], 8, axis=0).repeat(4, axis=1)
    table = table_of(128, 128, 0.5, mask=mask, patch=64, stride=32, tissue=0.3)
    assert table.filter(row=1)["tissue"].to_list() == pytest.approx([0.75, 0.75, 0.25, 0])
    assert table.filter(row=0)["tissue"].to_list() == pytest.approx([0.5625, 0.5625, 0.1875, 0])
    assert table.filter(row=1)["kept"].to_list() == [True, True, False, False]


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "s.parquet").write_text("slide,row")
    with pytest.raises(PatchTableError, match="cannot be read"):
        read_patch_table(tmp_path / "s.parquet")


def test_rounding_of_mpp_does_not_add_an_empty_row(tmp_path):
    path = write_tiff(tmp_path / "s.tif", np.full((256, 256, 3), 200, np.uint8), mpp=0.25)
    with open_slide(path) as slide:  # the file may state 0.2500000001
        table = patch_table(
            "s", slide, TissueMask(np.ones((8, 8), bool), 8.0), Geometry(64, 0.5, 64), tissue=0.6
        )
    assert len(table) == 4


def test_the_file_holds_units_and_format_for_readers_of_arrow(tmp_path):
    path = tmp_path / "s.parquet"
    write_patch_table(path, table_of(width=64, height=64))
    schema = pq.read_schema(path)
    assert schema.metadata[b"nic_format"] == b"3"
    assert schema.field("x").metadata[b"unit"] == b"level-0 px"
    assert schema.field("mpp").metadata[b"unit"] == b"um/px"


def test_a_table_of_another_format_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "s.parquet"
    table_of(width=64, height=64).write_parquet(path)
    with pytest.raises(PatchTableError, match="format 1.*materialize 'patch_table' again"):
        read_patch_table(path)
