"""``nic``: every step of the method on the command line."""

from __future__ import annotations

import signal
import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from nic_core.cli.compress import compress
from nic_core.cli.demo import demo
from nic_core.cli.encoder import encoder_app
from nic_core.cli.environment import read_environment
from nic_core.cli.evaluate import evaluate
from nic_core.cli.export import export_app
from nic_core.cli.grid import grid_app
from nic_core.cli.predict import predict
from nic_core.cli.report import report
from nic_core.cli.shared import console
from nic_core.cli.slides import inspect, tissue
from nic_core.cli.study import check, init
from nic_core.cli.view import view
from nic_core.object_stores import RemoteError
from nic_core.version import __version__

PLUGINS = "nic.commands"
"""Entry points with further commands: functions that take the application and add to it."""

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command()(init)
app.command()(check)
app.command()(demo)
app.command()(inspect)
app.command()(tissue)
app.command()(compress)
app.command()(predict)
app.command()(evaluate)
app.command()(view)
app.command()(report)
app.add_typer(grid_app, name="grid")
app.add_typer(encoder_app, name="encoder")
app.add_typer(export_app, name="export")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nic {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Neural image compression of whole-slide images, step by step.

    The environment variables NIC_COHORT and NIC_STORE name the cohort file and the store. They are
    also read from a file .env in the current folder.
    """
    read_environment()


def main() -> None:
    """Run ``nic`` with the commands of this package and of the installed plug-ins.

    SIGTERM ends a command as Ctrl-C does: its processes end with it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for plugin in entry_points(group=PLUGINS):
        plugin.load()(app)
    try:
        app()
    except RemoteError as error:
        console.print(str(error), style="red", soft_wrap=True, markup=False)
        sys.exit(1)
