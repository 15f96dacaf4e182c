"""MLflow as the team's memory: trainings that outlive it, champions, and no secrets."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import mlflow
import numpy as np
import pytest
import torch
from sqlalchemy import event
from sqlalchemy.engine import Engine

from nic_assets import tracking
from nic_assets.build import build_defs
from nic_assets.tracking import TrackedRun, Tracking, TrackingError
from nic_assets.tracking.runs import git_commit, without_secrets
from nic_core import steps
from nic_core.cohort import Cohort, EncoderSpec, load_cohort
from nic_core.encoders.files import read_card
from nic_core.encoders.training_loop import _Run
from nic_core.models.comparison import compare_with_champion
from nic_core.steps.slide_models import PREDICTIONS
from nic_core.store import Store
from tests.assets.test_checks import evaluated

ENCODER = "mtl-4"


@pytest.fixture(scope="module")
def one_task(tiny_cohort, tmp_path_factory) -> tuple[Cohort, Path]:
    """A cohort whose encoder learns one task in a moment, and a store with that task."""
    cohort, store = load_cohort(tiny_cohort), Store(tmp_path_factory.mktemp("tasks") / "store")
    task = cohort.patch_tasks[0].name
    steps.make_patch_task(cohort, store, task)
    quick = EncoderSpec(
        name=ENCODER, objective="supervised", tasks=(task,), patches_seen=48, batch=16
    )
    return cohort.with_encoder(quick), store.root


class Lab:
    """Materializes one encoder, and can be disturbed when an epoch of its training is over."""

    def __init__(self, cohort: Cohort, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = Store(root)
        self.cohort = cohort
        self.instance = dg.DagsterInstance.ephemeral()
        self.epochs = 0
        self.disturb: dict[int, Callable[[], object]] = {}
        train_epoch = _Run.train_epoch

        def counted(run, progress):
            result = train_epoch(run, progress)
            self.epochs += 1
            self.disturb.pop(self.epochs, lambda: None)()
            return result

        monkeypatch.setattr(_Run, "train_epoch", counted)
        monkeypatch.setattr(tracking, "LIVE_PAUSE", 0.0)
        monkeypatch.setattr(tracking, "LAST_PAUSES", (0.0,))
        # the step's own tries
        monkeypatch.setattr(dg.RetryPolicy, "calculate_delay", lambda policy, attempt: 0)

    def materialize(self) -> dg.ExecuteInProcessResult:
        job = build_defs(self.cohort, self.store).resolve_implicit_global_asset_job_def()
        return job.execute_in_process(
            instance=self.instance,
            asset_selection=[dg.AssetKey("encoder")],
            partition_key=ENCODER,
            raise_on_error=False,
        )

    @property
    def said(self) -> str:
        """Everything that Dagster recorded."""
        runs = self.instance.get_runs()
        return "".join(repr(self.instance.all_logs(run.run_id)) for run in runs)

    def materialized(self) -> dg.AssetMaterialization | None:
        event = self.instance.get_latest_materialization_event(dg.AssetKey("encoder"))
        return None if event is None else event.asset_materialization


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
    return {v.version: v.tags for v in client.search_model_versions(f"name='{name}'")}


def test_a_server_killed_in_a_training_costs_no_training_and_no_password_is_told(
    lab, server, monkeypatch, capfd, tmp_path
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://team:hunter2@127.0.0.1:{server.port}")
    server.start()
    lab.disturb[2] = server.kill  # the first epoch is told, the second not
    assert not lab.materialize().success
    assert f"{lab.store.encoder(ENCODER)} is made and safe" in lab.said
    assert lab.materialized() is None
    trained, weights = lab.epochs, read_card(lab.store.encoder(ENCODER)).weights_hash
    assert trained > 1

    server.start()
    assert lab.materialize().success
    assert lab.epochs == trained
    assert not lab.store.encoder_checkpoint(ENCODER).exists()
    client = mlflow.MlflowClient(f"http://127.0.0.1:{server.port}")
    (tags,) = versions(client, f"encoder-{ENCODER}").values()
    assert tags["weights_hash"] == weights == read_card(lab.store.encoder(ENCODER)).weights_hash
    experiment = client.get_experiment_by_name("encoders")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    assert [run.info.status for run in runs] == ["KILLED", "FINISHED"]
    losses = [client.get_metric_history(run.info.run_id, "loss") for run in runs]
    assert [len(history) for history in losses] == [1, trained]
    link = lab.materialized().metadata["mlflow_run"].value
    page = f"http://127.0.0.1:{server.port}/#/experiments/{experiment.experiment_id}/runs/"
    assert link == page + runs[1].info.run_id

    assert "hunter2" not in lab.said
    assert not [word for word in capfd.readouterr() if "hunter2" in word]
    told = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(told) > 20
    assert not [path for path in told if b"hunter2" in path.read_bytes()]


@pytest.fixture
def impatient() -> Iterator[None]:
    """MLflow waits 20 s for a locked database; here it gives up at once."""

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


def test_what_a_locked_database_did_not_take_is_sent_when_it_is_free(lab, impatient):
    database = lab.store.mlflow / "mlflow.db"
    lock = locked(database)
    lab.disturb[1] = lock.__enter__
    lab.disturb[2] = lambda: lock.__exit__(None, None, None)
    assert lab.materialize().success
    assert "MLflow does not answer ((sqlite3.OperationalError) database is locked)" in lab.said
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    (run,) = client.search_runs([client.get_experiment_by_name("encoders").experiment_id])
    steps_ = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps_) == list(range(1, lab.epochs + 1))


def test_a_database_that_stays_locked_fails_the_step_and_the_next_only_logs(lab, impatient):
    database = lab.store.mlflow / "mlflow.db"
    lab.store.mlflow.mkdir()
    mlflow.MlflowClient(f"sqlite:///{database}").search_experiments()  # makes it
    with locked(database):
        assert not lab.materialize().success
    assert "no training is repeated" in lab.said
    trained = lab.epochs
    assert lab.materialize().success
    assert lab.epochs == trained
    (tags,) = versions(mlflow.MlflowClient(f"sqlite:///{database}"), f"encoder-{ENCODER}").values()
    assert tags["weights_hash"] == read_card(lab.store.encoder(ENCODER)).weights_hash
    assert lab.materialize().success  # asked again with nothing outstanding: trained again
    assert lab.epochs == 2 * trained


# --- champions -------------------------------------------------------------------------------


class Registry:
    """Registers models that predict the numbers 0 to 39 with an error of some size."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tracking = Tracking(f"sqlite:///{root / 'mlflow.db'}", (root / "artifacts").as_uri())
        self.client = self.tracking.client

    def run(self, warn: Callable[[str], object] = pytest.fail) -> TrackedRun:
        tags = dict.fromkeys(("cohort", "dagster/asset_key", "dagster/run_id"), "x")
        tags["dagster/partition"] = "mtl-4|t"
        return TrackedRun(self.tracking, "target-t", tags, lambda _: False, warn)

    def register(self, error: float) -> str:
        label = np.arange(40.0)
        model = evaluated(label + np.random.default_rng(1).normal(0, error, 40), label)
        folder = self.root / "model"
        folder.mkdir(exist_ok=True)
        model.predictions.write_parquet(folder / PREDICTIONS)
        run = self.run()
        run.files(folder)
        run.register(
            torch.nn.Linear(2, 1),
            torch.zeros(2, 2),
            name="model-t",
            description="",
            tags={"encoder": "mtl-4"},
        )
        run.challenge(lambda champion: compare_with_champion(model, champion))
        run.finish(folder)
        assert run.verdict is not None
        return run.verdict.explanation

    @property
    def champion(self) -> int:
        return int(self.client.get_model_version_by_alias("model-t", "champion").version)


def test_the_champion_is_the_first_then_a_better_one_and_whatever_a_person_chose(tmp_path):
    registry = Registry(tmp_path)
    assert registry.register(error=10).startswith("becomes champion as the first of its name")
    assert registry.champion == 1
    worse = registry.register(error=30)
    assert "version 1 (mtl-4) stays champion: Spearman 0." in worse
    assert "on 40 units of 40 patients" in worse
    assert registry.champion == 1
    assert registry.client.get_model_version("model-t", "2").tags["champion"] == worse
    registry.client.set_registered_model_alias("model-t", "champion", "2")
    assert registry.register(error=10).startswith("replaces version 2 (mtl-4) as champion")
    assert registry.champion == 3
    candidate = registry.client.get_model_version_by_alias("model-t", "candidate")
    assert int(candidate.version) == 3


def test_a_place_for_artifacts_that_is_no_folder_is_a_fault_that_can_be_mended(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tracking, "LAST_PAUSES", ())
    registry, warnings = Registry(tmp_path), []
    (tmp_path / "artifacts").write_text("in the way")
    run = registry.run(warnings.append)
    run.card({"name": "x"})
    with pytest.raises(TrackingError, match="model is made and safe, but MLflow"):
        run.finish(tmp_path / "model")
    assert len(warnings) == 1
    (tmp_path / "artifacts").unlink()
    run.finish(tmp_path / "model")
    (found,) = registry.client.search_runs(["1"])
    assert [item.path for item in registry.client.list_artifacts(found.info.run_id)] == [
        "card.json"
    ]


# --- small things ----------------------------------------------------------------------------


def test_addresses_are_told_without_their_user_and_password():
    text = "no answer from https://me:secret@host:5000/api and postgresql://me:s%2Fx@db/mlflow"
    assert (
        without_secrets(text) == "no answer from https://host:5000/api and postgresql://db/mlflow"
    )
    assert "secret" not in repr(Tracking("http://me:secret@host", None))


def test_links_lead_to_the_server_that_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.org/")
    found = Tracking.in_store(Store(tmp_path))
    assert found.page("model-t", "2") == "https://mlflow.example.org/#/models/model-t/versions/2"
    assert found.artifacts is None


def test_a_checkout_has_a_commit():
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("this is no checkout")
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert re.fullmatch(f"{head}(-dirty)?", git_commit() or "")
