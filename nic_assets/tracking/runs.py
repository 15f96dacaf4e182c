"""MLflow: the team's memory of encoders, models and figures.

One MLflow run a trained encoder or slide model, tagged with the Dagster run and asset key; one
registered model an encoder and a target, whose newest version carries the alias ``candidate``.
Networks are registered in PyTorch's exported format (``pt2``: no pickle, no project code needed
to load).

A training does not depend on MLflow. What it wants remembered is kept in order and sent when
MLflow answers; at the end, with the product in the store, the rest must get through, or
:class:`TrackingError` says that this alone is outstanding.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dagster as dg
import mlflow
import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from sqlalchemy.exc import SQLAlchemyError

from nic_assets.tracking.database import make_database
from nic_core.cohort import Cohort, ImportedEncoder, RegisteredEncoder
from nic_core.encoders import EncoderError
from nic_core.models.comparison import Champion, Verdict
from nic_core.steps import digest
from nic_core.steps.slide_models import PREDICTIONS, UNLOGGED
from nic_core.store import Store

DEFAULT_UI = "http://127.0.0.1:5000"
CANDIDATE, CHAMPION = "candidate", "champion"
PRODUCT = "product"  # among a run's artifacts: the folder of the store
DATASETS = {"patch task": "patch_task", "target": "target_folds"}  # by nic_core.reports' kinds

LIVE_PAUSE = 300.0  # seconds without a try after a fault while a training runs; a try may take 20
LAST_PAUSES = (1.0, 5.0, 15.0)  # between the tries at its end
# of a client: no connection, a locked database, an error of the server, no place for artifacts
FAULTS = (MlflowException, SQLAlchemyError, OSError)

# a table that grows is read back at each addition: no news either
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# its address may hold a password
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# a training waits for the client: the tries that matter are ours
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
# that a new database gets its tables is no news to a user
logging.getLogger("alembic").setLevel(logging.WARNING)
# faults are raised as well
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


class TrackingError(Exception):
    """MLflow did not answer; says what is safe and what is outstanding. It may later."""


@dataclass(frozen=True)
class Tracking:
    """Where MLflow keeps its records: by default a SQLite file and artifacts in the store.

    ``artifacts`` is where a new experiment keeps its files; None leaves that to the server.
    """

    uri: str = field(repr=False)
    artifacts: str | None
    ui: str = DEFAULT_UI

    @classmethod
    def in_store(cls, store: Store) -> Tracking:
        """``$MLFLOW_TRACKING_URI`` where set, else the store's own database."""
        folder: Path = store.mlflow
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        if uri.startswith("http"):
            return cls(uri, None, without_secrets(uri).rstrip("/"))
        return cls(uri, (folder / "artifacts").as_uri())

    @property
    def client(self) -> mlflow.MlflowClient:
        make_database(self.uri)
        return mlflow.MlflowClient(self.uri)

    @contextmanager
    def run(
        self,
        context: dg.AssetExecutionContext,
        *,
        cohort: Cohort,
        partition: str,
        experiment: str,
        product: Path,
    ) -> Iterator[TrackedRun]:
        """An MLflow run for one partition of the asset that ``context`` materializes.

        The block makes ``product`` in the store, and tells the run of it. After the block all is
        logged.

        Raises
        ------
        TrackingError
            The block succeeded, but MLflow does not answer.
        """
        tags = {
            "cohort": cohort.name,
            "dagster/run_id": context.run.run_id,
            "dagster/asset_key": context.asset_key.to_user_string(),
            "dagster/partition": partition,
        }
        if commit := git_commit():
            tags["git/commit"] = commit

        def ended(dagster_run: str) -> bool:
            known = context.instance.get_run_by_id(dagster_run)
            return known is not None and known.is_finished

        run = TrackedRun(self, experiment, tags, ended, context.log.warning)
        try:
            yield run
        except BaseException:
            run.fail()
            raise
        run.finish(product)

    def pinned_versions(
        self, cohort: Cohort, warn: Callable[[str], None], known: Collection[str]
    ) -> dict[str, str]:
        """A version for every encoder that the cohort takes from the registry: its entry, and
        the weights that carry the alias.

        One that cannot be looked up gives a warning. If it is among the ``known`` it is left
        out: it is taken as unchanged. Else its version is its entry, and who makes it is told.
        """
        found = {}
        for entry in cohort.encoders:
            if isinstance(entry, RegisteredEncoder):
                try:
                    found[entry.name] = digest(entry, self._pinned(entry).tags["weights_hash"])
                except (TrackingError, EncoderError) as error:
                    warn(str(error))
                    if entry.name not in known:
                        found[entry.name] = digest(entry)
        return found

    @contextmanager
    def fetched(self, entry: RegisteredEncoder) -> Iterator[tuple[ImportedEncoder, str]]:
        """A registered encoder as a file entry of the same name, and its version's page.

        Raises
        ------
        EncoderError
            No version carries the alias, or its run does not hold the encoder's folder.
        TrackingError
            MLflow does not answer.
        """
        found = self._pinned(entry)
        with tempfile.TemporaryDirectory() as folder:
            with self._answering(entry.version):
                path = _download(self.client, found, PRODUCT, folder)
            if path is None:
                raise EncoderError(
                    f"encoder '{entry.name}': the run of {entry.version} (version "
                    f"{found.version}) has no '{PRODUCT}': it was imported from a file, or made "
                    "by an older version; import the file, or train it again"
                )
            ready = ImportedEncoder(name=entry.name, objective="imported", file=path)
            yield ready, self.page(found.name, found.version)

    def page(self, name: str, number: str) -> str:
        """Of a registered version."""
        return f"{self.ui}/#/models/{name}/versions/{number}"

    def _pinned(self, entry: RegisteredEncoder) -> ModelVersion:
        name, alias = entry.version.split("@")
        with self._answering(entry.version):
            found = _by_alias(self.client, name, alias)
        if found is None:
            raise EncoderError(
                f"encoder '{entry.name}': the registry has no {entry.version}; set the alias "
                f"'{alias}' on a version of '{name}' in MLflow"
            )
        return found

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        try:
            yield
        except FAULTS as error:
            # `from None`: an address with a password may stand in the cause
            raise TrackingError(
                f"MLflow cannot be asked for {what} ({_reason(error)}); run again when it answers"
            ) from None


class TrackedRun:
    """An MLflow run; the library's :class:`~nic_core.tracker.Tracker` in MLflow's terms.

    Every call is kept until MLflow has taken it and those before it, so that none is lost and
    none done twice. ``figures`` keeps what was drawn, for an asset to show the same pictures.
    """

    def __init__(
        self,
        tracking: Tracking,
        experiment: str,
        tags: Mapping[str, str],
        ended: Callable[[str], bool],
        warn: Callable[[str], None],
    ) -> None:
        self.figures: dict[str, Figure] = {}
        self.verdict: Verdict | None = None
        self._tracking = tracking
        self._tags = tags
        self._warn = warn
        self._tables: dict[str, list[pl.DataFrame]] = {}
        self._datasets: dict[str, str] = {}
        self._experiment = self._id = self._model = ""
        self._version: ModelVersion | None = None
        self._next_try = 0.0
        self._outstanding: deque[Callable[[], object]] = deque()
        self._keep(lambda: self._open(experiment, ended))

    @property
    def url(self) -> str:
        """Of the run, once it is finished."""
        return f"{self._tracking.ui}/#/experiments/{self._experiment}/runs/{self._id}"

    @property
    def page(self) -> str:
        """Of the version that was registered, once the run is finished; empty if none was."""
        if self._version is None:
            return ""
        return self._tracking.page(self._version.name, self._version.version)

    def params(self, values: Mapping[str, str | int | float]) -> None:
        params = [Param(name, str(value)) for name, value in values.items()]
        self._keep(lambda: self._client.log_batch(self._id, params=params))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        now = _milliseconds()
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._keep(lambda: self._client.log_batch(self._id, metrics))

    def table(self, name: str, rows: pl.DataFrame) -> None:
        self._tables.setdefault(name, []).append(rows)

    def figure(self, name: str, figure: Figure) -> None:
        self.figures[name] = figure
        self._keep(lambda: self._client.log_figure(self._id, figure, f"{name}.png"))

    def card(self, card: Mapping[str, Any]) -> None:
        """The product's JSON card, as it lies in the store."""
        self._keep(lambda: self._client.log_dict(self._id, dict(card), "card.json"))

    def files(self, folder: Path) -> None:
        """The product's folder: what a registry alone can give back."""

        def send() -> None:
            for path in folder.iterdir():
                if path.name != UNLOGGED:
                    self._client.log_artifact(self._id, str(path), PRODUCT)

        self._keep(send)

    def inputs(self, data: Mapping[str, tuple[Path, str]]) -> None:
        """The data sets that the product was made of: asset and partition to place and digest.

        MLflow takes up to 36 letters of a digest.
        """
        self._datasets = {name: identity[:36] for name, (_, identity) in data.items()}
        inputs = [
            DatasetInput(
                Dataset(
                    name,
                    self._datasets[name],
                    "local",
                    json.dumps({"uri": place.resolve().as_uri()}),
                ),
                [InputTag("mlflow.data.context", "training")],
            )
            for name, (place, _) in data.items()
        ]
        self._keep(lambda: self._client.log_inputs(self._id, inputs))

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
        """Register ``module`` under ``name``, as :data:`CANDIDATE` and other ``aliases``.

        ``example`` fixes the signature: its first axis is the batch, the others are constant.
        """
        with torch.no_grad():
            output = module(example)
        # torch's own remark on tensors that share memory, about an archive it writes correctly
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")

        def log_model() -> None:
            with _mlflow_at(self._tracking.uri), mlflow.start_run(run_id=self._id):
                info = mlflow.pytorch.log_model(
                    module,
                    name="model",
                    signature=infer_signature(_array(example), _array(output)),
                    input_example=_array(example),
                    pip_requirements=[f"{p}=={_public(p)}" for p in ("torch", "numpy")],
                )
            self._model = info.model_id

        def make_version() -> None:
            with _mlflow_at(self._tracking.uri):
                self._version = mlflow.register_model(
                    f"models:/{self._model}", name, tags={**self._tags, **tags}
                )

        def describe() -> None:
            assert self._version is not None
            number = self._version.version
            self._client.update_model_version(name, number, description=description)
            for alias in (CANDIDATE, *aliases):
                self._client.set_registered_model_alias(name, alias, number)

        for entry in (log_model, make_version, describe):
            self._keep(entry)

    def summary(self, results: pl.DataFrame) -> None:
        """Final figures (:data:`nic_core.reports.RESULT_SCHEMA`): values, bounds and the table.

        They are figures of the version that was registered before, if one was, and of the data
        set that they are about.
        """

        def send() -> None:
            now, metrics = _milliseconds(), []
            for row in results.iter_rows(named=True):
                # an encoder has many tasks, a model one target
                parts = ("part", *(("about",) if row["kind"] == "patch task" else ()))
                name = "/".join(_metric_name(row[p]) for p in (*parts, "model", "metric"))
                about = f"{DATASETS.get(row['kind'])}/{row['about']}"
                data = {"dataset_name": about, "dataset_digest": self._datasets.get(about)}
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
                                **(data if about in self._datasets else {}),
                            )
                        )
            self._client.log_batch(self._id, metrics)

        self._keep(send)
        self.table("results", results)

    def challenge(self, judge: Callable[[Champion | None], Verdict]) -> None:
        """Let ``judge`` compare what was registered with the champion of its name, whoever made
        that one; if it is better it becomes the champion. ``verdict`` holds what was said."""

        def decide() -> None:
            assert self._version is not None
            name, number = self._version.name, self._version.version
            if self.verdict is None:
                self.verdict = judge(self._champion(name))
            if self.verdict.better:
                self._client.set_registered_model_alias(name, CHAMPION, number)
            self._client.set_model_version_tag(name, number, CHAMPION, self.verdict.explanation)

        self._keep(decide)

    def finish(self, product: Path) -> None:
        """Send what is outstanding; see :meth:`Tracking.run`."""
        for name, parts in self._tables.items():
            rows = pl.concat(parts).to_dict(as_series=False)
            file = f"{name}.json"
            self._outstanding.append(
                lambda rows=rows, file=file: self._client.log_table(self._id, rows, file)  # type: ignore[misc]
            )
        self._outstanding.append(lambda: self._client.set_terminated(self._id, "FINISHED"))
        for pause in (*LAST_PAUSES, None):
            try:
                self._send()
                return
            except FAULTS as error:
                if pause is None:
                    # `from None`: an address with a password may stand in the cause
                    raise TrackingError(
                        f"{product} is made and safe, but MLflow does not take its record "
                        f"({_reason(error)}); run again when it answers: no training is repeated"
                    ) from None
            time.sleep(pause)

    def fail(self) -> None:
        """Mark the run as failed, if MLflow can be told."""
        try:
            if self._id:
                self._client.set_terminated(self._id, "FAILED")
        except FAULTS as error:
            self._warn(f"MLflow cannot be told that this failed ({_reason(error)})")

    @property
    def _client(self) -> mlflow.MlflowClient:
        return self._tracking.client

    def _open(self, experiment: str, ended: Callable[[str], bool]) -> None:
        client, tags = self._client, self._tags
        known = client.get_experiment_by_name(experiment)
        at = self._tracking.artifacts
        self._experiment = (
            known.experiment_id
            if known
            else client.create_experiment(experiment, f"{at}/{experiment}" if at else None)
        )
        # an attempt that was killed, or could not reach MLflow any more, would run for ever
        same = ("cohort", "dagster/asset_key", "dagster/partition")
        others = client.search_runs(
            [self._experiment],
            " and ".join(f"tags.`{tag}` = '{tags[tag]}'" for tag in same)
            + " and attributes.status = 'RUNNING'",
        )
        for other in others:
            maker = other.data.tags["dagster/run_id"]
            if maker == tags["dagster/run_id"] or ended(maker):
                client.set_terminated(other.info.run_id, "KILLED")
        self._id = client.create_run(
            self._experiment, tags=dict(tags), run_name=tags["dagster/partition"]
        ).info.run_id

    def _champion(self, name: str) -> Champion | None:
        found = _by_alias(self._client, name, CHAMPION)
        if found is None:
            return None
        title = f"version {found.version} ({found.tags.get('encoder', 'encoder unknown')})"
        with tempfile.TemporaryDirectory() as folder:
            path = _download(self._client, found, f"{PRODUCT}/{PREDICTIONS}", folder)
            try:
                return Champion(title, None if path is None else pl.read_parquet(path))
            except pl.exceptions.PolarsError:
                return Champion(title, None)

    def _keep(self, entry: Callable[[], object]) -> None:
        self._outstanding.append(entry)
        if time.monotonic() < self._next_try:
            return
        try:
            self._send()
        except FAULTS as error:
            self._next_try = time.monotonic() + LIVE_PAUSE
            self._warn(f"MLflow does not answer ({_reason(error)}): it is told later")

    def _send(self) -> None:
        while self._outstanding:
            self._outstanding[0]()
            self._outstanding.popleft()


def without_secrets(text: str) -> str:
    """Text without the user and password of any address in it."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


@cache
def git_commit() -> str | None:
    """The commit of this project's checkout, ``-dirty`` if files differ; None if it is none."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or not for this user
        return None


@contextmanager
def _mlflow_at(uri: str) -> Iterator[None]:
    """The address of MLflow's own functions, which keep it in the process and its environment."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None: as if never set


def _by_alias(client: mlflow.MlflowClient, name: str, alias: str) -> ModelVersion | None:
    try:
        number = client.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if number is None else client.get_model_version(name, str(number))


def _download(
    client: mlflow.MlflowClient, found: ModelVersion, path: str, folder: str
) -> Path | None:
    """An artifact of a version's run in ``folder``; None if it has no such."""
    if found.run_id is None:
        return None
    beside = client.list_artifacts(found.run_id, path.rpartition("/")[0])
    if all(item.path != path for item in beside):
        return None
    return Path(client.download_artifacts(found.run_id, path, folder))


def _reason(error: Exception) -> str:
    return without_secrets(str(error).strip().partition("\n")[0])[:300] or type(error).__name__


def _milliseconds() -> int:
    return int(time.time() * 1000)


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().numpy()


def _metric_name(text: str) -> str:
    """The letters that MLflow takes in a name, with its slash kept for the parts."""
    return re.sub(r"[^\w.-]+", "_", text)


def _public(package: str) -> str:
    """The version without a local part such as ``+cpu``, which no index serves."""
    return version(package).partition("+")[0]
