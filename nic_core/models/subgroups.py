"""Metrics of subgroups of units, for example of the slides of each site or scanner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from nic_core.cohort import Target
from nic_core.models.kinds import kind_of, prediction_array
from nic_core.models.metrics import score

SMALLEST = 10
"""Smallest number of patients of a subgroup that is scored [choice]."""
MISSING_GROUP = "(missing)"
"""Subgroup of the units without a value."""
SUBGROUP_SCHEMA = pl.Schema(
    {
        "group": pl.String(),
        "metric": pl.String(),
        "value": pl.Float64(),  # null where `note` says why
        "low": pl.Float64(),  # bounds of the 95 % bootstrap interval over patients
        "high": pl.Float64(),
        "units": pl.Int64(),
        "patients": pl.Int64(),
        "note": pl.String(),  # why a value is missing; null if it is not
    }
)


def groups_of_units(
    units: Iterable[Iterable[str]], value_of: Mapping[str, str]
) -> list[str | None]:
    """Return the subgroup of each unit, from the values of its parts.

    A unit whose parts have several values has the subgroup ``A + B``; one without a value, None.

    Parameters
    ----------
    units
        The parts of each unit, such as the ids of its slides.
    value_of
        Part to its value.
    """
    return [
        " + ".join(sorted({value_of[part] for part in parts if part in value_of})) or None
        for parts in units
    ]


def subgroup_metrics(
    target: Target,
    predictions: pl.DataFrame,
    groups: Sequence[str | None],
    *,
    resamples: int,
    seed: int,
) -> pl.DataFrame:
    """Score each subgroup of units by itself.

    Subgroups of fewer than :data:`SMALLEST` patients are listed without values.

    Parameters
    ----------
    predictions
        A row per unit: ``patient``, the label columns and prediction columns of the target's kind
        (:class:`~nic_core.models.kinds.base.TargetKind`). Survival functions are not scored, since
        their times would depend on the labels of each subgroup.
    groups
        The subgroup of each row; None: unknown, which counts as subgroup ``(missing)``.
    resamples
        Number of bootstrap resamples of patients.
    seed
        Seed of the resamples.

    Returns
    -------
    polars.DataFrame
        A row per subgroup and metric, :data:`SUBGROUP_SCHEMA`, by subgroup.

    Raises
    ------
    ValueError
        The numbers of predictions and groups differ.
    """
    if len(groups) != predictions.height:
        raise ValueError(
            f"{predictions.height} predictions but {len(groups)} groups; give one group per row"
        )
    kind = kind_of(target)
    named = pl.Series(
        [MISSING_GROUP if group is None else group for group in groups], dtype=pl.String
    )
    predictions = predictions.select("patient", *kind.label_columns, *kind.prediction_columns)
    names = list(kind.metrics(predictions, prediction_array(kind, predictions)))
    rows: list[tuple[object, ...]] = []
    for group in named.unique().sort():
        units = predictions.filter(named == group)
        counts = (units.height, units["patient"].n_unique())
        if counts[1] < SMALLEST:
            note = f"too small: {counts[1]} of at least {SMALLEST} patients"
            rows += [(group, metric, None, None, None, *counts, note) for metric in names]
            continue
        metrics = kind.metrics(units, prediction_array(kind, units))
        scores = score(metrics, units["patient"].to_list(), resamples=resamples, seed=seed)
        rows += [
            (group, metric, s.value, s.low, s.high, *counts, undefined_note(s.value))
            for metric, s in scores.items()
        ]
    return pl.DataFrame(rows, SUBGROUP_SCHEMA, orient="row").fill_nan(None)


def undefined_note(value: float) -> str | None:
    """Return the note of a metric that is NaN; None if it is a number."""
    if value == value:
        return None
    return "undefined on these units: for example one class only, no event, or equal labels"
