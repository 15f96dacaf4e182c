"""Metrics of each fold, against other packages on the units of that fold."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from sksurv.metrics import concordance_index_censored

from nic_core.cohort import ClassificationTarget, RegressionTarget, SurvivalTarget, Target
from nic_core.models.baselines import BASELINES
from nic_core.models.cross_validation import NETWORK
from nic_core.models.fold_metrics import (
    FOLD_METRIC_SCHEMA,
    fold_metrics,
    fold_summary,
    fold_values,
)
from nic_core.models.kinds import kind_of

SCORE = RegressionTarget(name="score", kind="regression", column="y")
GROWTH = ClassificationTarget(name="growth", kind="classification", column="y", classes=("a", "b"))
DEATH = SurvivalTarget(name="death", kind="survival", time="time", event="event", unit="days")
COUNT = 40
FOLD = np.arange(COUNT) // 2 % 4
DRAWN = np.random.default_rng(1)
LABELS: dict[str, dict[str, np.ndarray]] = {
    "score": {"y": DRAWN.normal(size=COUNT)},
    "growth": {"y": np.arange(COUNT) % 2},
    "death": {"time": DRAWN.uniform(1, 9, COUNT), "event": DRAWN.random(COUNT) < 0.6},
}


def predictions(target: Target, **labels: np.ndarray) -> pl.DataFrame:
    """Random predictions of 40 units of 20 patients in four folds, and of two in split test."""
    random, kind = np.random.default_rng(0), kind_of(target)
    rows = pl.DataFrame(
        {
            "split": "cv",
            "unit": [f"u{i:02}" for i in range(COUNT)],
            "patient": [f"p{i // 2:02}" for i in range(COUNT)],
            "fold": FOLD,
            "fold_name": [f"site {fold}" for fold in FOLD],
            **labels,
        }
    )
    parts = []
    for model in (NETWORK, *BASELINES):
        shape = (COUNT, kind.outputs)
        values = random.normal(size=shape) if shape[1] == 1 else random.dirichlet([1, 1], COUNT)
        series = kind.prediction_series(values, np.full((COUNT, 2), 0.5), np.array([2.0, 5.0]))
        parts.append(rows.select(pl.lit(model).alias("model"), pl.all()).with_columns(series))
    cv = pl.concat(parts)
    test = cv.head(2).with_columns(
        split=pl.lit("test"), fold=pl.lit(None, pl.Int64), fold_name=pl.lit(None, pl.String)
    )
    return pl.concat([cv, test])


def expected(metric: str, rows: pl.DataFrame) -> float:
    """The metric of these units by another package."""
    match metric:
        case "spearman":
            return float(spearmanr(rows["y"], rows["prediction"])[0])
        case "auc":
            return float(roc_auc_score(rows["y"], rows["probability_b"]))
        case "average_precision":
            return float(average_precision_score(rows["y"], rows["probability_b"]))
        case "harrell_c":
            columns = (rows[name].to_numpy() for name in ("event", "time", "risk"))
            return float(concordance_index_censored(*columns)[0])
    raise AssertionError(metric)


@pytest.mark.parametrize(
    ("target", "metric"),
    [
        (SCORE, "spearman"),
        (GROWTH, "auc"),
        (GROWTH, "average_precision"),
        (DEATH, "harrell_c"),
    ],
)
def test_metrics_of_a_fold_are_those_of_its_units_alone(target, metric):
    rows = predictions(target, **LABELS[target.name])
    found = fold_metrics(target, rows)
    assert found.schema == FOLD_METRIC_SCHEMA
    for model in (NETWORK, *BASELINES):
        of_folds = found.filter(model=model, metric=metric)
        held_out = [rows.filter(model=model, split="cv", fold=fold) for fold in range(4)]
        direct = [expected(metric, part) for part in held_out]
        assert of_folds["value"].to_list() == pytest.approx(direct)
        assert of_folds["fold_name"].to_list() == [f"site {fold}" for fold in range(4)]
        assert of_folds.select("units", "patients").rows() == [(10, 5)] * 4
        (summary,) = fold_summary(of_folds.drop("model")).to_dicts()
        assert summary["folds_mean"] == pytest.approx(np.mean(direct))
        assert summary["folds_deviation"] == pytest.approx(np.std(direct, ddof=1))
        assert summary["folds_undefined"] == 0


def test_censoring_weights_of_a_fold_are_those_of_all_folds():
    rows = predictions(DEATH, **LABELS["death"]).filter(model=NETWORK, split="cv")
    values = fold_values(kind_of(DEATH), rows).filter(metric="integrated_brier")
    # every unit has its own term, so the mean over folds of equal size is the pooled value
    pooled = kind_of(DEATH).metrics(rows, rows.select("risk").to_numpy())["integrated_brier"]
    assert values["value"].mean() == pytest.approx(pooled(np.ones((1, COUNT)))[0])


def summary_of(
    target: Target, fold: np.ndarray = FOLD, **labels: np.ndarray
) -> dict[str, dict[str, float | None]]:
    rows = predictions(target, **labels).filter(model=NETWORK, split="cv")
    rows = rows.with_columns(fold=pl.Series(fold))
    summary = fold_summary(fold_values(kind_of(target), rows))
    return {row["metric"]: row for row in summary.to_dicts()}


def test_folds_without_two_classes_or_an_event_are_counted():
    one_class = np.where(FOLD == 0, 0, np.arange(COUNT) % 2)
    assert summary_of(GROWTH, y=one_class)["auc"]["folds_undefined"] == 1
    time = LABELS["death"]["time"]
    found = summary_of(DEATH, time=time, event=FOLD == 2)["harrell_c"]
    assert (found["folds_undefined"], found["folds_deviation"]) == (3, None)
    assert found["folds_mean"] is not None
    one_patient_each = summary_of(GROWTH, np.arange(COUNT) // 2, y=np.arange(COUNT) // 2 % 2)
    assert one_patient_each["auc"]["folds_undefined"] == 20
    assert one_patient_each["auc"]["folds_mean"] is None
