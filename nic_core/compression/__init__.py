"""Compression: encode the patches of a slide to a grid, for one slide or many."""

from nic_core.compression.stream import compress_slide, compress_to_store, is_up_to_date

__all__ = ["compress_slide", "compress_to_store", "is_up_to_date"]
