"""``nic demo``: paint the demo cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nic_core.cli.shared import console, one_line, progress_bars


def demo(
    folder: Annotated[
        Path, typer.Argument(help="folder of the cohort; created, or replaced if it is a demo")
    ],
    slides: Annotated[int, typer.Option(help="number of slides, at least 2")] = 64,
    patches: Annotated[int, typer.Option(help="patches of each patch task")] = 1500,
    side: Annotated[int, typer.Option(help="side of a slide, px, at least 768")] = 3072,
    seed: Annotated[int, typer.Option(help="seed of slides, patches and labels")] = 0,
    external: Annotated[
        int,
        typer.Option(help="slides of an external cohort of another stain and blur; 0: none"),
    ] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="number of processes; default: number of cores")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="folder for pictures of patches and slides")
    ] = None,
) -> None:
    """Paint the demo cohort: synthetic slides, patch tasks, labels and cohort.yaml.

    A complete cohort with the same options is not painted again.
    """
    # imported here, because matplotlib and scipy are slow to import
    from nic_core.demo import make_demo
    from nic_core.demo.figures import save_pictures

    with one_line(ValueError, OSError):
        with progress_bars() as progress:
            bar = progress.add_task("demo cohort", total=None, unit="steps")
            cohort = make_demo(
                folder,
                seed=seed,
                slides=slides,
                patches_per_task=patches,
                side=side,
                external=external,
                workers=workers,
                progress=lambda done, total, name: progress.update(
                    bar, completed=done, total=total, description=name
                ),
            )
        console.print(str(cohort), soft_wrap=True, markup=False)
        if pictures is not None:
            for path in save_pictures(folder, pictures):
                console.print(str(path), soft_wrap=True, markup=False)
