"""What the environment says: the cohort, the store, and Dagster's home."""

from __future__ import annotations

import os
from pathlib import Path

from dotenv import dotenv_values


def read_environment() -> Path:
    """Take over ``.env`` of this folder, as Dagster's commands do; returns Dagster's home.

    What the shell has set wins. Without ``DAGSTER_HOME`` this folder is home.
    """
    for name, value in dotenv_values(".env").items():
        os.environ.setdefault(name, value or "")
    return Path(os.environ.setdefault("DAGSTER_HOME", str(Path.cwd())))
