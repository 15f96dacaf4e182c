"""One MLflow run: a list of calls that survives interruptions of MLflow.

A training does not depend on MLflow. Each call is listed, and sent in order as soon as MLflow
answers. At the end, with the product in the store, the remaining calls are retried a few times;
if they still fail, :class:`TrackingError` says that only the logging is outstanding. If a person
deletes the run or its experiment meanwhile, all calls are sent again, to a new run.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature

from nic_assets.tracking.connection import (
    CONNECTION_ERRORS,
    Connection,
    TrackingError,
    TrackingUnavailableError,
    does_not_exist,
    is_unavailable,
    reason,
)
from nic_assets.tracking.registry import (
    CANDIDATE,
    CHAMPION,
    PRODUCT_FOLDER,
    find_champion,
    verify_exported,
)
from nic_core.models.comparison import Champion, Verdict
from nic_core.steps.slide_models import UNLOGGED

# kind of a result (nic_core.reports.RESULT_SCHEMA) to the asset that is its data set
DATASETS = {"patch task": "patch_task", "target": "target_folds"}

RETRY_AFTER = 300.0  # s after a failed call before the next; a failing call may take 20 s
FINAL_RETRY_DELAYS = (1.0, 5.0, 15.0)  # s between the attempts at the end of a run
DIGEST_LENGTH = 36  # characters that MLflow stores of a data set's digest


class TrackedRun:
    """An MLflow run; implements the library's :class:`~nic_core.tracker.Tracker`.

    Attributes
    ----------
    figures
        Every logged figure by name, for the asset's metadata.
    verdict
        Result of :meth:`compare_with_champion`, once the run is finished.
    """

    def __init__(
        self,
        connection: Connection,
        experiment: str,
        tags: Mapping[str, str],
        is_finished: Callable[[str], bool],
        warn: Callable[[str], None],
    ) -> None:
        """List the creation of the run.

        Parameters
        ----------
        tags
            Tags of the run and of the version that it registers.
        is_finished
            Whether a Dagster run, given by its id, is finished.
        warn
            Receives a message when MLflow does not answer.
        """
        self.figures: dict[str, Figure] = {}
        self.verdict: Verdict | None = None
        self._connection = connection
        self._tags = tags
        self._warn = warn
        self._tables: dict[str, list[pl.DataFrame]] = {}
        self._datasets: dict[str, str] = {}
        self._experiment = self._id = self._model = ""
        self._version: ModelVersion | None = None
        self._retry_at = 0.0
        self._calls: list[Callable[[], object]] = []
        self._sent = 0
        self._repeated = False
        self._enqueue(lambda: self._create(experiment, is_finished))

    @property
    def url(self) -> str:
        """URL of the run, once it is finished."""
        return f"{self._connection.ui}/#/experiments/{self._experiment}/runs/{self._id}"

    @property
    def page(self) -> str:
        """URL of the registered version, once the run is finished; empty if it registered none."""
        if self._version is None:
            return ""
        return self._connection.page(self._version.name, self._version.version)

    def params(self, values: Mapping[str, str | int | float]) -> None:
        """Log the run's settings."""
        params = [Param(name, str(value)) for name, value in values.items()]
        self._enqueue(lambda: self._client.log_batch(self._id, params=params))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log values after a step."""
        now = _milliseconds()
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._enqueue(lambda: self._client.log_batch(self._id, metrics))

    def table(self, name: str, rows: pl.DataFrame) -> None:
        """Add rows to a table, which is logged when the run finishes."""
        self._tables.setdefault(name, []).append(rows)

    def figure(self, name: str, figure: Figure) -> None:
        """Log a figure as PNG."""
        self.figures[name] = figure
        self._enqueue(lambda: self._client.log_figure(self._id, figure, f"{name}.png"))

    def card(self, card: Mapping[str, Any]) -> None:
        """Log the product's JSON card."""
        self._enqueue(lambda: self._client.log_dict(self._id, dict(card), "card.json"))

    def files(self, folder: Path) -> None:
        """Log the product's files, so that the registry alone can restore the product."""

        def log_files() -> None:
            for path in folder.iterdir():
                if path.name != UNLOGGED:
                    self._client.log_artifact(self._id, str(path), PRODUCT_FOLDER)

        self._enqueue(log_files)

    def inputs(self, data: Mapping[str, tuple[Path, str]]) -> None:
        """Log the data sets of the product: ``asset/partition`` to path and digest."""
        self._datasets = {name: identity[:DIGEST_LENGTH] for name, (_, identity) in data.items()}
        inputs = [
            DatasetInput(
                Dataset(
                    name,
                    self._datasets[name],
                    "local",
                    json.dumps({"uri": path.resolve().as_uri()}),
                ),
                [InputTag("mlflow.data.context", "training")],
            )
            for name, (path, _) in data.items()
        ]
        self._enqueue(lambda: self._client.log_inputs(self._id, inputs))

    def register(
        self,
        module: torch.nn.Module,
        example: torch.Tensor,
        *,
        name: str,
        description: str,
        tags: Mapping[str, str],
        aliases: tuple[str, ...] = (),
    ) -> None:
        """Register ``module`` as a version of ``name``, as :data:`CANDIDATE` and ``aliases``.

        The module is logged as torch.export archive (pt2), which loads without this package and
        without pickle. The logged files are verified before anything is registered; the calls
        from then on raise :class:`~nic_assets.tracking.registry.ModelFormatError` for any other
        format.

        Parameters
        ----------
        example
            An input that fixes the signature: its first axis is the batch, the others are
            constant.
        """
        with torch.no_grad():
            output = module(example)
        # PyTorch warns of tensors that share memory, although it writes them correctly
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")

        def log_model() -> None:
            with self._connection.active(), mlflow.start_run(run_id=self._id):
                info = mlflow.pytorch.log_model(
                    module,
                    name="model",
                    serialization_format="pt2",
                    signature=infer_signature(_array(example), _array(output)),
                    input_example=_array(example),
                    pip_requirements=[f"{p}=={_public_version(p)}" for p in ("torch", "numpy")],
                )
            self._model = info.model_id

        def create_version() -> None:
            with self._connection.active():
                self._version = mlflow.register_model(
                    f"models:/{self._model}", name, tags={**self._tags, **tags}
                )

        def describe() -> None:
            assert self._version is not None
            number = self._version.version
            self._client.update_model_version(name, number, description=description)
            for alias in (CANDIDATE, *aliases):
                self._client.set_registered_model_alias(name, alias, number)

        self._enqueue(log_model)
        self._enqueue(lambda: verify_exported(self._connection, self._model))
        self._enqueue(create_version)
        self._enqueue(describe)

    def summary(self, results: pl.DataFrame) -> None:
        """Log final results (:data:`nic_core.reports.RESULT_SCHEMA`): values, bounds and table.

        Each value is linked to the registered version, if there is one, and to its data set.
        """

        def log_results() -> None:
            now, metrics = _milliseconds(), []
            for row in results.iter_rows(named=True):
                # an encoder has results on several tasks, a model on one target
                parts = ("part", *(("about",) if row["kind"] == "patch task" else ()))
                name = "/".join(_metric_name(row[p]) for p in (*parts, "model", "metric"))
                dataset = f"{DATASETS.get(row['kind'])}/{row['about']}"
                data = {"dataset_name": dataset, "dataset_digest": self._datasets.get(dataset)}
                for suffix in ("value", "low", "high"):
                    value = row[suffix]
                    if value is not None and math.isfinite(value):
                        metrics.append(
                            Metric(
                                name if suffix == "value" else f"{name}/{suffix}",
                                value,
                                now,
                                0,
                                model_id=self._model or None,
                                **(data if dataset in self._datasets else {}),
                            )
                        )
            self._client.log_batch(self._id, metrics)

        self._enqueue(log_results)
        self.table("results", results)

    def compare_with_champion(self, judge: Callable[[Champion | None], Verdict]) -> None:
        """Compare the registered version with the champion of its name, and set the aliases.

        The alias :data:`CHAMPION` moves to the version only if the verdict says so. The version's
        tag ``champion`` and its description give the reason in either case.

        Parameters
        ----------
        judge
            Returns the verdict; receives None if no version is the champion yet.
        """

        def decide() -> None:
            assert self._version is not None
            name, number = self._version.name, self._version.version
            if self.verdict is None:
                self.verdict = judge(find_champion(self._connection, name))
            if self.verdict.better:
                self._client.set_registered_model_alias(name, CHAMPION, number)
            self._client.set_model_version_tag(name, number, CHAMPION, self.verdict.explanation)
            description = self._client.get_model_version(name, number).description or ""
            sentence = f"Comparison with the champion: {self.verdict.explanation}."
            if sentence not in description:
                self._client.update_model_version(
                    name, number, description=f"{description}\n\n{sentence}".strip()
                )

        self._enqueue(decide)

    def finish(self, product: Path) -> None:
        """Send the remaining calls and mark the run as finished.

        Raises
        ------
        TrackingError
            MLflow does not answer (:class:`TrackingUnavailableError`), or refuses a call;
            ``product`` is in the store.
        """
        for name, parts in self._tables.items():
            rows = pl.concat(parts).to_dict(as_series=False)
            file = f"{name}.json"
            self._calls.append(
                lambda rows=rows, file=file: self._client.log_table(self._id, rows, file)  # type: ignore[misc]
            )
        self._calls.append(lambda: self._client.set_terminated(self._id, "FINISHED"))
        for delay in (*FINAL_RETRY_DELAYS, None):
            try:
                self._send()
                return
            except CONNECTION_ERRORS as error:
                # `from None`: the cause may contain a URL with a password
                if not is_unavailable(error):
                    raise TrackingError(
                        f"{product} is in the store, but MLflow refuses its log ({reason(error)}); "
                        "correct it in MLflow and materialize the partition again: no training is "
                        "repeated"
                    ) from None
                if delay is None:
                    raise TrackingUnavailableError(
                        f"{product} is in the store, but MLflow does not accept its log "
                        f"({reason(error)}); materialize the partition again when it does: no "
                        "training is repeated"
                    ) from None
            time.sleep(delay)

    def end(self, status: str) -> None:
        """Mark the run as ``FAILED`` or ``KILLED``, unless MLflow failed to answer a moment ago."""
        if not self._id or time.monotonic() < self._retry_at:
            return
        try:
            self._client.set_terminated(self._id, status)
        except CONNECTION_ERRORS as error:
            self._warn(f"{_problem(error)}: the run is not marked as {status}")

    @property
    def _client(self) -> mlflow.MlflowClient:
        return self._connection.client

    def _create(self, experiment: str, is_finished: Callable[[str], bool]) -> None:
        """Create the run and, if needed, its experiment; end abandoned runs of the partition."""
        client, tags = self._client, self._tags
        self._experiment = self._experiment_id(experiment)
        # a run whose process was killed, or that lost the connection, would stay RUNNING
        partition = ("cohort", "dagster/asset_key", "dagster/partition")
        others = client.search_runs(
            [self._experiment],
            " and ".join(f"tags.`{tag}` = '{tags[tag]}'" for tag in partition)
            + " and attributes.status = 'RUNNING'",
        )
        for other in others:
            dagster_run = other.data.tags["dagster/run_id"]
            if dagster_run == tags["dagster/run_id"] or is_finished(dagster_run):
                client.set_terminated(other.info.run_id, "KILLED")
        self._id = client.create_run(
            self._experiment, tags=dict(tags), run_name=tags["dagster/partition"]
        ).info.run_id

    def _experiment_id(self, name: str) -> str:
        """Return the id of an experiment; create it, or restore it if it was deleted.

        MLflow reserves the name of a deleted experiment until ``mlflow gc`` removes it.
        """
        client, artifacts = self._client, self._connection.artifacts
        known = client.get_experiment_by_name(name)
        if known is None:
            try:
                created: str = client.create_experiment(
                    name, f"{artifacts}/{name}" if artifacts else None
                )
                return created
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # a parallel step created it
                    raise
                known = client.get_experiment_by_name(name)
                assert known is not None
        if known.lifecycle_stage == "deleted":
            client.restore_experiment(known.experiment_id)
            self._warn(
                f"the MLflow experiment '{name}' was deleted; it was restored with its runs, since "
                "its name cannot be used again before mlflow gc"
            )
        identity: str = known.experiment_id
        return identity

    def _enqueue(self, call: Callable[[], object]) -> None:
        """List a call and send what is left, unless MLflow failed to answer a moment ago."""
        self._calls.append(call)
        if time.monotonic() < self._retry_at:
            return
        try:
            self._send()
        except CONNECTION_ERRORS as error:
            self._retry_at = time.monotonic() + RETRY_AFTER
            self._warn(f"{_problem(error)}: logging is retried later")

    def _send(self) -> None:
        """Make the remaining calls in order; if the run was deleted, make all of them once more."""
        while self._sent < len(self._calls):
            try:
                self._calls[self._sent]()
            except MlflowException:
                if self._repeated or not self._is_deleted():
                    raise
                self._warn(
                    f"the MLflow run {self._id} was deleted: everything is logged again to a new "
                    "run"
                )
                self._repeated, self._sent = True, 0
            else:
                self._sent += 1

    def _is_deleted(self) -> bool:
        """Return whether MLflow answers that the run is deleted."""
        if not self._id:
            return False
        try:
            deleted: bool = self._client.get_run(self._id).info.lifecycle_stage == "deleted"
            return deleted
        except MlflowException as error:
            return does_not_exist(error)


def _problem(error: Exception) -> str:
    verb = "does not answer" if is_unavailable(error) else "refuses a call"
    return f"MLflow {verb} ({reason(error)})"


def _milliseconds() -> int:
    return int(time.time() * 1000)


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().numpy()


def _metric_name(text: str) -> str:
    """Replace the characters that MLflow does not accept in a part of a metric's name."""
    return re.sub(r"[^\w.-]+", "_", text)


def _public_version(package: str) -> str:
    """Return the installed version without a local part such as ``+cpu``, unknown to an index."""
    return version(package).partition("+")[0]
