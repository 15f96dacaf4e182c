"""Whole-slide images: opening, reading at any resolution, finding them."""

from __future__ import annotations

from nic_core.slides.engines import Level
from nic_core.slides.errors import SlideError
from nic_core.slides.identity import content_identity
from nic_core.slides.slide import Slide, open_slide

__all__ = ["Level", "Slide", "SlideError", "content_identity", "open_slide"]
