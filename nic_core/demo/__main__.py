"""``python -m nic_core.demo ROOT``: write the demo cohort."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.image import imsave
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nic_core.demo.cohort import PATCHES_PER_TASK, SIDE, SLIDES, make_demo
from nic_core.demo.figures import contact_sheet, slide_sheet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nic_core.demo", description=__doc__)
    parser.add_argument("root", type=Path, help="folder of the cohort")
    parser.add_argument("--slides", type=int, default=SLIDES)
    parser.add_argument("--patches", type=int, default=PATCHES_PER_TASK, help="of each task")
    parser.add_argument("--side", type=int, default=SIDE, help="of a slide, px")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="processes; default: cores")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of what was painted")
    given = parser.parse_args()
    columns = (
        TextColumn("painting the demo cohort"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as bar:
        job = bar.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(job, completed=done, total=total, description=what)

        cohort = make_demo(
            given.root,
            seed=given.seed,
            slides=given.slides,
            patches_per_task=given.patches,
            side=given.side,
            workers=given.workers,
            progress=show,
        )
    print(f"{cohort}")
    if given.pictures is not None:
        given.pictures.mkdir(parents=True, exist_ok=True)
        contact_sheet(given.root).savefig(given.pictures / "demo-patches.png", dpi=110)
        imsave(given.pictures / "demo-slides.png", slide_sheet(given.root, 4))
        print(f"{given.pictures}: demo-patches.png, demo-slides.png")


if __name__ == "__main__":
    main()
