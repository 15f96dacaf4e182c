"""Patch tasks and encoders: read the images, train or import, probe."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl
from matplotlib.figure import Figure

from nic_core.cohort import Cohort, ImportedEncoder, RegisteredEncoder
from nic_core.encoders import (
    EncoderError,
    PatchDataset,
    Trained,
    build_patch_task,
    import_encoder,
    load_encoder,
    load_patch_task,
    save_encoder,
    train_encoder,
)
from nic_core.encoders.figures import embedding_map, neighbour_sheet
from nic_core.encoders.patch_tasks import leaks
from nic_core.encoders.probes import check_scale, probe_table, task_embeddings
from nic_core.steps.slide_index import digest, patch_task_version
from nic_core.store import Store, atomic_file, atomic_folder
from nic_core.tracker import Tracker

HISTORY = "history.parquet"
RECIPE = "recipe"  # in a patch task's folder: a digest of what it was made of


def make_patch_task(
    cohort: Cohort,
    store: Store,
    task: str,
    progress: Callable[[int, int], None] | None = None,
) -> PatchDataset:
    """Read a patch task's images; writes and returns the dataset, its patches on disk.

    Raises
    ------
    CohortError
        See :func:`~nic_core.encoders.patch_tasks.build_patch_task`.
    """
    settings = cohort.settings
    recipe = _recipe(cohort, task)  # before anything is read
    with atomic_folder(store.patch_task(task)) as folder:
        build_patch_task(
            cohort.patch_task(task),
            patch=settings.patch,
            mpp=settings.mpp,
            tissue=settings.tissue,
            seed=0,
            folder=folder,
            progress=progress,
        )
        (folder / RECIPE).write_text(recipe)
    return load_patch_task(store.patch_task(task))


def patch_task_is_current(cohort: Cohort, store: Store, task: str) -> bool:
    """Whether a patch task is there, made of what its entry, files and settings are now."""
    recipe = store.patch_task(task) / RECIPE
    return recipe.exists() and recipe.read_text() == _recipe(cohort, task)


def _recipe(cohort: Cohort, task: str) -> str:
    settings = cohort.settings
    made_of = patch_task_version(cohort.patch_task(task))
    return digest(made_of, settings.patch, settings.mpp, settings.tissue)


def make_encoder(
    cohort: Cohort,
    store: Store,
    encoder: str,
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    device: str = "auto",
) -> Trained:
    """Train an encoder on its patch tasks, or import a ready one; writes and returns it.

    A training that was killed goes on from its last epoch. With a tracker its state stays until
    :func:`remove_checkpoint`: called again, it tells the tracker all and trains nothing.

    Raises
    ------
    EncoderError
        The entry cannot be trained or imported, or names a version of a registry.
    """
    spec, settings = cohort.encoder(encoder), cohort.settings
    if isinstance(spec, RegisteredEncoder):
        raise EncoderError(
            f"encoder '{encoder}' is a version of a registry, which is not asked here; give the "
            "file of an imported one"
        )
    if isinstance(spec, ImportedEncoder):
        ready = import_encoder(spec, patch=settings.patch, mpp=settings.mpp)
        trained = Trained(ready, pl.DataFrame())
    else:
        trained = train_encoder(
            spec,
            [load_patch_task(store.patch_task(task)) for task in spec.tasks],
            patch=settings.patch,
            mpp=settings.mpp,
            embedding_size=settings.embedding_size,
            device=device,
            tracker=tracker,
            checkpoint=store.encoder_checkpoint(encoder),
            progress=progress,
        )
    with atomic_folder(store.encoder(encoder)) as folder:
        save_encoder(folder, trained.encoder)
        trained.history.write_parquet(folder / HISTORY)
    if tracker is None:
        remove_checkpoint(store, encoder)
    return trained


def remove_checkpoint(store: Store, encoder: str) -> None:
    """Forget a training's state: its product is kept, and its tracker has taken everything."""
    store.encoder_checkpoint(encoder).unlink(missing_ok=True)


def leaked_groups(cohort: Cohort, store: Store, encoder: str) -> list[str]:
    """What training an encoder saw of the test patients of the patch tasks that are made; see
    :func:`~nic_core.encoders.patch_tasks.leaks`."""
    made = [path for task in cohort.patch_tasks if (path := store.patch_task(task.name)).exists()]
    tasks = [load_patch_task(path) for path in made]
    return leaks([task for task in tasks if task.name in cohort.encoder(encoder).tasks], tasks)


def make_encoder_probe(
    cohort: Cohort, store: Store, encoder: str
) -> tuple[pl.DataFrame, dict[str, Figure]]:
    """Probe an encoder on every patch task that could be made; writes and returns the scores.

    The scores are those of :data:`~nic_core.encoders.probes.PROBE_SCHEMA`; the figures show the
    embeddings' principal axes and nearest neighbours.

    Raises
    ------
    EncoderError
        No patch task has been made, or one is of another size or um/px than the encoder's.
    """
    loaded = load_encoder(store.encoder(encoder))
    made = [path for task in cohort.patch_tasks if (path := store.patch_task(task.name)).exists()]
    if not made:
        raise EncoderError(
            f"encoder '{encoder}' cannot be probed: no patch task has been made; materialize "
            "'patch_task' first"
        )
    tasks = [load_patch_task(path) for path in made]
    for task in tasks:
        check_scale(loaded, task)
    embeddings = [task_embeddings(loaded, task) for task in tasks]
    scores = probe_table(loaded, embeddings)
    with atomic_file(store.encoder_probe(encoder)) as path:
        scores.write_parquet(path)
    return scores, {
        "embeddings": embedding_map(embeddings),
        "nearest_patches": neighbour_sheet(embeddings),
    }
