"""Painted patch tasks as arrays, for studies of what painted tissue teaches an encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nic_core.demo.morphology import MORPHOLOGY_TASKS
from nic_core.demo.patches import TASKS, DemoTask, class_counts
from nic_core.demo.variety import ORDINARY, PATCH, Variety, compressed, draw_jpeg_quality
from nic_core.parallel import process_pool

PAINTED_TASKS = TASKS + MORPHOLOGY_TASKS


@dataclass(frozen=True)
class PaintedTask:
    """The patches of a painted patch task.

    Attributes
    ----------
    task
    pixels
        uint8 (N, 128, 128, 3), after JPEG compression. At 0.5 um/px, or with
        ``Variety.scale`` at 0.35 to 0.70 um/px, one for each patient.
    labels
        int64 (N,): index into ``task.classes``.
    groups
        int64 (N,): the painted patient, from 0.
    """

    task: DemoTask
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]


def paint_task(
    task: DemoTask,
    *,
    patches: int,
    patients: int,
    seed: int,
    variety: Variety = ORDINARY,
    processes: int = 1,
) -> PaintedTask:
    """Paint a patch task of the demo cohort (``TASKS``) or of ``MORPHOLOGY_TASKS``.

    The same arguments give the same pixels, whatever the number of processes. For the demo cohort's
    tasks, ``ORDINARY`` gives the patches that :func:`nic_core.demo.make_demo` writes for this
    seed and these numbers of patches and patients.

    Parameters
    ----------
    task : DemoTask
    patches : int
        Number of patches; patches of the classes, and of the patients of a class, differ in
        number by at most one.
    patients : int
        At least 200 patches for each patient make good use of a painted sheet.
    seed : int
        0 or more.
    variety : Variety, optional
        How widely the patients differ.
    processes : int, optional
        1 paints in this process.

    Raises
    ------
    ValueError
        Fewer than one patient, or fewer patches than patients times classes.
    """
    if patients < 1 or patches < patients * len(task.classes):
        raise ValueError(
            f"{task.name}: {patches} patches of {patients} patients; at least one patient is "
            f"needed, and one patch of each of the {len(task.classes)} classes for each patient"
        )
    index = PAINTED_TASKS.index(task)
    counts = class_counts(patches, patients, len(task.classes))
    jobs = [(task, c, (seed, 3, index, p), variety) for p, c in enumerate(counts)]
    if processes == 1:
        painted = [_paint_patient(*job) for job in jobs]
    else:
        with process_pool(processes) as pool:
            painted = list(pool.map(_paint_patient, *zip(*jobs, strict=True)))
    return PaintedTask(
        task,
        np.concatenate([pixels for pixels, _ in painted]),
        np.concatenate([labels for _, labels in painted]),
        np.repeat(np.arange(patients), [len(labels) for _, labels in painted]),
    )


def _paint_patient(
    task: DemoTask, counts: tuple[int, ...], seed: tuple[int, ...], variety: Variety
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    quality = draw_jpeg_quality(rng.spawn(1)[0], variety)
    cut = task.cut(rng, counts, variety)
    pixels = np.empty((len(cut), PATCH, PATCH, 3), np.uint8)
    for i, (_, patch) in enumerate(cut):
        pixels[i] = compressed(patch, quality)
    return pixels, np.array([label for label, _ in cut], np.int64)
