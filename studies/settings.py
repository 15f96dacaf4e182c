"""The settings with which the folder of a study was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from nic_core.store import atomic_file


def check_settings(out: Path, settings: Mapping[str, object]) -> None:
    """Write the settings of a folder to ``settings.json``; exit if it was made with others.

    Parameters
    ----------
    out : Path
        Folder with the results of a study.
    settings : mapping
        What the results depend on, as JSON.
    """
    path = out / "settings.json"
    if not path.exists():
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(settings, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    if before != settings:
        names = sorted({*before, *settings})
        others = {n: before.get(n) for n in names if before.get(n) != settings.get(n)}
        raise SystemExit(f"{out} was made with {others}; give another --out, or the same settings")
