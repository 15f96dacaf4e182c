"""Slide models that MLflow calls with a table of slide files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from typer.testing import CliRunner

from nic_assets.tracking.callable_model import log_slide_predictor
from nic_assets.tracking.connection import Connection
from nic_assets.tracking.registry import verify_exported
from nic_core import steps
from nic_core.cli import app
from nic_core.models.files import ensemble_module, load_model
from nic_core.models.prediction import ModelMismatchError
from nic_core.store import ModelKey, Store
from tests.slides.conftest import real_data

pytestmark = pytest.mark.slow

ENCODER, TARGET = "mean-rgb", "survival"
CHAMPION = f"models:/model-{TARGET}@champion"
TIMES = [365.0, 12.5]

__all__ = ["real_data"]  # a fixture


@dataclass(frozen=True)
class Logged:
    """A logged and registered model, and the folders that it was made from."""

    connection: Connection
    run_id: str
    model_id: str
    store: Store

    @property
    def model_folder(self) -> Path:
        return self.store.slide_model(ModelKey(encoder=ENCODER, target=TARGET))

    @property
    def encoder_folder(self) -> Path:
        return self.store.encoder(ENCODER)

    @property
    def folder(self) -> Path:
        """The logged files."""
        with self.connection.active():
            return Path(mlflow.artifacts.download_artifacts(f"models:/{self.model_id}"))

    def slides(self) -> pl.DataFrame:
        return steps.read_slide_index(self.store).filter(split="test").sort("slide")


@pytest.fixture(scope="module")
def logged(mean_rgb_study, tmp_path_factory) -> Logged:
    store, root = mean_rgb_study[1], tmp_path_factory.mktemp("mlflow")
    connection = Connection(f"sqlite:///{root / 'mlflow.db'}", (root / "artifacts").as_uri())
    client = connection.client
    experiment = client.create_experiment("models", connection.artifacts)
    run_id = client.create_run(experiment).info.run_id
    model_id = log_slide_predictor(
        connection,
        run_id,
        model_folder=store.slide_model(ModelKey(encoder=ENCODER, target=TARGET)),
        encoder_folder=store.encoder(ENCODER),
    )
    with connection.active():
        version = mlflow.register_model(f"models:/{model_id}", f"model-{TARGET}")
    client.set_registered_model_alias(version.name, "champion", version.version)
    return Logged(connection, run_id, model_id, store)


@pytest.fixture(scope="module")
def champion(logged) -> PyFuncModel:
    with logged.connection.active(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        return mlflow.pyfunc.load_model(CHAMPION)


def by_command(logged: Logged, out: Path, *paths: object, **options: object) -> pl.DataFrame:
    """The predictions of ``nic predict``."""
    given = ["--model", logged.model_folder, "--encoder", logged.encoder_folder, "--out", out]
    given += [part for time in TIMES for part in ("--times", time)]
    given += [part for name, value in options.items() for part in (f"--{name}", value)]
    done = CliRunner().invoke(app, ["predict", *map(str, [*paths, *given])])
    assert done.exit_code in (0, 1), done.output
    return pl.read_parquet(out / f"predictions-{TARGET}.parquet")


def test_the_logged_files_contain_no_pickle(logged):
    files = sorted(str(f.relative_to(logged.folder)) for f in logged.folder.rglob("*.*"))
    assert files == [
        "artifacts/encoder/card.json",
        "artifacts/encoder/weights.safetensors",
        "artifacts/model/card.json",
        "artifacts/model/distance.safetensors",
        *(f"artifacts/model/fold-{k}.safetensors" for k in range(4)),
        "conda.yaml",
        "data/model.pt2",
        "input_example.json",
        "python_env.yaml",
        "requirements.txt",
        "serving_input_example.json",
        "slide_predictor.py",
    ]
    verify_exported(logged.connection, logged.model_id)


def test_one_version_has_the_network_and_the_callable_model(logged, champion, monkeypatch):
    # MLflow then refuses pickles, also those in an archive of torch.export
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with logged.connection.active():
        network = mlflow.pytorch.load_model(CHAMPION)
    model = load_model(logged.model_folder)
    card = model.card
    crops = torch.randn(3, card.embedding_size, card.crop, card.crop)
    torch.testing.assert_close(network(crops), ensemble_module(model.networks)(crops))
    assert champion.metadata.metadata == {
        "target": TARGET,
        "encoder": ENCODER,
        "weights_hash": card.weights_hash,
        "geometry": "128 px at 0.5 um/px, stride 128 px",
    }
    run = logged.connection.client.get_run(logged.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]


def test_the_requirements_name_this_distribution(logged):
    wanted = (logged.folder / "requirements.txt").read_text().split()
    assert f"nic-pathology=={importlib.metadata.version('nic-pathology')}" in wanted


def test_a_table_of_slides_gets_the_predictions_of_the_command(logged, champion, tmp_path):
    (tmp_path / "text.svs").write_text("no slide")
    slides = logged.slides()
    paths = [*slides["path"], str(tmp_path / "text.svs")]
    people = dict(zip([*slides["slide"], "text"], [*slides["patient"], "anna"], strict=True))
    table = pd.DataFrame({"slide": paths, "mpp": np.nan, "patient": people.values()})
    found = champion.predict(table, params={"times": TIMES})
    (tmp_path / "patients.csv").write_text(
        "slide,patient\n" + "".join(f"{slide},{patient}\n" for slide, patient in people.items())
    )
    patients = tmp_path / "patients.csv"
    expected = by_command(logged, tmp_path / "out", *paths, patients=patients)
    records = found.to_dict(orient="records")
    reasons = [row.pop("reasons") for row in records]
    assert records == expected.to_dicts()
    assert reasons[:-1] == [[]] * (len(records) - 1)
    assert reasons[-1][0].startswith("not an image of a known format; give a whole-slide image")
    assert records[-1]["risk"] is None
    json.dumps(records, allow_nan=False)
    declared = champion.metadata.get_output_schema().input_names()
    assert [c for c in found.columns if "_survival_" not in c and c[:9] != "survival_"] == declared


def test_a_real_slide_gets_the_predictions_of_the_command(logged, champion, real_data, tmp_path):
    path = real_data / "slides" / "CMU-1-Small-Region.svs"
    found = champion.predict(pd.DataFrame({"slide": [str(path)]}), params={"times": TIMES})
    expected = by_command(logged, tmp_path, path)
    assert expected["risk"].null_count() == 0
    assert found.drop(columns="reasons").to_dict(orient="records") == expected.to_dicts()


def test_mpp_and_mask_are_those_of_the_row(logged, champion, tmp_path):
    row = logged.slides().row(0, named=True)
    blank, mask = tmp_path / "blank.svs", tmp_path / "none.png"
    shutil.copy(row["path"], blank)
    table = pd.DataFrame(
        {
            "slide": [row["path"], str(blank)],
            "mpp": [0.25, None],
            "mask": [None, str(mask)],
        }
    )
    found = champion.predict(table)
    expected = by_command(logged, tmp_path / "out", row["path"], mpp=0.25)
    assert found["risk"][0] == expected["risk"][0]
    assert found["reasons"][1][0].startswith(f"mask {mask}: ")


@pytest.mark.parametrize(
    ("columns", "times", "message"),
    [
        ({"slide": ["a.svs", ""]}, [], "row 2: slide '' is not the path of a file"),
        ({"slide": ["x/a.svs", "y/a.svs"]}, [], "row 2: y/a.svs has the slide id 'a' of x/a.svs"),
        ({"slide": ["a.svs", "b.svs"], "patient": ["p", None]}, [], "row 2 has no patient"),
        ({"slide": ["a.svs"], "mpp": ["fine"]}, [], "column mpp"),
        ({"path": ["a.svs"]}, [], "missing inputs"),
        ({"slide": ["a.svs"]}, [-1.0], "time -1 is negative"),
    ],
)
def test_an_invalid_table_is_refused_with_the_reason(champion, columns, times, message):
    with pytest.raises(MlflowException, match=message) as refused:
        champion.predict(pd.DataFrame(columns), params={"times": times})
    assert refused.value.get_http_status_code() == 400


def test_the_encoder_of_another_model_is_not_logged(logged, tmp_path):
    shutil.copytree(logged.encoder_folder, tmp_path / "other")
    card = json.loads((tmp_path / "other" / "card.json").read_text())
    (tmp_path / "other" / "card.json").write_text(json.dumps(card | {"mpp": 1.0}))
    client = logged.connection.client
    run_id = client.create_run(client.get_run(logged.run_id).info.experiment_id).info.run_id
    with pytest.raises(ModelMismatchError, match="um/px 1.0, not 0.5"):
        log_slide_predictor(
            logged.connection,
            run_id,
            model_folder=logged.model_folder,
            encoder_folder=tmp_path / "other",
        )
    run = client.get_run(run_id)
    assert (run.info.status, run.outputs.model_outputs) == ("RUNNING", [])


@contextmanager
def served(logged: Logged, log: Path) -> Iterator[str]:
    """The URL of a server of the champion, in another process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", CHAMPION, "-h", "127.0.0.1", "-p", str(port)]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": logged.connection.uri,
        # MLflow starts uvicorn by its name
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            while True:
                assert server.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                    break
                except (urllib.error.URLError, TimeoutError):
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
                server.wait()


@pytest.mark.integration
def test_a_served_model_answers_with_the_predictions_of_the_command(logged, tmp_path):
    path = logged.slides()["path"][0]
    records = [{"slide": path, "mpp": None}, {"slide": "/nowhere.svs", "mpp": None}]
    body = json.dumps({"dataframe_records": records, "params": {"times": TIMES}}).encode()
    with served(logged, tmp_path / "log") as url:
        request = urllib.request.Request(
            f"{url}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            found = json.load(response)["predictions"]
    expected = by_command(logged, tmp_path / "out", path).to_dicts()
    assert found[0].pop("reasons") == []
    assert found[:1] == expected
    assert found[1]["failed"] == ["nowhere"]
    assert found[1]["reasons"] == ["cannot be read (No such file or directory); check the path"]
