"""The store: where every product lies, and how it gets there whole.

::

    <root>/
      slides/<slide>/           slide.json, thumbnail.jpg, tissue.png
      patch_tables/<slide>.parquet
      patch_tasks/<task>/       patches.npy, patches.parquet, findings.parquet
      encoders/<encoder>/       weights.safetensors, card.json, history.parquet
      grids/<encoder>/<slide>.zarr
      maps/<map>/<slide>/       cells.parquet, overlay.jpg
      models/<target>/folds.parquet
      models/<target>/<encoder>/  fold-*.safetensors, card.json, predictions.parquet
      reports/
      mlflow/                   the tracker's database and artifacts
      dagster/                  the orchestrator's own storage

This module alone knows the layout. Products are written beside their place under a
temporary name and renamed, so a reader sees the old one, the new one or none.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STORE_VARIABLE = "NIC_STORE"
DEFAULT_STORE = Path("data/store")


@dataclass(frozen=True)
class Store:
    """Paths of every product under one root."""

    root: Path

    @classmethod
    def from_environment(cls) -> Store:
        """``$NIC_STORE``, else ``data/store``."""
        return cls(Path(os.environ.get(STORE_VARIABLE) or DEFAULT_STORE).resolve())

    @property
    def slides(self) -> Path:
        return self.root / "slides"

    def slide(self, slide: str) -> Path:
        return self.slides / slide

    def patch_table(self, slide: str) -> Path:
        return self.root / "patch_tables" / f"{slide}.parquet"

    def patch_task(self, task: str) -> Path:
        return self.root / "patch_tasks" / task

    def encoder(self, encoder: str) -> Path:
        return self.root / "encoders" / encoder

    def training(self, encoder: str) -> Path:
        """Where an encoder's training keeps its state until it is done."""
        return self.root / "encoders" / f".{encoder}.training.pt"

    def grid(self, encoder: str, slide: str) -> Path:
        return self.root / "grids" / encoder / f"{slide}.zarr"

    def map(self, name: str, slide: str) -> Path:
        return self.root / "maps" / name / slide

    def folds(self, target: str) -> Path:
        return self.root / "models" / target / "folds.parquet"

    def model(self, target: str, encoder: str) -> Path:
        return self.root / "models" / target / encoder

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def mlflow(self) -> Path:
        return self.root / "mlflow"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it into place if the block succeeds."""
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new temporary folder beside ``path``; if the block succeeds it takes its place.

    A folder cannot be replaced in one system call: for an instant there is none.
    """
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        old = _temporary(path)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last: writers choose their format by it
    return path.with_name(f".{secrets.token_hex(4)}.{path.name}")
