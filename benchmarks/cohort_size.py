"""Width and coverage of the 95 % intervals of slide models by the number of patients.

    python benchmarks/cohort_size.py

Predictions are drawn instead of trained: of a model without signal, and of a good one (AUC 0.80,
Spearman 0.50, Harrell's C 0.74 in a population). Half of the patients have each class; 40 % of the
times are censored. Each row is the mean over 400 simulated cohorts of one slide per patient, scored
as the models of a study are (1000 bootstrap resamples of patients). It takes
some minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from nic_core.models.metrics import (
    Metric,
    classification_metrics,
    regression_metrics,
    score,
    survival_metrics,
)

SIZES = (5, 10, 20, 50, 100, 200)
COHORTS = 400
POPULATION = 4000
# the strength of a signal that gives the good model its value in a population
SHIFT, CORRELATION, LOG_HAZARD = 1.19, 0.518, 1.02

Draw = Callable[[np.random.Generator, int, bool], Metric]


def auc(random: np.random.Generator, patients: int, good: bool) -> Metric:
    """Draw scores of two classes whose means differ."""
    y = np.arange(patients) % 2
    p = random.normal(size=patients) + SHIFT * good * y
    return classification_metrics(y, np.stack([-p, p], axis=1))["auc"]


def spearman(random: np.random.Generator, patients: int, good: bool) -> Metric:
    """Draw correlated labels and predictions."""
    y, noise = random.normal(size=(2, patients))
    r = CORRELATION * good
    return regression_metrics(y, r * y + np.sqrt(1 - r**2) * noise)["spearman"]


def harrell_c(random: np.random.Generator, patients: int, good: bool) -> Metric:
    """Draw risks, and times with proportional hazards; 40 % are censored."""
    risk = random.normal(size=patients)
    death = random.exponential(np.exp(-LOG_HAZARD * good * risk))
    censored = np.zeros(patients, bool)
    censored[random.permutation(patients)[: round(0.4 * patients)]] = True
    time = np.where(censored, death * random.uniform(size=patients), death)
    return survival_metrics(time, ~censored, risk)["harrell_c"]


def main() -> None:
    """Print the table."""
    columns = (
        "metric",
        "model",
        "patients",
        "median interval",
        "width",
        "covers truth",
        "above chance",
    )
    table = Table(*columns, title=f"means over {COHORTS} cohorts")
    for name, draw, chance in (
        ("AUC", auc, 0.5),
        ("Spearman", spearman, 0.0),
        ("C", harrell_c, 0.5),
    ):
        for good in (False, True):
            once = np.ones((1, POPULATION))
            truth = float(draw(np.random.default_rng(0), POPULATION, good)(once)[0])
            truth = truth if good else chance
            for patients in SIZES:
                ids = [str(i) for i in range(patients)]
                found = []
                for seed in range(COHORTS):
                    metric = draw(np.random.default_rng([seed, patients]), patients, good)
                    interval = score({name: metric}, ids, resamples=1000, seed=seed)[name]
                    found.append((interval.low, interval.high))
                low, high = np.array(found).T
                table.add_row(
                    name,
                    f"{truth:.2f}",
                    str(patients),
                    f"{np.median(low):.2f} to {np.median(high):.2f}",
                    f"{np.mean(high - low):.2f}",
                    f"{np.mean((low <= truth) & (truth <= high)):.0%}",
                    f"{np.mean(low > chance):.0%}",
                )
            table.add_section()
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
