"""Publish a finished product: one MLflow run, and one version of a registered model.

Only the product's folder is read, so that a training does not depend on MLflow. A run that was
published before is found by the tag ``content_hash``: an unchanged product makes no new run and no
new version.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.entities.model_registry import ModelVersion

from nic_assets.tracking.archives import archive_of, requirements_of
from nic_assets.tracking.callable_model import MODEL_NAME, log_slide_predictor
from nic_assets.tracking.connection import Connection, as_tracking_error
from nic_assets.tracking.experiments import experiment_id
from nic_assets.tracking.publications import Network, Publication
from nic_assets.tracking.registry import (
    CHAMPION,
    PRODUCT_FOLDER,
    ModelFormatError,
    find_champion,
    find_version,
    verify_exported,
)
from nic_core.models.comparison import Champion, Verdict
from nic_core.pictures import FIGURES, PRINT_DPI

# kind of a result (nic_core.reports.RESULT_SCHEMA) to the asset that is its data set
DATASETS = {"patch task": "patch_task", "target": "target_folds"}
DIGEST_LENGTH = 36  # characters that MLflow stores of a data set's digest
METRICS_PER_CALL = 1000  # limit of a request
DESCRIPTION_LENGTH = 4000  # characters; databases store 5000, and the comparison is added
MODEL_CARD = "model-card.md"
SECTION = "\n\n## Comparison with the champion when registered\n\n"  # of a version's description
CONTENT_HASH = "content_hash"  # tag of a run and of a version
LOGGED_MODEL = "logged_model"  # tag of a run: id of the model that is registered


@dataclass(frozen=True)
class Published:
    """A published product.

    Attributes
    ----------
    url
        URL of the run.
    version
        The registered version; None if the product has no network that can be exported.
    """

    url: str
    version: ModelVersion | None


def publish(
    connection: Connection,
    publication: Publication,
    *,
    warn: Callable[[str], None],
) -> Published:
    """Publish a product, unless it was published before, and set the aliases of its version.

    The run of live curves (:class:`~nic_assets.tracking.live.LiveCurves`) of the same training is
    completed; without one a new run is made. What an interrupted publication left is deleted. A
    deleted run or version is made again.

    Parameters
    ----------
    warn
        Receives a message when a deleted experiment is restored.

    Raises
    ------
    TrackingError
        MLflow does not answer, or refuses a request. The product stays in the store.
    ModelFormatError
        The logged model is not a torch.export archive.
    """
    with as_tracking_error(f"the registration of {publication.product}"):
        experiment = experiment_id(connection, publication.experiment, warn)
        run = _published_run(connection, experiment, publication)
        if run is None:
            run = _log_run(connection, experiment, publication)
        version = None
        if publication.network is not None:
            version = _registered(connection, run, publication, publication.network)
    return Published(connection.run_page(experiment, run.info.run_id), version)


def settle_champion(
    connection: Connection, version: ModelVersion, judge: Callable[[Champion | None], Verdict]
) -> Verdict:
    """Compare a version with the champion of its name; move the alias if the verdict says so.

    The version's tag ``champion`` and its description give the reason in either case. A version
    that is the champion already is not compared.

    Parameters
    ----------
    judge
        Returns the verdict; receives None if no version is the champion yet.

    Raises
    ------
    TrackingError
        MLflow does not answer, or refuses a request.
    """
    client, name, number = connection.client, version.name, version.version
    with as_tracking_error(f"the champion of '{name}'"):
        holder = find_version(connection, name, CHAMPION)
        if holder is not None and str(holder.version) == str(number):
            known = holder.tags.get(CHAMPION, f"version {number} has the alias '{CHAMPION}'")
            return Verdict(False, known)
        verdict = judge(find_champion(connection, name))
        if verdict.better:
            client.set_registered_model_alias(name, CHAMPION, number)
        client.set_model_version_tag(name, number, CHAMPION, verdict.explanation)
        card, _, _ = (client.get_model_version(name, number).description or "").partition(SECTION)
        client.update_model_version(
            name, number, description=f"{card}{SECTION}{verdict.explanation}."
        )
    return verdict


def _published_run(connection: Connection, experiment: str, publication: Publication) -> Run | None:
    """Return the complete run of the same content; delete incomplete ones."""
    client = connection.client
    complete = None
    for run in client.search_runs(
        [experiment], f"tags.`{CONTENT_HASH}` = '{publication.content_hash}'"
    ):
        whole = publication.network is None or LOGGED_MODEL in run.data.tags
        if run.info.status == "FINISHED" and whole:
            complete = run
        else:  # its publication was interrupted or refused
            client.delete_run(run.info.run_id)
    return complete


def _log_run(connection: Connection, experiment: str, publication: Publication) -> Run:
    """Log everything to the live run of the training, or to a new run, and finish it."""
    client = connection.client
    tags = {**publication.tags, CONTENT_HASH: publication.content_hash}
    live = _live_run(connection, experiment, publication.tags)
    if live is None:
        run = client.create_run(experiment, tags=tags, run_name=publication.run_name)
    else:
        run = live
        client.log_batch(run.info.run_id, tags=[RunTag(*tag) for tag in tags.items()])
    identity = run.info.run_id
    client.log_batch(
        identity,
        params=[Param(name, str(value)) for name, value in publication.params.items()],
    )
    _log_metrics(connection, run, publication.metrics)
    for name, figure in publication.figures.items():
        client.log_figure(identity, figure, f"{name}.png", save_kwargs={"dpi": PRINT_DPI})
    for picture in publication.pictures:
        client.log_artifact(identity, str(picture))
    for name, rows in {**publication.tables, "results": publication.results}.items():
        client.log_table(identity, rows.to_dict(as_series=False), f"{name}.json")
    client.log_dict(identity, dict(publication.card), "card.json")
    client.log_text(identity, publication.model_card, MODEL_CARD)
    client.log_inputs(identity, _inputs(publication.data))
    for path in sorted(publication.files.iterdir()) if publication.files is not None else ():
        if path.name != FIGURES and path not in publication.pictures:
            client.log_artifact(identity, str(path), PRODUCT_FOLDER)
    logged = ""
    if publication.network is not None:
        logged = _log_model(connection, identity, publication.network)
    client.log_batch(identity, _result_metrics(publication, logged))
    if logged:
        client.set_tag(identity, LOGGED_MODEL, logged)
    client.set_terminated(identity, "FINISHED")
    return client.get_run(identity)


def _live_run(connection: Connection, experiment: str, tags: Mapping[str, str]) -> Run | None:
    """Return the unfinished run with the live curves of the product's training."""
    wanted = ("dagster/run_id", "dagster/asset_key", "dagster/partition")
    if not tags.keys() >= set(wanted):
        return None
    conditions = [f"tags.`{tag}` = '{tags[tag]}'" for tag in wanted]
    found = connection.client.search_runs(
        [experiment], " and ".join([*conditions, "attributes.status = 'RUNNING'"]), max_results=1
    )
    return found[0] if found else None


def _log_metrics(
    connection: Connection, run: Run, rows: list[tuple[int, dict[str, float]]]
) -> None:
    """Log the metrics of each epoch, except those that the live curves have already."""
    client, now = connection.client, _milliseconds()
    known = {
        name: {metric.step for metric in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }
    metrics = [
        Metric(name, value, now, step)
        for step, values in rows
        for name, value in values.items()
        if step not in known.get(name, ())
    ]
    for start in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run.info.run_id, metrics[start : start + METRICS_PER_CALL])


def _inputs(data: Mapping[str, tuple[Path, str]]) -> list[DatasetInput]:
    return [
        DatasetInput(
            Dataset(
                name,
                digest[:DIGEST_LENGTH],
                "local",
                json.dumps({"uri": path.resolve().as_uri()}),
            ),
            [InputTag("mlflow.data.context", "training")],
        )
        for name, (path, digest) in data.items()
    ]


def _result_metrics(publication: Publication, model: str) -> list[Metric]:
    """Return the final results as metrics, linked to the logged model and to their data sets."""
    now, metrics = _milliseconds(), []
    for row in publication.results.iter_rows(named=True):
        # an encoder has results on several tasks, a model on one target
        parts = ("part", *(("about",) if row["kind"] == "patch task" else ()))
        name = "/".join(_metric_name(row[part]) for part in (*parts, "model", "metric"))
        dataset = f"{DATASETS.get(row['kind'])}/{row['about']}"
        _, digest = publication.data.get(dataset, (None, None))
        linked = (
            {"dataset_name": dataset, "dataset_digest": digest[:DIGEST_LENGTH]} if digest else {}
        )
        for column in ("value", "low", "high", "folds_mean", "folds_deviation"):
            value, end = row[column], "" if column == "value" else f"_{column}"
            if value is not None and math.isfinite(value):
                metrics.append(
                    Metric(f"{name}{end}", value, now, 0, model_id=model or None, **linked)
                )
    return metrics


def _log_model(connection: Connection, run: str, network: Network) -> str:
    """Log a network as torch.export archive and verify its files; return the logged model's id.

    The archive loads without this package and without pickle. A slide model can also be called with
    slide files.

    Raises
    ------
    ModelFormatError
        The logged files have another format. The run is marked as failed.
    """
    if network.slide_model is not None:
        model, encoder = network.slide_model
        identity = log_slide_predictor(connection, run, model_folder=model, encoder_folder=encoder)
    else:
        identity = _log_archive(connection, run, network)
    try:
        verify_exported(connection, identity)
    except ModelFormatError:
        connection.client.set_terminated(run, "FAILED")
        raise
    return identity


def _log_archive(connection: Connection, run: str, network: Network) -> str:
    """Log a network as torch.export archive; return the logged model's id."""
    with (
        archive_of(network.module, network.example) as arguments,
        connection.active(),
        mlflow.start_run(run_id=run),
    ):
        info = mlflow.pytorch.log_model(
            network.module,
            name=MODEL_NAME,
            pip_requirements=requirements_of("torch", "numpy"),
            **arguments,
        )
    identity: str = info.model_id
    return identity


def _registered(
    connection: Connection, run: Run, publication: Publication, network: Network
) -> ModelVersion:
    """Return the version of a run, with its aliases; register it if there is none."""
    client, name = connection.client, network.name
    found = client.search_model_versions(f"name='{name}' and run_id='{run.info.run_id}'")
    if found:
        version = found[0]
    else:
        tags = {**publication.tags, CONTENT_HASH: publication.content_hash}
        with connection.active():
            version = mlflow.register_model(
                f"models:/{run.data.tags[LOGGED_MODEL]}", name, tags=tags
            )
    if not version.description:
        client.update_model_version(name, version.version, description=_description(publication))
    if not client.get_registered_model(name).description:
        client.update_registered_model(name, network.note)
    for alias in network.aliases:
        client.set_registered_model_alias(name, alias, version.version)
    return version


def _description(publication: Publication) -> str:
    """Return a link to the viewer and the model card, or its first lines if it is too long."""
    link = f"[Slides and predictions]({publication.page}), where `nic view` serves them.\n\n"
    card = publication.model_card
    if len(link + card) <= DESCRIPTION_LENGTH:
        return link + card
    shown = card[: DESCRIPTION_LENGTH - len(link)].rpartition("\n")[0]
    return f"{link}{shown}\n\nThe run's artifact `{MODEL_CARD}` has the whole card."


def _milliseconds() -> int:
    return int(time.time() * 1000)


def _metric_name(text: str) -> str:
    """Replace the characters that MLflow does not accept in a part of a metric's name."""
    return re.sub(r"[^\w.-]+", "_", text)
