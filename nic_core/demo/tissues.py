"""Tissue values of the label rasters and of the truth images."""

from __future__ import annotations

from enum import IntEnum


class Tissue(IntEnum):
    """The tissue at a point; the values are those of the truth PNGs."""

    BACKGROUND = 0
    STROMA = 1  # loose connective tissue, the default tissue of every slide
    TUMOUR = 2
    RIM = 3  # dense desmoplastic stroma: around nests, or in bands away from them
    LYMPHOCYTES = 4
    NECROSIS = 5
    FAT = 6
    GLAND = 7  # epithelium of normal glands
    MUSCLE = 8
    MUCUS = 9
    BLOOD = 10
    LUMEN = 11  # of glands and vessels; part of GLAND in the truth of a slide
