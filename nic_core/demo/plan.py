"""Plan of the demo cohort: patients, slides, latent variables and targets.

Latent variables are stratified, and stains are assigned with a typical correlation to them, so that
a small cohort is as difficult as designed for every seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from nic_core.demo.cells import Tumour
from nic_core.demo.layout import NESTS
from nic_core.demo.painter import Stain, random_stain

GROWTH = ("replacement", "desmoplastic")
MITOSES = (10.0, 700.0)  # per mm2 of tumour, lowest and highest
SCORE_NOISE = 0.40  # standard deviation; that of the signal is 1
RISK = 1.6  # standard deviation of the log hazard
CENSORED = 0.35
MEDIAN_DAYS = 900.0
FAITHFUL = 0.94  # probability that a nest follows the growth pattern of its slide

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class PlannedSlide:
    """Parameters of a slide."""

    slide: str
    patient: str
    split: str
    seed: tuple[int, ...]
    tumour: Tumour
    capsules: tuple[bool, ...]
    stain: Stain


def plan_cohort(seed: int, slides: int) -> tuple[list[PlannedSlide], pl.DataFrame]:
    """Draw the slides to paint and their labels.

    About a sixth of the slides are ``test``, each of a different patient. Among the others, every
    fourth patient has two slides.

    Returns
    -------
    slides : list of PlannedSlide
    labels : polars.DataFrame
        Columns slide, patient, split, score, growth, time (days), event (1: death), and the latent
        variables mitoses (per mm2 of tumour), grade, signal (the score without noise), risk (log
        hazard of the patient).
    """
    rng = np.random.default_rng([seed, 1])
    test = max(1, slides // 6)
    rest = slides - test
    patients = max(1, round(0.8 * rest))
    owner = np.concatenate([np.arange(rest) % patients, patients + np.arange(test)])
    is_test = np.arange(patients + test) >= patients
    growth, level, grade = (np.empty(patients + test) for _ in range(3))
    for part in (~is_test, is_test):
        n = int(part.sum())
        growth[part] = rng.permutation(np.arange(n) % 2)
        level[part] = _quantiles(rng, n)
        # grade correlates with mitoses, as in real tumours
        blend = 0.6 * (level[part] - 0.5) + 0.4 * (_quantiles(rng, n) - 0.5)
        grade[part] = (np.argsort(np.argsort(blend)) + 0.5) / n
    slide_level = np.clip(level[owner] + rng.normal(0, 0.05, slides), 0, 1)
    mitoses = MITOSES[0] * (MITOSES[1] / MITOSES[0]) ** slide_level
    slide_grade = 1 + 2 * np.clip(grade[owner] + rng.normal(0, 0.05, slides), 0, 1)
    signal = _standard(0.65 * _standard(slide_level) + 0.45 * _standard(slide_grade))
    score = signal + SCORE_NOISE * _standard(rng.permutation(_normal_quantiles(slides)))
    mean_signal = np.array([signal[owner == p].mean() for p in range(len(growth))])
    # replacement growth has the worse prognosis
    risk = RISK * _standard(_standard(mean_signal) + 0.8 * _standard(-growth))
    time, event = _survival(rng, risk)
    stains = _assign_stains(rng, np.column_stack([mean_signal, growth, risk]))
    planned = []
    for i, p in enumerate(owner):
        faithful = rng.random(NESTS) < FAITHFUL
        capsules = tuple(bool(growth[p]) == f for f in faithful.tolist())
        planned.append(
            PlannedSlide(
                slide=f"demo-{p + 1:02d}-{int((owner[:i] == p).sum()) + 1}",
                patient=f"patient-{p + 1:02d}",
                split="test" if is_test[p] else "cv",
                seed=(seed, 2, i),
                tumour=Tumour(float(slide_grade[i]), float(mitoses[i])),
                capsules=capsules,
                stain=stains[p],
            )
        )
    labels = pl.DataFrame(
        {
            "slide": [s.slide for s in planned],
            "patient": [s.patient for s in planned],
            "split": [s.split for s in planned],
            "score": score.round(4),
            "growth": [GROWTH[int(growth[p])] for p in owner],
            "time": time[owner].round(1),
            "event": event[owner],
            "mitoses": mitoses,
            "grade": slide_grade,
            "signal": signal,
            "risk": risk[owner],
        }
    )
    return planned, labels


def plan_external(seed: int, slides: int) -> tuple[list[PlannedSlide], pl.DataFrame]:
    """Draw the slides of another hospital: other patients, stain and blur.

    Haematoxylin is weaker, eosin stronger, the glass yellower and the image less sharp than in the
    slides of :func:`plan_cohort`. Returns the same as that function.
    """
    planned, labels = plan_cohort(seed + 1_000_003, slides)
    rename = {s.slide: s.slide.replace("demo-", "external-") for s in planned}
    foreign = [
        replace(
            s,
            slide=rename[s.slide],
            patient=f"external-{s.patient}",
            stain=replace(
                s.stain,
                haematoxylin=0.8 * s.stain.haematoxylin,
                eosin=1.25 * s.stain.eosin,
                white=(s.stain.white - np.array([0, 4, 12])).astype(np.float32),
                blur=s.stain.blur + 0.6,
            ),
        )
        for s in planned
    ]
    return foreign, labels.with_columns(
        slide=pl.col("slide").replace(rename), patient=pl.format("external-{}", "patient")
    )


def _quantiles(rng: np.random.Generator, n: int) -> Doubles:
    return rng.permutation((np.arange(n) + 0.5) / n)


def _normal_quantiles(n: int) -> Doubles:
    return np.asarray(stats.norm.ppf((np.arange(n) + 0.5) / n))


def _standard(x: Doubles) -> Doubles:
    return np.asarray((x - x.mean()) / (x.std() or 1.0))


def _survival(rng: np.random.Generator, risk: Doubles) -> tuple[Doubles, NDArray[np.int64]]:
    """Draw Weibull times with proportional hazards, and independent uniform censoring."""
    n = len(risk)
    shape = 1.3
    death = (-np.log(_quantiles(rng, n)) * np.exp(-risk)) ** (1 / shape)
    death *= MEDIAN_DAYS / np.median(death)
    leaving = rng.uniform(0.1, 1, n)
    # a patient is censored after leaving * follow_up days; choose follow_up to censor CENSORED
    ratios = np.sort(death / leaving)
    follow_up = ratios[min(n - 1, round((1 - CENSORED) * n) - 1)] * (1 + 1e-9)
    event = death <= leaving * follow_up
    return np.maximum(np.minimum(death, leaving * follow_up), 1.0), event.astype(np.int64)


def _assign_stains(rng: np.random.Generator, causes: Doubles) -> list[Stain]:
    """Return one stain per patient, without a strong correlation to the latent variables.

    Many random assignments are ranked by their largest correlation and the median one is used. The
    best one would be more balanced than chance, which makes held-out predictions anticorrelate.
    """
    n = len(causes)
    stains = [random_stain(rng) for _ in range(n)]
    properties = np.array(
        [
            (
                np.log(s.haematoxylin),
                np.log(s.eosin),
                *s.white,
                *(np.log(s.vectors[0]) + np.log(s.haematoxylin)),
                *(np.log(s.vectors[1]) + np.log(s.eosin)),
            )
            for s in stains
        ]
    )
    properties = (properties - properties.mean(0)) / properties.std(0)
    causes = (causes - causes.mean(0)) / np.where(causes.std(0) > 0, causes.std(0), 1)
    orders = [rng.permutation(n) for _ in range(201)]
    largest = [np.abs(properties[order].T @ causes).max() for order in orders]
    return [stains[i] for i in orders[int(np.argsort(largest)[len(orders) // 2])]]
