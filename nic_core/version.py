"""The version of the installed distribution."""

from __future__ import annotations

import importlib.metadata

DISTRIBUTION = "nic-pathology"

try:
    __version__ = importlib.metadata.version(DISTRIBUTION)
except importlib.metadata.PackageNotFoundError:
    __version__ = "unknown (not installed)"
