"""Experiment tracking with MLflow: runs, registered models, and the champion alias."""

from nic_assets.tracking.connection import TrackingError, TrackingUnavailableError
from nic_assets.tracking.registry import CANDIDATE, CHAMPION, ModelFormatError
from nic_assets.tracking.resource import Tracking
from nic_assets.tracking.runs import TrackedRun

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "ModelFormatError",
    "TrackedRun",
    "Tracking",
    "TrackingError",
    "TrackingUnavailableError",
]
