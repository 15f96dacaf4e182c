"""Target kinds: regression, classification and survival, one object each.

Everything that depends on what a slide model predicts is a member of
:class:`~nic_core.models.kinds.base.TargetKind`: labels, folds, loss, metrics, predictions, the
linear baseline, figures and display text. The rest of the package calls :func:`kind_of` and never
tests which kind a target has. To add a kind, add a target to :mod:`nic_core.cohort.targets`, a
module here, and a case to :func:`kind_of`.
"""

from nic_core.cohort import ClassificationTarget, RegressionTarget, SurvivalTarget, Target
from nic_core.models.kinds.base import (
    Calibration,
    TargetKind,
    metric_name,
    prediction_array,
    primary_value,
)
from nic_core.models.kinds.classification import Classification
from nic_core.models.kinds.regression import Regression
from nic_core.models.kinds.survival import Survival

__all__ = [
    "Calibration",
    "Classification",
    "Regression",
    "Survival",
    "TargetKind",
    "kind_of",
    "metric_name",
    "prediction_array",
    "primary_value",
]


def kind_of(target: Target) -> TargetKind:
    """Return the object that implements a target's kind."""
    match target:
        case RegressionTarget():
            return Regression(target)
        case ClassificationTarget():
            return Classification(target)
        case SurvivalTarget():
            return Survival(target)
