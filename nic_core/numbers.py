"""Numbers as text, for tables and pictures."""

from __future__ import annotations

import math


def format_number(value: float, digits: int = 3) -> str:
    """Return a number with significant digits; the integer part is always whole.

    1149.6 is ``1150`` and not 1.15e+03. Numbers nearer to 0 than 0.0001 have an exponent.

    Parameters
    ----------
    value
        May be infinite or NaN.
    digits
        Significant digits, if the integer part does not have more.
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def rounded(value: float, digits: int = 4) -> float:
    """Round to significant digits, and never before the first decimal."""
    if value == 0 or not math.isfinite(value):
        return value
    return round(value, max(1, digits - 1 - math.floor(math.log10(abs(value)))))
