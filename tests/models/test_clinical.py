"""Clinical covariates: terms, fits without a penalty, and the models that use them."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, linregress
from sksurv.datasets import load_veterans_lung_cancer

from nic_core.cohort import (
    CategoricalCovariate,
    ClassificationTarget,
    ModelSettings,
    NumericCovariate,
    RegressionTarget,
    SurvivalTarget,
)
from nic_core.models.baselines import BASELINES
from nic_core.models.checkpoints import FoldCheckpoints
from nic_core.models.clinical import (
    CLINICAL,
    CLINICAL_IMAGE,
    CLINICAL_SCHEMA,
    IMAGE_SCORE,
    clinical_table,
    fit_clinical,
    fit_clinical_image,
    fit_design,
)
from nic_core.models.comparison import LIKELIHOOD_RATIO, compare_models
from nic_core.models.cross_validation import cross_validate
from nic_core.models.folds import make_folds, split_fold
from nic_core.models.kinds import kind_of
from nic_core.models.labels import shuffle_labels
from nic_core.models.likelihood import (
    fit_cox,
    fit_logistic,
    fit_normal,
    independent_terms,
    likelihood_ratio,
)
from nic_core.models.metrics import classification_metrics

AGE = NumericCovariate(kind="numeric", column="age")
STAGE = CategoricalCovariate(kind="categorical", column="stage", categories=("I", "II", "III"))
COVARIATES = (AGE, STAGE)
RIM = ClassificationTarget(
    name="rim", kind="classification", column="rim", classes=("none", "rim"), covariates=COVARIATES
)
GRADE = RegressionTarget(name="grade", kind="regression", column="grade", covariates=COVARIATES)
DEATH = SurvivalTarget(
    name="death", kind="survival", time="t", event="e", unit="days", covariates=COVARIATES
)
QUICK = ModelSettings(network="small", crop_um=1280, epochs=1, crops_at_test=1, bootstrap=50)


def units(n, seed=0):
    """Units with an age that says much about every label, and a stage that says nothing."""
    random = np.random.default_rng(seed)
    age = random.normal(60, 10, n)
    effect = (age - 60) / 10
    y = (effect + random.logistic(size=n) > 0).astype(int)
    death, leaving = random.exponential(np.exp(-effect)), random.uniform(0.2, 3, n)
    return pl.DataFrame(
        {
            "unit": [f"u{i:04}" for i in range(n)],
            "patient": [f"p{i:04}" for i in range(n)],
            "split": "cv",
            "covariate_age": age,
            "covariate_stage": random.choice(["I", "II", "III"], n),
            "time": np.minimum(death, leaving),
            "event": death <= leaving,
            "y": y,
        }
    )


# --- fits without a penalty ---


def test_cox_fit_equals_published_values_of_the_veteran_trial():
    # survival::coxph of R, Efron's ties: estimates and standard errors of its manual's example
    frame, y = load_veterans_lung_cancer()
    x = frame.select_dtypes("number").to_numpy(np.float64)
    cell = frame["Celltype"].to_numpy()
    dummies = [(cell == name) for name in ("smallcell", "adeno", "large")]
    binary = [frame["Prior_therapy"] == "yes", frame["Treatment"] == "test"]
    x = np.column_stack([x, *dummies, *binary]).astype(np.float64)
    event, time = (np.ascontiguousarray(y[name]) for name in y.dtype.names)
    fitted = fit_cox(x, time.astype(np.float64), event)
    names = [*frame.select_dtypes("number").columns, "smallcell", "adeno", "large", "prior", "test"]
    found = dict(
        zip(names, zip(fitted.coefficients[0], fitted.errors[0], strict=True), strict=True)
    )
    assert found["Karnofsky_score"] == pytest.approx((-0.03282, 0.005508), abs=5e-6)
    assert found["test"] == pytest.approx((0.2946, 0.2075), abs=5e-5)
    assert found["smallcell"] == pytest.approx((0.8616, 0.2753), abs=5e-5)
    assert found["adeno"] == pytest.approx((1.196, 0.3009), abs=5e-4)
    assert found["Age_in_years"] == pytest.approx((-0.008706, 0.009300), abs=5e-6)
    assert fitted.finite.all()


@given(st.lists(st.integers(1, 60), min_size=4, max_size=4))
def test_odds_ratio_of_a_2_by_2_table_equals_its_closed_form(cells):
    a, b, c, d = cells
    x = np.repeat([1.0, 1.0, 0.0, 0.0], cells)[:, None]
    y = np.repeat([1, 0, 1, 0], cells)
    fitted = fit_logistic(x, y, 2)
    assert fitted.coefficients[0, 0] == pytest.approx(np.log(a * d / (b * c)), abs=1e-5)
    assert fitted.errors[0, 0] == pytest.approx(np.sqrt(sum(1 / n for n in cells)), rel=1e-4)
    statistic, degrees, p = likelihood_ratio(fit_logistic(x[:, :0], y, 2), fitted)
    expected = chi2_contingency([[a, b], [c, d]], correction=False, lambda_="log-likelihood")
    assert (statistic, degrees) == (pytest.approx(expected.statistic, abs=1e-6), 1)
    assert p == pytest.approx(expected.pvalue, abs=1e-5)


def test_odds_ratios_of_three_classes_equal_their_closed_form():
    counts = np.array([[20, 10, 5], [6, 12, 18]])  # term 0 or 1, class
    x = np.repeat([0.0, 1.0], counts.sum(1))[:, None]
    y = np.concatenate([np.repeat([0, 1, 2], row) for row in counts])
    fitted = fit_logistic(x, y, 3)
    odds = counts[:, 1:] / counts[:, :1]
    np.testing.assert_allclose(fitted.coefficients[:, 0], np.log(odds[1] / odds[0]), atol=1e-6)
    error = np.sqrt((1 / counts[:, 1:] + 1 / counts[:, :1]).sum(0))
    np.testing.assert_allclose(fitted.errors[:, 0], error, rtol=1e-5)


def test_linear_fit_equals_scipy():
    random = np.random.default_rng(0)
    x = random.normal(size=30)
    y = 3 + 0.5 * x + random.normal(size=30)
    fitted, expected = fit_normal(x[:, None], y), linregress(x, y)
    assert fitted.coefficients[0, 0] == pytest.approx(expected.slope)
    assert fitted.errors[0, 0] == pytest.approx(expected.stderr)
    assert fitted.p_values()[0, 0] == pytest.approx(expected.pvalue)


def test_separation_marks_only_the_term_that_separates():
    random = np.random.default_rng(0)
    x = random.normal(size=(80, 1))
    rare = (np.arange(80) < 4).astype(float)[:, None]
    y = np.where(rare[:, 0] == 1, 1, x[:, 0] + random.logistic(size=80) > 0).astype(int)
    fitted = fit_logistic(np.hstack([x, rare]), y, 2)
    assert fitted.finite.tolist() == [[True, False]]
    assert not fit_logistic(x, (x[:, 0] > 0).astype(int), 2).finite.any()
    ordered = fit_cox(-np.arange(20.0)[:, None], np.arange(1, 21.0), np.ones(20, bool))
    assert not ordered.finite.any()


def test_linearly_dependent_terms_are_found():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 20)) * [[1], [1e6]]
    x = np.column_stack([a, b, np.ones(20), a + b, 1 - a, random.normal(size=20)])
    assert independent_terms(x) == [0, 1, 5]


# --- terms ---


def test_missing_values_follow_the_units_that_are_fitted_on():
    train = pl.DataFrame(
        {"covariate_age": [50.0, 60.0, None, 80.0], "covariate_stage": ["I", "II", None, "I"]}
    )
    design = fit_design(COVARIATES, train)
    assert [term.name for term in design.terms] == [
        "age",
        "age missing",
        "stage II",
        "stage missing",
    ]
    new = pl.DataFrame(
        {"covariate_age": [None, 70.0], "covariate_stage": [None, "III"]},
        schema_overrides={"covariate_age": pl.Float64},
    )
    # no fitted unit has stage III: the terms of stage have their means
    assert design.matrix(new).tolist() == [[60, 1, 0, 1], [70, 0, 0.25, 0.25]]


def test_units_without_any_covariate_are_predicted():
    empty = pl.col("unit") < "u0010"
    table = units(60).with_columns(
        pl.when(~empty).then("covariate_age"), pl.when(~empty).then("covariate_stage")
    )
    predicted = fit_clinical(kind_of(RIM), COVARIATES, table)(table)
    assert predicted.shape == (60, 2)
    assert len(np.unique(predicted[:10], axis=0)) == 1
    found = clinical_table(kind_of(RIM), COVARIATES, with_scores(RIM, table, 0.0))
    # the same units lack both covariates, so one of the two terms says nothing more
    missing = found.filter(model=CLINICAL, term="stage missing")
    assert "linear combination" in missing["problem"][0]
    assert missing["coefficient"][0] is None


def test_covariate_without_any_value_has_a_row_that_says_so():
    table = units(40).with_columns(covariate_age=pl.lit(None, pl.Float64))
    found = clinical_table(kind_of(GRADE), (AGE,), with_scores(GRADE, table, 0.0))
    row = found.filter(model=CLINICAL).row(0, named=True)
    assert row["term"] == "age missing"
    assert row["problem"].startswith("left out: constant")
    assert row["likelihood_ratio"] is None


# --- coefficients and tests ---


def with_scores(target, table, strength, seed=1):
    """Add predictions of a network that see the label with that strength."""
    random = np.random.default_rng(seed)
    kind = kind_of(target)
    truth = table["time"].log().to_numpy() * -1 if target is DEATH else table["y"].to_numpy()
    score = strength * truth + random.normal(size=table.height)
    if target is RIM:
        p = 1 / (1 + np.exp(-score))
        values = [1 - p, p]
    else:
        values = [score]
    columns = dict(zip(kind.prediction_columns, values, strict=True))
    return table.with_columns(pl.Series(name, v) for name, v in columns.items())


@pytest.mark.parametrize("target", [RIM, GRADE, DEATH], ids=lambda t: t.kind)
def test_table_shows_what_each_covariate_and_the_image_say(target):
    found = clinical_table(kind_of(target), COVARIATES, with_scores(target, units(300), 2.0))
    assert found.schema == CLINICAL_SCHEMA
    assert found["problem"].null_count() == found.height
    age, image = (
        found.filter(model=CLINICAL_IMAGE, covariate=c).row(0, named=True)
        for c in ("age", IMAGE_SCORE)
    )
    stage = found.filter(model=CLINICAL, covariate="stage")
    assert found.filter(model=CLINICAL, term="age")["p"][0] < 1e-4
    assert stage["likelihood_ratio_p"].to_list() == [stage["likelihood_ratio_p"][0]] * 2
    assert stage["likelihood_ratio_p"][0] > 0.01
    assert stage["degrees"].to_list() == [2, 2]
    assert image["likelihood_ratio_p"] < 1e-6
    assert image["coefficient_low"] > 0
    assert set(found["outcome"]) == ({"rim"} if target is RIM else {None})
    if target is GRADE:
        assert found["ratio"].null_count() == found.height
    else:
        assert age["ratio"] == pytest.approx(np.exp(age["coefficient"]))
        assert image["ratio_low"] == pytest.approx(np.exp(image["coefficient_low"]))


def test_likelihood_ratio_is_calibrated_for_an_image_without_signal():
    p = [
        clinical_table(
            kind_of(RIM), (AGE,), with_scores(RIM, units(60, seed), 0.0, seed + 500)
        ).filter(covariate=IMAGE_SCORE)["likelihood_ratio_p"][0]
        for seed in range(100)
    ]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.12
    assert 0.4 <= np.mean(p) <= 0.6


# --- predictions ---


def test_clinical_image_is_at_chance_for_an_overfitted_network():
    kind, values = kind_of(RIM), []
    for seed in range(20):
        random = np.random.default_rng(seed)
        table = shuffle_labels(
            units(80, seed).with_columns(slides=pl.concat_list("unit")), seed=seed
        )
        folds = make_folds(table, target=RIM, folds=4, seed=0)
        cv = table.join(folds, on="patient").sort("unit")
        parts = []
        for fold in range(4):
            train, validation, test = split_fold(cv, fold, 4)
            # a network that knows the labels of its training units, and nothing of the others
            image = {unit: random.random() for unit in cv["unit"]}
            image |= zip(train["unit"], 0.98 * train["y"] + 0.01, strict=True)

            def seen(rows, image=image):
                p = np.array([image[unit] for unit in rows["unit"]])
                return np.stack([1 - p, p], 1)

            clinical = fit_clinical(kind, COVARIATES, train)
            joined = fit_clinical_image(kind, validation, clinical(validation), seen(validation))
            parts.append((test["y"].to_numpy(), joined(clinical(test), seen(test))))
        y, p = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        values.append(classification_metrics(y, p)["auc"](np.ones((1, len(y))))[0])
    # pooled folds of a model without signal are somewhat below chance
    assert 0.4 < np.mean(values) < 0.52


def with_covariates(few, target):
    table = few.table
    covariates = {
        "covariate_age": pl.Series(np.random.default_rng(0).normal(60, 10, table.height))
        + 20 * table["rim"],
        "covariate_stage": pl.Series(["I", "II", None] * (table.height // 3)),
    }
    if target is RIM:
        labels = {"y": table["rim"].cast(pl.Int64)}
    elif target is GRADE:
        labels = {"y": table["grade"]}
    else:
        random = np.random.default_rng(0)
        labels = {
            "time": pl.Series(random.exponential(np.exp(-2.0 * table["rim"].to_numpy()))),
            "event": pl.Series([True, True, True, False] * (table.height // 4)),
        }
    return table.drop("rim", "grade").with_columns(**labels, **covariates)


def evaluate(few, target, table, folds, **options):
    return cross_validate(target, table, folds, few.source, QUICK, crop=20, **options)


@pytest.mark.slow
@pytest.mark.parametrize("target", [RIM, GRADE, DEATH], ids=lambda t: t.kind)
def test_clinical_models_are_cross_validated_and_compared(few, target, tmp_path):
    table = with_covariates(few, target)
    folds = make_folds(table, target=target, folds=4, seed=0)
    kept = FoldCheckpoints(tmp_path, "same")
    result = evaluate(few, target, table, folds, checkpoints=kept)
    for model in (CLINICAL, CLINICAL_IMAGE):
        rows = result.predictions.filter(model=model)
        assert sorted(rows["unit"]) == sorted(table["unit"])
        assert rows["fold"].null_count() == 0
    again = evaluate(few, target, table, folds, checkpoints=kept)
    assert again.predictions.equals(result.predictions)
    compared = compare_models(
        target, {"e": result.predictions}, {"e": result.clinical}, resamples=50, seed=0
    )
    assert compared.filter(first="e: network", second="e: clinical").height
    pair = compared.filter(first="e: clinical + image", second="e: clinical")
    test = pair.filter(metric=LIKELIHOOD_RATIO)
    image = result.clinical.filter(covariate=IMAGE_SCORE)
    assert test["difference"].to_list() == image["likelihood_ratio"].to_list()
    assert test["p"].to_list() == image["likelihood_ratio_p"].to_list()


@pytest.mark.slow
def test_labels_of_the_test_fold_do_not_enter_its_predictions(few):
    table = with_covariates(few, GRADE)
    folds = make_folds(table, target=GRADE, folds=4, seed=0)
    held_out = pl.col("patient").is_in(folds.filter(fold=0)["patient"].implode())
    other = table.with_columns(y=pl.when(held_out).then(-5 * pl.col("y")).otherwise("y"))
    one, two = (
        evaluate(few, GRADE, t, folds).predictions.filter(model=CLINICAL_IMAGE)
        for t in (table, other)
    )
    assert one.filter(fold=0)["prediction"].equals(two.filter(fold=0)["prediction"])
    assert not one.filter(fold=1)["prediction"].equals(two.filter(fold=1)["prediction"])


@pytest.mark.slow
def test_validation_fold_without_a_class_leaves_clinical_image_out(few):
    table = with_covariates(few, RIM)
    patients = sorted(table["patient"].unique())
    of_fold = [3 if name in ("p00", "p02") else i % 3 for i, name in enumerate(patients)]
    folds = pl.DataFrame({"patient": patients, "fold": of_fold}).with_columns(
        fold_name=pl.lit(None, pl.String)
    )
    result = evaluate(few, RIM, table, folds)
    assert set(result.predictions["model"]) == {"network", *BASELINES, CLINICAL}
    (note,) = result.notes
    assert "clinical + image is not predicted" in note
    assert "fold 3: no unit to train on has class 'rim'" in note
    assert result.clinical.filter(covariate=IMAGE_SCORE).height == 1


def test_permuted_labels_leave_covariates_with_their_patient():
    table = units(40).with_columns(slides=pl.concat_list("unit"))
    shuffled = shuffle_labels(table, seed=1)
    same = ["unit", "covariate_age", "covariate_stage"]
    assert shuffled.select(same).equals(table.select(same))
    assert not shuffled["y"].equals(table["y"])
    assert sorted(shuffled["y"]) == sorted(table["y"])
