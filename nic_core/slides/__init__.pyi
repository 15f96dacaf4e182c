from .engines import Level
from .errors import SlideError
from .identity import content_identity
from .images import ImageInfo
from .slide import Slide, open_slide
from .source import SlideSource, open_source

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
