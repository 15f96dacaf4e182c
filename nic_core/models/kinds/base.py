"""The interface of a target kind, and functions that every kind shares.

Terms: the *label table* is the cohort's file of labels; the *target table* is its decoded form,
one row per unit (:func:`nic_core.models.labels.target_table`); *outputs* are the numbers that a
network returns, float (B, outputs); *predictions* are outputs in the target's own terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from nic_core.cohort import CohortError, Target
from nic_core.cohort.tables import (
    MISSING,
    ROW,
    NumberError,
    suggestion,
    to_numbers,
    to_text,
    visible,
)
from nic_core.models.cox import BaselineHazard
from nic_core.models.likelihood import MaximumLikelihood
from nic_core.models.metrics import Metric
from nic_core.models.recalibration import Recalibration

Floats = NDArray[np.float64]
RecalibrationMethod = Literal["temperature", "isotonic"]
ExplainedOutput = Callable[[Tensor, Tensor, Tensor], Tensor]


class Calibration(NamedTuple):
    """Scale of one fold's risks on its own training units, and their baseline hazard.

    The calibrated risk is ``(risk - mean) / deviation``.
    """

    mean: float
    deviation: float
    hazard: BaselineHazard


class TargetKind(Protocol):
    """A target together with everything that depends on its kind."""

    @property
    def target(self) -> Target:
        """The target itself."""

    # --- labels ---

    @property
    def source_columns(self) -> tuple[str, ...]:
        """Columns of the label table that hold this target's labels."""

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Columns of the target table, and of tables of predictions, that hold the labels."""

    def decode(self, labels: pl.DataFrame, key: str) -> pl.DataFrame:
        """Convert labels to numbers.

        Parameters
        ----------
        labels
            Columns :data:`ROW`, ``key`` (``slide`` or ``patient``) and :attr:`source_columns`.

        Returns
        -------
        :data:`ROW`, ``key`` and :attr:`label_columns`; rows without any label are dropped.

        Raises
        ------
        CohortError
            A label is invalid; the message names target, column and row.
        """

    # --- folds ---

    def strata(self, units: pl.DataFrame) -> pl.DataFrame:
        """Name the strata of patients, from the labels of their units [choice].

        Folds get equally many patients of each stratum, and patients with neighbouring values in
        a stratum get different folds.

        Parameters
        ----------
        units
            Rows of the target table.

        Returns
        -------
        polars.DataFrame
            A row per patient: ``patient``; ``strata`` (list of int64, the one that counts first
            in front): several if the patient's units have different classes; ``value`` (float64).
        """

    def patients_needed(self, cv: pl.DataFrame) -> dict[str, int]:
        """Count the patients of split ``cv`` that have what every fold needs.

        For example ``{"class 'a'": 12, "class 'b'": 3}``: at most 3 folds are possible.
        """

    def training_problem(self, train: pl.DataFrame, validation: pl.DataFrame) -> str | None:
        """Say why a network cannot be trained on these units; None: it can be."""

    # --- network ---

    @property
    def outputs(self) -> int:
        """Number of outputs of a network."""

    def output_scale(self, train: pl.DataFrame) -> tuple[float, float]:
        """Shift and scale, estimated on training units, that :meth:`activate` applies."""

    def activate(self, outputs: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Convert network outputs to predictions, both float (B, outputs)."""

    def loss(self, outputs: Tensor, rows: pl.DataFrame, shift: Tensor, scale: Tensor) -> Tensor:
        """Mean loss of network outputs on the labels in ``rows`` of the target table."""

    def explained_output(self, label: str | None) -> ExplainedOutput:
        """Return the function of network outputs that a heatmap explains.

        It is linear up to a constant, and maps outputs, float (B, outputs), with the shift and
        scale of :meth:`activate` to float (B,). Regression: the prediction minus the mean of the
        training labels, in the label's unit. Classification: the output of the class minus the mean
        of the others, which for two classes is the log-odds. Survival: the risk, which has mean 0
        over the training units.

        Parameters
        ----------
        label
            Class to explain; None: the last one, or the only output.

        Raises
        ------
        ValueError
            The target has no such class.
        """

    # --- metrics ---

    @property
    def primary_metric(self) -> str:
        """Metric by which epochs, penalties and champions are chosen."""

    @property
    def primary_name(self) -> str:
        """Name of :attr:`primary_metric` in tables and figures."""

    @property
    def chance_level(self) -> float:
        """Expected :attr:`primary_metric` of predictions that are independent of the labels."""

    def metrics(self, rows: pl.DataFrame, prediction: Floats) -> dict[str, Metric]:
        """Metrics of predictions float (units, outputs).

        Parameters
        ----------
        rows
            :attr:`label_columns`; for survival optionally also ``survival`` and ``horizons``
            (see :attr:`nic_core.models.cross_validation.CrossValidation.predictions`).
        """

    def p_values(
        self, rows: pl.DataFrame, prediction: Floats, *, median_risk: float | None = None
    ) -> dict[str, float]:
        """Significance tests of the predictions, which have no bootstrap interval.

        ``median_risk`` is as in :meth:`figure`.
        """

    def calibration_metrics(
        self,
        rows: pl.DataFrame,
        prediction: Floats,
        folds: Floats,
        hazards: Sequence[BaselineHazard],
    ) -> dict[str, Metric]:
        """Calibration of an ensemble's predictions (:mod:`nic_core.models.calibration`).

        Parameters
        ----------
        rows
            :attr:`label_columns`.
        prediction : float (units, outputs)
            Mean of the folds.
        folds : float (folds, units, outputs)
        hazards
            Baseline hazard of each fold; empty for kinds without survival functions.
        """

    # --- linear baseline ---

    def linear_model(self, penalty: float) -> Any:
        """Unfitted linear estimator; ``penalty`` weights the sum of squared coefficients."""

    def linear_labels(self, table: pl.DataFrame) -> Any:
        """Labels of the target table in the form that :meth:`linear_model` is fitted on."""

    def linear_prediction(self, model: Any, features: Floats) -> Floats:
        """Predictions (units, outputs) of a fitted linear model, in the terms of networks."""

    # --- inference on covariates ---

    @property
    def outcomes(self) -> tuple[str | None, ...]:
        """What each row of coefficients is about: every class but the first; None: the target."""

    @property
    def ratio_name(self) -> str | None:
        """What the exponential of a coefficient is; None: it has no meaning."""

    def image_scores(self, prediction: Floats) -> Floats:
        """Predictions (units, outputs) as terms of a linear model, (units, outcomes)."""

    def maximum_likelihood(self, rows: pl.DataFrame, x: Floats) -> MaximumLikelihood:
        """Fit the linear model of this kind without a penalty.

        Parameters
        ----------
        rows
            :attr:`label_columns`.
        x : float (units, terms)
            Linearly independent (:func:`nic_core.models.likelihood.independent_terms`).
        """

    # --- cross-validation ---

    def calibrate(
        self, train: pl.DataFrame, predict: Callable[[pl.DataFrame], Floats]
    ) -> Calibration | None:
        """Estimate the scale of a fold's risks on its training units; None: none is needed."""

    @property
    def recalibrates(self) -> bool:
        """Whether predictions of this kind state probabilities, which can be recalibrated."""

    def recalibrate(
        self,
        validation: pl.DataFrame,
        prediction: Floats,
        hazard: BaselineHazard | None,
        method: RecalibrationMethod,
    ) -> tuple[Recalibration, BaselineHazard | None]:
        """Fit a recalibration of a network, and the baseline hazard that goes with it.

        Parameters
        ----------
        validation, prediction
            Units that the network was not fitted on, and its predictions (units, outputs).
        hazard
            The network's baseline hazard; None for kinds without one.

        Raises
        ------
        NotImplementedError
            This kind states no probabilities: :attr:`recalibrates` is false.
        """

    def recalibrated(self, prediction: Floats, recalibration: Recalibration) -> Floats:
        """Return recalibrated predictions (units, outputs)."""

    def horizons(self, units: pl.DataFrame) -> Floats:
        """Times at which survival functions are evaluated, (times,); empty for other kinds."""

    def times(self, units: pl.DataFrame) -> Floats:
        """Times of calibration and decision curves, (times,); empty for other kinds.

        Those of the target, else the median time of the units' events [choice].
        """

    # --- tables of predictions ---

    @property
    def prediction_columns(self) -> list[str]:
        """Names of the predictions' columns, one per output."""

    @property
    def has_survival_functions(self) -> bool:
        """Whether a model of this kind has baseline hazards and a median risk."""

    def prediction_series(
        self, prediction: Floats, survival: Floats, horizons: Floats
    ) -> list[pl.Series]:
        """Columns of the table of cross-validated predictions.

        Parameters
        ----------
        prediction : float (units, outputs)
        survival : float (units, times)
            Survival probabilities at ``horizons``; (units, 0) for other kinds.
        horizons : float (times,)
        """

    def median_risk(self, held_out: pl.DataFrame) -> float | None:
        """Median of cross-validated risks; None for kinds without risk groups."""

    def conclusions(
        self,
        folds: Floats,
        median_risk: float | None,
        hazards: Sequence[BaselineHazard],
    ) -> list[pl.Series]:
        """Columns that summarise the folds' predictions (folds, units, outputs) of new units."""

    # --- display ---

    def figure(
        self,
        predictions: Mapping[str, pl.DataFrame],
        title: str,
        *,
        median_risk: float | None = None,
    ) -> Figure:
        """Draw the evaluation of one split.

        Parameters
        ----------
        predictions
            Display name of each model to its rows of predictions; the network comes first.
        median_risk
            For survival: the risk at which units are divided into two groups; default: the median
            of these units.
        """

    def explained_name(self, label: str | None) -> str:
        """Name of what a positive value of a heatmap speaks for.

        ``label`` is as in :meth:`explained_output`.
        """

    def prediction_text(self, row: Mapping[str, Any]) -> str:
        """Prediction of a unit in words, for a caption; ``row`` has the prediction columns."""

    def conclusion_headings(self, times: Sequence[float]) -> list[str]:
        """Headings of the terminal's columns after the predictions: conclusions, then times."""

    def conclusion_cells(self, row: Mapping[str, Any]) -> list[str]:
        """Texts of the conclusions of one unit, a row of :func:`predict_grids`."""

    def legend(self, median_risk: float | None) -> str:
        """Explanation of the terminal's table; empty if the headings are enough."""


def prediction_array(kind: TargetKind, predictions: pl.DataFrame) -> Floats:
    """Return one model's predictions (units, outputs) from their table."""
    return predictions.select(kind.prediction_columns).to_numpy()


class WithoutSurvivalFunctions:
    """Members of :class:`TargetKind` that are equal for all kinds but survival."""

    has_survival_functions = False

    def p_values(
        self, rows: pl.DataFrame, prediction: Floats, *, median_risk: float | None = None
    ) -> dict[str, float]:
        return {}

    def calibrate(
        self, train: pl.DataFrame, predict: Callable[[pl.DataFrame], Floats]
    ) -> Calibration | None:
        return None

    def horizons(self, units: pl.DataFrame) -> Floats:
        return np.empty(0)

    def times(self, units: pl.DataFrame) -> Floats:
        return np.empty(0)

    def prediction_series(
        self: TargetKind, prediction: Floats, survival: Floats, horizons: Floats
    ) -> list[pl.Series]:
        return named_series(self.prediction_columns, prediction)

    def median_risk(self, held_out: pl.DataFrame) -> float | None:
        return None

    def legend(self, median_risk: float | None) -> str:
        return ""


def primary_value(kind: TargetKind, rows: pl.DataFrame, prediction: Floats) -> float:
    """Return the primary metric of predictions (units, outputs); NaN where it is undefined."""
    metric = kind.metrics(rows, prediction)[kind.primary_metric]
    return float(metric(np.ones((1, rows.height)))[0])


def metric_name(kind: TargetKind, metric: str) -> str:
    """Return the name of a metric in tables and figures."""
    return kind.primary_name if metric == kind.primary_metric else metric


def named_series(columns: Sequence[str], values: Floats, prefix: str = "") -> list[pl.Series]:
    """Return the columns of an array (units, columns) as named series."""
    return [pl.Series(prefix + name, values[:, i], pl.Float64) for i, name in enumerate(columns)]


def survival_columns(times: Sequence[float] | Floats) -> list[str]:
    """Return the names of the columns of survival probabilities at times."""
    return [f"survival_{time:g}" for time in times]


def label_error(target: Target, column: str, problem: str) -> CohortError:
    """Return a ``CohortError`` that names the target and the column of the label table."""
    return CohortError(f"target '{target.name}', column '{column}': {problem}")


def row_name(labels: pl.DataFrame, index: int, key: str) -> str:
    """Name a row of the label table: ``slide 'a1' (row 3)``, or ``row 3`` if it has no id."""
    number, name = labels[ROW][index], labels[key][index]
    return f"row {number}" if name is None else f"{key} '{visible(name)}' (row {number})"


def numeric_labels(
    labels: pl.DataFrame,
    target: Target,
    column: str,
    key: str,
    remedy: str = "correct it or leave the cell empty",
) -> pl.Series:
    """Return a column of labels as float64; null where the label is missing.

    Raises
    ------
    CohortError
        A label is not a finite number.
    """
    try:
        return to_numbers(labels[column])
    except NumberError as error:
        where = row_name(labels, error.index, key)
        raise label_error(target, column, f"{where}: {error}; {remedy}") from error


def named_labels(
    labels: pl.DataFrame,
    target: Target,
    column: str,
    key: str,
    names: Sequence[str],
    *,
    what: str = "class",
    remedy: str = "correct the label or add the class to the target",
) -> pl.Series:
    """Return a column of classes or categories as text; null where the label is missing.

    A word that means 'no value' is a label if it is one of ``names``.

    Raises
    ------
    CohortError
        A label is not one of ``names``.
    """
    # a class may be called None or NA; a spelling of it in other case is an error, not missing
    named = {name.casefold() for name in names}
    missing = [text for text in MISSING if text.casefold() not in named]
    try:
        text = to_text(labels[column])
    except TypeError as error:
        raise label_error(target, column, str(error)) from error
    values = [None if value in missing else value for value in text]
    for index, value in enumerate(values):
        if value is not None and value not in names:
            near = suggestion(value, names)
            raise label_error(
                target,
                column,
                f"{row_name(labels, index, key)} has {what} '{visible(value)}', which is not "
                f"one of {', '.join(names)}"
                + (f" (is it {near}?)" if near else "")
                + f"; {remedy}",
            )
    return pl.Series(column, values, pl.String)
