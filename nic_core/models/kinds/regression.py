"""Regression targets: squared error, Spearman's rho, ridge regression (paper B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional

from nic_core.cohort import RegressionTarget
from nic_core.cohort.tables import ROW
from nic_core.models.calibration import linear_calibration
from nic_core.models.cox import BaselineHazard
from nic_core.models.kinds.base import (
    ExplainedOutput,
    Floats,
    RecalibrationMethod,
    WithoutSurvivalFunctions,
    numeric_labels,
    prediction_array,
)
from nic_core.models.likelihood import MaximumLikelihood, fit_normal
from nic_core.models.metrics import Metric, regression_metrics
from nic_core.models.plots import scatter_figure
from nic_core.models.recalibration import Recalibration
from nic_core.numbers import format_number


@dataclass(frozen=True)
class Regression(WithoutSurvivalFunctions):
    """A number per unit; implements :class:`~nic_core.models.kinds.base.TargetKind`.

    The column ``y`` (float64) holds the label. Networks learn standardised labels: predictions
    are ``output * scale + shift`` in the label's unit.
    """

    target: RegressionTarget

    primary_metric = "spearman"
    primary_name = "Spearman"
    chance_level = 0.0
    label_columns = ("y",)
    outputs = 1

    @property
    def source_columns(self) -> tuple[str, ...]:
        return (self.target.column,)

    def decode(self, labels: pl.DataFrame, key: str) -> pl.DataFrame:
        numbers = numeric_labels(labels, self.target, self.target.column, key)
        return labels.select(ROW, key, y=numbers).drop_nulls("y")

    def strata(self, units: pl.DataFrame) -> pl.DataFrame:
        """One stratum; the value is a patient's mean label."""
        return units.group_by("patient").agg(
            strata=pl.lit(0, pl.Int64).implode(), value=pl.col("y").mean()
        )

    def patients_needed(self, cv: pl.DataFrame) -> dict[str, int]:
        return {"a label": cv["patient"].n_unique()}

    def training_problem(self, train: pl.DataFrame, validation: pl.DataFrame) -> str | None:
        if train["y"].n_unique() < 2:
            return f"all {train.height} labels to train on are {train['y'][0]:g}"
        y = train["y"].cast(pl.Float32)  # as the network computes
        if y.is_infinite().any() or y.n_unique() < 2:
            return "the labels are too large, or differ too little, for float32; rescale them"
        return None

    def output_scale(self, train: pl.DataFrame) -> tuple[float, float]:
        y = train["y"].to_numpy()
        return float(y.mean()), float(y.std())

    def activate(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return outputs * scale + shift

    def loss(self, outputs: Tensor, rows: pl.DataFrame, shift: Tensor, scale: Tensor) -> Tensor:
        y = torch.tensor(rows["y"].to_numpy(), dtype=outputs.dtype, device=outputs.device)
        return functional.mse_loss(outputs[:, 0], (y - shift) / scale)

    def explained_output(self, label: str | None) -> ExplainedOutput:
        if label is not None:
            raise ValueError(
                f"target '{self.target.name}' (regression) has no class '{label}'; "
                "leave the class out"
            )
        return lambda outputs, shift, scale: outputs[:, 0] * scale

    def metrics(self, rows: pl.DataFrame, prediction: Floats) -> dict[str, Metric]:
        return regression_metrics(rows["y"].to_numpy(), prediction[:, 0])

    def calibration_metrics(
        self,
        rows: pl.DataFrame,
        prediction: Floats,
        folds: Floats,
        hazards: Sequence[BaselineHazard],
    ) -> dict[str, Metric]:
        return linear_calibration(rows["y"].to_numpy(), prediction[:, 0])

    def linear_model(self, penalty: float) -> Ridge:
        return Ridge(alpha=penalty)

    def linear_labels(self, table: pl.DataFrame) -> Floats:
        return table["y"].to_numpy()

    def linear_prediction(self, model: Any, features: Floats) -> Floats:
        return np.asarray(model.predict(features), np.float64)[:, None]

    outcomes = (None,)
    ratio_name = None
    recalibrates = False

    def image_scores(self, prediction: Floats) -> Floats:
        return prediction

    def maximum_likelihood(self, rows: pl.DataFrame, x: Floats) -> MaximumLikelihood:
        return fit_normal(x, rows["y"].to_numpy())

    def recalibrate(
        self,
        validation: pl.DataFrame,
        prediction: Floats,
        hazard: BaselineHazard | None,
        method: RecalibrationMethod,
    ) -> tuple[Recalibration, BaselineHazard | None]:
        raise NotImplementedError("regression states no probabilities")

    def recalibrated(self, prediction: Floats, recalibration: Recalibration) -> Floats:
        return prediction

    @property
    def prediction_columns(self) -> list[str]:
        return ["prediction"]

    def conclusions(
        self, folds: Floats, median_risk: float | None, hazards: Sequence[BaselineHazard]
    ) -> list[pl.Series]:
        return []

    def figure(
        self,
        predictions: Mapping[str, pl.DataFrame],
        title: str,
        *,
        median_risk: float | None = None,
    ) -> Figure:
        rows = next(iter(predictions.values()))
        return scatter_figure(
            rows["y"].to_numpy(),
            prediction_array(self, rows)[:, 0],
            fold=None if rows["fold"].null_count() else rows["fold"].to_numpy(),
            label=self.target.column,
            title=title,
        )

    def explained_name(self, label: str | None) -> str:
        return f"a higher {self.target.column}"

    def prediction_text(self, row: Mapping[str, Any]) -> str:
        return f"predicted {self.target.column}: {format_number(row['prediction'])}"

    def conclusion_headings(self, times: Sequence[float]) -> list[str]:
        return []

    def conclusion_cells(self, row: Mapping[str, Any]) -> list[str]:
        return []
