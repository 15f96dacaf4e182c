"""``nic view``: look at the slides and products of a study in a browser."""

from __future__ import annotations

import ipaddress
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from nic_core.cli.shared import console, one_line
from nic_core.store import Store
from nic_core.view.addresses import DEFAULT_ADDRESS

DEFAULT_PORT = int(DEFAULT_ADDRESS.rpartition(":")[2])
_NEEDED = ("starlette", "uvicorn", "xstatic", "bokeh")


def view(
    cohort: Annotated[
        Path | None,
        typer.Option(help="cohort file; default: $NIC_COHORT, or that of the demo"),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="store; default: $NIC_STORE, or data/store")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = DEFAULT_PORT,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="NIC_VIEW_TOKEN", help="secret that browsers must give; needed beyond loopback"
        ),
    ] = None,
    annotate: Annotated[
        Path | None,
        typer.Option(help="folder for regions that are drawn; default: nothing is written"),
    ] = None,
) -> None:
    """Serve the study of a store as pages for a browser, until Ctrl-C.

    The pages show the slides with the products that exist. Nothing is computed or changed.
    """
    absent = [name for name in _NEEDED if find_spec(name) is None]
    if absent:
        console.print(
            f"nic view needs {', '.join(absent)}; run: pip install 'nic-pathology[view]'",
            style="red",
            soft_wrap=True,
            markup=False,
        )
        raise typer.Exit(1)
    if token is None and not _is_loopback(host):
        raise typer.BadParameter(
            f"'{host}' can be reached from other machines: give --token too, or use a proxy that "
            "authenticates in front of 127.0.0.1",
            param_hint="--host",
        )
    import uvicorn

    from nic_core.cohort import CohortError, load_cohort
    from nic_core.view.server import application
    from nic_core.view.study import open_study

    with one_line(CohortError):
        study = open_study(
            load_cohort(cohort), Store(store.resolve()) if store else Store.from_environment()
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise typer.BadParameter(
            f"cannot listen on {host}, port {port} ({error.strerror}); choose another port",
            param_hint="--port",
        ) from error
    served = application(study, token=token, annotate=annotate)
    shown = f"[{host}]" if ":" in host else host
    secret = f"?token={token}" if token else ""
    console.print(f"http://{shown}:{port}/{secret}", soft_wrap=True, markup=False)
    config = uvicorn.Config(served, log_level="warning", server_header=False)
    uvicorn.Server(config).run(sockets=[listener])


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
