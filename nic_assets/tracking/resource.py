"""The Dagster resource ``tracking``: experiment tracking and model registry by MLflow.

Each encoder and slide model is one MLflow run, tagged with cohort, asset and partition. Each
encoder and each target is one registered model; the version registered last has the alias
``candidate``.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from nic_assets.tracking.connection import (
    Connection,
    TrackingError,
    as_tracking_error,
    without_secrets,
)
from nic_assets.tracking.database import database_uri
from nic_core.cohort import Cohort, EncoderSpec, ImportedEncoder, RegisteredEncoder
from nic_core.store import Store

if TYPE_CHECKING:
    from nic_assets.tracking.live import LiveCurves


class Tracking(Connection):
    """A connection to MLflow that shows live curves and reads the registry."""

    @classmethod
    def in_store(cls, store: Store) -> Tracking:
        """Return the connection by ``$MLFLOW_TRACKING_URI``; by default a database in the store."""
        folder: Path = store.mlflow
        uri = os.environ.get("MLFLOW_TRACKING_URI") or database_uri(store)
        if uri.startswith("http"):
            return cls(uri, None, without_secrets(uri).rstrip("/"))
        return cls(uri, (folder / "artifacts").as_uri())

    @contextmanager
    def live_curves(
        self,
        context: dg.AssetExecutionContext,
        tags: Mapping[str, str],
        *,
        experiment: str,
        name: str,
    ) -> Iterator[LiveCurves]:
        """Show the curves of a training that the block runs; best effort.

        Parameters
        ----------
        tags
            Tags of the training (:func:`training_tags`).
        experiment, name
            Experiment and name of the MLflow run.
        """
        from nic_assets.tracking.live import LiveCurves

        def is_finished(dagster_run: str) -> bool:
            found = context.instance.get_run_by_id(dagster_run)
            return found is not None and found.is_finished

        curves = LiveCurves(self, experiment, name, tags, is_finished, context.log.warning)
        try:
            yield curves
        except Exception:
            curves.end("FAILED")
            raise
        except BaseException:  # interrupted
            curves.end("KILLED")
            raise

    def registered_versions(
        self, cohort: Cohort, warn: Callable[[str], None], known: Collection[str]
    ) -> dict[str, str]:
        """Return the data version of every encoder entry that refers to the registry.

        Such an entry is registered itself, or its initial weights are. The version is a digest of
        the entry and of the weights that have the alias now. If an encoder cannot be looked up,
        ``warn`` receives the reason. The encoder is then left out if it is among the ``known`` (it
        counts as unchanged); otherwise its version is a digest of the entry, and its
        materialization raises the error.
        """
        from nic_assets.tracking.registry import find_encoder
        from nic_core.encoders import EncoderError
        from nic_core.steps import digest

        versions = {}
        for entry in cohort.encoders:
            registered = entry if isinstance(entry, RegisteredEncoder) else None
            if isinstance(entry, EncoderSpec):
                registered = entry.registered_start
            if registered is not None:
                geometry = cohort.geometry(entry.name)
                try:
                    found = find_encoder(self, registered)
                    versions[entry.name] = digest(entry, geometry, found.tags["weights_hash"])
                except (TrackingError, EncoderError) as error:
                    warn(str(error))
                    if entry.name not in known:
                        versions[entry.name] = digest(entry, geometry)
        return versions

    @contextmanager
    def download_encoder(self, entry: RegisteredEncoder) -> Iterator[tuple[ImportedEncoder, str]]:
        """Download a registered encoder to a temporary folder, which exists within the block.

        Yields
        ------
        ImportedEncoder, str
            An entry of the same name for the downloaded files, and the URL of the version.

        Raises
        ------
        EncoderError
            No version has the alias, its run does not exist, or the run lacks the encoder's files.
        TrackingError
            MLflow does not answer, or refuses the request.
        """
        from nic_assets.tracking.registry import PRODUCT_FOLDER, download_artifact, find_encoder
        from nic_core.encoders import EncoderError

        found = find_encoder(self, entry)
        with tempfile.TemporaryDirectory() as folder:
            with as_tracking_error(entry.version):
                path = download_artifact(self, found, PRODUCT_FOLDER, folder)
            if path is None:
                raise EncoderError(
                    f"encoder '{entry.name}': the run of {entry.version} (version "
                    f"{found.version}) was deleted or has no artifact '{PRODUCT_FOLDER}': the "
                    "encoder was imported from a file, or logged by an older version of this "
                    f"package; import the file, or set the alias on another version"
                )
            imported = ImportedEncoder(
                name=entry.name,
                objective="imported",
                file=path,
                patch=entry.patch,
                mpp=entry.mpp,
                stride=entry.stride,
            )
            yield imported, self.page(found.name, found.version)


def training_tags(
    cohort: Cohort, asset: str, partition: str, *, run: str | None, commit: str | None
) -> dict[str, str]:
    """Return the tags by which a run and a version name their training.

    Parameters
    ----------
    run, commit
        The Dagster run and the commit of the training; None if they are not known.
    """
    tags = {"cohort": cohort.name, "dagster/asset_key": asset, "dagster/partition": partition}
    if run is not None:
        tags["dagster/run_id"] = run
    if commit is not None:
        tags["git/commit"] = commit
    return tags


@cache
def git_commit() -> str | None:
    """Return the commit of this project's checkout, with ``-dirty`` if tracked files differ.

    None if the package is not in a git checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or refuses this user
        return None
