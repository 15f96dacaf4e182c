"""The quality report: the slides of a study compared with each other."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap

import polars as pl
from matplotlib.figure import Figure
from matplotlib.image import imread

from nic_core.cohort import Cohort, CohortError
from nic_core.pictures import WIDTH, new_figure, save_figure
from nic_core.steps.slide_index import read_slide_index
from nic_core.steps.slides import THUMBNAIL, read_record
from nic_core.store import PatchTableKey, Store, atomic_folder
from nic_core.tiling.patches import read_patch_table
from nic_core.tiling.slide_quality import (
    QUALITY_SCHEMA,
    blurred_share,
    find_outliers,
    slide_quality,
)

SLIDES, OUTLIERS = "slides.parquet", "outliers.png"
_SHOWN = 12  # outliers in the figure
_COLUMNS = 3


@dataclass(frozen=True)
class QualityReport:
    """Quality of the slides of a study.

    Attributes
    ----------
    slides : polars.DataFrame
        Output of :func:`nic_core.tiling.slide_quality.find_outliers`.
    without_patch_table : list of str
        Slides that are not compared because they have no patch table.
    figure : Figure or None
        Thumbnails of up to 12 slides with problems; None if there are none.
    """

    slides: pl.DataFrame
    without_patch_table: list[str]
    figure: Figure | None

    @property
    def outliers(self) -> pl.DataFrame:
        """Columns ``slide``, ``problems`` and ``exclude`` of the slides with problems."""
        return self.slides.filter(pl.col("problems") != "").select("slide", "problems", "exclude")


def make_quality_report(cohort: Cohort, store: Store) -> QualityReport:
    """Compare the slides that have a patch table; write and return the report.

    The patch tables are those of the first encoder's geometry.

    Raises
    ------
    CohortError
        No slide has a patch table, or a slide record is of another version.
    PatchTableError
        A patch table cannot be read.
    """
    index = read_slide_index(store)
    geometry = next(iter(cohort.geometries))
    tables = {
        slide: store.patch_table(PatchTableKey(geometry=geometry, slide=slide))
        for slide in index["slide"]
    }
    made = {slide: table.exists() for slide, table in tables.items()}
    if not any(made.values()):
        raise CohortError("no slide has a patch table; materialize 'patch_table' first")
    rows = []
    for slide, exclude in index.select("slide", "exclude").iter_rows():
        if made[slide]:
            record = read_record(store, slide)
            area = record.width * record.height * (record.mpp / 1000) ** 2  # mm2
            cells = read_patch_table(tables[slide])
            rows.append(
                slide_quality(
                    slide,
                    cells,
                    exclude=exclude,
                    mpp=record.mpp,
                    tissue_share=record.tissue_mm2 / area,
                    ink_share=record.ink_share,
                )
            )
    slides = pl.DataFrame(rows, schema=QUALITY_SCHEMA)
    # in a second pass over the patch tables, since a cell is compared with all slides
    blurred = [
        blurred_share(read_patch_table(tables[slide]), slides, slide) for slide in slides["slide"]
    ]
    slides = find_outliers(slides.with_columns(blurred_share=pl.Series(blurred, dtype=pl.Float64)))
    report = QualityReport(
        slides,
        [slide for slide, exists in made.items() if not exists],
        _outlier_figure(store, slides.filter(pl.col("problems") != "")),
    )
    with atomic_folder(store.quality_report) as folder:
        slides.write_parquet(folder / SLIDES)
        if report.figure is not None:
            save_figure(report.figure, folder / OUTLIERS)
    return report


def _outlier_figure(store: Store, outliers: pl.DataFrame) -> Figure | None:
    """Thumbnails of outliers, each with its problems."""
    if outliers.is_empty():
        return None
    shown = outliers.head(_SHOWN)
    rows = -(-shown.height // _COLUMNS)
    figure = new_figure(WIDTH, 3.1 * rows + 0.3)
    panels = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (slide, problems) in zip(
        panels, shown.select("slide", "problems").iter_rows(), strict=False
    ):
        axes.imshow(imread(store.slide(slide) / THUMBNAIL))
        lines = [wrapped for text in (slide, *problems.split("; ")) for wrapped in wrap(text, 36)]
        axes.set_title("\n".join(lines), fontsize=8)
    more = f"; {outliers.height - _SHOWN} more are in {SLIDES}" if outliers.height > _SHOWN else ""
    figure.suptitle(f"slides that differ from the others, and how{more}", fontsize=10)
    return figure
