"""Clinical covariates: the baseline that uses them alone, and together with the image.

Predictions. In every fold, the model ``clinical`` is the linear model of the target's kind (ridge,
logistic or Cox regression) on the covariates, fitted on the units that train the network. The model
``clinical_image`` joins two scores, that of the clinical model and that of the network, by a second
model of the same kind. It is fitted on the validation fold, on which neither of the two was
fitted, and applied to the test fold: no label of the test fold has a part in it [choice]. The usual
stacking, which fits the second model on the held-out scores of the other folds, has more units,
but the networks of those folds were trained on the labels of the test fold. The price is that few
units determine two coefficients, with the ridge penalty :data:`PENALTY`.

Inference. :func:`clinical_table` fits both models once, without a penalty, on all cross-validated
units. The image score of a unit is there the prediction of the network that was not trained on it.

Missing values, as seen in the units that a model is fitted on [choice]: a number gets their median,
and a term that marks it as missing; of a category, 'missing' is a further category.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nic_core.cohort import Covariate, NumericCovariate
from nic_core.models.kinds import TargetKind, prediction_array
from nic_core.models.labels import COVARIATE
from nic_core.models.likelihood import MaximumLikelihood, independent_terms, likelihood_ratio

Floats = NDArray[np.float64]

CLINICAL, CLINICAL_IMAGE = "clinical", "clinical_image"
CLINICAL_NAMES = {CLINICAL: "clinical", CLINICAL_IMAGE: "clinical + image"}
PENALTY = 1.0  # weight of the sum of squared coefficients of standardised terms [choice]
IMAGE_SCORE = "image score"

CLINICAL_SCHEMA = pl.Schema(
    {
        "model": pl.String(),  # clinical or clinical_image
        "covariate": pl.String(),  # column of the label table, or image score
        "term": pl.String(),  # column of the design matrix
        "outcome": pl.String(),  # class, against the first one; null for other kinds
        "coefficient": pl.Float64(),  # per unit of the term; per standard deviation of image score
        "coefficient_low": pl.Float64(),  # bounds of the 95 % Wald interval
        "coefficient_high": pl.Float64(),
        "ratio": pl.Float64(),  # hazard or odds ratio; null for regression
        "ratio_low": pl.Float64(),
        "ratio_high": pl.Float64(),
        "p": pl.Float64(),  # Wald, two-sided
        "likelihood_ratio": pl.Float64(),  # model with against without the covariate
        "degrees": pl.Int64(),
        "likelihood_ratio_p": pl.Float64(),
        "units": pl.Int64(),
        "patients": pl.Int64(),
        "problem": pl.String(),  # why numbers are missing; null: none are
    }
)


@dataclass(frozen=True)
class Term:
    """A column of the design matrix of the covariates.

    Attributes
    ----------
    covariate
        Column of the label table.
    name
        For example ``age``, ``age missing`` or ``stage II``.
    content
        ``number``; ``missing``: 1 where the value is missing; ``category``: 1 where it is
        ``category``.
    mean
        Of the units that the model is fitted on; of a number, their median.
    """

    covariate: str
    name: str
    content: Literal["number", "missing", "category"]
    mean: float
    category: str | None = None


@dataclass(frozen=True)
class Design:
    """How covariates become numbers, with medians and categories of the fitted units.

    Attributes
    ----------
    terms
        Columns of the design matrix.
    categories
        Categorical covariate to the values that the fitted units have; None: missing.
    """

    terms: tuple[Term, ...]
    categories: dict[str, frozenset[str | None]]

    def matrix(self, units: pl.DataFrame) -> Floats:
        """Return the design matrix (units, terms).

        A category that no fitted unit has gets the mean of every term of its covariate: the
        prediction is that for the mean of the fitted units.
        """
        columns = [np.empty((units.height, 0))]
        for term in self.terms:
            values = units[COVARIATE + term.covariate]
            if term.content == "number":
                column = values.fill_null(term.mean).to_numpy()
            elif term.covariate in self.categories:
                known = self.categories[term.covariate]
                column = np.array(
                    [float(v == term.category) if v in known else term.mean for v in values]
                )
            else:
                column = values.is_null().to_numpy()
            columns.append(column.astype(np.float64)[:, None])
        return np.hstack(columns)


def fit_design(covariates: Sequence[Covariate], train: pl.DataFrame) -> Design:
    """Derive the terms of covariates from the units that a model is fitted on.

    Parameters
    ----------
    train
        Target table (:func:`nic_core.models.labels.target_table`).
    """
    terms: list[Term] = []
    categories: dict[str, frozenset[str | None]] = {}
    for covariate in covariates:
        name, values = covariate.column, train[COVARIATE + covariate.column]
        missing = values.null_count() / max(len(values), 1)
        if isinstance(covariate, NumericCovariate):
            median = values.median()
            if isinstance(median, float):
                terms.append(Term(name, name, "number", median))
            if missing:
                terms.append(Term(name, f"{name} missing", "missing", missing))
            continue
        categories[name] = frozenset(values)
        for category in covariate.categories[1:]:
            if category in categories[name]:
                share = (values == category).fill_null(False).mean()
                assert isinstance(share, float)
                terms.append(Term(name, f"{name} {category}", "category", share, category))
        if missing:
            terms.append(Term(name, f"{name} missing", "category", missing))
    return Design(tuple(terms), categories)


def fit_clinical(
    kind: TargetKind, covariates: Sequence[Covariate], train: pl.DataFrame
) -> Callable[[pl.DataFrame], Floats]:
    """Fit the clinical model of a fold; return its predictor of units, (units, outputs)."""
    design = fit_design(covariates, train)
    model = _fit(kind, train, design.matrix(train))
    return lambda units: kind.linear_prediction(model, design.matrix(units))


def fit_clinical_image(
    kind: TargetKind, validation: pl.DataFrame, clinical: Floats, image: Floats
) -> Callable[[Floats, Floats], Floats]:
    """Fit the model that joins clinical and image scores; return its predictor (units, outputs).

    Parameters
    ----------
    validation
        Units on which neither of the two models was fitted.
    clinical, image : float (units, outputs)
        Predictions of these units by the clinical model and by the network.
    """

    def terms(clinical: Floats, image: Floats) -> Floats:
        return np.hstack([kind.image_scores(clinical), kind.image_scores(image)])

    model = _fit(kind, validation, terms(clinical, image))
    return lambda clinical, image: kind.linear_prediction(model, terms(clinical, image))


def _fit(kind: TargetKind, units: pl.DataFrame, x: Floats) -> Any:
    model = make_pipeline(StandardScaler(), kind.linear_model(PENALTY))
    return model.fit(x, kind.linear_labels(units))


def clinical_table(
    kind: TargetKind, covariates: Sequence[Covariate], units: pl.DataFrame
) -> pl.DataFrame:
    """Estimate what each covariate, and the image score, says about the target.

    Coefficients with Wald intervals and likelihood-ratio tests of models fitted without a penalty
    on all units. The test of the image score compares 'clinical + image' with 'clinical'.
    Units are treated as independent: with several units of a patient, intervals are too narrow.

    Parameters
    ----------
    units
        Cross-validated units of the target table, with the columns of the network's held-out
        predictions (:attr:`TargetKind.prediction_columns`).

    Returns
    -------
    polars.DataFrame
        One row per model, term and outcome, :data:`CLINICAL_SCHEMA`. A term without a finite
        estimate says why in ``problem``.
    """
    design = fit_design(covariates, units)
    x = design.matrix(units)
    labels = [(term.covariate, term.name) for term in design.terms]
    scores = kind.image_scores(prediction_array(kind, units))
    deviation = scores.std(0)
    scores = scores / np.where(deviation > 0, deviation, 1.0)
    several = len(kind.outcomes) > 1
    image = [
        (IMAGE_SCORE, f"{IMAGE_SCORE} {outcome}" if several else IMAGE_SCORE)
        for outcome in kind.outcomes
    ]
    rows = [
        *_rows(kind, CLINICAL, units, x, labels),
        *_rows(kind, CLINICAL_IMAGE, units, np.hstack([x, scores]), [*labels, *image]),
    ]
    return pl.DataFrame(rows, schema=CLINICAL_SCHEMA, orient="row").with_columns(
        pl.col(pl.Float64).fill_nan(None)
    )


def _rows(
    kind: TargetKind, model: str, units: pl.DataFrame, x: Floats, labels: list[tuple[str, str]]
) -> Iterator[tuple[object, ...]]:
    kept = independent_terms(x)
    fitted = kind.maximum_likelihood(units, x[:, kept])
    low, high = fitted.interval()
    p = fitted.p_values()
    tests = {
        covariate: _test(kind, units, x, kept, labels, covariate, fitted) for covariate, _ in labels
    }
    counts = (units.height, units["patient"].n_unique())
    nothing = (None,) * 7
    for column, (covariate, term) in enumerate(labels):
        for number, outcome in enumerate(kind.outcomes):
            begin = (model, covariate, term, outcome)
            if column not in kept:
                problem = "left out: constant, or a linear combination of earlier terms"
                yield (*begin, *nothing, *tests[covariate], *counts, problem)
                continue
            place = (number, kept.index(column))
            if not fitted.finite[place]:
                problem = "no finite estimate: the term separates the labels, or has too few units"
                yield (*begin, *nothing, *tests[covariate], *counts, problem)
                continue
            estimates = tuple(float(a[place]) for a in (fitted.coefficients, low, high))
            ratios = tuple(np.exp(estimates).tolist()) if kind.ratio_name else (None,) * 3
            numbers = (*estimates, *ratios, float(p[place]))
            yield (*begin, *numbers, *tests[covariate], *counts, None)


def _test(
    kind: TargetKind,
    units: pl.DataFrame,
    x: Floats,
    kept: list[int],
    labels: list[tuple[str, str]],
    covariate: str,
    fitted: MaximumLikelihood,
) -> tuple[float | None, int | None, float | None]:
    """Test a model against the one without a covariate; nothing if the covariate has no term."""
    without = [column for column in kept if labels[column][0] != covariate]
    if len(without) == len(kept):
        return None, None, None
    return likelihood_ratio(kind.maximum_likelihood(units, x[:, without]), fitted)
