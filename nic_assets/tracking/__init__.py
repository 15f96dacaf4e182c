"""MLflow: runs, registered models and the champion alias."""

from nic_assets.tracking.runs import CANDIDATE, CHAMPION, TrackedRun, Tracking, TrackingError

__all__ = ["CANDIDATE", "CHAMPION", "TrackedRun", "Tracking", "TrackingError"]
