"""Write the demo cohort: patch tasks, slides, labels and ``cohort.yaml``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray

from nic_core.demo.layout import plant_slide
from nic_core.demo.painter import paint
from nic_core.demo.patches import TASKS, DemoTask, class_counts
from nic_core.demo.plan import GROWTH, PlannedSlide, plan_cohort, plan_external
from nic_core.demo.tissues import Tissue
from nic_core.demo.variety import JPEG_QUALITY, MPP, ORDINARY
from nic_core.libvips import pyvips
from nic_core.parallel import process_pool
from nic_core.store import atomic_file, atomic_folder
from nic_core.types import Pixels

SLIDES = 64
EXTERNAL = "external"  # folder of the external cohort
PATCHES_PER_TASK = 1500
SIDE = 3072
SMALLEST_SIDE = 768

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class _Recipe:
    """Parameters of a demo cohort, stored with it so that it is not painted again."""

    seed: int
    slides: int
    patches_per_task: int
    side: int
    external: int = 0
    version: int = 1  # of the generator; increase it if pixels, labels or files change


def make_demo(
    root: Path,
    *,
    seed: int = 0,
    slides: int = SLIDES,
    patches_per_task: int = PATCHES_PER_TASK,
    side: int = SIDE,
    external: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Paint a demo cohort into a folder.

    A complete cohort with the same parameters is not painted again. The same parameters give the
    same pixels and tables for any number of workers.

    Parameters
    ----------
    root : Path
        Folder of the cohort; a demo cohort with other parameters is replaced.
    seed : int
        Of everything random.
    slides : int
        Number of slides, at least 2. About a sixth are the external test set.
    patches_per_task : int
        Patches of each of the four tasks, balanced over classes.
    side : int
        Side of a slide, px at 0.5 um/px, at least 768.
    external : int
        Number of slides of the external cohort, at least 2; 0: none. They are painted with another
        seed, stain and blur, and do not change the other slides.
    workers : int, optional
        Number of processes; default: the number of cores.
    progress : callable, optional
        Called with (steps done, total steps, name of the step) after every step.

    Returns
    -------
    Path
        The cohort file, ``cohort.yaml``.

    Raises
    ------
    ValueError
        A size is too small.
    FileExistsError
        ``root`` contains files but no demo cohort.
    """
    recipe = _Recipe(seed, slides, patches_per_task, side, external)
    if external == 1 or external < 0:
        raise ValueError(f"an external cohort needs at least 2 slides; got {external}")
    if slides < 2 or side < SMALLEST_SIDE or patches_per_task < len(TASKS[-1].classes):
        raise ValueError(
            f"a demo cohort needs slides >= 2, side >= {SMALLEST_SIDE} px and patches per task "
            f">= {len(TASKS[-1].classes)}; got slides {slides}, side {side}, patches per task "
            f"{patches_per_task}"
        )
    if not is_made(root, vars(recipe)):
        with atomic_folder(root) as folder:
            _write(folder, recipe, workers or os.cpu_count() or 1, progress)
    return root / "cohort.yaml"


def is_made(root: Path, recipe: Mapping[str, object]) -> bool:
    """Whether the folder has the complete cohort of a recipe.

    Raises
    ------
    FileExistsError
        ``root`` contains files but no demo cohort.
    """
    stamp = root / "recipe.json"
    if root.exists() and any(root.iterdir()) and not stamp.exists():
        raise FileExistsError(
            f"{root} contains files but no demo cohort; give an empty or a new folder"
        )
    if not (root / "cohort.yaml").exists():
        return False
    return bool(json.loads(stamp.read_text()) == recipe)


def _write(folder: Path, recipe: _Recipe, workers: int, progress: Progress | None) -> None:
    planned, labels = plan_cohort(recipe.seed, recipe.slides)
    foreign: list[PlannedSlide] = []
    if recipe.external:
        foreign, foreign_labels = plan_external(recipe.seed, recipe.external)
        _write_external_tables(folder / EXTERNAL, foreign, foreign_labels)
    patients = int(np.clip(recipe.patches_per_task // 27, 4, 25))
    for name in ("slides", "truth"):
        (folder / name).mkdir()
    for task in TASKS:
        for label in task.classes:
            (folder / "patch_tasks" / task.name / label).mkdir(parents=True)
    with process_pool(workers) as pool:
        slide_jobs = [pool.submit(_make_slide, folder, s, recipe.side) for s in planned]
        foreign_jobs = [
            pool.submit(_make_slide, folder / EXTERNAL, s, recipe.side) for s in foreign
        ]
        task_jobs = {
            task: [
                pool.submit(_make_patches, folder, task.name, p, counts, (recipe.seed, 3, t, p))
                for p, counts in enumerate(
                    class_counts(recipe.patches_per_task, patients, len(task.classes))
                )
            ]
            for t, task in enumerate(TASKS)
        }
        names: dict[Future[Any], str] = {
            job: f"slide {s.slide}"
            for job, s in zip(slide_jobs + foreign_jobs, planned + foreign, strict=True)
        }
        for task, jobs in task_jobs.items():
            names |= dict.fromkeys(jobs, f"patches of {task.name}")
        await_jobs(names, progress)
    pl.DataFrame(
        [
            (s.slide, x, y)
            for s, job in zip(planned, slide_jobs, strict=True)
            for x, y in job.result()
        ],
        schema={"slide": pl.String, "x": pl.Float64, "y": pl.Float64},
        orient="row",
    ).write_csv(folder / "truth" / "mitoses.csv")
    for task, jobs in task_jobs.items():
        pl.DataFrame(
            [row for job in jobs for row in job.result()],
            schema=["path", "label", "group"],
            orient="row",
        ).write_parquet(folder / "patch_tasks" / f"{task.name}.parquet")
    pl.DataFrame(
        {
            "slide": [s.slide for s in planned],
            "path": [f"slides/{s.slide}.tif" for s in planned],
            "patient": [s.patient for s in planned],
            "truth": [f"truth/{s.slide}.png" for s in planned],
            "split": [s.split for s in planned],
        }
    ).write_csv(folder / "slides.csv")
    causes = ("mitoses", "grade", "signal", "risk")
    labels.drop("split", *causes).write_csv(folder / "labels.csv")
    labels.select("slide", *causes).write_csv(folder / "truth" / "causes.csv")
    write_codes(folder)
    (folder / "cohort.yaml").write_text(_cohort_yaml(external=bool(foreign)))
    (folder / "recipe.json").write_text(json.dumps(vars(recipe)))


def _write_external_tables(
    folder: Path, planned: Sequence[PlannedSlide], labels: pl.DataFrame
) -> None:
    """Write slide table and label table of the external cohort, and make folders of its images."""
    for name in ("slides", "truth"):
        (folder / name).mkdir(parents=True)
    patients = sorted({s.patient for s in planned})
    # every fifth patient is of the small site, which has too few patients for metrics of its own
    site = {p: "harbour" if i % 5 == 4 else "city" for i, p in enumerate(patients)}
    pl.DataFrame(
        {
            "slide": [s.slide for s in planned],
            "path": [f"slides/{s.slide}.tif" for s in planned],
            "patient": [s.patient for s in planned],
            "site": [site[s.patient] for s in planned],
        }
    ).write_csv(folder / "slides.csv")
    labels.select("slide", "patient", "score", "growth", "time", "event").write_csv(
        folder / "labels.csv"
    )


def _make_slide(folder: Path, planned: PlannedSlide, side: int) -> list[tuple[float, float]]:
    """Paint and write a slide; return the centres of its mitoses, level-0 px."""
    rng = np.random.default_rng(planned.seed)
    slide = plant_slide(rng, side, planned.tumour, planned.capsules)
    pixels = paint(slide.scene, planned.stain, rng)[:side, :side]
    write_slide(folder, planned.slide, pixels, slide.truth, MPP)
    x, y = slide.mitoses
    return [(round(float(a), 1), round(float(b), 1)) for a, b in zip(x, y, strict=True)]


def await_jobs(names: Mapping[Future[Any], str], progress: Progress | None) -> None:
    """Wait for all jobs, raise the first error, and report every finished job by its name."""
    for done, job in enumerate(as_completed(names), start=1):
        job.result()
        if progress is not None:
            progress(done, len(names), names[job])


def write_slide(
    folder: Path, slide: str, pixels: Pixels, truth: NDArray[np.uint8], mpp: float
) -> None:
    """Write a slide as a pyramidal TIFF with its um/px, and its truth image."""
    with atomic_file(folder / "slides" / f"{slide}.tif") as path:
        pyvips.Image.new_from_array(np.ascontiguousarray(pixels)).tiffsave(
            str(path),
            pyramid=True,
            tile=True,
            tile_width=256,
            tile_height=256,
            compression="jpeg",
            Q=85,
            resunit="cm",
            xres=1000 / mpp,  # px per mm
            yres=1000 / mpp,
        )
    with atomic_file(folder / "truth" / f"{slide}.png") as path:
        pyvips.Image.new_from_array(truth).pngsave(str(path))


def write_codes(folder: Path) -> None:
    """Write the table of the values in truth images."""
    (folder / "truth" / "codes.csv").write_text(
        "code,tissue\n" + "".join(f"{t.value},{t.name.lower()}\n" for t in Tissue)
    )


def _make_patches(
    folder: Path, name: str, patient: int, counts: tuple[int, ...], seed: tuple[int, ...]
) -> list[tuple[str, str, str]]:
    """Paint and write the patches of one patient; return rows (path, label, group)."""
    task = _task(name)
    rows = []
    patches = task.cut(np.random.default_rng(seed), counts, ORDINARY)
    for number, (label, pixels) in enumerate(patches):
        of_class = task.classes[label]
        path = f"{name}/{of_class}/p{patient + 1:02d}-{number:04d}.jpg"
        image = pyvips.Image.new_from_array(np.ascontiguousarray(pixels))
        image.jpegsave(str(folder / "patch_tasks" / path), Q=JPEG_QUALITY)
        rows.append((path, of_class, f"{name}-{patient + 1:02d}"))
    return rows


def _task(name: str) -> DemoTask:
    return next(task for task in TASKS if task.name == name)


def target_entries() -> list[dict[str, Any]]:
    """The targets of a demo cohort, as the cohort file has them."""
    return [
        {"name": "proliferation", "kind": "regression", "column": "score"},
        {
            "name": "growth",
            "kind": "classification",
            "column": "growth",
            "classes": list(GROWTH),
        },
        {
            "name": "survival",
            "kind": "survival",
            "level": "patient",
            "time": "time",
            "event": "event",
            "unit": "days",
        },
    ]


def _cohort_yaml(*, external: bool) -> str:
    names = [task.name for task in TASKS]
    cohort: dict[str, Any] = {
        "name": "demo",
        "slides": {"table": "slides.csv"},
        "labels": "labels.csv",
        "patch_tasks": [
            {
                "name": task.name,
                "organ": task.organ,
                "mpp": MPP,
                "table": f"patch_tasks/{task.name}.parquet",
            }
            for task in TASKS
        ],
        "encoders": [
            {"name": "mean-rgb", "objective": "mean_rgb"},
            {
                "name": "mtl-4",
                "objective": "mtl",
                "tasks": names,
                "patches_seen": 32_000,
                "learning_rate": 2e-3,
            },
        ],
        "targets": target_entries(),
        "maps": [
            {
                "name": "tumour",
                "encoder": "mtl-4",
                "task": "lymph_node",
                "label": "tumor",
                "positive": [int(Tissue.TUMOUR)],
                # the map separates tumour from other tissue; necrosis and glass are neither
                "ignore": [int(Tissue.NECROSIS), int(Tissue.BACKGROUND)],
            }
        ],
        "settings": {
            "models": {
                "network": "small",
                "crop_um": 1536,
                "folds": 4,
                "epochs": 50,
                "crops_at_test": 1,
            }
        },
    }
    if external:
        cohort["external"] = [
            {
                "name": "harbour-city",
                "slides": {"table": f"{EXTERNAL}/slides.csv"},
                "labels": f"{EXTERNAL}/labels.csv",
                "subgroups": ["site"],
            }
        ]
    head = (
        "# A synthetic cohort, see docs/explanation/demo-cohort.md. "
        "Paths are relative to this file.\n"
    )
    return head + yaml.safe_dump(cohort, sort_keys=False, allow_unicode=True)
