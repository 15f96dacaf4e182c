"""Keys of products that follow from the cohort file alone."""

from __future__ import annotations

from nic_core.cohort import Cohort
from nic_core.store import PatchTaskKey


def patch_task_keys(cohort: Cohort, encoder: str) -> dict[str, PatchTaskKey]:
    """Return the key of every patch task as an encoder sees it, by the name of the task."""
    return {
        task.name: PatchTaskKey(
            geometry=cohort.task_geometry(encoder, task.name).name, task=task.name
        )
        for task in cohort.patch_tasks
    }
