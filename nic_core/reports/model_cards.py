"""Model cards in Markdown: intended use, training data, limits, metrics and licence.

The sections follow Mitchell et al., "Model Cards for Model Reporting" (FAT* 2019).
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from nic_core.cohort.presets import licence_of
from nic_core.encoders import EncoderCard
from nic_core.encoders.keras_import import LICENCE, RELEASED
from nic_core.models.files import ModelCard
from nic_core.models.kinds import kind_of
from nic_core.reports.results import (
    encoder_results,
    markdown_table,
    model_results,
    results_markdown,
)

NOT_RECORDED = "not recorded; ask the source of the weights"


def starting_weights(card: EncoderCard) -> str:
    """Return the weights that an encoder starts from, with their licence, in one sentence."""
    if card.architecture == "mean_rgb":
        return "The network has no trained weights, so no licence of other weights applies."
    start = card.initial_weights
    if start is not None:
        return f"The training started from {start.origin} (licence: {_licence(start.origin)})."
    if card.preset is not None:
        return f"Weights of the preset '{card.preset}' (licence: {licence_of(card.preset)})."
    if card.source is not None:
        return f"Weights of {card.source} (licence: {_licence(card.source)})."
    return "Random initial weights, so no licence of other weights applies."


def _licence(origin: str) -> str:
    if origin.startswith("encoder '"):
        return "see the card of that encoder"
    return LICENCE if origin.partition(" ")[0] in RELEASED else NOT_RECORDED


def encoder_model_card(card: EncoderCard, *, cohort: str, origin: Mapping[str, str]) -> str:
    """Return the model card of an encoder.

    Parameters
    ----------
    cohort
        Name of the cohort in which it was made.
    origin
        Origin of the training data, such as ``organ``, as far as it is known.
    """
    data = [f"- cohort: {cohort}", *(f"- {name}: {value}" for name, value in origin.items())]
    data += [
        f"- patch task {task}: {', '.join(card.tasks.get(task, ())) or 'without classes'}, at "
        f"{card.task_mpp.get(task, card.mpp):g} um/px, sha256 {identity[:16]}"
        for task, identity in card.data.items()
    ]
    if not card.data:
        without = "is not trained" if card.architecture == "mean_rgb" else "was trained elsewhere"
        data.append(f"- none in this study: the network {without}")
    results = encoder_results(card)
    return _card(
        f"Encoder {card.name}",
        f"Maps H&E patches of {card.patch} px at {card.mpp:g} um/px to embeddings of "
        f"{card.embedding_size} numbers ({card.objective}, {card.architecture}), to compress "
        "slides into grids. For research; it is not a medical device.",
        data,
        [
            "- other um/px, stains, scanners and organs than those of the training data are not "
            "tested",
            "- scores of patch tasks do not rank encoders for predictions of slides",
        ],
        results_markdown(results) if results.height else "This encoder has no scored patch task.",
        starting_weights(card),
    )


def slide_model_card(
    card: ModelCard,
    encoder: EncoderCard | None,
    *,
    origin: Mapping[str, str],
    subgroups: pl.DataFrame,
) -> str:
    """Return the model card of a slide model.

    Parameters
    ----------
    encoder
        Card of the encoder that the model was trained on; None if the store has it no longer.
    origin
        Origin of the training slides, such as ``scanner``, ``stain`` and ``organ``, as far as it is
        known.
    subgroups
        Metrics by subgroup: ``column`` and
        :data:`~nic_core.models.subgroups.SUBGROUP_SCHEMA`; no rows if there are none.
    """
    target, training = card.target, card.training
    results = model_results(card)
    network = results.filter(model=results["model"][0])
    metrics = results_markdown(network)
    if subgroups.height:
        metrics += f"\n\nCross-validated, by subgroup:\n\n{_subgroups_markdown(subgroups)}"
    return _card(
        f"Model of {target.name} on {card.encoder}",
        f"Predicts {target.name} ({target.kind}) of a {target.level} from the grids of encoder "
        f"{card.encoder}: the mean of {len(card.networks)} networks on crops of {card.crop} x "
        f"{card.crop} cells ({card.crop_um:g} um). For research; it is not a medical device.",
        [
            f"- cohort: {training.name}, {training.patients} patients, {training.units} units, "
            f"{len(training.slides)} slides",
            f"- grids: {card.patch} px at {card.mpp:g} um/px, stride {card.stride} px",
            *(f"- {name}: {value}" for name, value in origin.items()),
            *(f"- {table}: digest {digest}" for table, digest in card.data.items()),
        ],
        [
            "- only grids of the encoder with the weights hash "
            f"{card.weights_hash[:16]} can be predicted",
            f"- the metrics are those of cohort {training.name}; other hospitals, scanners and "
            "stains are not tested unless a subgroup below says so",
            f"- an interval over {training.patients} patients says how exactly the metric is known "
            f"on this cohort; chance level of {kind_of(target).primary_name} is "
            f"{kind_of(target).chance_level:g}",
        ],
        metrics,
        NOT_RECORDED if encoder is None else starting_weights(encoder),
    )


def _subgroups_markdown(subgroups: pl.DataFrame) -> str:
    rows = []
    for row in subgroups.iter_rows(named=True):
        value = row["note"]
        if row["value"] is not None:
            value = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        of_group = (row[name] for name in ("column", "group", "metric"))
        rows.append([*of_group, value, row["units"], row["patients"]])
    return markdown_table(("column", "subgroup", "metric", "value", "units", "patients"), rows)


def _card(
    title: str, use: str, data: list[str], limits: list[str], metrics: str, licence: str
) -> str:
    return "\n\n".join(
        [
            f"# {title}",
            f"## Intended use\n\n{use}",
            "## Training data\n\n" + "\n".join(data),
            "## Limits\n\n" + "\n".join(limits),
            f"## Metrics\n\n{metrics}",
            f"## Licence of the starting weights\n\n{licence}",
        ]
    )
