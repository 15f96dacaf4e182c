"""Compare a slide's embeddings in a faster setting with the exact ones."""

from __future__ import annotations

from nic_core.cohort import Geometry
from nic_core.compression.stream import compress_slide
from nic_core.encoders.errors import EncoderError
from nic_core.encoders.inference import PreparedEncoder
from nic_core.encoders.similarity import Similarity, similarity
from nic_core.slides import Slide
from nic_core.tiling.patches import patch_table
from nic_core.tiling.tissue import tissue_mask

TISSUE = 0.6  # tissue fraction of the patches that are compared


def slide_similarity(slide: Slide, exact: PreparedEncoder, found: PreparedEncoder) -> Similarity:
    """Compare the embeddings of all patches of a slide's tissue by two preparations of an encoder.

    Raises
    ------
    EncoderError
        The slide has no patch of tissue.
    SlideError
        The slide cannot be read.
    """
    card = exact.card
    geometry = Geometry(patch=card.patch, mpp=card.mpp, stride=card.patch)
    cells = patch_table("slide", slide, tissue_mask(slide), geometry, tissue=TISSUE)
    one, other = (
        compress_slide(slide, cells, encoder, slide_id="slide", slide_identity="")
        for encoder in (exact, found)
    )
    if not one.valid.any():
        raise EncoderError(
            f"{slide.path}: no patch has tissue, so there is nothing to compare; give another slide"
        )
    return similarity(other.embeddings[:, one.valid].T, one.embeddings[:, one.valid].T)
