"""Order of names in which digits count as numbers: ``img2`` before ``img10``."""

from __future__ import annotations

import re


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return the key to sort names by."""
    parts = re.findall(r"([0-9]+)|([^0-9]+)", name)
    return [(0, int(digits), "") if digits else (1, 0, text) for digits, text in parts]
