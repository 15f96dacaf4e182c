"""``nic demo``: paint the demo cohort, or compose a cohort of real tissue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nic_core.cli.shared import console, one_line, progress_bars

PAINTED_ONLY = ("patches", "external", "pictures")


def demo(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(help="folder of the cohort; created, or replaced if it is a demo")
    ],
    slides: Annotated[int, typer.Option(help="number of slides, at least 2")] = 64,
    patches: Annotated[int, typer.Option(help="patches of each patch task")] = 1500,
    side: Annotated[
        int, typer.Option(help="side of a slide, px, at least 768; of a composed one 1280")
    ] = 3072,
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
    composed: Annotated[
        Path | None,
        typer.Option(help="folder of GlaS regions with MANIFEST.csv: compose slides of them"),
    ] = None,
) -> None:
    """Paint the demo cohort: synthetic slides, patch tasks, labels and cohort.yaml.

    With --composed, slides are put together from real tissue instead, without patch tasks. A
    complete cohort with the same options is not made again.
    """
    from nic_core.demo import make_composed, make_demo
    from nic_core.demo.figures import save_pictures

    with one_line(ValueError, OSError):
        if composed is not None:
            _refuse_painted_options(context)
        with progress_bars() as progress:
            bar = progress.add_task("demo cohort", total=None, unit="steps")

            def show(done: int, total: int, name: str) -> None:
                progress.update(bar, completed=done, total=total, description=name)

            if composed is None:
                cohort = make_demo(
                    folder,
                    seed=seed,
                    slides=slides,
                    patches_per_task=patches,
                    side=side,
                    external=external,
                    workers=workers,
                    progress=show,
                )
            else:
                cohort = make_composed(
                    folder,
                    composed,
                    seed=seed,
                    slides=slides,
                    side=side,
                    workers=workers,
                    progress=show,
                )
        console.print(str(cohort), soft_wrap=True, markup=False)
        if pictures is not None:
            for path in save_pictures(folder, pictures):
                console.print(str(path), soft_wrap=True, markup=False)


def _refuse_painted_options(context: typer.Context) -> None:
    # compared by name: the class of a source is typer's or click's, by the version of typer
    sources = {name: context.get_parameter_source(name) for name in PAINTED_ONLY}
    given = [f"--{name}" for name, source in sources.items() if source and source.name != "DEFAULT"]
    if given:
        raise ValueError(f"composed slides have no {', '.join(given)}; leave these options out")
