"""Recalibration on validation folds: temperature, isotonic curves, effect on other units."""

import numpy as np
import polars as pl
import pytest
from scipy.special import expit

from nic_core.cohort import ClassificationTarget, CohortError, ModelSettings, SurvivalTarget
from nic_core.models.checkpoints import FoldCheckpoints
from nic_core.models.cross_validation import NETWORK, UNCALIBRATED, cross_validate
from nic_core.models.folds import make_folds
from nic_core.models.kinds import kind_of, prediction_array
from nic_core.models.metrics import classification_metrics
from nic_core.models.recalibration import fit_class_temperature, fit_isotonic

RIM = ClassificationTarget(name="rim", kind="classification", column="rim", classes=("none", "rim"))
DEATH = SurvivalTarget(name="death", kind="survival", time="t", event="e", unit="days")


def overconfident(n, seed, factor=3.0):
    """Classes, and probabilities whose log odds are ``factor`` times too large."""
    random = np.random.default_rng(seed)
    logit = random.normal(0, 1.5, n)
    y = (random.random(n) < expit(logit)).astype(int)
    p = expit(factor * logit)
    return y, np.stack([1 - p, p], 1)


@pytest.mark.parametrize("fit", [fit_class_temperature, fit_isotonic])
def test_recalibration_improves_probabilities_of_other_units(fit):
    y, p = overconfident(400, 0)
    other, stated = overconfident(400, 1)
    after = fit(p, y).probabilities(stated)
    np.testing.assert_allclose(after.sum(1), 1)
    once = np.ones((1, 400))
    before = classification_metrics(other, stated)["brier"](once)[0]
    assert classification_metrics(other, after)["brier"](once)[0] < before - 0.01


def test_temperature_is_the_factor_of_the_log_odds():
    y, p = overconfident(5000, 0)
    assert fit_class_temperature(p, y).temperature == pytest.approx(3, abs=0.3)


def test_temperature_of_perfect_predictions_is_finite():
    y = np.array([0, 1, 0, 1])
    p = np.where(np.eye(2)[y] == 1, 0.9, 0.1)
    assert 0.1 < fit_class_temperature(p, y).temperature < 1


def test_survival_temperature_is_the_inverse_calibration_slope():
    random, kind = np.random.default_rng(0), kind_of(DEATH)
    risk = random.normal(size=2000)
    death, leaving = random.exponential(np.exp(-risk / 2)), random.uniform(0.5, 4, 2000)
    units = pl.DataFrame({"time": np.minimum(death, leaving), "event": death <= leaving})
    calibration = kind.calibrate(units, lambda rows: risk[:, None])
    scaled = (risk[:, None] - calibration.mean) / calibration.deviation
    found, hazard = kind.recalibrate(units, scaled, calibration.hazard, "temperature")
    assert found.temperature == pytest.approx(2, abs=0.2)
    assert hazard.scale == pytest.approx(calibration.hazard.scale / found.temperature)


def labelled(few, target):
    table = few.table
    if target is RIM:
        return table.with_columns(y=pl.col("rim").cast(pl.Int64)).drop("rim", "grade")
    random = np.random.default_rng(0)
    return table.drop("rim", "grade").with_columns(
        time=pl.Series(random.exponential(size=table.height)),
        event=pl.Series([True, True, True, False] * (table.height // 4)),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "method"), [(RIM, "temperature"), (RIM, "isotonic"), (DEATH, "temperature")]
)
def test_held_out_predictions_are_recalibrated(few, target, method, tmp_path):
    settings = ModelSettings(
        network="small", epochs=1, crops_at_test=1, bootstrap=20, recalibration=method
    )
    table, kind = labelled(few, target), kind_of(target)
    folds = make_folds(table, target=target, folds=4, seed=0)
    kept = FoldCheckpoints(tmp_path, "same")
    result, again = (
        cross_validate(target, table, folds, few.source, settings, crop=20, checkpoints=kept)
        for _ in range(2)
    )
    assert again.predictions.equals(result.predictions)
    assert again.recalibrations == result.recalibrations
    assert len(result.recalibrations) == 4
    before, after = (result.predictions.filter(model=name) for name in (UNCALIBRATED, NETWORK))
    for fold, recalibration in enumerate(result.recalibrations):
        one, other = (prediction_array(kind, rows.filter(fold=fold)) for rows in (before, after))
        np.testing.assert_allclose(kind.recalibrated(one, recalibration), other)
    if target is DEATH:  # the order of the risks stays, their survival functions change
        assert after["risk"].equals(before["risk"])
        assert after["survival"].to_list() != before["survival"].to_list()


@pytest.mark.slow
def test_recalibration_without_a_class_to_validate_on_is_refused(few):
    table = labelled(few, RIM)
    patients = sorted(table["patient"].unique())
    of_fold = [3 if name in ("p00", "p02") else i % 3 for i, name in enumerate(patients)]
    folds = pl.DataFrame({"patient": patients, "fold": of_fold}).with_columns(
        fold_name=pl.lit(None, pl.String)
    )
    settings = ModelSettings(network="small", epochs=1, crops_at_test=1, recalibration="isotonic")
    with pytest.raises(CohortError, match=r"recalibration cannot be fitted.*fold 3: .*class 'rim'"):
        cross_validate(RIM, table, folds, few.source, settings, crop=20)
