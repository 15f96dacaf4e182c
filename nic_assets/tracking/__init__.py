"""Experiment tracking with MLflow: live curves, published runs, registered models, champions."""

from nic_assets.tracking.connection import TrackingError, TrackingUnavailableError
from nic_assets.tracking.live import LiveCurves
from nic_assets.tracking.registry import CANDIDATE, CHAMPION, ModelFormatError
from nic_assets.tracking.resource import Tracking

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "LiveCurves",
    "ModelFormatError",
    "Tracking",
    "TrackingError",
    "TrackingUnavailableError",
]
