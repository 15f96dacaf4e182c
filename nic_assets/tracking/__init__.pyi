from .connection import TrackingError, TrackingUnavailableError
from .live import LiveCurves
from .registry import CANDIDATE, CHAMPION, ModelFormatError
from .resource import Tracking

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "LiveCurves",
    "ModelFormatError",
    "Tracking",
    "TrackingError",
    "TrackingUnavailableError",
]
