"""pyvips, set up for this project: the other modules import it from here."""

from __future__ import annotations

import pyvips

# libvips remembers what it loaded by file name: a file that changed would be read as it was
pyvips.cache_set_max(0)

__all__ = ["pyvips"]
