"""Log a slide model to MLflow so that it can be called with slide files.

The logged model has two flavours, so that one registered version and its alias hold both [choice]:

- ``python_function`` takes a table of slide files and returns their predictions
  (:mod:`nic_assets.tracking.slide_predictor`); it needs this distribution;
- ``pytorch`` takes crops of grids. It is the exported network, and needs PyTorch only.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlflow
import pandas as pd  # mlflow depends on it
import polars as pl
import torch
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

from nic_assets.tracking.archives import archive_of, requirements_of
from nic_assets.tracking.connection import Connection
from nic_core.encoders import load_encoder
from nic_core.encoders.encoder import Encoder
from nic_core.encoders.files import save_encoder
from nic_core.models.files import SlideModel, ensemble_module, load_model, model_files
from nic_core.models.prediction import check_encoder
from nic_core.models.slide_table import TABLE_SCHEMA, predict_table
from nic_core.version import DISTRIBUTION

MODEL_NAME = "model"
"""Name of the logged model in its run."""

SCRIPT = Path(__file__).with_name("slide_predictor.py")
EXAMPLE = pd.DataFrame({"slide": ["/slides/slide-1.svs"]})
_TYPES = {pl.String: "string", pl.Float64: "double", pl.Boolean: "boolean"}


def log_slide_predictor(
    connection: Connection, run_id: str, *, model_folder: Path, encoder_folder: Path
) -> str:
    """Log a slide model and its encoder as one model of a run; return the id of the logged model.

    The model contains the files of both, the exported network and a script: no pickle. Before it
    is logged, both are loaded, and the encoder is compared with the model's card.

    Parameters
    ----------
    run_id
        The MLflow run; it is marked as finished.
    model_folder, encoder_folder
        Folders of the slide model and of its encoder. Features of other software have no encoder
        that could be applied to a slide: such a model cannot be logged by this function.

    Raises
    ------
    ModelFileError, EncoderError, ModelMismatchError
        The model or the encoder cannot be loaded, or they do not fit each other.
    """
    model, encoder = load_model(model_folder), load_encoder(encoder_folder)
    card = model.card
    check_encoder(card, encoder.card)
    with connection.active(), mlflow.start_run(run_id=run_id):
        info = Model.log(
            artifact_path=None,
            flavor=sys.modules[__name__],  # MLflow calls its save_model
            name=MODEL_NAME,
            metadata={
                "target": card.target.name,
                "encoder": card.encoder,
                "weights_hash": card.weights_hash,
                "geometry": f"{card.patch} px at {card.mpp:g} um/px, stride {card.stride} px",
            },
            model=model,
            model_folder=model_folder,
            encoder=encoder,
            validate_serving_input=False,
        )
    model_id: str = info.model_id
    return model_id


def save_model(
    path: str,
    mlflow_model: Model,
    *,
    model: SlideModel,
    model_folder: Path,
    encoder: Encoder,
    validate_serving_input: bool,  # for Model.log: the slide of the input example does not exist
) -> None:
    """Write both flavours to the folder ``path``; the interface of an MLflow flavour."""
    requirements = _requirements(encoder)
    with tempfile.TemporaryDirectory() as temporary:
        artifacts = {name: Path(temporary) / name for name in ("model", "encoder")}
        artifacts["model"].mkdir()
        for name in model_files(model.card):
            shutil.copyfile(model_folder / name, artifacts["model"] / name)
        save_encoder(artifacts["encoder"], encoder)
        mlflow.pyfunc.save_model(
            path,
            mlflow_model=mlflow_model,
            python_model=str(SCRIPT),
            artifacts={name: str(folder) for name, folder in artifacts.items()},
            signature=slide_signature(model, encoder),
            input_example=EXAMPLE,
            pip_requirements=requirements,
        )
        exported = _export(model, Path(temporary) / "network", requirements)
        data = exported.flavors["pytorch"]["model_data"]
        shutil.move(Path(temporary) / "network" / data, Path(path) / data)
    mlflow_model.add_flavor("pytorch", **exported.flavors["pytorch"])
    mlflow_model.save(str(Path(path) / MLMODEL_FILE_NAME))


def slide_signature(model: SlideModel, encoder: Encoder) -> ModelSignature:
    """Return the columns of the table of slides, of the predictions, and the parameter ``times``.

    The columns of the predictions are those of a table without rows.
    """
    none = pl.DataFrame(schema={"slide": pl.String()})
    predictions = predict_table(model, encoder, none, device="cpu")
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(_mlflow_type(kind), name, required=name == "slide")
                for name, kind in TABLE_SCHEMA.items()
            ]
        ),
        outputs=Schema(
            [ColSpec(_mlflow_type(kind), name) for name, kind in predictions.schema.items()]
        ),
        params=ParamSchema([ParamSpec("times", DataType.double, default=[], shape=(-1,))]),
    )


def _mlflow_type(kind: pl.DataType) -> DataType | Array:
    if isinstance(kind, pl.List):
        return Array(_mlflow_type(kind.inner))  # type: ignore[arg-type]
    return DataType[_TYPES[type(kind)]]


def _export(model: SlideModel, folder: Path, requirements: list[str]) -> Model:
    """Write the mean of the folds' networks as a torch.export archive (pt2)."""
    card, network, exported = model.card, ensemble_module(model.networks), Model()
    crops = torch.zeros((2, card.embedding_size, card.crop, card.crop))
    with archive_of(network, crops) as arguments:
        mlflow.pytorch.save_model(
            network,
            str(folder),
            mlflow_model=exported,
            pip_requirements=requirements,
            **arguments,
        )
    return exported


def _requirements(encoder: Encoder) -> list[str]:
    """Return this distribution and what reads the logged files, at the installed versions."""
    extra = "[timm]" if encoder.card.architecture == "timm" else ""
    return [
        f"{DISTRIBUTION}{extra}=={version(DISTRIBUTION)}",
        *requirements_of("mlflow", "torch", "numpy"),
    ]
