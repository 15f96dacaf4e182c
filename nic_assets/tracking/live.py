"""Live curves: the metrics of a training in progress, as an unfinished MLflow run; best effort."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from nic_assets.tracking.connection import Connection, connection_errors, reason
from nic_assets.tracking.experiments import experiment_id

PARTITION_TAGS = ("cohort", "dagster/asset_key", "dagster/partition")


class LiveCurves:
    """Implements the library's :class:`~nic_core.tracker.Tracker`.

    The run is created with the first metrics. After a call that fails, nothing more is sent: the
    registration of the product logs all metrics from its folder.
    """

    def __init__(
        self,
        connection: Connection,
        experiment: str,
        run_name: str,
        tags: Mapping[str, str],
        is_finished: Callable[[str], bool],
        warn: Callable[[str], None],
    ) -> None:
        """Prepare the run; nothing is sent yet.

        Parameters
        ----------
        tags
            Tags of the run: at least :data:`PARTITION_TAGS` and ``dagster/run_id``.
        is_finished
            Whether a Dagster run, given by its id, is finished.
        warn
            Receives a message when a call fails.
        """
        self._connection, self._experiment = connection, experiment
        self._name, self._tags = run_name, dict(tags)
        self._is_finished, self._warn = is_finished, warn
        self._id = ""
        self._failed = False

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._try(lambda: self._connection.client.log_batch(self._run(), metrics))

    def end(self, status: str) -> None:
        """Mark the run as ``FAILED`` or ``KILLED``, if there is one."""
        if self._id:
            self._try(lambda: self._connection.client.set_terminated(self._id, status))

    def _try(self, call: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            call()
        except connection_errors() as error:
            self._failed = True
            self._warn(
                f"MLflow shows no live curves of this training ({reason(error)}); its registration "
                "logs them"
            )

    def _run(self) -> str:
        """Return the id of the run; create it, and end abandoned runs of the partition."""
        if not self._id:
            client, tags = self._connection.client, self._tags
            experiment = experiment_id(self._connection, self._experiment, self._warn)
            conditions = [f"tags.`{tag}` = '{tags[tag]}'" for tag in PARTITION_TAGS]
            # a run whose process was killed would stay RUNNING
            for other in client.search_runs(
                [experiment], " and ".join([*conditions, "attributes.status = 'RUNNING'"])
            ):
                dagster_run = other.data.tags.get("dagster/run_id", "")
                if dagster_run == tags["dagster/run_id"] or self._is_finished(dagster_run):
                    client.set_terminated(other.info.run_id, "KILLED")
            self._id = client.create_run(experiment, tags=tags, run_name=self._name).info.run_id
        return self._id
