"""MLflow: registration, outages, live curves, the format of registered models, champions."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import mlflow
import mlflow.cli
import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException, RestException
from mlflow.models.model import ModelInfo
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError

from nic_assets.build import build_defs
from nic_assets.cli import _registered_encoders
from nic_assets.tracking import ModelFormatError, Tracking, TrackingError
from nic_assets.tracking.connection import is_unavailable, without_secrets
from nic_assets.tracking.database import create_database, database_uri
from nic_assets.tracking.experiments import experiment_id
from nic_assets.tracking.publications import Network, Publication
from nic_assets.tracking.resource import git_commit
from nic_assets.tracking.runs import publish, settle_champion
from nic_core import steps
from nic_core.cli.encoder import ListedEncoder
from nic_core.cohort import (
    Cohort,
    EncoderSpec,
    ModelSettings,
    RegisteredEncoder,
    RegressionTarget,
    load_cohort,
)
from nic_core.encoders import EncoderError
from nic_core.encoders.files import read_card
from nic_core.encoders.training_loop import _Run
from nic_core.models.comparison import compare_with_champion, permutation_control
from nic_core.models.cross_validation import CrossValidation
from nic_core.reports import RESULT_SCHEMA
from nic_core.steps.slide_models import PREDICTIONS
from nic_core.store import PatchTaskKey, Store

ENCODER = "mtl-4"
LOG_MODEL = mlflow.pytorch.log_model


@pytest.fixture(scope="module")
def one_task(tiny_cohort, tmp_path_factory) -> tuple[Cohort, Path]:
    """A cohort whose encoder trains on one task within seconds; a store with it and a database."""
    cohort, store = load_cohort(tiny_cohort), Store(tmp_path_factory.mktemp("tasks") / "store")
    task = cohort.patch_tasks[0].name
    steps.make_patch_task(cohort, store, PatchTaskKey(geometry="128px-0.5um", task=task))
    create_database(database_uri(store))  # once: it takes seconds
    quick = EncoderSpec(
        name=ENCODER, objective="supervised", tasks=(task,), patches_seen=48, batch=16
    )
    return cohort.with_encoder(quick), store.root


class Lab:
    """Trains and registers one encoder; calls a function after chosen epochs of its training."""

    def __init__(self, cohort: Cohort, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = Store(root)
        self.cohort = cohort
        self.instance = dg.DagsterInstance.ephemeral()
        self.epochs = 0
        self.after_epoch: dict[int, Callable[[], object]] = {}
        train_epoch = _Run.train_epoch

        def counted(run, progress):
            result = train_epoch(run, progress)
            self.epochs += 1
            self.after_epoch.pop(self.epochs, lambda: None)()
            return result

        monkeypatch.setattr(_Run, "train_epoch", counted)
        # the step's own retries
        monkeypatch.setattr(dg.RetryPolicy, "calculate_delay", lambda policy, attempt: 0)

    def materialize(self, asset: str = "encoder") -> dg.ExecuteInProcessResult:
        job = build_defs(self.cohort, self.store).resolve_implicit_global_asset_job_def()
        return job.execute_in_process(
            instance=self.instance,
            asset_selection=[dg.AssetKey(asset)],
            partition_key=ENCODER,
            raise_on_error=False,
        )

    @property
    def log(self) -> str:
        """Every event that Dagster recorded."""
        found = self.instance.get_runs()
        return "".join(repr(self.instance.all_logs(run.run_id)) for run in found)

    def register(self) -> dg.ExecuteInProcessResult:
        return self.materialize("registered_encoder")

    def registered(self) -> dg.AssetMaterialization | None:
        event = self.instance.get_latest_materialization_event(dg.AssetKey("registered_encoder"))
        return None if event is None else event.asset_materialization

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.store.mlflow / 'mlflow.db'}")


@pytest.fixture
def lab(one_task, tmp_path, monkeypatch) -> Lab:
    cohort, products = one_task
    shutil.copytree(products, tmp_path / "store")
    return Lab(cohort, tmp_path / "store", monkeypatch)


class Server:
    """An MLflow server that can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
            *("--host", "127.0.0.1", "--port", str(self.port)),
        ]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while True:
            assert self.process.poll() is None, "the server did not start"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.1)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    yield server
    server.kill()


def versions(client: mlflow.MlflowClient, name: str) -> dict[str, dict[str, str]]:
    """Version to tags."""
    return {str(v.version): v.tags for v in client.search_model_versions(f"name='{name}'")}


def runs(client: mlflow.MlflowClient) -> list[mlflow.entities.Run]:
    """The runs of encoders that are not deleted, oldest first."""
    experiment = client.get_experiment_by_name("encoders").experiment_id
    return list(client.search_runs([experiment], order_by=["attributes.start_time"]))


def loss_steps(client: mlflow.MlflowClient, run: mlflow.entities.Run) -> list[int]:
    return sorted(m.step for m in client.get_metric_history(run.info.run_id, "loss"))


@pytest.mark.integration
@pytest.mark.slow
def test_mlflow_killed_in_a_training_delays_the_registration_alone(
    lab, server, monkeypatch, capfd, tmp_path
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://team:hunter2@127.0.0.1:{server.port}")
    server.start()
    lab.after_epoch[2] = server.kill  # the first epoch is logged, the second is not
    assert lab.materialize().success
    assert lab.log.count("MLflow shows no live curves of this training") == 1
    trained, weights = lab.epochs, read_card(lab.store.encoder(ENCODER)).weights_hash
    assert trained > 2
    outage = lab.register()
    assert not outage.success
    assert "MLflow does not answer the request for the registration of encoder" in lab.log
    attempts = [e.event_type_value for e in outage.all_events].count("STEP_UP_FOR_RETRY")
    assert attempts == 3
    assert lab.registered() is None

    server.start()
    client = mlflow.MlflowClient(f"http://127.0.0.1:{server.port}")
    [live] = runs(client)
    assert (live.info.status, loss_steps(client, live)) == ("RUNNING", [1])
    assert lab.register().success
    assert lab.epochs == trained
    (tags,) = versions(client, f"encoder-{ENCODER}").values()
    assert tags["weights_hash"] == weights
    [run] = runs(client)
    assert (run.info.run_id, run.info.status) == (live.info.run_id, "FINISHED")
    assert loss_steps(client, run) == list(range(1, trained + 1))
    page = f"http://127.0.0.1:{server.port}/#/experiments/{run.info.experiment_id}/runs/"
    link = lab.registered().metadata["mlflow_run"].value
    assert link == f"{page}{run.info.run_id}?workflowType=machine_learning"

    assert "hunter2" not in lab.log
    assert not [word for word in capfd.readouterr() if "hunter2" in word]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if b"hunter2" in path.read_bytes()]


@pytest.fixture
def impatient() -> Iterator[None]:
    """Set SQLite's timeout for a locked database to 0 s; MLflow sets 20 s."""

    def give_up(connection, cursor, statement, parameters, *_):
        waits = statement.startswith("PRAGMA busy_timeout")
        return ("PRAGMA busy_timeout = 0" if waits else statement), parameters

    event.listen(Engine, "before_cursor_execute", give_up, retval=True)
    yield
    event.remove(Engine, "before_cursor_execute", give_up)


@contextmanager
def locked(database: Path) -> Iterator[None]:
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@pytest.mark.slow
def test_a_database_locked_in_a_training_ends_the_live_curves_alone(lab, impatient):
    lock = locked(lab.store.mlflow / "mlflow.db")
    lab.after_epoch[2] = lock.__enter__
    lab.after_epoch[3] = lambda: lock.__exit__(None, None, None)
    assert lab.materialize().success
    assert lab.log.count("MLflow shows no live curves of this training") == 1
    [live] = runs(lab.client)
    assert (live.info.status, loss_steps(lab.client, live)) == ("RUNNING", [1])
    assert lab.register().success
    [run] = runs(lab.client)
    assert loss_steps(lab.client, run) == list(range(1, lab.epochs + 1))


@pytest.mark.slow
def test_a_failed_training_leaves_a_failed_run_and_the_next_a_whole_one(lab):
    lab.after_epoch[2] = lambda: exec("raise ValueError('a bug')")
    assert not lab.materialize().success
    [failed] = runs(lab.client)
    assert failed.info.status == "FAILED"
    assert lab.materialize().success
    assert lab.register().success
    assert [run.info.status for run in runs(lab.client)] == ["FAILED", "FINISHED"]


@pytest.mark.slow
def test_an_unchanged_encoder_is_registered_once(lab, monkeypatch):
    assert lab.materialize().success
    assert lab.register().success
    client, name = lab.client, f"encoder-{ENCODER}"
    [run] = runs(client)
    [tags] = versions(client, name).values()
    first = lab.registered()

    def unchanged() -> bool:
        again = lab.registered()
        return (
            [found.info.run_id for found in runs(client)] == [run.info.run_id]
            and list(versions(client, name).values()) == [tags]
            and again.metadata["mlflow_run"] == first.metadata["mlflow_run"]
            and again.tags["dagster/data_version"] == first.tags["dagster/data_version"]
        )

    client.delete_registered_model_alias(name, "candidate")
    assert lab.register().success  # a second run
    assert unchanged()
    assert int(client.get_model_version_by_alias(name, "candidate").version) == 1
    lab.instance = dg.DagsterInstance.ephemeral()
    assert lab.register().success  # without Dagster's records, after `dagster run wipe`
    assert unchanged()

    client.delete_model_version(name, "1")
    assert lab.register().success
    assert [found.info.run_id for found in runs(client)] == [run.info.run_id]
    assert list(versions(client, name)) == ["2"]
    client.delete_run(run.info.run_id)
    assert lab.register().success
    [other] = runs(client)
    assert other.info.run_id != run.info.run_id
    assert sorted(versions(client, name)) == ["2", "3"]
    # the training is not recorded any more, so the new run does not name it
    assert "dagster/run_id" not in other.data.tags
    assert loss_steps(client, other) == loss_steps(client, run)


@pytest.mark.slow
def test_an_interrupted_registration_is_made_again_as_a_whole(lab, monkeypatch):
    assert lab.materialize().success
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_inputs", lambda *_: exec("raise ValueError(1)"))
        assert not lab.register().success
    [broken] = runs(lab.client)
    assert lab.register().success
    [run] = runs(lab.client)
    assert run.info.run_id != broken.info.run_id
    assert run.info.status == "FINISHED"
    assert loss_steps(lab.client, run) == list(range(1, lab.epochs + 1))
    assert list(versions(lab.client, f"encoder-{ENCODER}")) == ["1"]


# --- champions -------------------------------------------------------------------------------


def cross_validated(prediction: np.ndarray) -> CrossValidation:
    """A model that predicts the numbers 0 to 39 of 40 patients."""
    units = [f"u{number:02}" for number in range(40)]
    rows = pl.DataFrame(
        {
            "model": "network",
            "split": "cv",
            "unit": units,
            "patient": units,
            "y": np.arange(40.0),
            "prediction": prediction,
        }
    )
    target = RegressionTarget(name="t", kind="regression", column="y")
    empty = pl.DataFrame()
    return CrossValidation(target, ModelSettings(), 8, rows, empty, (), empty, ())


def predictions(error: float) -> np.ndarray:
    return np.arange(40.0) + np.random.default_rng(1).normal(0, error, 40)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    """MLflow's database before the first run; its creation takes seconds."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    create_database(f"sqlite:///{path}")
    return path


@pytest.fixture
def registry(empty_database, tmp_path) -> Registry:
    shutil.copy(empty_database, tmp_path)
    return Registry(tmp_path)


class Registry:
    """Registers versions of ``model-t`` in a new database."""

    def __init__(
        self, root: Path, tracking: Tracking | None = None, database: str | None = None
    ) -> None:
        self.root = root
        self.database = database or f"sqlite:///{root / 'mlflow.db'}"
        self.tracking = tracking or Tracking(self.database, (root / "artifacts").as_uri())
        self.uri = self.tracking.uri
        self.client = self.tracking.client

    def publication(self, content: str, name: str = "model-t", **changes: Any) -> Publication:
        values = {
            "product": "a linear model",
            "experiment": "target-t",
            "run_name": "t",
            "content_hash": content,
            "tags": {"cohort": "x", "encoder": "mtl-4"},
            "params": {"epochs": 2},
            "metrics": [(0, {"loss": 2.0}), (1, {"loss": 1.0})],
            "results": pl.DataFrame(schema=RESULT_SCHEMA),
            "page": "http://127.0.0.1:8765/target/t",
            "data": {},
            "card": {"name": "t"},
            "model_card": "# a linear model",
            "files": None,
            "network": Network(
                name, "linear models", torch.nn.Linear(2, 1), torch.zeros(2, 2), ("candidate",)
            ),
        }
        return Publication(**values | changes)

    def register(
        self,
        prediction: np.ndarray,
        name: str = "model-t",
        warn: Callable[[str], object] = pytest.fail,
    ) -> ModelVersion:
        model = cross_validated(prediction)
        folder = self.root / "model"
        folder.mkdir(exist_ok=True)
        model.predictions.write_parquet(folder / PREDICTIONS)
        content = steps.digest(model.predictions.rows())
        version = publish(
            self.tracking, self.publication(content, name, files=folder), warn=warn
        ).version
        settle_champion(
            self.tracking,
            version,
            lambda champion: compare_with_champion(
                model, champion, permutation_control(model), encoder="mtl-4", weights_hash="abc"
            ),
        )
        return self.client.get_model_version(name, str(version.version))

    def holder(self, alias: str) -> int | None:
        """The number of the version that has an alias."""
        number = self.client.get_registered_model("model-t").aliases.get(alias)
        return None if number is None else int(number)


@pytest.mark.slow
def test_the_champion_is_the_first_then_a_better_or_chosen_version(registry):
    first = registry.register(predictions(error=10))
    assert "the first of its name" in first.tags["champion"]
    assert registry.holder("champion") == 1
    worse = registry.register(predictions(error=20))
    assert "version 1 (mtl-4) stays champion: Spearman 0." in worse.tags["champion"]
    assert "on 40 units of 40 patients" in worse.tags["champion"]
    assert registry.holder("champion") == 1
    registry.client.set_registered_model_alias("model-t", "champion", "2")
    better = registry.register(predictions(error=0))
    assert "version 2 (mtl-4)" in better.tags["champion"]
    assert registry.holder("champion") == registry.holder("candidate") == 3


@pytest.mark.slow
def test_the_description_of_a_version_has_the_comparison(registry):
    version = registry.register(predictions(error=10))
    reason = version.tags["champion"]
    link = "[Slides and predictions](http://127.0.0.1:8765/target/t), where `nic view` serves them."
    card = "# a linear model\n\n## Comparison with the champion when registered\n\n"
    assert version.description == f"{link}\n\n{card}{reason}."
    registry.client.set_registered_model_alias("model-t", "champion", "1")
    again = registry.register(predictions(error=10))
    assert (again.version, again.description) == (version.version, version.description)


@pytest.mark.slow
def test_a_first_version_that_fails_its_control_is_only_a_candidate(registry):
    random = np.random.default_rng(0).permutation(40.0 + np.arange(40))
    version = registry.register(random)
    assert registry.holder("candidate") == 1
    assert registry.holder("champion") is None
    assert "permutation control" in version.tags["champion"]
    assert "permutation control" in version.description


# --- the format of registered models ---------------------------------------------------------


@pytest.mark.slow
def test_the_list_of_encoders_shows_registered_versions_with_an_alias(registry, monkeypatch):
    tags = {"architecture": "timm", "patch": "224", "mpp": "0.5", "embedding_size": "768"}
    for name in ("encoder-p", "model-p"):
        registry.client.create_registered_model(name)
        for number, given in ((1, {}), (2, tags | {"preset": "phikon"})):
            registry.client.create_model_version(name, registry.root.as_uri(), tags=given)
            if number == 2:
                registry.client.set_registered_model_alias(name, "champion", "2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking.uri)
    listed, problems = _registered_encoders(Store(registry.root))
    licence = "Owkin non-commercial"
    assert listed == [
        ListedEncoder("encoder-p@champion", "registry", "timm", 224, 0.5, 768, licence)
    ]
    assert problems == []


@pytest.mark.slow
def test_the_list_of_encoders_says_that_the_registry_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # no server
    listed, problems = _registered_encoders(Store(tmp_path))
    assert listed == []
    assert "MLflow does not answer the request for the registered encoders" in problems[0]


def test_a_store_without_a_registry_lists_no_registered_encoder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert _registered_encoders(Store(tmp_path)) == ([], [])
    assert not list(tmp_path.iterdir())  # no database was created


def logged_files(registry: Registry) -> list[str]:
    """The files in the folder ``data`` of every logged model."""
    folders = (registry.root / "artifacts").rglob("models/*/artifacts/data")
    return sorted(file.name for folder in folders for file in folder.iterdir())


@pytest.mark.slow
def test_registered_models_are_torch_export_archives(registry):
    registry.register(predictions(error=10))
    assert logged_files(registry) == ["model.pt2"]
    uri = registry.client.get_model_version_download_uri("model-t", "1")
    loaded = torch.export.load(next(Path(uri.removeprefix("file://")).rglob("model.pt2")))
    assert loaded.module()(torch.zeros(3, 2)).shape == (3, 1)


def as_pickle(model: torch.nn.Module, **options: Any) -> ModelInfo:
    """``mlflow.pytorch.log_model`` as versions of MLflow before 3.14 behave by default."""
    return LOG_MODEL(model, **{**options, "serialization_format": "pickle"})


def as_renamed_pickle(model: torch.nn.Module, **options: Any) -> ModelInfo:
    """A pickle in a file with the name of an archive."""
    info = as_pickle(model, **options)
    folder = Path(info.artifact_path.removeprefix("file://")) / "data"
    (folder / "pickle_module_info.txt").unlink()
    (folder / "model.pth").rename(folder / "model.pt2")
    return info


@pytest.mark.slow
@pytest.mark.parametrize(
    ("log_model", "found"),
    [(as_pickle, "found data/model.pth"), (as_renamed_pickle, "found data/model.pt2")],
)
def test_a_pickled_model_is_not_registered(registry, monkeypatch, log_model, found):
    monkeypatch.setattr(mlflow.pytorch, "log_model", log_model)
    with pytest.raises(ModelFormatError, match=found) as refused:
        registry.register(predictions(error=10))
    assert "the model was not registered" in str(refused.value)
    assert logged_files(registry) != []
    assert list(registry.client.search_registered_models()) == []


@pytest.mark.slow
def test_a_refused_model_fails_its_run_and_is_registered_later(registry, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.pytorch, "log_model", as_pickle)
        with pytest.raises(ModelFormatError):
            registry.register(predictions(error=10))
    [refused] = registry.client.search_runs(["1"])
    assert refused.info.status == "FAILED"
    assert int(registry.register(predictions(error=10)).version) == 1
    [run] = registry.client.search_runs(["1"])
    assert run.info.status == "FINISHED"


# --- interruptions ---------------------------------------------------------------------------


@pytest.mark.slow
def test_an_artifact_folder_that_cannot_be_written_is_refused_with_a_remedy(registry, tmp_path):
    (tmp_path / "artifacts").write_text("in the way")
    with pytest.raises(TrackingError, match="MLflow refuses .* registration of a linear model"):
        registry.register(predictions(error=10))
    (tmp_path / "artifacts").unlink()
    assert int(registry.register(predictions(error=10)).version) == 1


# --- what a team reads -----------------------------------------------------------------------


@pytest.mark.slow
def test_experiments_are_of_model_training_and_described(registry):
    registry.register(predictions(error=10))
    tags = registry.client.get_experiment_by_name("target-t").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags["mlflow.note.content"].startswith("Slide models of t: ")
    assert registry.client.get_registered_model("model-t").description == "linear models"


@pytest.mark.slow
def test_results_are_metrics_with_bounds_and_the_card_is_an_artifact(registry):
    row = ("target", "t", "mtl-4", "small grid CNN", "cross-validated", "AUC")
    row += (0.7, 0.6, 0.8, 40, 0.65, 0.1, 0)
    results = pl.DataFrame([row], schema=RESULT_SCHEMA, orient="row")
    long = "# a card\n\n" + "a line of the card\n" * 500
    published = publish(
        registry.tracking,
        registry.publication("c", results=results, model_card=long),
        warn=pytest.fail,
    )
    run = registry.client.get_run(published.version.run_id)
    assert run.info.run_name == "t"
    assert run.data.params == {"epochs": "2"}
    name = "cross-validated/small_grid_CNN/AUC"
    assert run.data.metrics == {
        "loss": 1.0,
        name: 0.7,
        f"{name}_low": 0.6,
        f"{name}_high": 0.8,
        f"{name}_folds_mean": 0.65,
        f"{name}_folds_deviation": 0.1,
    }
    description = registry.client.get_model_version("model-t", "1").description
    assert len(description) < 4100
    assert description.endswith("The run's artifact `model-card.md` has the whole card.")
    assert {"card.json", "model-card.md", "results.json"} <= {
        item.path for item in registry.client.list_artifacts(run.info.run_id)
    }


# --- what people delete ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "unavailable"),
    [
        (MlflowException("no connection"), True),  # the client's default code: INTERNAL_ERROR
        (MlflowException("locked", TEMPORARILY_UNAVAILABLE), True),
        (RestException({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slower"}), True),
        (RestException({"error_code": "503", "message": "a proxy"}), True),
        (RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "gone"}), False),
        (RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "deleted"}), False),
        (RestException({"error_code": "INVALID_STATE", "message": "deleted"}), False),
        (RestException({"error_code": "PERMISSION_DENIED", "message": "no"}), False),
        (RestException({"error_code": "401", "message": "log in"}), False),
        (ConnectionRefusedError(), True),
        (OSError(errno.EIO, "input/output error"), True),
        (OSError(errno.ENOSPC, "disk full"), False),
        (PermissionError(errno.EACCES, "not allowed"), False),
    ],
)
def test_the_server_answer_decides_whether_mlflow_is_unavailable(error, unavailable):
    assert is_unavailable(error) is unavailable


def test_a_locked_database_is_unavailable_and_a_read_only_one_is_not(tmp_path):
    database = tmp_path / "x.db"
    sqlite3.connect(database).execute("create table t (x)").connection.close()
    engine = create_engine(f"sqlite:///{database}?timeout=0")
    with locked(database), pytest.raises(OperationalError) as busy:
        engine.connect().execute(text("insert into t values (1)"))
    assert is_unavailable(busy.value)
    read_only = create_engine(f"sqlite:///file:{database}?mode=ro&uri=true")
    with pytest.raises(OperationalError) as refused:
        read_only.connect().execute(text("insert into t values (1)"))
    assert not is_unavailable(refused.value)
    wrapped = MlflowException("x", TEMPORARILY_UNAVAILABLE)
    wrapped.__cause__ = refused.value
    assert not is_unavailable(wrapped)


def collect_garbage(registry: Registry) -> None:
    """Run ``mlflow gc``: it removes what was deleted for good."""
    stores = ["--backend-store-uri", registry.database, "--tracking-uri", registry.uri]
    done = CliRunner().invoke(mlflow.cli.cli, ["gc", *stores])
    mlflow.set_tracking_uri(None)  # the command leaves its address in this process
    assert done.exit_code == 0, done.output


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.integration)])
def either(request, tmp_path) -> Registry:
    """A registry in a SQLite file, or behind a server."""
    if request.param == "sqlite":
        return request.getfixturevalue("registry")
    server = request.getfixturevalue("server")
    server.start()
    return Registry(
        tmp_path,
        Tracking(f"http://127.0.0.1:{server.port}", None),
        f"sqlite:///{server.folder / 'mlflow.db'}",
    )


@pytest.mark.slow
def test_a_champion_without_its_run_cannot_be_compared_and_stays(either):
    first = either.register(predictions(error=20))
    assert either.holder("champion") == 1
    either.client.delete_run(first.run_id)
    collect_garbage(either)
    second = either.register(predictions(error=0))
    assert "cannot be compared with the champion, version 1" in second.tags["champion"]
    assert "set the alias 'champion' by hand" in second.tags["champion"]
    assert (either.holder("champion"), either.holder("candidate")) == (1, 2)


@pytest.mark.slow
def test_after_the_champion_was_removed_the_next_version_takes_its_place(either):
    either.register(predictions(error=10))
    either.client.delete_model_version("model-t", "1")
    second = either.register(predictions(error=10))
    assert "the first of its name" in second.tags["champion"]
    assert either.holder("champion") == 2


@pytest.mark.slow
def test_a_deleted_experiment_is_restored_with_a_warning(either):
    experiment = experiment_id(either.tracking, "target-t", pytest.fail)
    either.client.delete_experiment(experiment)
    warnings: list[str] = []
    either.register(predictions(error=10), warn=warnings.append)
    [warning] = warnings
    assert "the MLflow experiment 'target-t' was deleted; it was restored" in warning
    assert either.client.get_experiment(experiment).lifecycle_stage == "active"


@pytest.mark.slow
def test_a_registered_encoder_without_its_run_names_the_remedy(either):
    version = either.register(predictions(error=10), "encoder-e")
    either.client.set_model_version_tag("encoder-e", "1", "weights_hash", "abc")
    either.client.delete_run(version.run_id)
    collect_garbage(either)
    entry = RegisteredEncoder(name="e", objective="registered", version="encoder-e@candidate")
    with (
        pytest.raises(EncoderError, match="was deleted or has no artifact 'product'"),
        either.tracking.download_encoder(entry),
    ):
        pass


@pytest.mark.slow
def test_a_registered_encoder_of_another_project_is_refused(registry):
    registry.register(predictions(error=10), "encoder-e")
    entry = RegisteredEncoder(name="e", objective="registered", version="encoder-e@candidate")
    with (
        pytest.raises(EncoderError, match="has no tag weights_hash"),
        registry.tracking.download_encoder(entry),
    ):
        pass


class Refusal(BaseHTTPRequestHandler):
    """A server that answers every request of MLflow's client with a refusal."""

    def do_GET(self) -> None:
        body = b'{"error_code": "PERMISSION_DENIED", "message": "team x may not write"}'
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.integration
@pytest.mark.slow
def test_a_refusal_fails_the_step_at_once_with_the_servers_words(lab, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{refusing.server_port}")
        assert lab.materialize().success
        result = lab.register()
        refusing.shutdown()
    assert not result.success
    assert "STEP_UP_FOR_RETRY" not in [event.event_type_value for event in result.all_events]
    assert "MLflow refuses the request for the registration of encoder" in lab.log
    assert "(PERMISSION_DENIED: team x may not write)" in lab.log


# --- small things ----------------------------------------------------------------------------


def test_user_and_password_are_removed_from_urls():
    text = "no answer from https://me:secret@host:5000/api and postgresql://me:s%2Fx@db/mlflow"
    assert (
        without_secrets(text) == "no answer from https://host:5000/api and postgresql://db/mlflow"
    )
    assert "secret" not in repr(Tracking("http://me:secret@host", None))


def test_links_point_to_the_tracking_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.org/")
    found = Tracking.in_store(Store(tmp_path))
    page = "https://mlflow.example.org/#/models/model-t/versions/2?workflowType=machine_learning"
    assert found.page("model-t", "2") == page
    assert found.artifacts is None


def test_the_commit_of_a_checkout_is_found():
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("this is not a git checkout")
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert re.fullmatch(f"{head}(-dirty)?", git_commit() or "")
