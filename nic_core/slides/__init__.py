"""Whole-slide images: open a slide file and read any region at any resolution.

This package depends on no other part of the project but :mod:`nic_core.types` and
:mod:`nic_core.object_stores`.
"""

from __future__ import annotations

from nic_core.slides.engines import Level
from nic_core.slides.errors import SlideError
from nic_core.slides.identity import content_identity
from nic_core.slides.images import ImageInfo
from nic_core.slides.slide import Slide, open_slide
from nic_core.slides.source import SlideSource, open_source

__all__ = [
    "ImageInfo",
    "Level",
    "Slide",
    "SlideError",
    "SlideSource",
    "content_identity",
    "open_slide",
    "open_source",
]
