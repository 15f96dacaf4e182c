"""MLflow: the team's memory of encoders, models and figures.

One MLflow run a trained encoder or slide model, tagged with the Dagster run and asset key; one
registered model each, whose newest version carries the alias ``candidate``. Networks are
registered in PyTorch's exported format (``pt2``: no pickle, no project code needed to load).
"""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dagster as dg
import mlflow
import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from mlflow.models import infer_signature

from nic_core.store import Store

DEFAULT_UI = "http://127.0.0.1:5000"
CANDIDATE = "candidate"

# a table that grows is read back at each addition: no news either
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# that a new database gets its tables is no news to a user
for _name in ("alembic", "mlflow.store.db.utils"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True)
class Tracking:
    """Where MLflow keeps its records: by default a SQLite file and artifacts in the store."""

    uri: str
    artifacts: str
    ui: str = DEFAULT_UI

    @classmethod
    def in_store(cls, store: Store) -> Tracking:
        """``$MLFLOW_TRACKING_URI`` where set, else the store's own database."""
        folder: Path = store.mlflow
        return cls(
            uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}",
            artifacts=(folder / "artifacts").as_uri(),
        )

    @contextmanager
    def run(
        self,
        context: dg.AssetExecutionContext,
        *,
        partition: str,
        experiment: str,
    ) -> Iterator[TrackedRun]:
        """An MLflow run for one partition of the asset that ``context`` materializes."""
        if self.uri.startswith("sqlite:///"):
            Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(self.uri)
        known = mlflow.get_experiment_by_name(experiment)
        identifier = (
            known.experiment_id
            if known
            else mlflow.create_experiment(
                experiment, artifact_location=f"{self.artifacts}/{experiment}"
            )
        )
        tags = {
            "dagster/run_id": context.run.run_id,
            "dagster/asset_key": context.asset_key.to_user_string(),
            "dagster/partition": partition,
        }
        with mlflow.start_run(experiment_id=identifier, run_name=partition, tags=tags) as active:
            yield TrackedRun(
                url=f"{self.ui}/#/experiments/{identifier}/runs/{active.info.run_id}",
                models_url=f"{self.ui}/#/models",
                tags=tags,
            )


@dataclass(frozen=True)
class TrackedRun:
    """A live MLflow run; the library's :class:`~nic_core.tracker.Tracker` in MLflow's terms.

    ``figures`` keeps what was drawn, so that an asset can show the same pictures.
    """

    url: str
    models_url: str
    tags: Mapping[str, str]
    figures: dict[str, Figure] = field(default_factory=dict)

    def params(self, values: Mapping[str, str | int | float]) -> None:
        mlflow.log_params(dict(values))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        mlflow.log_metrics(dict(values), step=step)

    def table(self, name: str, rows: pl.DataFrame) -> None:
        mlflow.log_table(rows.to_dict(as_series=False), f"{name}.json")

    def figure(self, name: str, figure: Figure) -> None:
        self.figures[name] = figure
        mlflow.log_figure(figure, f"{name}.png")

    def summary(self, results: pl.DataFrame) -> None:
        """Final figures (:data:`nic_core.reports.RESULT_SCHEMA`): values, bounds and the table."""
        for row in results.iter_rows(named=True):
            name = "/".join(_metric_name(row[part]) for part in ("part", "model", "metric"))
            for suffix in ("value", "low", "high"):
                value = row[suffix]
                if value is not None and math.isfinite(value):
                    mlflow.log_metric(name if suffix == "value" else f"{name}/{suffix}", value)
        mlflow.log_table(results.to_dict(as_series=False), "results.json")

    def card(self, card: Mapping[str, Any]) -> None:
        """The product's JSON card, as it lies in the store."""
        mlflow.log_dict(dict(card), "card.json")

    def register(
        self,
        module: torch.nn.Module,
        example: torch.Tensor,
        *,
        name: str,
        description: str,
        tags: Mapping[str, str],
    ) -> str:
        """Register ``module`` under ``name``; returns the new version's page.

        ``example`` fixes the signature: its first axis is the batch, the others are constant.
        """
        with torch.no_grad():
            output = module(example)
        # torch's own remark on tensors that share memory, about an archive it writes correctly
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        info = mlflow.pytorch.log_model(
            module,
            name="model",
            signature=infer_signature(_array(example), _array(output)),
            input_example=_array(example),
            registered_model_name=name,
            pip_requirements=[f"{package}=={_public(package)}" for package in ("torch", "numpy")],
        )
        client = mlflow.MlflowClient()
        number = str(info.registered_model_version)
        client.update_model_version(name, number, description=description)
        for key, value in {**self.tags, **tags}.items():
            client.set_model_version_tag(name, number, key, value)
        client.set_registered_model_alias(name, CANDIDATE, number)
        return f"{self.models_url}/{name}/versions/{number}"


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().numpy()


def _metric_name(text: str) -> str:
    """The letters that MLflow takes in a name, with its slash kept for the parts."""
    return re.sub(r"[^\w.-]+", "_", text)


def _public(package: str) -> str:
    """The version without a local part such as ``+cpu``, which no index serves."""
    return version(package).partition("+")[0]
