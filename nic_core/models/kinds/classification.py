"""Classification targets: cross-entropy, ROC AUC, logistic regression (paper B)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from nic_core.cohort import ClassificationTarget
from nic_core.cohort.tables import ROW
from nic_core.models.calibration import logistic_calibration
from nic_core.models.cox import BaselineHazard
from nic_core.models.kinds.base import (
    ExplainedOutput,
    Floats,
    RecalibrationMethod,
    WithoutSurvivalFunctions,
    named_labels,
    prediction_array,
)
from nic_core.models.likelihood import MaximumLikelihood, fit_logistic
from nic_core.models.metrics import Metric, classification_metrics
from nic_core.models.plots import classification_figure
from nic_core.models.recalibration import Recalibration, fit_class_temperature, fit_isotonic

LEAST_PROBABILITY = 1e-3  # in log odds [choice]


@dataclass(frozen=True)
class Classification(WithoutSurvivalFunctions):
    """A class per unit; implements :class:`~nic_core.models.kinds.base.TargetKind`.

    The column ``y`` (int64) holds the position of the class in ``target.classes``. Predictions
    are class probabilities. Of two classes the second is the positive one.
    """

    target: ClassificationTarget

    primary_metric = "auc"
    primary_name = "AUC"
    chance_level = 0.5
    label_columns = ("y",)

    @property
    def source_columns(self) -> tuple[str, ...]:
        return (self.target.column,)

    def decode(self, labels: pl.DataFrame, key: str) -> pl.DataFrame:
        column, classes = self.target.column, self.target.classes
        index = {name: i for i, name in enumerate(classes)}
        names = named_labels(labels, self.target, column, key, classes)
        y = names.replace_strict(index, return_dtype=pl.Int64)
        return labels.select(ROW, key, y=y).drop_nulls("y")

    def strata(self, units: pl.DataFrame) -> pl.DataFrame:
        """The classes of a patient's units; the one that the fewest patients have is in front."""
        counts = Counter(units.select("patient", "y").unique()["y"])
        patients = units.group_by("patient").agg(strata=pl.col("y").unique())
        strata = [sorted(classes, key=lambda y: (counts[y], y)) for classes in patients["strata"]]
        return patients.select(
            "patient", strata=pl.Series(strata, dtype=pl.List(pl.Int64)), value=pl.lit(0.0)
        )

    def patients_needed(self, cv: pl.DataFrame) -> dict[str, int]:
        return {
            f"class '{name}'": cv.filter(pl.col("y") == index)["patient"].n_unique()
            for index, name in enumerate(self.target.classes)
        }

    def training_problem(self, train: pl.DataFrame, validation: pl.DataFrame) -> str | None:
        present = set(train["y"])
        absent = [name for i, name in enumerate(self.target.classes) if i not in present]
        return f"no unit to train on has class '{absent[0]}'" if absent else None

    @property
    def outputs(self) -> int:
        return len(self.target.classes)

    def output_scale(self, train: pl.DataFrame) -> tuple[float, float]:
        return 0.0, 1.0

    def activate(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return outputs.softmax(1)

    def loss(self, outputs: Tensor, rows: pl.DataFrame, shift: Tensor, scale: Tensor) -> Tensor:
        y = torch.tensor(rows["y"].to_numpy(), device=outputs.device)
        return functional.cross_entropy(outputs, y)

    def explained_output(self, label: str | None) -> ExplainedOutput:
        classes = self.target.classes
        if label is not None and label not in classes:
            raise ValueError(
                f"target '{self.target.name}' has no class '{label}'; it has {', '.join(classes)}"
            )
        index = len(classes) - 1 if label is None else classes.index(label)
        others = [i for i in range(len(classes)) if i != index]
        return lambda outputs, shift, scale: outputs[:, index] - outputs[:, others].mean(1)

    def metrics(self, rows: pl.DataFrame, prediction: Floats) -> dict[str, Metric]:
        return classification_metrics(rows["y"].to_numpy(), prediction)

    def calibration_metrics(
        self,
        rows: pl.DataFrame,
        prediction: Floats,
        folds: Floats,
        hazards: Sequence[BaselineHazard],
    ) -> dict[str, Metric]:
        """Of two classes those of the second; of more, those of each against the rest."""
        y, classes = rows["y"].to_numpy(), self.target.classes
        if len(classes) == 2:
            return logistic_calibration(y == 1, prediction[:, 1])
        return {
            f"{metric}_{name}": value
            for i, name in enumerate(classes)
            for metric, value in logistic_calibration(y == i, prediction[:, i]).items()
        }

    def linear_model(self, penalty: float) -> LogisticRegression:
        return LogisticRegression(C=1 / penalty, max_iter=1000)

    def linear_labels(self, table: pl.DataFrame) -> NDArray[np.int64]:
        return table["y"].to_numpy()

    def linear_prediction(self, model: Any, features: Floats) -> Floats:
        probability: Floats = model.predict_proba(features)
        return probability

    ratio_name = "odds ratio"
    recalibrates = True

    @property
    def outcomes(self) -> tuple[str, ...]:
        return self.target.classes[1:]

    def image_scores(self, prediction: Floats) -> Floats:
        """Log odds of each class against the first one.

        Probabilities are kept above :data:`LEAST_PROBABILITY`, so that no unit is an outlier.
        """
        logs = np.log(np.maximum(prediction, LEAST_PROBABILITY))
        scores: Floats = logs[:, 1:] - logs[:, :1]
        return scores

    def maximum_likelihood(self, rows: pl.DataFrame, x: Floats) -> MaximumLikelihood:
        return fit_logistic(x, rows["y"].to_numpy(), len(self.target.classes))

    def recalibrate(
        self,
        validation: pl.DataFrame,
        prediction: Floats,
        hazard: BaselineHazard | None,
        method: RecalibrationMethod,
    ) -> tuple[Recalibration, None]:
        fit = fit_isotonic if method == "isotonic" else fit_class_temperature
        return fit(prediction, validation["y"].to_numpy()), None

    def recalibrated(self, prediction: Floats, recalibration: Recalibration) -> Floats:
        return recalibration.probabilities(prediction)

    @property
    def prediction_columns(self) -> list[str]:
        return [f"probability_{name}" for name in self.target.classes]

    def conclusions(
        self, folds: Floats, median_risk: float | None, hazards: Sequence[BaselineHazard]
    ) -> list[pl.Series]:
        """``class``: the class with the highest mean probability."""
        names = [self.target.classes[i] for i in folds.mean(0).argmax(1)]
        return [pl.Series("class", names, pl.String)]

    def figure(
        self,
        predictions: Mapping[str, pl.DataFrame],
        title: str,
        *,
        median_risk: float | None = None,
    ) -> Figure:
        return classification_figure(
            {
                name: (rows["y"].to_numpy(), prediction_array(self, rows))
                for name, rows in predictions.items()
            },
            classes=self.target.classes,
            title=title,
        )

    def explained_name(self, label: str | None) -> str:
        return self.target.classes[-1] if label is None else label

    def prediction_text(self, row: Mapping[str, Any]) -> str:
        probability, name = max((row[f"probability_{c}"], c) for c in self.target.classes)
        return f"predicted class: {name} (probability {probability:.2f})"

    def conclusion_headings(self, times: Sequence[float]) -> list[str]:
        return ["class"]

    def conclusion_cells(self, row: Mapping[str, Any]) -> list[str]:
        return [row["class"] or ""]
