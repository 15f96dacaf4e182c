"""Recognition of carcinoma (IDC) in patients that are left out of every training, one by one.

    python -m examples.idc.leave_one_out data/idc/cohort.yaml --out data/idc-by-patient
        [--patches 8000] [--released encoder_multitask-4.h5]

The cohort is that of ``make_cohort.py``. For each patient of the task ``idc`` the encoder is
trained without this patient, and its own head gives each patch of the patient a probability of
carcinoma. Beside it stand class-balanced logistic regressions on the mean RGB of a patch, on
hand-made features, and on the embedding of a released encoder, fitted to the patches of all other
patients. Of the other patients the encoder trains on three quarters; the last quarter chooses its
epoch.

Patients with patches of both classes come first, because only they have an AUC of their own.
Results are kept in one file a patient; an interrupted run continues when it is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from nic_core.cohort import Cohort, EncoderSpec, load_cohort
from nic_core.encoders import (
    PatchDataset,
    build_patch_task,
    load_patch_task,
    task_probabilities,
    train_encoder,
)
from nic_core.encoders.keras_import import import_keras_encoder
from nic_core.encoders.probes import Embedder, embed_in_parts
from nic_core.encoders.splits import split_by_group
from nic_core.models.metrics import (
    Difference,
    Interval,
    Metric,
    classification_metrics,
    compare,
    score,
)
from nic_core.store import atomic_file, atomic_folder
from studies.features import ColourAndTexture
from studies.settings import check_settings

TASK, POSITIVE = "idc", "idc"  # patch task, and its class of carcinoma
REFERENCE = "mean RGB"  # classifier that the others are compared with
STRENGTH = 0.01  # C of the logistic regressions
RESAMPLES = 2000
SCHEMA = pl.Schema(
    {
        "patient": pl.String(),
        "source": pl.String(),  # image file
        "carcinoma": pl.Boolean(),
        "classifier": pl.String(),
        "probability": pl.Float64(),  # of carcinoma
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cohort", type=Path, help="cohort file of make_cohort.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--patches", type=int, help="patches seen; default: as in the cohort")
    parser.add_argument("--released", type=Path, help="Keras file of a released encoder")
    arguments = parser.parse_args()
    cohort = load_cohort(arguments.cohort)
    spec = encoder_of_task(cohort, arguments.patches)
    out: Path = arguments.out
    released = arguments.released and arguments.released.name
    check_settings(out, {"encoder": spec.model_dump(mode="json"), "released": released})
    tasks = [patch_task(cohort, name, out / "patch_tasks") for name in spec.tasks]
    (idc,) = (task for task in tasks if task.name == TASK)
    without = {patient: _held_out(idc, patient, spec.seed) for patient in patients(idc)}
    regression_file = out / "rows" / "regressions.parquet"
    if not regression_file.exists():
        with atomic_file(regression_file) as partial:
            regressions(idc, embedders(idc, arguments.released)).write_parquet(partial)
    head_files = {patient: out / "rows" / f"{patient}.parquet" for patient in without}
    for patient, path in head_files.items():
        if not path.exists():
            found = head_without(without[patient], cohort, spec, tasks)
            with atomic_file(path) as partial:
                found.write_parquet(partial)
            print(f"{patient}: {len(found)} patches", flush=True)
    for table in report(pl.read_parquet([*head_files.values(), regression_file])):
        Console(width=140).print(table)


def patients(task: PatchDataset) -> list[str]:
    """Return the groups of a task, those with several classes first."""
    counts = task.table.group_by("group").agg(pl.col("class").n_unique())
    return counts.sort(pl.col("class") < 2, "group")["group"].to_list()


def regressions(idc: PatchDataset, classified: dict[str, Embedder]) -> pl.DataFrame:
    """Classify the patches of each patient by regressions fitted to the other patients.

    Returns
    -------
    polars.DataFrame
        A row for each patch and embedder (``SCHEMA``).
    """
    groups = idc.table["group"].to_numpy()
    parts = []
    for name, embedder in classified.items():
        embeddings = embed_in_parts(embedder, idc.patches, np.arange(len(idc.patches)))
        for patient in patients(idc):
            own = groups == patient
            regression = carcinoma_regression(embeddings, idc, ~own)
            probability = regression.predict_proba(embeddings[own])[:, 1]
            parts.append(_rows(idc, np.flatnonzero(own), name, probability))
    return pl.concat(parts)


def carcinoma_regression(
    embeddings: NDArray[np.floating],
    idc: PatchDataset,
    rows: NDArray[np.bool_] | slice = slice(None),
) -> Pipeline:
    """Fit a class-balanced logistic regression of carcinoma to the embeddings of some patches."""
    carcinoma = idc.labels == idc.classes.index(POSITIVE)
    regression = make_pipeline(
        StandardScaler(), LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=2000)
    )
    return regression.fit(embeddings[rows], carcinoma[rows])


def head_without(
    idc: PatchDataset, cohort: Cohort, spec: EncoderSpec, tasks: list[PatchDataset]
) -> pl.DataFrame:
    """Classify the patches of a patient by the head of an encoder trained without the patient.

    Parameters
    ----------
    idc : PatchDataset
        The task ``idc`` with the patient as its test split; it replaces the one in ``tasks``.
    cohort, spec, tasks
        The encoder that is trained, and its patch tasks.

    Returns
    -------
    polars.DataFrame
        A row for each patch of the patient (``SCHEMA``).
    """
    settings = cohort.settings
    encoder = train_encoder(
        spec,
        [idc if task.name == TASK else task for task in tasks],
        patch=settings.patch,
        mpp=settings.mpp,
        embedding_size=settings.embedding_size,
    ).encoder
    test = idc.rows("test")
    probabilities = task_probabilities(encoder, TASK, encoder.embed(idc.patches[test]))
    return _rows(idc, test, f"head of {spec.name}", probabilities[:, idc.classes.index(POSITIVE)])


def _rows(
    idc: PatchDataset,
    rows: NDArray[np.int64],
    classifier: str,
    probability: NDArray[np.floating],
) -> pl.DataFrame:
    table = idc.table[rows]
    return pl.DataFrame(
        {
            "patient": table["group"],
            "source": table["source"],
            "carcinoma": table["label"] == POSITIVE,
            "classifier": [classifier] * len(rows),
            "probability": probability,
        },
        SCHEMA,
        strict=False,
    )


def report(probabilities: pl.DataFrame) -> list[Table]:
    """Return two tables: of the patients together, and patient by patient.

    A patient whose patches are of one class has no AUC; the share of the patches classified
    correctly (at a probability of 0.5) is given for every patient.
    """
    names = probabilities["classifier"].unique(maintain_order=True).to_list()
    pooled = Table(
        "classifier",
        "patients",
        "AUC",
        "balanced accuracy",
        "correct, mean of patients",
        f"AUC minus {REFERENCE}",
    )
    single = Table("patient", "patches", "carcinoma", *names, title="AUC / correct")
    for name in names:
        rows = probabilities.filter(classifier=name)
        reference = probabilities.filter(classifier=REFERENCE)
        other = "" if name == REFERENCE else auc_difference(rows, reference)
        pooled.add_row(name, *summary(rows), other)
    for (patient,), rows in probabilities.group_by("patient", maintain_order=True):
        by_name = [rows.filter(classifier=name) for name in names]
        truth = by_name[0]["carcinoma"]
        cells = [_cell(found) for found in by_name]
        single.add_row(str(patient), str(len(truth)), f"{truth.mean():.0%}", *cells)
    return [pooled, single]


def summary(rows: pl.DataFrame) -> list[str]:
    """Return the number of patients, and scores with 95 % intervals (bootstrap over patients).

    AUC and balanced accuracy are over the patches of all patients together.
    """
    means = (
        rows.with_columns(correct=_correct(rows))
        .group_by("patient", maintain_order=True)
        .agg(pl.col("correct").mean())
    )
    correct = means["correct"].to_numpy()
    found = score(_metrics(rows), rows["patient"].to_list(), resamples=RESAMPLES, seed=0)
    found |= score(
        {"correct": lambda counts: counts @ correct / counts.sum(1)},
        means["patient"].to_list(),
        resamples=RESAMPLES,
        seed=0,
    )
    return [
        str(len(means)),
        *(_interval(found[name]) for name in ("auc", "balanced_accuracy", "correct")),
    ]


def auc_difference(rows: pl.DataFrame, reference: pl.DataFrame) -> str:
    """Return the AUC of a classifier minus that of another, with its 95 % interval.

    The bootstrap is paired: both AUCs are of the same resamples of patients.
    """
    # patches of one image keep their order, which is the same for every classifier
    one, other = (
        found.sort("patient", "source", maintain_order=True) for found in (rows, reference)
    )
    found = compare(
        _metrics(one), _metrics(other), one["patient"].to_list(), resamples=RESAMPLES, seed=0
    )
    return _interval(found["auc"])


def _metrics(rows: pl.DataFrame) -> dict[str, Metric]:
    probability = rows["probability"].to_numpy()
    every = classification_metrics(
        rows["carcinoma"].to_numpy(), np.stack([1 - probability, probability], 1)
    )
    return {name: every[name] for name in ("auc", "balanced_accuracy")}


def _correct(rows: pl.DataFrame) -> pl.Series:
    return (rows["probability"] > 0.5) == rows["carcinoma"]


def _cell(rows: pl.DataFrame) -> str:
    right = f"{_correct(rows).mean():.2f}"
    if rows["carcinoma"].n_unique() < 2:
        return f"- / {right}"
    auc = _metrics(rows)["auc"](np.ones((1, len(rows))))[0]
    return f"{auc:.2f} / {right}"


def _interval(found: Interval | Difference) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def encoder_of_task(cohort: Cohort, patches: int | None) -> EncoderSpec:
    for spec in cohort.encoders:
        if isinstance(spec, EncoderSpec) and TASK in spec.tasks:
            return spec.model_copy(update={"patches_seen": patches or spec.patches_seen})
    raise SystemExit(f"cohort '{cohort.name}' has no encoder that is trained on the task '{TASK}'")


def embedders(idc: PatchDataset, released: Path | None) -> dict[str, Embedder]:
    mean_rgb = EncoderSpec(name="mean-rgb", objective="mean_rgb")
    found: dict[str, Embedder] = {
        REFERENCE: train_encoder(
            mean_rgb, [], patch=idc.patch, mpp=idc.mpp, embedding_size=3
        ).encoder,
        "colour and texture": ColourAndTexture(),
    }
    if released is not None:
        found[f"released, {released.stem}"] = import_keras_encoder(released, released.stem)
    return found


def patch_task(cohort: Cohort, name: str, folder: Path) -> PatchDataset:
    """Return a patch task of the cohort, whose patches are cut once."""
    settings = cohort.settings
    if not (folder / name).exists():
        with atomic_folder(folder / name) as partial:
            build_patch_task(
                cohort.patch_task(name),
                patch=settings.patch,
                mpp=settings.mpp,
                tissue=settings.tissue,
                seed=0,
                folder=partial,
            )
    return load_patch_task(folder / name)


def _held_out(task: PatchDataset, patient: str, seed: int) -> PatchDataset:
    """Return the task with the patches of one patient as its test split."""
    groups = task.table["group"].to_list()
    try:
        splits = split_by_group(task.labels, groups, seed=seed, test_groups=[patient])
    except ValueError as error:
        raise SystemExit(f"task '{task.name}' without patient {patient}: {error}") from error
    return dataclasses.replace(task, table=task.table.with_columns(split=pl.Series(splits)))


if __name__ == "__main__":
    main()
