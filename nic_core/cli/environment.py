"""Environment variables from a file ``.env``, as Dagster's commands read it."""

from __future__ import annotations

import os

from dotenv import dotenv_values


def read_environment() -> None:
    """Set the variables of ``.env`` in the current folder; variables that are set already win."""
    for name, value in dotenv_values(".env").items():
        os.environ.setdefault(name, value or "")
