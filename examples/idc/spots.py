"""Carcinoma maps of frozen breast sections, scored against clusters of gene expression.

    python -m examples.idc.spots data/idc/cohort.yaml SECTION.tif ... --cache data/idc-patch-tasks
        [--patches 8000] [--released encoder_multitask-4.h5]

The cohort is that of ``make_cohort.py``. Beside each section lies ``NAME_spots.csv``: centre of a
spot in level-0 px (x, y), and ``coarse``, the kind of its cluster. A spot has a diameter of 100 um.
The clusters were named by their genes, not by a pathologist. A patch of 200 um around each spot is
classified by the head of an encoder that was trained on all patients of the task ``idc``, and by
the regressions of ``leave_one_out.py``. Scored is the area under the ROC curve of spots of the
kind ``tumour`` against all other named ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from examples.idc.leave_one_out import (
    POSITIVE,
    TASK,
    carcinoma_regression,
    embedders,
    encoder_of_task,
    patch_task,
)
from nic_core.cohort import load_cohort
from nic_core.encoders import task_probabilities, train_encoder
from nic_core.encoders.probes import embed_in_parts
from nic_core.slides import open_slide
from nic_core.types import Pixels

TUMOUR = "tumour"
UNNAMED = ("", "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cohort", type=Path, help="cohort file of make_cohort.py")
    parser.add_argument("sections", type=Path, nargs="+", help="slides with a table of spots")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the cut patch tasks")
    parser.add_argument("--patches", type=int, help="patches seen; default: as in the cohort")
    parser.add_argument("--released", type=Path, help="Keras file of a released encoder")
    arguments = parser.parse_args()
    cohort = load_cohort(arguments.cohort)
    settings = cohort.settings
    spec = encoder_of_task(cohort, arguments.patches)
    tasks = [patch_task(cohort, name, arguments.cache) for name in spec.tasks]
    (idc,) = (task for task in tasks if task.name == TASK)
    sections = {
        path.stem: cut_spots(path, settings.patch, settings.mpp) for path in arguments.sections
    }
    table = Table("classifier", *(f"{name}, AUC" for name in sections))
    for name, embedder in embedders(idc, arguments.released).items():
        regression = carcinoma_regression(
            embed_in_parts(embedder, idc.patches, np.arange(len(idc.patches))),
            idc,
            np.full(len(idc.labels), True),
        )
        found = [
            auc(
                kinds,
                regression.predict_proba(
                    embed_in_parts(embedder, patches, np.arange(len(patches)))
                )[:, 1],
            )
            for kinds, patches in sections.values()
        ]
        table.add_row(name, *found)
    encoder = train_encoder(
        spec,
        tasks,
        patch=settings.patch,
        mpp=settings.mpp,
        embedding_size=settings.embedding_size,
    ).encoder
    carcinoma = idc.classes.index(POSITIVE)
    found = [
        auc(kinds, task_probabilities(encoder, TASK, encoder.embed(patches))[:, carcinoma])
        for kinds, patches in sections.values()
    ]
    table.add_row(f"head of {spec.name}", *found)
    Console(width=120).print(table)


def cut_spots(section: Path, patch: int, mpp: float) -> tuple[pl.Series, Pixels]:
    """Return the kinds of the named spots of a section, and a patch around each.

    Returns
    -------
    kinds : polars.Series of str (n,)
    patches : uint8 (n, patch, patch, 3)
        At ``mpp``, um/px.
    """
    spots = pl.read_csv(section.with_name(f"{section.stem}_spots.csv"))
    spots = spots.with_columns(pl.col("coarse").fill_null("")).filter(
        ~pl.col("coarse").is_in(UNNAMED)
    )
    if spots["coarse"].n_unique() < 2 or TUMOUR not in spots["coarse"]:
        raise SystemExit(f"{section.stem}: needs spots of the kind '{TUMOUR}' and of another kind")
    with open_slide(section) as slide:
        half = patch * mpp / slide.mpp / 2  # level-0 px
        patches = [
            slide.read(x - half, y - half, patch, patch, mpp)
            for x, y in spots.select("x", "y").iter_rows()
        ]
    return spots["coarse"], np.stack(patches)


def auc(kinds: pl.Series, probability: NDArray[np.floating]) -> str:
    """Return the area under the ROC curve of tumour spots, with their number and that of others."""
    tumour = (kinds == TUMOUR).to_numpy()
    return f"{roc_auc_score(tumour, probability):.2f} ({tumour.sum()} of {len(tumour)})"


if __name__ == "__main__":
    main()
