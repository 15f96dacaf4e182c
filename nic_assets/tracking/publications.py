"""What MLflow receives of an encoder or a slide model, read from the product's folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from matplotlib.figure import Figure

from nic_assets.tracking.experiments import ENCODERS, target_experiment
from nic_assets.tracking.registry import CANDIDATE
from nic_core import steps
from nic_core.cohort import Cohort, Geometry
from nic_core.cohort.index import DESCRIPTIVE_COLUMNS
from nic_core.encoders import EncoderCard, load_encoder
from nic_core.encoders.files import read_card
from nic_core.encoders.folder_names import PROGRAMS
from nic_core.models.cross_validation import CrossValidation, curves
from nic_core.models.figures import model_figures
from nic_core.models.files import ModelCard, ensemble_module
from nic_core.reports import encoder_model_card, encoder_results, model_results, slide_model_card
from nic_core.steps.encoders import AUGMENTED_PATCHES, CONFUSION, HISTORY
from nic_core.store import ModelKey, PatchTaskKey, Store
from nic_core.view.addresses import cohort_page, target_page


@dataclass(frozen=True)
class Network:
    """A network to register as a version of ``name``.

    Attributes
    ----------
    name
        Name of the registered model.
    note
        Description of the registered model, for all its versions.
    module, example
        The network, and an input that fixes its signature: the first axis is the batch, the others
        are constant.
    aliases
        Aliases that the version gets.
    slide_model
        Folders of the slide model and of its encoder, if the version can also be called with slide
        files (:mod:`nic_assets.tracking.callable_model`).
    """

    name: str
    note: str
    module: torch.nn.Module
    example: torch.Tensor
    aliases: tuple[str, ...]
    slide_model: tuple[Path, Path] | None = None


@dataclass(frozen=True)
class Publication:
    """A product as a run of MLflow and, if it has a network that can be exported, a version.

    Attributes
    ----------
    product
        The product in words, for messages.
    experiment, run_name
        Experiment and name of the run.
    content_hash
        Digest of the product. A product with the same digest is not published again.
    tags
        Tags of the run and of the version.
    params
        Settings of the training.
    metrics
        Step and metrics of each epoch.
    results
        Final results (:data:`nic_core.reports.RESULT_SCHEMA`).
    tables, figures, pictures
        Logged as JSON and PNG (figures at print quality), by name; pictures are files of the
        product.
    page
        Address of the viewer's page that shows it.
    data
        Tables that the training read: ``asset/partition`` to path and digest.
    card, model_card
        The product's card, and the model card in Markdown.
    files
        The product's folder, if its files are logged. Its figures are not logged a second time.
    network
        The network to register, if any.
    """

    product: str
    experiment: str
    run_name: str
    content_hash: str
    tags: Mapping[str, str]
    params: Mapping[str, object]
    metrics: list[tuple[int, dict[str, float]]]
    results: pl.DataFrame
    page: str
    data: Mapping[str, tuple[Path, str]]
    card: Mapping[str, Any]
    model_card: str
    files: Path | None
    network: Network | None
    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    pictures: tuple[Path, ...] = ()


def encoder_run_name(cohort: Cohort, encoder: str) -> str:
    """Return the name of an encoder's run in MLflow."""
    return f"{encoder} ({cohort.name})"


def model_run_name(cohort: Cohort, key: ModelKey) -> str:
    """Return the name of a slide model's run in MLflow."""
    return f"{key.target} on {key.encoder} ({cohort.name})"


def encoder_publication(
    cohort: Cohort, store: Store, name: str, tags: Mapping[str, str]
) -> Publication:
    """Return what MLflow receives of an encoder in the store.

    Parameters
    ----------
    tags
        Tags of its training: cohort, asset, partition, run and commit.

    Raises
    ------
    EncoderError
        The folder is missing or damaged.
    """
    folder = store.encoder(name)
    encoder = load_encoder(folder)
    card = encoder.card
    origin = _organs(cohort, card)
    history = pl.read_parquet(folder / HISTORY, glob=False)
    confusion, picture = folder / CONFUSION, folder / AUGMENTED_PATCHES
    tags = {
        **tags,
        "encoder": card.name,
        "objective": card.objective,
        "architecture": card.architecture,
        "weights_hash": card.weights_hash,
        "patch": f"{card.patch}",
        "mpp": f"{card.mpp:g}",
        "embedding_size": f"{card.embedding_size}",
        **({} if card.preset is None else {"preset": card.preset}),
        "tasks": ", ".join(card.tasks),
        "targets": ", ".join(target.name for target in cohort.targets),
        **{f"data/{task}": identity for task, identity in card.data.items()},
        **{f"mpp/{task}": f"{mpp:g}" for task, mpp in card.task_mpp.items()},
        **_initial_weights_tags(card),
        **origin,
    }
    network = None
    if card.architecture not in PROGRAMS:  # the archive of a network cannot be exported again
        network = Network(
            name=f"encoder-{name}",
            note=f"Encoder {name}: uint8 patches (B, 3, P, P) to embeddings float32 (B, C).",
            module=encoder.module,
            example=torch.zeros((2, 3, card.patch, card.patch), dtype=torch.uint8),
            aliases=(CANDIDATE,),
        )
    return Publication(
        product=f"encoder '{name}'",
        experiment=ENCODERS,
        run_name=encoder_run_name(cohort, name),
        content_hash=steps.digest(card.model_dump(exclude={"software"})),
        tags=tags,
        params={
            "encoder": card.name,
            "objective": card.objective,
            "architecture": card.architecture,
            "tasks": ", ".join(card.tasks),
            "patch": card.patch,
            "mpp": card.mpp,
            "embedding_size": card.embedding_size,
            **card.training,
        },
        metrics=[
            (row["epoch"], {name: row[name] for name in history.columns if _is_metric(row[name])})
            for row in history.iter_rows(named=True)
        ],
        results=encoder_results(card),
        page=cohort_page(),
        data={
            f"patch_task/{task}": (store.patch_task(_trained_on(card, task)), identity)
            for task, identity in card.data.items()
        },
        card=card.model_dump(mode="json"),
        model_card=encoder_model_card(card, cohort=cohort.name, origin=origin),
        # an imported encoder has its own file
        files=None if card.objective == "imported" else folder,
        network=network,
        tables=(
            {"validation_confusion": pl.read_parquet(confusion, glob=False)}
            if confusion.exists()
            else {}
        ),
        figures=steps.encoder_figures(folder),
        pictures=(picture,) if picture.exists() else (),
    )


def model_publication(
    cohort: Cohort,
    store: Store,
    key: ModelKey,
    tags: Mapping[str, str],
    read: tuple[CrossValidation, ModelCard],
) -> Publication:
    """Return what MLflow receives of a slide model in the store.

    Parameters
    ----------
    tags
        As in :func:`encoder_publication`.
    read
        Output of :func:`nic_core.steps.read_slide_model` for the model's folder.
    """
    result, card = read
    folder = store.slide_model(key)
    geometry = f"{card.patch} px at {card.mpp:g} um/px, stride {card.stride} px"
    encoder = _encoder_of(store, card)
    origin = _slide_origin(steps.read_slide_index(store), result)
    paths = {
        f"target_grids/{key.encoder}/{key.target}": store.target_grids(key),
        f"target_folds/{key.target}": store.target_folds(key.target),
    }
    return Publication(
        product=f"slide model '{key}'",
        experiment=target_experiment(key.target),
        run_name=model_run_name(cohort, key),
        content_hash=steps.digest(card.model_dump(exclude={"software"}), result.predictions.rows()),
        tags={
            **tags,
            "target": key.target,
            "encoder": key.encoder,
            "weights_hash": card.weights_hash,
            "geometry": geometry,
            "crop_um": f"{card.crop_um:g}",
            **({} if encoder is None else {"tasks": ", ".join(encoder.tasks)}),
            "training_digest": card.training.digest,
            **{f"data/{name}": digest for name, digest in card.data.items()},
            **origin,
        },
        params={
            "encoder": key.encoder,
            "target": key.target,
            "kind": card.target.kind,
            "geometry": geometry,
            **card.settings.model_dump(),
        },
        metrics=list(curves(result.history)),
        results=model_results(card),
        page=target_page(key.target),
        data={name: (paths[name], digest) for name, digest in card.data.items()},
        card=card.model_dump(mode="json"),
        model_card=slide_model_card(
            card, encoder, origin=origin, subgroups=steps.model_subgroups(store, result)
        ),
        files=folder,
        network=Network(
            name=f"model-{key.target}",
            note=f"Models of {key.target} ({card.target.kind}), on the grids of any encoder (tag "
            "`encoder`): tables of slide files to predictions, and crops of embeddings float32 "
            "(B, C, crop, crop) to predictions.",
            module=ensemble_module(result.networks),
            example=torch.zeros((2, card.embedding_size, card.crop, card.crop)),
            aliases=(CANDIDATE, f"{CANDIDATE}-{key.encoder.replace('.', '-')}"),
            # features of other software cannot be computed for another slide
            slide_model=(
                (folder, store.encoder(key.encoder))
                if encoder is not None and encoder.objective != "features"
                else None
            ),
        ),
        figures=model_figures(result),
    )


def _is_metric(value: object) -> bool:
    """Return whether a value of the history is a number: not the phase, nor undefined."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _trained_on(card: EncoderCard, task: str) -> PatchTaskKey:
    """Return the key of a patch task as the encoder saw it in its training."""
    geometry = Geometry(card.patch, card.task_mpp[task], card.patch)
    return PatchTaskKey(geometry=geometry.name, task=task)


def _encoder_of(store: Store, card: ModelCard) -> EncoderCard | None:
    """Return the card of the model's encoder, unless the store has it with other weights now."""
    folder = store.encoder(card.encoder)
    found = read_card(folder) if folder.exists() else None
    return found if found is not None and found.weights_hash == card.weights_hash else None


def _slide_origin(index: pl.DataFrame, result: CrossValidation) -> dict[str, str]:
    """Return what the slide table says of the model's slides, as far as it does."""
    slides = index.filter(pl.col("slide").is_in(result.predictions["slides"].explode().implode()))
    found = {
        column: slides[column].drop_nulls().unique().sort().to_list()
        for column in DESCRIPTIVE_COLUMNS
    }
    return {column: ", ".join(values) for column, values in found.items() if values}


def _organs(cohort: Cohort, card: EncoderCard) -> dict[str, str]:
    """Return the organs of the encoder's patch tasks as a tag; empty if none is known."""
    organs = {task.organ for task in cohort.patch_tasks if task.name in card.data}
    return {"organ": ", ".join(sorted(organs))} if organs else {}


def _initial_weights_tags(card: EncoderCard) -> dict[str, str]:
    """Return the origin and hash of the weights that a training started from, as tags."""
    start = card.initial_weights
    if start is None:
        return {}
    return {"initial_weights": start.origin, "initial_weights_hash": start.weights_hash}
