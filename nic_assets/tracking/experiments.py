"""MLflow's experiments: one for encoders, and one for each target."""

from __future__ import annotations

from collections.abc import Callable

from nic_assets.tracking.connection import Connection

ENCODERS = "encoders"

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of an experiment of model training. MLflow otherwise guesses the kind from its content."""

NOTE = "mlflow.note.content"  # tag of an experiment's description


def target_experiment(target: str) -> str:
    """Return the name of a target's experiment."""
    return f"target-{target}"


def experiment_id(connection: Connection, name: str, warn: Callable[[str], None]) -> str:
    """Return the id of an experiment; create it, or restore it if it was deleted.

    MLflow reserves the name of a deleted experiment until ``mlflow gc`` removes it.
    """
    from mlflow.exceptions import MlflowException

    client, artifacts = connection.client, connection.artifacts
    known = client.get_experiment_by_name(name)
    if known is None:
        try:
            created: str = client.create_experiment(
                name,
                f"{artifacts}/{name}" if artifacts else None,
                tags=KIND | {NOTE: _description(name)},
            )
            return created
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # a parallel step created it
                raise
            known = client.get_experiment_by_name(name)
            assert known is not None
    if known.lifecycle_stage == "deleted":
        client.restore_experiment(known.experiment_id)
        warn(
            f"the MLflow experiment '{name}' was deleted; it was restored with its runs, since "
            "its name cannot be used again before mlflow gc"
        )
    identity: str = known.experiment_id
    return identity


def _description(name: str) -> str:
    if name == ENCODERS:
        return (
            "Encoders: patch to embedding. A run holds the curves of a training, its scores on the "
            "test patients of each patch task, and the model card."
        )
    return (
        f"Slide models of {name.removeprefix('target-')}: grid to prediction, one run for each "
        "encoder. Cross-validated and test metrics have 95 % intervals (`_low`, `_high`)."
    )
