"""Cox loss and survival functions equal a direct computation and scikit-survival."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sksurv.datasets import load_gbsg2, load_veterans_lung_cancer, load_whas500
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.linear_model.coxph import CoxPHOptimizer
from sksurv.preprocessing import OneHotEncoder

from nic_core.models.cox import BaselineHazard, cox_loss, fit_baseline_hazard, median_survival


def reference(risk, time, event, ties):
    """Negative log partial likelihood and its gradient, computed from the definition."""
    value, gradient, n = 0.0, np.zeros(len(risk)), int(event.sum())
    w = np.exp(risk)
    for t in np.unique(time[event]):
        at_risk = time >= t
        dead = event & (time == t)
        d = int(dead.sum())
        for k in range(d):
            share = k / d if ties == "efron" else 0.0
            part = w * at_risk - share * w * dead
            value += np.log(part.sum())
            gradient += part / part.sum()
        value -= risk[dead].sum()
        gradient[dead] -= 1
    return value / n, gradient / n


@given(
    st.integers(2, 25), st.integers(0, 2**31), st.sampled_from(["breslow", "efron"]), st.booleans()
)
@settings(max_examples=100, deadline=None)
def test_cox_loss_and_gradient_equal_the_definition(n, seed, ties, many_ties):
    random = np.random.default_rng(seed)
    risk = random.normal(size=n) * 3
    time = random.integers(1, 5, n).astype(float) if many_ties else random.random(n)
    event = random.random(n) < 0.6
    event[0] = True
    x = torch.tensor(risk, requires_grad=True)
    loss = cox_loss(x, torch.tensor(time), torch.tensor(event), ties=ties)
    loss.backward()
    value, gradient = reference(risk, time, event, ties)
    assert loss.item() == pytest.approx(value, abs=1e-10)
    np.testing.assert_allclose(x.grad.numpy(), gradient, atol=1e-10)


@pytest.mark.parametrize("load", [load_veterans_lung_cancer, load_whas500, load_gbsg2])
@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_cox_gradient_is_0_at_scikit_survival_coefficients(load, ties):
    frame, y = load()
    x = OneHotEncoder().fit_transform(frame).to_numpy(np.float64)
    x = (x - x.mean(0)) / x.std(0)
    event, time = (np.ascontiguousarray(y[name]) for name in y.dtype.names)
    fitted = CoxPHSurvivalAnalysis(ties=ties, tol=1e-14).fit(x, y)
    beta = torch.tensor(fitted.coef_, requires_grad=True)
    loss = cox_loss(
        torch.tensor(x) @ beta, torch.tensor(time.astype(float)), torch.tensor(event), ties=ties
    )
    loss.backward()
    assert beta.grad.abs().max().item() < 1e-6
    theirs = CoxPHOptimizer(x, event, time, np.zeros(x.shape[1]), ties)
    expected = theirs.nlog_likelihood(fitted.coef_) * len(event) / event.sum()
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("load", [load_veterans_lung_cancer, load_whas500, load_gbsg2])
@pytest.mark.parametrize("ties", ["breslow", "efron"])
@pytest.mark.parametrize("seed", range(2))
def test_cox_loss_and_gradient_equal_scikit_survival(load, ties, seed):
    frame, y = load()
    x = OneHotEncoder().fit_transform(frame).to_numpy(np.float64)
    x = (x - x.mean(0)) / x.std(0)
    event, time = (np.ascontiguousarray(y[name]) for name in y.dtype.names)
    w = np.random.default_rng(seed).normal(0, 0.5, x.shape[1])
    theirs = CoxPHOptimizer(x, event, time, np.zeros(x.shape[1]), ties)
    theirs.update(w)
    scale = len(event) / event.sum()  # scikit-survival averages over all units, we over deaths
    beta = torch.tensor(w, requires_grad=True)
    loss = cox_loss(
        torch.tensor(x) @ beta, torch.tensor(time.astype(float)), torch.tensor(event), ties=ties
    )
    loss.backward()
    assert loss.item() == pytest.approx(theirs.nlog_likelihood(w) * scale, abs=1e-6)
    np.testing.assert_allclose(beta.grad.numpy(), theirs.gradient.ravel() * scale, atol=1e-6)


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_efron_equals_breslow_without_ties(ties):
    time, event = torch.arange(6.0), torch.tensor([1, 0, 1, 1, 0, 1])
    risk = torch.randn(6, generator=torch.Generator().manual_seed(0))
    assert cox_loss(risk, time, event, ties=ties).item() == pytest.approx(
        cox_loss(risk, time, event).item()
    )


def test_cox_loss_ignores_a_constant_and_is_finite():
    time, event = torch.tensor([3.0, 1, 2, 2]), torch.tensor([True, True, False, True])
    risk = torch.tensor([0.1, -2.0, 0.7, 1.0])
    loss = cox_loss(risk, time, event)
    assert cox_loss(risk + 5, time, event).item() == pytest.approx(loss.item(), abs=1e-5)
    for ties in ("breslow", "efron"):
        x = (risk * 500).requires_grad_()
        cox_loss(x, time, event, ties=ties).backward()
        assert torch.isfinite(x.grad).all()


def test_cox_loss_without_events_raises():
    with pytest.raises(ValueError, match="the batch has no event"):
        cox_loss(torch.zeros(3), torch.ones(3), torch.zeros(3))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_survival_functions_equal_scikit_survival(scale):
    frame, y = load_whas500()
    x = frame.astype(float).to_numpy()
    x = (x - x.mean(0)) / x.std(0)
    event, time = (np.ascontiguousarray(y[name]) for name in y.dtype.names)
    fitted = CoxPHSurvivalAnalysis().fit(x, y)
    functions = fitted.predict_survival_function(x[:20])
    times = np.percentile(time, [5, 30, 60, 90])
    table, risk = pl.DataFrame({"time": time, "event": event}), fitted.predict(x) / scale
    hazard = fit_baseline_hazard(table, risk, scale)
    assert BaselineHazard.model_validate_json(hazard.model_dump_json()) == hazard
    expected = [[f(t) for t in times] for f in functions]
    np.testing.assert_allclose(hazard.survival(risk[:20], times), expected, atol=1e-10)
    late = hazard.survival(np.array([0.0, 800.0 / scale]), np.array([-1.0, 1e9]))
    assert late[:, 0].tolist() == [1, 1]  # 1 before the first event
    assert late[1, 1] == 0
    medians = median_survival([hazard], risk[None, :20])
    for found, function in zip(medians, functions, strict=True):
        assert found == function.x[function.y <= 0.5][0]
    assert np.isnan(median_survival([hazard], np.array([[-50 / scale]]))).all()
    # several folds: the median of their mean function
    two = np.stack([risk[:20], risk[20:40]])
    mean = np.mean([hazard.survival(r, np.array(hazard.times)) for r in two], 0)
    for found, alive in zip(median_survival([hazard] * 2, two), mean, strict=True):
        assert found == next(t for t, a in zip(hazard.times, alive, strict=True) if a <= 0.5)
