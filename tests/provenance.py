"""The provenance of grids that tests make up."""

from __future__ import annotations

from nic_core.grids import GridProvenance


def provenance(**changes: object) -> GridProvenance:
    """Provenance of a grid of patches of 128 px at 0.5 um/px, with other values by name."""
    return GridProvenance.model_validate(
        {
            "format": 4,
            "slide": "s1",
            "slide_identity": "ab" * 16,
            "slide_mpp": 0.25,
            "slide_image": 0,
            "encoder": "mtl",
            "weights_hash": "cd" * 16,
            "mpp": 0.5,
            "patch": 128,
            "stride": 128,
            "origin": (0.0, 0.0),
            "unreadable": 0,
            "precision": "float32",
            "reading": "patch",
            "colours": "stored",
            "icc_profile": None,
            "software": "nic test",
        }
        | changes
    )
