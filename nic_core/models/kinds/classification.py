"""Classification targets: cross-entropy, ROC AUC, logistic regression (paper B)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from nic_core.models.cox import BaselineHazard
from nic_core.models.kinds.base import (
    Floats,
    WithoutSurvivalFunctions,
    label_error,
    prediction_array,
)
from nic_core.models.metrics import Metric, classification_metrics
from nic_core.models.plots import classification_figure


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
    fold_order = ("y",)

    @property
    def source_columns(self) -> tuple[str, ...]:
        return (self.target.column,)

    def decode(self, labels: pl.DataFrame, key: str) -> pl.DataFrame:
        column, classes = self.target.column, self.target.classes
        labels = labels.with_columns(pl.col(column).cast(pl.String)).drop_nulls(column)
        unknown = labels.filter(~pl.col(column).is_in(classes))
        if unknown.height:
            raise label_error(
                self.target,
                column,
                f"{key} '{unknown[key][0]}' has class '{unknown[column][0]}', which is not one of "
                f"{', '.join(classes)}; correct the label or add the class to the target",
            )
        index = {name: i for i, name in enumerate(classes)}
        return labels.select(key, y=pl.col(column).replace_strict(index, return_dtype=pl.Int64))

    def check_enough(self, cv: pl.DataFrame, folds: int) -> None:
        for index, name in enumerate(self.target.classes):
            count = cv.filter(pl.col("y") == index)["patient"].n_unique()
            if count < folds:
                raise label_error(
                    self.target,
                    self.target.column,
                    f"class '{name}' has {count} patients, too few for {folds} folds; "
                    "merge classes or lower settings.models.folds",
                )

    def patient_labels(self) -> list[pl.Expr]:
        # the most frequent class; of several the first
        return [pl.col("y").mode().min()]

    def strata(self, patients: pl.DataFrame) -> pl.Series:
        return patients["y"]

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

    def explained_output(self, label: str | None) -> Callable[[Tensor, Tensor], Tensor]:
        classes = self.target.classes
        if label is not None and label not in classes:
            raise ValueError(
                f"target '{self.target.name}' has no class '{label}'; it has {', '.join(classes)}"
            )
        index = len(classes) - 1 if label is None else classes.index(label)
        others = [i for i in range(len(classes)) if i != index]
        # log-odds of the class against all others
        return lambda outputs, predictions: outputs[:, index] - outputs[:, others].logsumexp(1)

    def metrics(self, rows: pl.DataFrame, prediction: Floats) -> dict[str, Metric]:
        return classification_metrics(rows["y"].to_numpy(), prediction)

    def linear_model(self, penalty: float) -> LogisticRegression:
        return LogisticRegression(C=1 / penalty, max_iter=1000)

    def linear_labels(self, table: pl.DataFrame) -> NDArray[np.int64]:
        return table["y"].to_numpy()

    def linear_prediction(self, model: Any, features: Floats) -> Floats:
        probability: Floats = model.predict_proba(features)
        return probability

    @property
    def prediction_columns(self) -> list[str]:
        return [f"probability_{name}" for name in self.target.classes]

    def conclusions(
        self, folds: Floats, median_risk: float | None, hazards: Sequence[BaselineHazard]
    ) -> list[pl.Series]:
        """``class``: the class with the highest mean probability."""
        names = [self.target.classes[i] for i in folds.mean(0).argmax(1)]
        return [pl.Series("class", names, pl.String)]

    def figure(self, predictions: Mapping[str, pl.DataFrame], title: str) -> Figure:
        return classification_figure(
            {
                name: (rows["y"].to_numpy(), prediction_array(self, rows))
                for name, rows in predictions.items()
            },
            classes=self.target.classes,
            title=title,
        )

    def conclusion_headings(self, times: Sequence[float]) -> list[str]:
        return ["class"]

    def conclusion_cells(self, row: Mapping[str, Any]) -> list[str]:
        return [row["class"] or ""]
