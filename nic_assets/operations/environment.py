"""The environment variables of a study: cohort, store and Dagster home."""

from __future__ import annotations

import os
from pathlib import Path

from dotenv import dotenv_values


def read_environment() -> Path:
    """Set the variables of ``.env`` in the working directory, as Dagster's commands do.

    Variables that are already set keep their values. ``DAGSTER_HOME`` defaults to the working
    directory.

    Returns
    -------
    pathlib.Path
        Dagster's home.
    """
    for name, value in dotenv_values(".env").items():
        os.environ.setdefault(name, value or "")
    return Path(os.environ.setdefault("DAGSTER_HOME", str(Path.cwd())))
