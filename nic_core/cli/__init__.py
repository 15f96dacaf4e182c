"""``nic``: every step of the method on the command line, without orchestrator."""

from __future__ import annotations

import typer

from nic_core.cli.compress import compress
from nic_core.cli.encoder import encoder_app
from nic_core.cli.grid import grid_app
from nic_core.cli.predict import predict
from nic_core.cli.slides import inspect, tissue

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.command()(inspect)
app.command()(tissue)
app.command()(compress)
app.command()(predict)
app.add_typer(grid_app, name="grid")
app.add_typer(encoder_app, name="encoder")
