"""Make the slide record and the patch table of a slide."""

from __future__ import annotations

import polars as pl
from matplotlib.image import imsave
from pydantic import BaseModel, ConfigDict, ValidationError

from nic_core.cohort import Cohort, CohortError
from nic_core.cohort.index import row_source
from nic_core.slides import ImageInfo, Level, content_identity
from nic_core.slides.icc import IccProfile
from nic_core.steps.slide_index import index_row, open_indexed
from nic_core.store import PatchTableKey, Store, atomic_folder
from nic_core.tiling.background import stain_density
from nic_core.tiling.ink import find_ink
from nic_core.tiling.mask_files import source_mask
from nic_core.tiling.patches import patch_table, write_patch_table
from nic_core.tiling.quality import measure_quality
from nic_core.tiling.tissue import TissueMask, tissue_outline
from nic_core.types import Pixels

RECORD, THUMBNAIL, TISSUE = "slide.json", "thumbnail.jpg", "tissue.png"
THUMBNAIL_SIDE = 1024  # px


class SlideRecord(BaseModel):
    """Metadata of a slide and of its tissue mask: ``slide.json`` in the slide's folder."""

    model_config = ConfigDict(frozen=True)

    slide: str  # slide id
    identity: str  # content identity
    engine: str  # library that reads the file
    width: int  # level-0 px
    height: int
    mpp: float  # um/px at level 0
    levels: tuple[Level, ...]  # finest first
    image: int  # number of the image that is read
    images: tuple[ImageInfo, ...]  # all images of a TIFF; empty for other formats
    icc_profile: IccProfile | None  # of the file
    scanner: str | None  # maker and model or number; null: the file does not state them
    tissue_mpp: float  # um/px of tissue.png
    tissue_mm2: float  # area of the tissue
    ink_share: float  # fraction of the slide's area: pen ink and black areas


def make_slide(store: Store, slide: str) -> tuple[SlideRecord, Pixels]:
    """Detect the tissue of a slide, or read its given mask; write record, thumbnail and mask.

    Returns
    -------
    record : SlideRecord
    outline : uint8 (H, W, 3)
        Thumbnail with the outline of the tissue.

    Raises
    ------
    CohortError
        The slide is not in the slide index.
    SlideError
        The slide or its mask cannot be used.
    """
    with open_indexed(store, slide) as opened:
        thumbnail = opened.thumbnail(THUMBNAIL_SIDE)
        thumbnail_mpp = opened.width * opened.mpp / thumbnail.shape[1]
        ink = find_ink(stain_density(thumbnail, thumbnail_mpp), thumbnail_mpp)
        mask = source_mask(row_source(index_row(store, slide)), opened)
        record = SlideRecord(
            slide=slide,
            identity=content_identity(opened.path),
            engine=opened.engine,
            width=opened.width,
            height=opened.height,
            mpp=opened.mpp,
            levels=opened.levels,
            image=opened.image,
            images=opened.images,
            icc_profile=opened.icc_profile,
            scanner=opened.scanner,
            tissue_mpp=mask.mpp,
            tissue_mm2=float(mask.array.sum()) * (mask.mpp / 1000) ** 2,
            ink_share=float(ink.mean()),
        )
        with atomic_folder(store.slide(slide)) as folder:
            (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n")
            imsave(folder / THUMBNAIL, thumbnail)
            mask.save(folder / TISSUE)
        return record, tissue_outline(opened, mask, side=320)


def read_record(store: Store, slide: str) -> SlideRecord:
    """Read the record that :func:`make_slide` wrote.

    Raises
    ------
    CohortError
        Another version of this project wrote it.
    """
    path = store.slide(slide) / RECORD
    try:
        return SlideRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CohortError(
            f"{path}: another version wrote it; materialize 'slide' of '{slide}' again"
        ) from error


def slide_scanner(store: Store, slide: str) -> str | None:
    """Return the scanner of a slide: that of the slide table, else that which its file states.

    None if neither states one, also for a slide without a record: features of other software need
    none.

    Raises
    ------
    CohortError
        Another version of this project wrote the record.
    """
    stated = index_row(store, slide)["scanner"]
    if stated is not None:
        return str(stated)
    if not (store.slide(slide) / RECORD).exists():
        return None
    return read_record(store, slide).scanner


def make_patch_table(cohort: Cohort, store: Store, key: PatchTableKey) -> pl.DataFrame:
    """Divide a slide into cells and measure their quality; write and return the patch table.

    Parameters
    ----------
    key
        Geometry, which an encoder of the cohort must have, and slide.

    Raises
    ------
    CohortError
        The slide is not in the slide index, or no encoder has the geometry.
    SlideError
        The slide cannot be used, or too many of its cells cannot be decoded.
    """
    slide, geometry = key.slide, cohort.geometry_named(key.geometry)
    mask = TissueMask.load(store.slide(slide) / TISSUE, read_record(store, slide).tissue_mpp)
    with open_indexed(store, slide) as opened:
        cells = patch_table(slide, opened, mask, geometry, tissue=cohort.settings.tissue)
        cells = measure_quality(cells, opened)
    write_patch_table(store.patch_table(key), cells)
    return cells
