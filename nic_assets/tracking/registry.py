"""MLflow's model registry: versions by alias, their files, and the format of a logged model."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from nic_assets.tracking.connection import Connection, as_tracking_error, does_not_exist
from nic_core.cohort import RegisteredEncoder

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from nic_core.models.comparison import Champion

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases of a registered model: the version registered last, and the best of those compared."""

PRODUCT_FOLDER = "product"
"""Folder among a run's artifacts with the files of the product as they are in the store."""

EXPORTED_MODEL = "model.pt2"
"""The only file in the folder ``data`` of a model that MLflow logged as torch.export archive."""


class ModelFormatError(Exception):
    """A logged model is not a torch.export archive, so it is not registered."""


def find_version(connection: Connection, name: str, alias: str) -> ModelVersion | None:
    """Return the version of a registered model that has an alias; None if there is none."""
    from mlflow.exceptions import MlflowException

    client = connection.client
    try:
        number = client.get_registered_model(name).aliases.get(alias)
        return None if number is None else client.get_model_version(name, str(number))
    except MlflowException as error:
        if does_not_exist(error):  # also a version that was deleted a moment ago
            return None
        raise


def find_encoder(connection: Connection, entry: RegisteredEncoder) -> ModelVersion:
    """Return the registered version of an encoder entry.

    Raises
    ------
    EncoderError
        No version has the alias, or the version has no tag ``weights_hash``.
    TrackingError
        MLflow does not answer, or refuses the request.
    """
    from nic_core.encoders import EncoderError

    name, alias = entry.version.split("@")
    with as_tracking_error(entry.version):
        found = find_version(connection, name, alias)
    if found is None:
        raise EncoderError(
            f"encoder '{entry.name}': the registry has no {entry.version}; set the alias "
            f"'{alias}' on a version of '{name}' in MLflow"
        )
    if "weights_hash" not in found.tags:
        raise EncoderError(
            f"encoder '{entry.name}': version {found.version} of '{name}' has no tag weights_hash, "
            f"so this project did not register it; set the alias '{alias}' on another version"
        )
    return found


def aliased_encoders(connection: Connection) -> dict[str, dict[str, str]]:
    """Return the tags of every registered encoder version that has an alias, by ``name@alias``.

    Raises
    ------
    TrackingError
        MLflow does not answer.
    """
    client, found = connection.client, {}
    token: str | None = None
    with as_tracking_error("the registered encoders"):
        while True:
            page = client.search_registered_models("name LIKE 'encoder-%'", page_token=token)
            for model in page:
                for alias, number in sorted(model.aliases.items()):
                    tags = client.get_model_version(model.name, str(number)).tags
                    found[f"{model.name}@{alias}"] = dict(tags)
            token = page.token
            if not token:
                return found


def find_champion(connection: Connection, name: str) -> Champion | None:
    """Return the champion of a registered model; None if no version is the champion."""
    from nic_core.models.comparison import Champion
    from nic_core.steps.slide_models import PREDICTIONS

    found = find_version(connection, name, CHAMPION)
    if found is None:
        return None
    encoder, weights_hash = found.tags.get("encoder"), found.tags.get("weights_hash")
    title = f"version {found.version} ({encoder or 'encoder unknown'})"
    with tempfile.TemporaryDirectory() as folder:
        path = download_artifact(connection, found, f"{PRODUCT_FOLDER}/{PREDICTIONS}", folder)
        try:
            predictions = None if path is None else pl.read_parquet(path, glob=False)
        except pl.exceptions.PolarsError:
            predictions = None
    return Champion(title, encoder, weights_hash, predictions)


def download_artifact(
    connection: Connection, version: ModelVersion, path: str, folder: str
) -> Path | None:
    """Download an artifact of a version's run into ``folder``.

    None if the run does not have it, or does not exist any more (``mlflow gc``).
    """
    from mlflow.exceptions import MlflowException

    if version.run_id is None:
        return None
    try:
        siblings = connection.client.list_artifacts(version.run_id, path.rpartition("/")[0])
    except MlflowException as error:
        if does_not_exist(error):
            return None
        raise
    if all(item.path != path for item in siblings):
        return None
    return Path(connection.client.download_artifacts(version.run_id, path, folder))


def verify_exported(connection: Connection, model_id: str) -> None:
    """Verify that a logged model is a torch.export archive (pt2), from its files.

    MLflow's description of a model is the same for an archive and a pickle, so this downloads the
    files and reads the names in the archive; it unpickles nothing.

    Raises
    ------
    ModelFormatError
        The model has other files, such as a pickle, or its file is not a torch.export archive.
    """
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        with connection.active():
            model = Path(
                mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=folder)
            )
        files = sorted(str(path.relative_to(model)) for path in model.glob("data/**/*"))
        if files == [f"data/{EXPORTED_MODEL}"] and _is_exported(model / files[0]):
            return
    raise ModelFormatError(
        f"logged model {model_id}: expected the torch.export archive data/{EXPORTED_MODEL}, found "
        f"{', '.join(files) or 'no file in data/'}; a pickle executes code when it is loaded, so "
        "the model was not registered. Install the versions of mlflow and torch that "
        "pyproject.toml requires and materialize the partition again: no training is repeated"
    )


def _is_exported(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(
            name.rpartition("/")[2] == "archive_format" and archive.read(name) == b"pt2"
            for name in archive.namelist()
        )
