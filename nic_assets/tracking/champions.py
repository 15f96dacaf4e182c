"""The registered versions of slide models that predict: a target's champion, or the version that
its entry names."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nic_assets.tracking.connection import (
    Connection,
    TrackingError,
    as_tracking_error,
    does_not_exist,
)
from nic_core.cohort import Cohort, CohortError, Target

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

NO_CHAMPION = "none"
"""Data version of a target without a champion."""


def find_predicting_version(connection: Connection, target: Target) -> ModelVersion | None:
    """Return the registered version that predicts a target; None if there is none.

    Raises
    ------
    TrackingError
        MLflow does not answer, or refuses the request.
    """
    from mlflow.exceptions import MlflowException

    from nic_assets.tracking.registry import CHAMPION, find_version

    name = f"model-{target.name}"
    with as_tracking_error(name):
        if target.predict_with == "champion":
            return find_version(connection, name, CHAMPION)
        try:
            return connection.client.get_model_version(name, str(target.predict_with))
        except MlflowException as error:
            if does_not_exist(error):
                return None
            raise


def champion_version(found: ModelVersion | None) -> str:
    """Return the data version of a target's champion: its number and run."""
    return NO_CHAMPION if found is None else f"{found.version} of run {found.run_id}"


def champion_versions(
    connection: Connection, cohort: Cohort, warn: Callable[[str], None], known: Collection[str]
) -> dict[str, str]:
    """Return the data version of the champion of every target.

    If MLflow cannot be asked, ``warn`` receives the reason. The target is then left out if it is
    among the ``known`` (its champion counts as unchanged); otherwise it counts as one without a
    champion, and the materialization of the champion raises the error.
    """
    versions = {}
    for target in cohort.targets:
        try:
            versions[target.name] = champion_version(find_predicting_version(connection, target))
        except TrackingError as error:
            warn(str(error))
            if target.name not in known:
                versions[target.name] = NO_CHAMPION
    return versions


@contextmanager
def download_model(connection: Connection, version: ModelVersion) -> Iterator[Path]:
    """Download the folder of a registered slide model; it exists within the block.

    Raises
    ------
    CohortError
        The version's run does not exist any more, or lacks the model's files.
    TrackingError
        MLflow does not answer, or refuses the request.
    """
    from nic_assets.tracking.registry import PRODUCT_FOLDER, download_artifact

    title = f"version {version.version} of {version.name}"
    with tempfile.TemporaryDirectory() as folder:
        with as_tracking_error(title):
            path = download_artifact(connection, version, PRODUCT_FOLDER, folder)
        if path is None:
            raise CohortError(
                f"the run of {title} was deleted or has no artifact '{PRODUCT_FOLDER}': set the "
                "alias 'champion' on another version"
            )
        yield path
