"""Addresses of the pages of ``nic view``, for links from other programs."""

from __future__ import annotations

import os
from urllib.parse import quote

VIEW_VARIABLE = "NIC_VIEW_URL"
DEFAULT_ADDRESS = "http://127.0.0.1:8765"
"""Where ``nic view`` serves by default."""
TISSUE_LAYER = "tissue"


def cohort_page() -> str:
    """Return the address of the table of slides: ``$NIC_VIEW_URL``, by default on this machine."""
    return (os.environ.get(VIEW_VARIABLE) or DEFAULT_ADDRESS).rstrip("/") + "/"


def slide_page(slide: str, *layers: str) -> str:
    """Return the address of a slide's page with some layers switched on, by their ids."""
    shown = ",".join(f"{quote(layer, safe='')}:0.6" for layer in layers)
    return f"{cohort_page()}slide/{quote(slide, safe='')}" + (f"#layers={shown}" if shown else "")


def grid_layer(encoder: str) -> str:
    """Return the id of the layer with the grid of an encoder in colours."""
    return f"grid.{encoder}"


def heat_layer(target: str, encoder: str) -> str:
    """Return the id of the layer with the heat of a slide model."""
    return f"heat.{target}.{encoder}"


def champion_layer(target: str) -> str:
    """Return the id of the layer with the heat of a target's champion."""
    return f"champion.{target}"


def target_page(target: str) -> str:
    """Return the address of a target's page."""
    return f"{cohort_page()}target/{quote(target, safe='')}"
