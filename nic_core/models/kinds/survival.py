"""Survival targets: Cox loss, Harrell's C, risk groups and median survival (paper A).

The method itself, partial likelihood and baseline hazard, is in :mod:`nic_core.models.cox`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv
from torch import Tensor

from nic_core.cohort import SurvivalTarget
from nic_core.cohort.tables import ROW
from nic_core.models.calibration import survival_calibration
from nic_core.models.cox import (
    BaselineHazard,
    cox_loss,
    fit_baseline_hazard,
    median_event_time,
    median_survival,
)
from nic_core.models.kinds.base import (
    Calibration,
    ExplainedOutput,
    Floats,
    RecalibrationMethod,
    label_error,
    named_series,
    numeric_labels,
    prediction_array,
    row_name,
)
from nic_core.models.likelihood import MaximumLikelihood, fit_cox
from nic_core.models.metrics import Metric, event_horizons, log_rank, survival_metrics
from nic_core.models.plots import kaplan_meier_figure
from nic_core.models.recalibration import Recalibration, fit_temperature
from nic_core.numbers import format_number


@dataclass(frozen=True)
class Survival:
    """Time to an event with right censoring; implements :class:`~.base.TargetKind`.

    The columns ``time`` (float64, in ``target.unit``) and ``event`` (bool, true: observed, false:
    censored) hold the label. A prediction is a risk: higher means an earlier event.
    """

    target: SurvivalTarget

    primary_metric = "harrell_c"
    primary_name = "Harrell's C"
    chance_level = 0.5
    label_columns = ("time", "event")
    outputs = 1
    has_survival_functions = True

    @property
    def source_columns(self) -> tuple[str, ...]:
        return self.target.time, self.target.event

    def decode(self, labels: pl.DataFrame, key: str) -> pl.DataFrame:
        events = labels.with_columns(_truth_as_number(labels[self.target.event]))
        numbers = labels.select(
            ROW,
            key,
            time=numeric_labels(labels, self.target, self.target.time, key),
            event=numeric_labels(
                events,
                self.target,
                self.target.event,
                key,
                "write 1 for an event and 0 for a censored time",
            ),
        )
        time, event = pl.col("time"), pl.col("event")
        numbers = numbers.filter(time.is_not_null() | event.is_not_null())
        for column, invalid, problem in (
            (self.target.time, time.is_null(), "has an event but no time"),
            (self.target.event, event.is_null(), "has a time but no event"),
            (self.target.time, time < 0, "has a negative time"),
            (self.target.event, ~event.is_in([0.0, 1.0]), "has an event that is not 0 or 1"),
        ):
            rows = numbers.filter(invalid)
            if rows.height:
                where = row_name(rows, 0, key)
                raise label_error(self.target, column, f"{where} {problem}; correct the row")
        return numbers.with_columns(event=event == 1)

    def strata(self, units: pl.DataFrame) -> pl.DataFrame:
        """Patients with an event and without; the value is the time of a patient's first unit."""
        patients = (
            units.sort("unit")
            .group_by("patient")
            .agg(event=pl.col("event").any().cast(pl.Int64), value=pl.col("time").first())
        )
        return patients.select("patient", strata=pl.concat_list("event"), value="value")

    def patients_needed(self, cv: pl.DataFrame) -> dict[str, int]:
        return {"an event": cv.filter("event")["patient"].n_unique()}

    def training_problem(self, train: pl.DataFrame, validation: pl.DataFrame) -> str | None:
        for units, purpose in ((train, "train on"), (validation, "validate on")):
            if not units["event"].any():
                return f"none of the {units.height} units to {purpose} has an event"
        if train.filter("event")["time"].to_numpy().min() == train["time"].to_numpy().max():
            return "no unit to train on has a time after an event, so no two can be compared"
        return None

    def output_scale(self, train: pl.DataFrame) -> tuple[float, float]:
        return 0.0, 1.0

    def activate(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return outputs * scale + shift

    def loss(self, outputs: Tensor, rows: pl.DataFrame, shift: Tensor, scale: Tensor) -> Tensor:
        time, event = (
            torch.tensor(rows[column].to_numpy(), device=outputs.device)
            for column in self.label_columns
        )
        return cox_loss(outputs[:, 0], time, event)

    def explained_output(self, label: str | None) -> ExplainedOutput:
        if label is not None:
            raise ValueError(
                f"target '{self.target.name}' (survival) has no class '{label}'; "
                "leave the class out"
            )
        return lambda outputs, shift, scale: outputs[:, 0] * scale + shift

    def metrics(self, rows: pl.DataFrame, prediction: Floats) -> dict[str, Metric]:
        time, event = (rows[column].to_numpy() for column in self.label_columns)
        if "survival" not in rows.columns:
            return survival_metrics(time, event, prediction[:, 0])
        horizons = np.asarray(rows["horizons"][0].to_list(), np.float64)
        survival = np.array(rows["survival"].to_list()).reshape(rows.height, len(horizons))
        return survival_metrics(time, event, prediction[:, 0], survival, horizons)

    def p_values(
        self, rows: pl.DataFrame, prediction: Floats, *, median_risk: float | None = None
    ) -> dict[str, float]:
        """``log_rank_p``: between units above the median risk and the others (paper A)."""
        time, event = (rows[column].to_numpy() for column in self.label_columns)
        return {"log_rank_p": log_rank(time, event, prediction[:, 0], threshold=median_risk)}

    def calibration_metrics(
        self,
        rows: pl.DataFrame,
        prediction: Floats,
        folds: Floats,
        hazards: Sequence[BaselineHazard],
    ) -> dict[str, Metric]:
        """Events are counted up to the median time of the events in training [choice]."""
        time, event = (rows[column].to_numpy() for column in self.label_columns)
        horizon = median_event_time(hazards)
        risks = list(zip(hazards, folds[..., 0], strict=True))
        return survival_calibration(
            time,
            event,
            np.mean([hazard.scale * risk for hazard, risk in risks], axis=0),
            np.mean([h.survival(risk, np.array([horizon]))[:, 0] for h, risk in risks], axis=0),
            horizon,
        )

    def linear_model(self, penalty: float) -> CoxPHSurvivalAnalysis:
        return CoxPHSurvivalAnalysis(alpha=penalty)

    def linear_labels(self, table: pl.DataFrame) -> Any:
        return Surv.from_arrays(table["event"].to_numpy(), table["time"].to_numpy())

    def linear_prediction(self, model: Any, features: Floats) -> Floats:
        return np.asarray(model.predict(features), np.float64)[:, None]

    outcomes = (None,)
    ratio_name = "hazard ratio"
    recalibrates = True

    def image_scores(self, prediction: Floats) -> Floats:
        return prediction

    def maximum_likelihood(self, rows: pl.DataFrame, x: Floats) -> MaximumLikelihood:
        return fit_cox(x, rows["time"].to_numpy(), rows["event"].to_numpy())

    def calibrate(
        self, train: pl.DataFrame, predict: Callable[[pl.DataFrame], Floats]
    ) -> Calibration | None:
        """Standardise risks, which are defined up to a constant in each fold [choice]."""
        risk = predict(train)
        # equal risks have deviation 0, which cannot be divided by
        mean, deviation = float(risk.mean()), float(risk.std()) or 1.0
        hazard = fit_baseline_hazard(train, (risk[:, 0] - mean) / deviation, deviation)
        return Calibration(mean, deviation, hazard)

    def recalibrate(
        self,
        validation: pl.DataFrame,
        prediction: Floats,
        hazard: BaselineHazard | None,
        method: RecalibrationMethod,
    ) -> tuple[Recalibration, BaselineHazard]:
        """Divide log hazard ratios by a temperature; estimate the baseline hazard anew.

        The inverse of the temperature is the calibration slope on the validation units. Risks, and
        so their order, stay as they are.
        """
        assert hazard is not None  # a survival model has one
        risk = prediction[:, 0] * hazard.scale
        time, event = (torch.tensor(validation[name].to_numpy()) for name in self.label_columns)
        deaths = int(event.sum())

        def loss(temperature: float) -> float:
            return deaths * cox_loss(torch.tensor(risk / temperature), time, event).item()

        temperature = fit_temperature(loss)
        scale = hazard.scale / temperature
        return (
            Recalibration(temperature=temperature),
            fit_baseline_hazard(validation, prediction[:, 0], scale),
        )

    def recalibrated(self, prediction: Floats, recalibration: Recalibration) -> Floats:
        return prediction

    def horizons(self, units: pl.DataFrame) -> Floats:
        return event_horizons(units["time"].to_numpy(), units["event"].to_numpy())

    def times(self, units: pl.DataFrame) -> Floats:
        return np.asarray(self.target.times or [units.filter("event")["time"].median()], np.float64)

    @property
    def prediction_columns(self) -> list[str]:
        return ["risk"]

    def prediction_series(
        self, prediction: Floats, survival: Floats, horizons: Floats
    ) -> list[pl.Series]:
        lists = pl.List(pl.Float64)
        return [
            *named_series(self.prediction_columns, prediction),
            pl.Series("survival", survival.tolist(), lists),
            pl.Series("horizons", [horizons.tolist()] * len(prediction), lists),
        ]

    def median_risk(self, held_out: pl.DataFrame) -> float | None:
        return float(np.median(held_out["risk"]))

    def conclusions(
        self, folds: Floats, median_risk: float | None, hazards: Sequence[BaselineHazard]
    ) -> list[pl.Series]:
        """``risk_group``, ``high`` above ``median_risk``, else ``low``; ``median_survival``."""
        assert median_risk is not None  # the card of a survival model has one
        groups = ["high" if risk > median_risk else "low" for risk in folds.mean(0)[:, 0]]
        median = median_survival(hazards, folds[..., 0])
        return [
            pl.Series("risk_group", groups, pl.String),
            pl.Series("median_survival", median, pl.Float64).fill_nan(None),
        ]

    def figure(
        self,
        predictions: Mapping[str, pl.DataFrame],
        title: str,
        *,
        median_risk: float | None = None,
    ) -> Figure:
        rows = next(iter(predictions.values()))
        return kaplan_meier_figure(
            rows["time"].to_numpy(),
            rows["event"].to_numpy(),
            prediction_array(self, rows)[:, 0],
            unit=self.target.unit,
            title=title,
            threshold=median_risk,
        )

    def explained_name(self, label: str | None) -> str:
        return "a higher risk"

    def prediction_text(self, row: Mapping[str, Any]) -> str:
        return f"predicted risk: {format_number(row['risk'])}"

    def conclusion_headings(self, times: Sequence[float]) -> list[str]:
        unit = self.target.unit
        return [
            "risk group",
            f"median survival ({unit})",
            *(f"alive after {time:g} {unit}" for time in times),
        ]

    def conclusion_cells(self, row: Mapping[str, Any]) -> list[str]:
        if row["risk"] is None:
            return ["", "none"]
        median = row["median_survival"]
        return [row["risk_group"], "not reached" if median is None else format_number(median)]

    def legend(self, median_risk: float | None) -> str:
        assert median_risk is not None  # the card of a survival model has one
        return (
            "a higher risk means an earlier event; risk group high: above the training cohort's "
            f"median risk of {format_number(median_risk)}; median survival: the time at which the "
            "folds' mean survival probability falls to one half"
        )


def _truth_as_number(event: pl.Series) -> pl.Series:
    """Write true and false, as R and pandas store an event, as 1 and 0."""
    if event.dtype == pl.Boolean:
        return event.cast(pl.Int64)
    if event.dtype != pl.String:
        return event
    words = {"true": "1", "false": "0"}
    texts = [None if text is None else words.get(text.casefold(), text) for text in event]
    return pl.Series(event.name, texts, pl.String)
