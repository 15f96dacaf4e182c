"""Steps of patch tasks and encoders: build patch tasks, train or import and probe encoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from nic_core.cohort import (
    Cohort,
    CohortError,
    EncoderSpec,
    FeaturesEncoder,
    Geometry,
    ImportedEncoder,
    RegisteredEncoder,
    ReusedEncoder,
)
from nic_core.encoders import (
    Encoder,
    EncoderCard,
    EncoderError,
    InitialEncoder,
    PatchDataset,
    Trained,
    build_patch_task,
    import_encoder,
    load_encoder,
    load_initial_weights,
    load_patch_task,
    save_encoder,
    train_encoder,
)
from nic_core.encoders.figures import (
    augmentation_sheet,
    confusion_matrix,
    embedding_map,
    neighbour_sheet,
    training_curves,
)
from nic_core.encoders.files import read_card, save_card
from nic_core.encoders.inference import embed_patches
from nic_core.encoders.patch_tasks import leaks
from nic_core.encoders.probes import PATCHES, check_scale, probe_table, task_embeddings
from nic_core.encoders.similarity import similarity
from nic_core.grids.features import features_hash
from nic_core.pictures import FIGURES, save_figure, save_figures
from nic_core.steps.keys import patch_task_keys
from nic_core.steps.slide_index import digest, patch_task_version
from nic_core.store import PatchTaskKey, Store, atomic_file, atomic_folder
from nic_core.tracker import Tracker

HISTORY, CONFUSION = "history.parquet", "confusion.parquet"
AUGMENTED_PATCHES = "augmented_patches.png"
RECIPE = "recipe"  # file in a patch task's folder: hash of its entry, files and settings


def make_patch_task(
    cohort: Cohort,
    store: Store,
    key: PatchTaskKey,
    progress: Callable[[int, int], None] | None = None,
) -> PatchDataset:
    """Build a patch task from its images and write it to the store.

    Parameters
    ----------
    key
        Geometry, at which an encoder of the cohort sees the task, and patch task.
    progress : callable, optional
        Called with (images read, total); each image counts twice.

    Returns
    -------
    PatchDataset
        The dataset; its patches are memory-mapped.

    Raises
    ------
    CohortError
        See :func:`~nic_core.encoders.patch_tasks.build_patch_task`.
    """
    geometry = _task_geometry(cohort, key)
    # computed before reading, so that a file changed meanwhile makes the patch task stale
    recipe = _recipe(cohort, key)
    with atomic_folder(store.patch_task(key)) as folder:
        build_patch_task(
            cohort.patch_task(key.task),
            patch=geometry.patch,
            mpp=geometry.mpp,
            tissue=cohort.settings.tissue,
            seed=0,
            folder=folder,
            progress=progress,
        )
        (folder / RECIPE).write_text(recipe)
    return load_patch_task(store.patch_task(key))


def patch_task_is_current(cohort: Cohort, store: Store, key: PatchTaskKey) -> bool:
    """Return whether a patch task exists and matches its present entry, files and settings."""
    recipe = store.patch_task(key) / RECIPE
    return recipe.exists() and recipe.read_text() == _recipe(cohort, key)


def _recipe(cohort: Cohort, key: PatchTaskKey) -> str:
    source = patch_task_version(cohort.patch_task(key.task))
    return digest(source, _task_geometry(cohort, key), cohort.settings.tissue)


def _task_geometry(cohort: Cohort, key: PatchTaskKey) -> Geometry:
    geometries = cohort.task_geometries[cohort.patch_task(key.task).name]
    if key.geometry not in geometries:
        raise CohortError(
            f"no encoder of the cohort sees patch task '{key.task}' as {key.geometry}; they see it "
            f"as {', '.join(geometries)}"
        )
    return geometries[key.geometry]


def make_encoder(
    cohort: Cohort,
    store: Store,
    encoder: str,
    tracker: Tracker | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    device: str = "auto",
    downloaded: Path | None = None,
) -> Trained:
    """Train an encoder on its patch tasks, or import it, and write it to the store.

    An interrupted training resumes from its last epoch. Beside the encoder, the folder has the
    history of the training and, of a trained network, the confusion matrices of the validation
    patches and a picture of augmented patches.

    Parameters
    ----------
    tracker : Tracker, optional
        Receives the metrics after each epoch.
    progress : callable, optional
        Called with (patches seen, total patches) after each training step.
    device : str
        ``auto`` (CUDA if available), ``cpu``, ``cuda`` or ``cuda:1``.
    downloaded : Path, optional
        Folder of the registered encoder that ``initial_weights.version`` names, which this step
        cannot download.

    Returns
    -------
    Trained
        The encoder and the history of its training, empty for an imported encoder.

    Raises
    ------
    EncoderError
        Training or import failed, the encoder to reuse or to start from is not in the store, or
        the entry has no network of its own: it names a version of a model registry, or a folder of
        features (:func:`make_features_encoder`).
    """
    spec, geometry = cohort.encoder(encoder), cohort.geometry(encoder)
    if isinstance(spec, FeaturesEncoder):
        raise EncoderError(
            f"encoder '{encoder}' is a folder of features, without a network to train or import; "
            "materialize 'encoder', or call 'make_features_encoder'"
        )
    if isinstance(spec, RegisteredEncoder):
        raise EncoderError(
            f"encoder '{encoder}' is a version of a model registry, which this step cannot "
            "download; use an entry with objective 'imported' and the encoder's file"
        )
    tasks: list[PatchDataset] = []
    if isinstance(spec, ImportedEncoder):
        trained = Trained(import_encoder(spec, geometry))
    elif isinstance(spec, ReusedEncoder):
        trained = Trained(_reuse(store, spec, geometry))
    else:
        keys = patch_task_keys(cohort, encoder)
        tasks = [load_patch_task(store.patch_task(keys[task])) for task in spec.tasks]
        trained = train_encoder(
            spec,
            tasks,
            patch=geometry.patch,
            mpp=geometry.mpp,
            embedding_size=spec.embedding_size or cohort.settings.embedding_size,
            initial=_initial_encoder(spec, store, downloaded),
            device=device,
            tracker=tracker,
            checkpoint=store.encoder_checkpoint(encoder),
            progress=progress,
        )
    with atomic_folder(store.encoder(encoder)) as folder:
        save_encoder(folder, trained.encoder)
        trained.history.write_parquet(folder / HISTORY)
        if tasks:
            trained.confusion.write_parquet(folder / CONFUSION)
            save_figure(augmentation_sheet(tasks), folder / AUGMENTED_PATCHES)
        save_figures(encoder_figures(folder), folder / FIGURES)
    store.encoder_checkpoint(encoder).unlink(missing_ok=True)
    return trained


def encoder_figures(folder: Path) -> dict[str, Figure]:
    """Draw the training curves and the confusion matrices of an encoder in the store.

    Empty for an encoder that was not trained.

    Parameters
    ----------
    folder
        Folder of an encoder that :func:`make_encoder` wrote.

    Raises
    ------
    EncoderError
        The card is missing, damaged or of another format.
    """
    history = pl.read_parquet(folder / HISTORY, glob=False)
    if history.is_empty():
        return {}
    card = read_card(folder)
    return {
        "training_curves": training_curves(history),
        **{
            f"confusion_{task}": confusion_matrix(task, card.tasks[task], scores)
            for task, scores in card.scores.items()
        },
    }


def _reuse(store: Store, spec: ReusedEncoder, geometry: Geometry) -> Encoder:
    folder = store.encoder(spec.encoder)
    if not folder.exists():
        raise EncoderError(
            f"encoder '{spec.name}' reuses '{spec.encoder}', which is not made yet; materialize "
            f"'encoder' of '{spec.encoder}' first"
        )
    loaded = load_encoder(folder)
    source = f"encoder '{spec.encoder}' of the study, at {loaded.card.mpp:g} um/px"
    card = loaded.card.model_copy(
        update={"name": spec.name, "mpp": geometry.mpp, "source": loaded.card.source or source}
    )
    return replace(loaded, card=card)


def make_features_encoder(cohort: Cohort, store: Store, encoder: str) -> EncoderCard:
    """Write and return the card of an encoder whose embeddings were computed by other software.

    Its weights hash is that of all files in the entry's folder.

    Raises
    ------
    CohortError
        The cohort has no such encoder.
    FeaturesError
        The folder does not exist, or is empty.
    """
    spec, geometry = cohort.encoder(encoder), cohort.geometry(encoder)
    if not isinstance(spec, FeaturesEncoder):
        raise EncoderError(f"encoder '{encoder}' does not have objective 'features'")
    card = EncoderCard(
        name=encoder,
        architecture="features",
        objective=spec.objective,
        patch=geometry.patch,
        mpp=geometry.mpp,
        embedding_size=spec.embedding_size,
        pixels=None,
        weights_hash=features_hash(spec.folder),
        source=f"folder {spec.folder.name}",
    )
    with atomic_folder(store.encoder(encoder)) as folder:
        save_card(folder, card)
    return card


def _initial_encoder(
    spec: EncoderSpec, store: Store, downloaded: Path | None
) -> InitialEncoder | None:
    """Load the encoder that a training starts from; None without one."""
    start = spec.initial_weights
    if start is None:
        return None
    if start.encoder is not None:
        place, origin = store.encoder(start.encoder), f"encoder '{start.encoder}'"
        if not place.exists():
            raise EncoderError(
                f"encoder '{spec.name}' starts from encoder '{start.encoder}', which is not in the "
                f"store {store.root}; make '{start.encoder}' first"
            )
    elif start.file is not None:
        place, origin = start.file, start.file.name
    elif downloaded is None:
        raise EncoderError(
            f"encoder '{spec.name}' starts from {start.version} of a model registry, which this "
            "step cannot download; use 'initial_weights.file' with the encoder's folder, or "
            "materialize the encoder in Dagster"
        )
    else:
        place, origin = downloaded, str(start.version)
    loaded = load_initial_weights(place, spec.name)
    if start.file is not None and loaded.card.source is not None:
        origin = loaded.card.source
    return InitialEncoder(loaded, origin)


def leaked_groups(cohort: Cohort, store: Store, encoder: str) -> list[str]:
    """Describe test groups of patch tasks that are in the encoder's training data.

    Only patch tasks in the store are compared; see :func:`~nic_core.encoders.patch_tasks.leaks`.
    The training data of the encoder's initial weights count as its own.
    """
    tasks = _made_patch_tasks(cohort, store, encoder)
    own, seen = cohort.tasks_of(encoder), read_card(store.encoder(encoder)).seen_data
    trained = [t for t in tasks if t.name in own or seen.get(t.name) == t.identity]
    return leaks(trained, tasks)


def _made_patch_tasks(cohort: Cohort, store: Store, encoder: str) -> list[PatchDataset]:
    """Load the patch tasks that are in the store as the encoder sees them."""
    paths = map(store.patch_task, patch_task_keys(cohort, encoder).values())
    return [load_patch_task(path) for path in paths if path.exists()]


def encoder_similarity(cohort: Cohort, store: Store, encoder: str) -> pl.DataFrame | None:
    """Compare embeddings in the precision of the cohort's grids with those in float32.

    The patches are test patches of every patch task in the store.

    Returns
    -------
    polars.DataFrame or None
        A row for each task: ``task`` and the fields of
        :class:`~nic_core.encoders.similarity.Similarity`. None if the precision is float32.

    Raises
    ------
    EncoderError
        The encoder cannot compute in the precision
        (:func:`~nic_core.encoders.int8.int8_network`).
    """
    loaded = load_encoder(store.encoder(encoder))
    prepared = loaded.prepare(precision=cohort.settings.compression.precision)
    if prepared.precision == "float32":
        return None
    rows = []
    for task in _made_patch_tasks(cohort, store, encoder):
        pixels = task.patches[task.rows("test")[:PATCHES]]
        found = similarity(embed_patches(prepared, pixels), loaded.embed(pixels))
        rows.append({"task": task.name, **asdict(found)})
    return pl.DataFrame(rows)


def make_encoder_probe(
    cohort: Cohort, store: Store, encoder: str
) -> tuple[pl.DataFrame, dict[str, Figure]]:
    """Probe an encoder on every patch task in the store, and write the scores to the store.

    Returns
    -------
    scores : polars.DataFrame
        Columns of :data:`~nic_core.encoders.probes.PROBE_SCHEMA`.
    figures : dict of str to Figure
        Principal axes and nearest neighbours of the embeddings.

    Raises
    ------
    EncoderError
        The store has no patch task, or one with another patch size than the encoder, or of another
        resolution than in the encoder's training.
    """
    loaded = load_encoder(store.encoder(encoder))
    tasks = _made_patch_tasks(cohort, store, encoder)
    if not tasks:
        raise EncoderError(
            f"encoder '{encoder}' cannot be probed, because the store has no patch task; "
            "materialize 'patch_task' first"
        )
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
