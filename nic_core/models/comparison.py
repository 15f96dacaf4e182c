"""Comparisons of cross-validated models: with each other, with chance, with the champion.

:func:`compare_models` compares encoders and baselines by the paired bootstrap;
:func:`permutation_control` compares a model with exchanged labels; :func:`compare_with_champion`
decides whether a new model becomes the registered champion of its target. All rules here are
[choice].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import polars as pl

from nic_core.cohort import Target
from nic_core.models.baselines import BASELINES
from nic_core.models.clinical import CLINICAL, CLINICAL_IMAGE, IMAGE_SCORE
from nic_core.models.cross_validation import MODEL_NAMES, NETWORK, UNCALIBRATED, CrossValidation
from nic_core.models.files import ModelCard
from nic_core.models.kinds import kind_of, metric_name, prediction_array, primary_value
from nic_core.models.labels import shuffle_labels
from nic_core.models.metrics import compare

COMPARISON_SCHEMA = pl.Schema(
    {
        "target": pl.String(),
        "part": pl.String(),  # cross-validated or test
        "first": pl.String(),  # encoder and model
        "second": pl.String(),
        "metric": pl.String(),
        "difference": pl.Float64(),  # first minus second
        "low": pl.Float64(),  # bounds of the 95 % paired bootstrap interval over patients
        "high": pl.Float64(),
        "p": pl.Float64(),  # two-sided, null hypothesis: no difference
        "p_holm": pl.Float64(),  # p after Holm's correction, see compare_models
        "n": pl.Int64(),  # units that both models predict, which are compared
        "only_first": pl.Int64(),  # units that only the first model predicts, left out
        "only_second": pl.Int64(),
        "other_slides": pl.Int64(),  # of the n units, those predicted from different slides
    }
)
CROSS_VALIDATED = "cross-validated"
LIKELIHOOD_RATIO = "likelihood ratio"  # metric whose difference is the statistic of the test
PERMUTATIONS = 200


def compare_models(
    target: Target,
    predictions: Mapping[str, pl.DataFrame],
    clinical: Mapping[str, pl.DataFrame] | None = None,
    *,
    resamples: int,
    seed: int,
) -> pl.DataFrame:
    """Compare the networks of every two encoders, and each network with its baselines.

    A recalibrated network is compared with itself before recalibration. With covariates, each
    network is also compared with the clinical baseline, and 'clinical + image' with 'clinical'.
    The latter pair has a row of metric :data:`LIKELIHOOD_RATIO` too: its difference is the
    statistic of the likelihood-ratio test, twice the difference of the log likelihoods, without an
    interval.

    Units are paired by their id, whatever the cells of the encoders' grids. Each pair of models is
    compared on the units that both predict, by :func:`nic_core.models.metrics.compare`. A patient
    of whom an encoder has compressed only some slides is predicted from those. ``p_holm`` is p
    corrected by :func:`holm` for all comparisons of the same target, part and metric [choice].

    Parameters
    ----------
    predictions
        Encoder to :attr:`nic_core.models.cross_validation.CrossValidation.predictions`.
    clinical
        Encoder to :attr:`nic_core.models.cross_validation.CrossValidation.clinical`.
    resamples
        Number of bootstrap resamples.
    seed
        Seed of the resamples.

    Returns
    -------
    polars.DataFrame
        One row per pair, split and metric, :data:`COMPARISON_SCHEMA`.
    """
    kind = kind_of(target)
    pairs = [((a, NETWORK), (b, NETWORK)) for a, b in combinations(predictions, 2)]
    pairs += [
        ((name, first), (name, second))
        for name in predictions
        for first, second in (
            *((NETWORK, model) for model in (UNCALIBRATED, *BASELINES, CLINICAL)),
            (CLINICAL_IMAGE, CLINICAL),
        )
    ]
    rows: list[tuple[object, ...]] = []
    for split, part in (("cv", CROSS_VALIDATED), ("test", "test")):
        for pair in pairs:
            all_first, all_second = (
                predictions[name].filter(model=m, split=split) for name, m in pair
            )
            one, other = common_units(all_first, all_second)
            if one.is_empty():
                continue
            units = (
                one.height,
                all_first.height - one.height,
                all_second.height - one.height,
                int((one["slides"].list.sort() != other["slides"].list.sort()).sum()),
            )
            first, second = (f"{name}: {MODEL_NAMES[m]}" for name, m in pair)
            differences = compare(
                kind.metrics(one, prediction_array(kind, one)),
                kind.metrics(other, prediction_array(kind, other)),
                one["patient"].to_list(),
                resamples=resamples,
                seed=seed,
            )
            rows += [
                (target.name, part, first, second, metric_name(kind, metric))
                + (d.value, d.low, d.high, d.p, None, *units)
                for metric, d in differences.items()
            ]
    for name, table in (clinical or {}).items():
        tests = table.filter(model=CLINICAL_IMAGE, covariate=IMAGE_SCORE)
        for statistic, p, units in (
            tests[:1].select("likelihood_ratio", "likelihood_ratio_p", "units").iter_rows()
        ):
            first, second = (f"{name}: {MODEL_NAMES[m]}" for m in (CLINICAL_IMAGE, CLINICAL))
            rows.append(
                (target.name, CROSS_VALIDATED, first, second, LIKELIHOOD_RATIO)
                + (statistic, None, None, p, None, units, 0, 0, 0)
            )
    found = pl.DataFrame(rows, schema=COMPARISON_SCHEMA, orient="row").fill_nan(None)
    corrected = pl.col("p").map_batches(holm, pl.Float64).over("part", "metric")
    return found.with_columns(p_holm=corrected)


def holm(p: pl.Series) -> pl.Series:
    """Return p values corrected for their number: Holm, Scand. J. Stat. 6:65-70 (1979).

    To reject every null hypothesis with a corrected p of at most a rejects a true one with a
    probability of at most a, whatever the dependence of the tests.

    Parameters
    ----------
    p
        float64; null: not tested, which does not count.

    Returns
    -------
    polars.Series
        float64, in the order of ``p``; null where ``p`` is.
    """
    tested = p.drop_nulls().to_numpy()
    order = np.argsort(tested, kind="stable")
    corrected = np.empty(len(tested))
    steps = tested[order] * np.arange(len(tested), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    result = np.full(len(p), np.nan)
    result[p.is_not_null().to_numpy()] = corrected
    return pl.Series(p.name, result, pl.Float64).fill_nan(None)


def comparison_notes(
    target: str, cards: Mapping[str, ModelCard], comparisons: pl.DataFrame
) -> list[str]:
    """State what besides the encoder differs between the compared models of a target.

    Parameters
    ----------
    cards
        Encoder to the card of its model of this target.
    comparisons
        Output of :func:`compare_models`.

    Returns
    -------
    list of str
        A line on the field of view and the settings, if they differ, and a line for each two
        encoders of which one lacks slides, or that have no unit in common.
    """
    stated = {
        encoder: {
            "side of a crop": f"{card.crop_um:g} um",
            "precision of the encoder": card.grids.precision,
            "reading": card.grids.reading,
            "colours": card.grids.colours,
            "tissue threshold": f"{card.grids.tissue:g}",
            **{
                f"settings.models.{name}": str(value)
                for name, value in card.settings.model_dump(exclude={"crop_um"}).items()
            },
        }
        for encoder, card in cards.items()
    }
    names = list(next(iter(stated.values()), {}))
    different = [
        f"{name} {', '.join(f'{of[name]} ({encoder})' for encoder, of in stated.items())}"
        for name in names
        if len({of[name] for of in stated.values()}) > 1
    ]
    notes = []
    if different:
        notes.append(
            f"target '{target}': the models differ in more than the encoder: {'; '.join(different)}"
        )
    pairs = comparisons.filter(
        pl.sum_horizontal("only_first", "only_second", "other_slides") > 0
    ).unique(["part", "first", "second"], keep="first", maintain_order=True)
    notes += [
        f"target '{target}', {row['part']}: '{row['first']}' and '{row['second']}' are compared on "
        f"{row['n']} units, {row['other_slides']} of them predicted from different slides; "
        f"{row['only_first']} more are predicted by the first only, {row['only_second']} by the "
        "second only"
        for row in pairs.iter_rows(named=True)
    ]
    notes += [
        f"target '{target}': no unit has a cross-validated prediction of both '{one}' and "
        f"'{other}', so they are not compared"
        for one, other in combinations(cards, 2)
        if comparisons.filter(
            part=CROSS_VALIDATED, first=f"{one}: {NETWORK}", second=f"{other}: {NETWORK}"
        ).is_empty()
    ]
    return notes


def common_units(one: pl.DataFrame, other: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return two models' rows of predictions for the units of both, in the same order.

    Survival functions at different horizons cannot be compared and are left out: the horizons
    depend on the units, which differ if one encoder lacks grids.
    """
    one = one.join(other, on="unit", how="semi").sort("unit")
    other = other.join(one, on="unit", how="semi").sort("unit")
    if "horizons" in one.columns and not one["horizons"].equals(other["horizons"]):
        one, other = (rows.drop("survival", "horizons") for rows in (one, other))
    return one, other


@dataclass(frozen=True)
class PermutationControl:
    """A model's score compared with its scores on exchanged labels.

    Attributes
    ----------
    value
        Primary metric of the network's cross-validated predictions.
    bound
        95th percentile of the same metric over :data:`PERMUTATIONS` permutations of the labels.
    metric
        Name of the metric.
    """

    value: float
    bound: float
    metric: str

    @property
    def passed(self) -> bool:
        """Whether ``value`` is above ``bound``; false if either is undefined."""
        return self.value > self.bound

    @property
    def explanation(self) -> str:
        """The comparison in words."""
        relation = "above" if self.passed else "not above"
        return (
            f"{self.metric} {self.value:.3f} is {relation} {self.bound:.3f}, the 95th percentile "
            f"with exchanged labels ({PERMUTATIONS} permutations)"
        )


def permutation_control(result: CrossValidation) -> PermutationControl:
    """Compare the cross-validated score with scores after exchanging labels between patients.

    The network is not trained again: only the labels of its predictions are exchanged. The full
    control, which trains on exchanged labels, is the setting ``models.permute_labels``.
    """
    kind = kind_of(result.target)
    rows = result.predictions.filter(model=NETWORK, split="cv").sort("unit")
    prediction = prediction_array(kind, rows)
    labels = rows.select("unit", "patient", "split", *kind.label_columns)
    permuted = [
        primary_value(kind, shuffle_labels(labels, seed=seed), prediction)
        for seed in range(PERMUTATIONS)
    ]
    defined = [value for value in permuted if math.isfinite(value)]
    return PermutationControl(
        value=primary_value(kind, labels, prediction),
        bound=float(np.quantile(defined, 0.95)) if defined else math.nan,
        metric=kind.primary_name,
    )


@dataclass(frozen=True)
class Champion:
    """The registered champion of a target.

    Attributes
    ----------
    title
        Its version and encoder, for messages.
    encoder, weights_hash
        The encoder that it was trained on; None if the registry does not say.
    predictions
        Its :attr:`~nic_core.models.cross_validation.CrossValidation.predictions`; None if the
        registry does not hold them.
    """

    title: str
    encoder: str | None
    weights_hash: str | None
    predictions: pl.DataFrame | None


@dataclass(frozen=True)
class Verdict:
    """The decision whether a new model becomes champion.

    Attributes
    ----------
    better
        True: the new model becomes champion.
    explanation
        Why, with the scores.
    compared
        False: the two models cannot be compared, and a person must decide.
    """

    better: bool
    explanation: str
    compared: bool = True


def compare_with_champion(
    result: CrossValidation,
    champion: Champion | None,
    control: PermutationControl,
    *,
    encoder: str,
    weights_hash: str,
) -> Verdict:
    """Decide whether a new model becomes the champion of its target.

    It does if it passes its permutation control and there is no champion yet, or its primary
    metric is better: the lower bound of the 95 % interval of the difference, by the paired
    bootstrap over patients, is above 0. A champion on earlier weights of the same encoder cannot
    score the slides that are compressed with the new weights; the new model replaces it unless its
    primary metric is worse: the upper bound is below 0. Both models are scored on the
    cross-validated predictions of their common units, with the labels of the new model; patch
    size, um/px and stride of the two encoders may differ. A model that was trained on exchanged
    labels never becomes champion.

    Parameters
    ----------
    result
        Cross-validation of the new model.
    champion
        The present champion; None: the new model is the first of its name.
    control
        Output of :func:`permutation_control` for ``result``.
    encoder, weights_hash
        The encoder that the new model was trained on.
    """
    settings, kind = result.settings, kind_of(result.target)
    if settings.permute_labels is not None:
        return Verdict(False, "does not become champion: it was trained on exchanged labels")
    if not control.passed:
        return Verdict(
            False,
            f"does not become champion: it fails its permutation control, {control.explanation}",
        )
    if champion is None:
        return Verdict(True, f"becomes champion as the first of its name: {control.explanation}")

    def undecided(reason: str) -> Verdict:
        return Verdict(
            False,
            f"cannot be compared with the champion, {champion.title}: {reason}; compare the two "
            "and set the alias 'champion' by hand",
            compared=False,
        )

    columns, labels = kind.prediction_columns, kind.label_columns
    held = champion.predictions
    if held is None or not {"model", "split", "unit", *columns} <= set(held.columns):
        return undecided("its run holds no predictions of this target")
    one = result.predictions.filter(model=NETWORK, split="cv")
    one = one.select("unit", "patient", *labels, *columns)
    other = held.filter(model=NETWORK, split="cv").select("unit", *columns)
    only_new, only_old = (
        a.join(b, on="unit", how="anti").height for a, b in ((one, other), (other, one))
    )
    one, other = common_units(one, other.join(one.drop(columns), on="unit"))
    if one.is_empty():
        return undecided("no unit is predicted by both")
    one_prediction, other_prediction = (prediction_array(kind, rows) for rows in (one, other))
    name = kind.primary_metric
    difference = compare(
        {name: kind.metrics(one, one_prediction)[name]},
        {name: kind.metrics(other, other_prediction)[name]},
        one["patient"].to_list(),
        resamples=settings.bootstrap,
        seed=settings.seed,
    )[name]
    if not math.isfinite(difference.low):
        return undecided(f"{kind.primary_name} is undefined on their {one.height} common units")
    new = primary_value(kind, one, one_prediction)
    old = primary_value(kind, other, other_prediction)
    scores = (
        f"{kind.primary_name} {new:.3f} against {old:.3f}, difference {difference.value:+.3f} "
        f"[{difference.low:+.3f}, {difference.high:+.3f}] on {one.height} units of "
        f"{one['patient'].n_unique()} patients"
    )
    if only_new or only_old:
        scores += (
            f" ({only_new} units that only the new model predicts and {only_old} that only the "
            "champion predicts are left out)"
        )
    if difference.low > 0:
        return Verdict(True, f"replaces {champion.title} as champion: {scores}")
    if champion.encoder == encoder and champion.weights_hash not in (None, weights_hash):
        retrained = f"was trained on earlier weights of encoder '{encoder}'"
        if difference.high < 0:
            return Verdict(
                False, f"{champion.title} stays champion, although it {retrained}: {scores}"
            )
        return Verdict(
            True,
            f"replaces {champion.title}, which {retrained} and cannot score slides that are "
            f"compressed with the present ones, and is not significantly worse: {scores}",
        )
    return Verdict(False, f"{champion.title} stays champion: {scores}")
