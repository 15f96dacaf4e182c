"""Comparisons of encoders and baselines, the permutation control, and the champion's rule."""

import io
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nic_core.cohort import ModelSettings, RegressionTarget, SurvivalTarget
from nic_core.models.baselines import BASELINES
from nic_core.models.comparison import (
    COMPARISON_SCHEMA,
    PERMUTATIONS,
    Champion,
    Verdict,
    compare_models,
    compare_with_champion,
    holm,
    permutation_control,
)
from nic_core.models.cross_validation import NETWORK, CrossValidation
from nic_core.reports import RESULT_SCHEMA, comparisons_table, results_figure, results_table

pytestmark = pytest.mark.slow

SCORE = RegressionTarget(name="score", kind="regression", column="y")
DEATH = SurvivalTarget(name="death", kind="survival", time="time", event="event", unit="days")
LABELS = np.arange(40.0)


def judge(result: CrossValidation, present: Champion | None) -> Verdict:
    control = permutation_control(result)
    return compare_with_champion(result, present, control, encoder="e", weights_hash="a")


def on_e(predictions: pl.DataFrame | None, weights_hash: str | None = "a") -> Champion:
    return Champion("version 1 (e)", "e", weights_hash, predictions)


def cross_validated(prediction: np.ndarray) -> CrossValidation:
    """A regression model with these predictions of 40 patients, one unit each."""
    units = [f"u{i:02}" for i in range(len(LABELS))]
    rows = pl.DataFrame(
        {
            "model": NETWORK,
            "split": "cv",
            "unit": units,
            "patient": units,
            "slides": [[unit] for unit in units],
            "y": LABELS,
            "prediction": prediction,
        }
    )
    empty = pl.DataFrame()
    return CrossValidation(SCORE, ModelSettings(bootstrap=200), 400, rows, empty, (), empty, ())


def model(error: float, seed: int = 2) -> CrossValidation:
    """A model whose predictions have normal errors of that standard deviation."""
    return cross_validated(LABELS + np.random.default_rng(seed).normal(0, error, len(LABELS)))


def failing_model() -> CrossValidation:
    """A model whose predictions do not depend on the labels."""
    return cross_validated(np.random.default_rng(0).permutation(LABELS))


def champion(error: float) -> Champion:
    return on_e(model(error, seed=1).predictions)


def survival_predictions() -> pl.DataFrame:
    """Predictions of 12 patients by a network and the baselines."""
    random = np.random.default_rng(0)
    patients = [f"p{i:02}" for i in range(12)]
    time, event = random.uniform(1, 9, 12), random.random(12) < 0.7
    return pl.concat(
        pl.DataFrame(
            {
                "model": name,
                "split": "cv",
                "unit": patients,
                "patient": patients,
                "slides": [[f"{p}-1", f"{p}-2"] for p in patients],
                "time": time,
                "event": event,
                "risk": random.normal(size=12),
                "survival": random.random((12, 2)).tolist(),
                "horizons": [[2.0, 5.0]] * 12,
            }
        )
        for name in (NETWORK, *BASELINES)
    )


def test_encoders_and_baselines_are_compared_in_pairs():
    predictions = survival_predictions()
    half = predictions.filter(pl.col("patient") < "p06")
    found = compare_models(DEATH, {"a": predictions, "b": half}, resamples=50, seed=0)
    assert found.schema == COMPARISON_SCHEMA
    pair = found.filter(first="a: network", second="b: network")
    assert (pair["difference"] == 0).all()
    assert (pair["p"] == 1).all()
    assert set(pair["n"]) == {6}
    assert "time_auc" in pair["metric"]
    linear = found.filter(first="a: network", second="a: mean embedding, linear")
    assert linear.filter(metric="Harrell's C")["n"].to_list() == [12]
    assert set(zip(found["first"], found["second"], strict=True)) == {
        ("a: network", "b: network"),
        *(
            (f"{e}: network", f"{e}: {name}, linear")
            for e in "ab"
            for name in ("mean embedding", "tissue area")
        ),
    }


def corrected(*values: float | None) -> list[float | None]:
    return holm(pl.Series(values, dtype=pl.Float64)).to_list()


def test_holm_of_values_worked_out_by_hand():
    assert corrected(0.01, 0.04, 0.03, 0.005) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert corrected(0.6, None, 0.5) == [1, None, 1]
    assert corrected(None) == [None]
    assert corrected() == []


@given(st.lists(st.none() | st.floats(0, 1), max_size=12))
def test_holm_is_monotone_and_within_the_bound_of_bonferroni(values):
    tested = [value for value in values if value is not None]
    pairs = [pair for pair in zip(values, corrected(*values), strict=True) if pair[0] is not None]
    for p, adjusted in pairs:
        assert p <= adjusted <= min(1, len(tested) * p)
    assert [adjusted for _, adjusted in sorted(pairs)] == sorted(a for _, a in pairs)
    if tested:
        smallest = min(pairs)
        assert smallest[1] == min(1, len(tested) * smallest[0])


def test_p_is_corrected_within_a_metric_and_a_part_of_the_data():
    predictions = survival_predictions()
    both = pl.concat([predictions, predictions.with_columns(split=pl.lit("test"))])
    found = compare_models(DEATH, {"a": both, "b": both}, resamples=50, seed=0)
    for _, family in found.group_by("part", "metric"):
        assert family.height == 5
        assert family["p_holm"].to_list() == holm(family["p"]).to_list()
    assert compare_models(DEATH, {}, resamples=50, seed=0).schema == COMPARISON_SCHEMA


def test_survival_functions_at_other_horizons_are_not_compared():
    predictions = survival_predictions()
    other = predictions.with_columns(horizons=pl.lit([2.0, 6.0]))
    found = compare_models(DEATH, {"a": predictions, "b": other}, resamples=50, seed=0)
    pair = found.filter(first="a: network", second="b: network")
    assert pair["metric"].to_list() == ["Harrell's C", "uno_c"]


def test_terminal_shows_each_pair_once_by_its_first_metric():
    predictions = survival_predictions()
    found = compare_models(DEATH, {"a": predictions, "b": predictions}, resamples=50, seed=0)
    console = Console(width=150, record=True, file=io.StringIO())
    undefined = dict.fromkeys(["difference", "low", "high", "p", "p_holm"])
    other = (
        found[:1]
        .with_columns(target=pl.lit("other"))
        .with_columns(pl.lit(value, pl.Float64).alias(name) for name, value in undefined.items())
    )
    console.print(comparisons_table(pl.concat([found, other])))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    titles = [line for line in lines if line.startswith("target ")]
    assert [title.partition(",")[0] for title in titles] == [
        "target death: differences in Harrell's C",
        "target other: differences in Harrell's C",
    ]
    rows = [line for line in lines if line.startswith(("a: ", "b: "))]
    assert len(rows) == 5 + 1
    assert rows[0] == "a: network b: network +0.000 +0.000 to +0.000 1 1 12"
    assert rows[-1] == "a: network b: network 12"


def test_permutation_control_separates_models_from_chance():
    passed, failed = permutation_control(model(5)), permutation_control(failing_model())
    assert passed.passed
    assert passed.value > 0.9 > passed.bound
    assert not failed.passed
    assert 0.2 < failed.bound < 0.35  # 95th percentile of Spearman's rho for 40 units: 0.27
    assert failed.explanation == (
        f"Spearman {failed.value:.3f} is not above {failed.bound:.3f}, the 95th percentile with "
        f"exchanged labels ({PERMUTATIONS} permutations)"
    )


def test_undefined_score_fails_the_permutation_control():
    control = permutation_control(cross_validated(np.ones(len(LABELS))))
    assert not control.passed
    assert np.isnan(control.value)


def test_first_model_becomes_champion_if_it_passes_its_control():
    verdict = judge(model(5), None)
    assert verdict.better
    assert verdict.explanation.startswith("becomes champion as the first of its name: Spearman 0.9")


def test_model_that_fails_its_control_is_not_champion_even_as_the_first():
    verdict = judge(failing_model(), None)
    assert not verdict.better
    assert verdict.compared
    assert verdict.explanation == (
        "does not become champion: it fails its permutation control, "
        + permutation_control(failing_model()).explanation
    )


def test_model_that_fails_its_control_does_not_replace_a_worse_champion():
    worst = on_e(cross_validated(-LABELS).predictions)
    verdict = judge(failing_model(), worst)
    assert not verdict.better
    assert "fails its permutation control" in verdict.explanation


def test_model_replaces_the_champion_only_if_its_interval_is_above_0():
    better = judge(model(1), champion(20))
    assert better.better
    assert better.explanation.startswith("replaces version 1 (e) as champion: Spearman 0.99")
    worse = judge(model(15), champion(1))
    assert not worse.better
    assert worse.explanation.startswith("version 1 (e) stays champion: Spearman 0.")
    assert "on 40 units of 40 patients" in worse.explanation
    equal = judge(model(5), on_e(model(5).predictions))
    assert not equal.better
    assert equal.compared
    assert "difference +0.000 [+0.000, +0.000]" in equal.explanation


def test_a_retrained_encoders_model_replaces_the_champion_unless_worse():
    """The champion cannot score slides that are compressed with other weights."""
    similar = judge(model(5), on_e(model(5.2, seed=1).predictions, "b"))
    assert similar.better
    assert similar.explanation.startswith(
        "replaces version 1 (e), which was trained on earlier weights of encoder 'e' and cannot "
        "score slides that are compressed with the present ones, and is not significantly worse: "
    )
    assert not judge(model(5), on_e(model(5.2, seed=1).predictions)).better
    worse = judge(model(15), on_e(model(1, seed=1).predictions, "b"))
    assert not worse.better
    assert "stays champion, although it was trained on earlier weights" in worse.explanation
    unknown = judge(model(5), on_e(model(5.2, seed=1).predictions, None))
    assert not unknown.better


def test_a_champion_on_another_encoder_is_not_replaced_without_evidence():
    other = Champion("version 1 (f)", "f", "b", model(5.2, seed=1).predictions)
    assert not judge(model(5), other).better


def test_units_that_one_of_two_models_predicts_are_counted():
    held = model(15, seed=1).predictions.filter(pl.col("unit") > "u02")
    extra = held.head(2).with_columns(unit="x-" + pl.col("unit"))
    verdict = judge(model(1), on_e(pl.concat([held, extra])))
    assert verdict.better
    assert "on 37 units of 37 patients (3 units that only the new model" in verdict.explanation
    assert "and 2 that only the champion predicts are left out)" in verdict.explanation


def test_terminal_shows_the_tissue_area_once_if_it_is_equal():
    rows = [
        ("target", "t", encoder, "tissue area, linear", "cross-validated", "AUC", value, 0, 1, 9)
        + (0.4, None, 2)
        for encoder, value in (("a", 0.5), ("b", 0.5))
    ]
    equal = pl.DataFrame(rows, schema=RESULT_SCHEMA, orient="row")
    text = printed(results_table(equal))
    assert "target t: AUC, cross-validated" in text
    assert "(any) tissue area, linear 0.500 0.000 to 1.000 0.40 (2 undefined) 9" in text
    assert text.count("tissue area") == 1
    other = equal.with_columns(value=pl.Series([0.5, 0.6]))
    assert printed(results_table(other)).count("tissue area") == 2


def printed(table):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    assert all(len(line) <= 80 for line in console.export_text(clear=False).splitlines())
    return " ".join(console.export_text().split())


def study_results():
    """Results of two encoders on two targets, of which one has slides of split test."""
    scores = [
        ("growth", encoder, model, part, "AUC", value)
        for encoder, better in (("mean-rgb", 0.0), ("mtl-4", 0.3))
        for part in ("cross-validated", "test")
        for model, value in (("small grid CNN", 0.5 + better), ("tissue area, linear", 0.45))
    ]
    scores += [("survival", "mtl-4", "small grid CNN", "cross-validated", "Harrell's C", None)]
    rows = [
        ("target", *names, value, value and value - 0.1, value and value + 0.1, 9, None, None, None)
        for *names, value in scores
    ]
    return pl.DataFrame(rows, schema=RESULT_SCHEMA, orient="row")


def test_results_figure_names_colours_marks_and_chance():
    figure = results_figure(study_results(), {"growth": 0.5, "survival": 0.5})
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "mean-rgb",
        "mtl-4",
        "without encoder",
        "cross-validated",
        "test",
        "chance",
    ]
    growth, survival = figure.axes
    assert growth.get_xlabel() == "AUC, 95 % interval over patients"
    assert survival.get_xlabel().startswith("Harrell's C")
    # what does not depend on the encoder is drawn once
    assert [label.get_text() for label in growth.get_yticklabels()] == [
        "mean-rgb: small grid CNN",
        "tissue area, linear",
        "mtl-4: small grid CNN",
    ]
    assert [text.get_text() for text in survival.texts] == ["undefined (cross-validated)"]


def test_results_figure_without_targets_is_empty():
    figure = results_figure(study_results().clear(), {})
    figure.canvas.draw()
    assert len(figure.axes) == 1


def test_champion_is_scored_with_the_labels_of_the_new_model():
    held = cross_validated(LABELS).predictions
    old_labels = held.with_columns(y=pl.col("y").shuffle(seed=0))
    verdict = judge(model(15), on_e(old_labels))
    assert "against 1.000" in verdict.explanation


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda held: None, "no predictions"),
        (lambda held: held.drop("prediction"), "no predictions"),
        (lambda held: held.with_columns(unit="other-" + pl.col("unit")), "no unit"),
        (lambda held: held.head(1), "undefined"),
    ],
    ids=["missing", "other target", "other units", "one unit"],
)
def test_champion_that_cannot_be_compared_is_left_to_a_person(change, reason):
    held = model(5, seed=1).predictions
    verdict = judge(model(1), on_e(change(held)))
    assert reason in verdict.explanation
    assert "by hand" in verdict.explanation
    assert not verdict.better
    assert not verdict.compared


def test_model_trained_on_exchanged_labels_is_never_champion():
    control = replace(model(1), settings=ModelSettings(permute_labels=0))
    verdict = judge(control, None)
    assert not verdict.better
    assert "trained on exchanged labels" in verdict.explanation
