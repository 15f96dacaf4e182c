"""Compression: from a slide to its grid, and many slides in one go."""

from nic_core.compression.stream import compress_slide, up_to_date

__all__ = ["compress_slide", "up_to_date"]
