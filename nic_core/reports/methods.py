"""The methods of a study in words, filled from its settings, with the source of each part.

The tags are those of the docstrings: [A] and [B] are the two papers (:data:`REFERENCES`), [code]
the authors' scripts, [choice] what neither states and this project decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nic_core.cohort import Cohort, ModelSettings, Settings, SiteFolds, Target
from nic_core.encoders import EncoderCard
from nic_core.models.files import ModelCard
from nic_core.models.kinds import kind_of

REFERENCES = (
    "[A] Tellez D, Höppener D, Verhoef C, et al. Extending unsupervised neural image compression "
    "with supervised multitask learning. Medical Imaging with Deep Learning (MIDL) 2020, PMLR "
    "121:770-783.",
    "[B] Tellez D, Litjens G, van der Laak J, Ciompi F. Neural image compression for gigapixel "
    "histopathology image analysis. IEEE Transactions on Pattern Analysis and Machine Intelligence "
    "2019.",
    "[code] The authors' scripts.",
    "[choice] Not stated by either paper; decided by this project.",
)
_OBJECTIVES = {
    "mtl": "supervised multitask learning [A] on the patch tasks {tasks}",
    "supervised": "supervised learning [B] on the patch task {tasks}",
    "vae": "a variational autoencoder [B] on the patches of {tasks}, without their labels",
    "contrastive": "contrastive training [B] on the patches of {tasks}, without their labels",
    "bigan": "a bidirectional GAN [B] on the patches of {tasks}, without their labels",
    "mean_rgb": "the mean colour of the patch, without training [B]",
    "imported": "a network that other software trained",
    "features": "embeddings that other software computed",
}
_NETWORKS = {
    "published": "the published CNN of eight depthwise-separable convolutions [B]",
    "small": (
        "a small CNN of three convolutions on up to 48 principal components of the embeddings, "
        "centred by slide [choice]"
    ),
    "local": (
        "a small CNN with a receptive field of 3 x 3 cells on up to 48 principal components of the "
        "embeddings, centred by slide, with a penalty on the outputs of single cells [choice]"
    ),
    "mil": "gated-attention pooling of up to 48 principal components of the embeddings [choice]",
}
_LOSSES = {
    "regression": "the squared error",
    "classification": "the cross-entropy",
    "survival": "the negative Cox partial likelihood [A]",
}
_RECALIBRATIONS = {
    "temperature": "by a temperature",
    "isotonic": "by isotonic regression (survival: by a temperature)",
}


def methods(
    cohort: Cohort, encoders: Sequence[EncoderCard], models: Sequence[ModelCard], *, masks: int
) -> tuple[str, ...]:
    """Describe the methods of a study, a paragraph for each of its parts that exists.

    Parameters
    ----------
    encoders
        Cards of the encoders that exist.
    models
        Cards of the slide models that exist.
    masks
        Number of slides with a tissue mask of their own.
    """
    parts = [_tissue(cohort, masks)]
    parts += [_encoder(card) for card in encoders]
    if models:
        parts += [_networks(models), _training(cohort.targets, models), _statistics(models)]
    return tuple(parts)


def _tissue(cohort: Cohort, masks: int) -> str:
    text = (
        "Slides were compressed by neural image compression [B]: the slide is divided into square "
        "cells, a network maps the patch of each cell to a short vector (its embedding), and the "
        "embeddings, at the places of their cells, are the grid from which slide models are "
        "trained."
    )
    if not cohort.networks:
        return f"{text} Cells and embeddings are those that other software computed."
    given = f" {masks:,} slides had a tissue mask of their own." if masks else ""
    threshold = cohort.settings.tissue
    source = "[code]" if threshold == Settings().tissue else "[choice]"
    return (
        f"{text} Tissue was found at 8 um/px by its colour in optical density [choice].{given} A "
        f"cell was kept if more than {threshold:.0%} of its patch was tissue {source}."
    )


def _encoder(card: EncoderCard) -> str:
    tasks = ", ".join(card.tasks or card.data)
    objective = _OBJECTIVES.get(card.objective, f"objective '{card.objective}'")
    text = (
        f"Encoder {card.name}: {objective.format(tasks=tasks)}. A patch of {card.patch} px at "
        f"{card.mpp:g} um/px gives {card.embedding_size} numbers."
    )
    if card.architecture == "tellez2020":
        text += " The network is that of [A]."
    elif card.architecture == "tellez2019":
        text += " The network is that of [B]."
    seen = card.training.get("patches_seen")
    rate = card.training.get("learning_rate")
    if isinstance(seen, int):
        text += f" {seen:,} patches passed through the network"
        text += f", at a learning rate of {rate:g}" if isinstance(rate, int | float) else ""
        text += f" (seed {card.training['seed']})." if "seed" in card.training else "."
    if "kept_weights" in card.training:
        text += f" Kept weights: {card.training['kept_weights']}."
    return text


def _networks(models: Sequence[ModelCard]) -> str:
    settings = _shared_settings(models)
    crops = sorted({card.crop for card in models})
    sides = " or ".join(map(str, crops))
    noise = ""
    if settings.feature_noise or settings.feature_dropout:
        noise = (
            f" Noise of standard deviation {settings.feature_noise:g} was added to the features in "
            f"training, and features were set to 0 with probability {settings.feature_dropout:g} "
            "[choice]."
        )
    positions = " with the positions of the cells" if settings.positions else ""
    return (
        f"Slide models are {_NETWORKS[settings.network]}{positions} on crops of {sides} x {sides} "
        f"cells ({settings.crop_um:g} um, rounded to whole cells [choice]), with random places and "
        f"orientations in training [B]. Features were normalised by the training slides of each "
        f"fold.{noise} Training: {settings.epochs} epochs in batches of {settings.batch} crops, "
        f"highest learning rate {settings.learning_rate:g}, seed {settings.seed}; the epoch with "
        "the best validation metric was kept [choice]. A prediction is the mean over "
        f"{settings.crops_at_test} crop{'s' if settings.crops_at_test > 1 else ''} in 8 "
        "orientations [B]."
    )


def _training(targets: Sequence[Target], models: Sequence[ModelCard]) -> str:
    settings = _shared_settings(models)
    kinds = dict.fromkeys(target.kind for target in targets)
    losses = ", ".join(f"{_LOSSES[kind]} for {kind}" for kind in kinds)
    text = (
        f"The loss is {losses}. Patients, not slides, were assigned to folds: "
        f"{_folds(settings)}. Fold k tested, fold k + 1 validated, the others trained [B]; all "
        "encoders share the folds of a target. Slides of split test were predicted by the mean of "
        "the folds' networks [B]."
    )
    if settings.seeds > 1:
        text += f" Each fold was trained from {settings.seeds} random initialisations."
    if settings.recalibration != "none":
        text += (
            f" Predicted probabilities were recalibrated {_RECALIBRATIONS[settings.recalibration]} "
            "on the validation fold of each network."
        )
    text += (
        " Baselines on the same folds are linear models on the mean embedding and on the tissue "
        "area [choice]"
    )
    covariates = [t.name for t in targets if t.covariates]
    text += (
        f", and on clinical covariates for {', '.join(covariates)} [choice]." if covariates else "."
    )
    if settings.permute_labels is not None:
        text += (
            " The labels were exchanged between patients before training: this is a control whose "
            "figures must be at chance level."
        )
    return text


def _folds(settings: ModelSettings) -> str:
    match settings.folds:
        case "site":
            return "each site was a fold [choice]"
        case "given":
            return "the folds were given in the slide table or label table"
        case SiteFolds(count=count):
            return f"whole sites were divided over {count} folds [choice]"
        case int(count):
            return (
                f"{count} folds [B]" if count == 4 else f"{count} folds [choice]"
            ) + ", stratified by label [choice]"
    raise AssertionError(settings.folds)


def _statistics(models: Sequence[ModelCard]) -> str:
    settings = _shared_settings(models)
    names = dict.fromkeys(kind_of(card.target).primary_name for card in models)
    return (
        "Metrics were computed once on the held-out predictions of all folds together, with 95 % "
        f"percentile intervals of {settings.bootstrap:,} bootstrap samples of patients [choice]. "
        f"The first metric of each kind of target is {', '.join(names)}. Two models were compared "
        "on the units that both predict, by a bootstrap that draws the units of both together; p "
        "is two-sided and was corrected by Holm's method for all comparisons of a target, part of "
        "the data and metric [choice]."
    )


def _shared_settings(models: Sequence[ModelCard]) -> ModelSettings:
    """Return the settings of the first model; notes of the report name differences of others."""
    return models[0].settings


def content_hashes(
    encoders: Sequence[EncoderCard], models: Sequence[ModelCard]
) -> Mapping[str, str]:
    """Return what a card hashes to its hash: weights, patch tasks, training data, networks."""
    hashes = {f"weights of encoder {card.name}": card.weights_hash for card in encoders}
    for card in encoders:
        hashes |= {f"patch task {task}": identity for task, identity in card.data.items()}
    for model in models:
        name = f"{model.target.name} on {model.encoder}"
        hashes[f"training data of {name}"] = model.training.digest
        hashes |= {f"network of fold {k}, {name}": h for k, h in enumerate(model.networks)}
    return hashes
