"""libCZI: Zeiss CZI, read in a process of its own, which a damaged file may crash."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from multiprocessing import Pipe
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from nic_core.slides.engines.base import EngineName, ReadError, pyramid_levels
from nic_core.slides.errors import SlideError
from nic_core.slides.metadata import BRIGHTFIELD_REMEDY, DAMAGED_REMEDY, FileMetadata
from nic_core.types import Pixels

_SCRIPT = Path(__file__).with_name("czi_process.py")
_TIMEOUT = 60  # s for one answer; on a damaged file libCZI may never give one


class CziEngine:
    """Engine for CZI. All scenes are parts of one slide; the area around them is white.

    Raises
    ------
    SlideError
        The package pylibCZIrw is not installed, the file is damaged, or it is not 8-bit RGB.
    """

    name: EngineName = "czi"

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("pylibCZIrw") is None:
            raise SlideError(
                path,
                "CZI needs the package pylibCZIrw",
                "install it: pip install 'nic-pathology[czi]'",
            )
        self._lock = threading.Lock()
        self._path = path
        self._process: _Process | None = _Process(path)
        try:
            found = self._process.answer()
        except ReadError as error:
            self.close()
            raise SlideError(path, f"libCZI cannot open it: {error}", DAMAGED_REMEDY) from error
        planes = {name: count for name, (_, count) in found["planes"].items() if count != 1}
        if list(found["channels"].values()) != ["Bgr24"] or planes:
            self.close()
            channels = ", ".join(found["channels"].values())
            raise SlideError(
                path,
                f"not an 8-bit RGB image: channels {channels}, planes {planes or 1}",
                BRIGHTFIELD_REMEDY,
            )
        width, height = found["size"]
        if min(width, height) < 1:
            self.close()
            raise SlideError(path, f"damaged: {width} x {height} px", DAMAGED_REMEDY)
        factors = sorted({max(1, round(1 / zoom)) for zoom in found["zooms"] if zoom > 0} | {1})
        self._factors = [factor for factor in factors if min(width, height) >= factor]
        self.levels = pyramid_levels([(width // f, height // f) for f in self._factors], [])
        try:
            self.metadata = _metadata(found["xml"])
        except (ElementTree.ParseError, ValueError) as error:
            self.close()
            raise SlideError(path, f"damaged CZI metadata ({error})", DAMAGED_REMEDY) from error

    def shrink_factors(self, level: int) -> tuple[int, ...]:
        return (1,)

    def read_region(
        self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
    ) -> Pixels:
        with self._lock:
            if self._process is None:  # it ended in an earlier read
                self._process = _Process(self._path)
                self._process.answer()
            try:
                self._process.ask((x, y, width, height, self._factors[level]))
                pixels = self._process.answer()
            except ReadError:
                if self._process.ended:
                    self._process = None
                raise
        if pixels.shape != (height, width, 3):
            raise ReadError(f"libCZI returned {pixels.shape} for {(height, width, 3)}")
        return np.asarray(pixels)

    def close(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None


class _Process:
    """A running ``czi_process.py`` and the connection to it."""

    def __init__(self, path: Path) -> None:
        self._connection, other = Pipe()
        # without the script's folder on the path: its modules have the names of libraries
        command = [sys.executable, "-P", str(_SCRIPT), str(path), str(other.fileno())]
        self._running = subprocess.Popen(
            command,
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        other.close()

    def ask(self, request: tuple[int, ...]) -> None:
        try:
            self._connection.send(request)
        except OSError as error:
            raise ReadError(self._end()) from error

    def answer(self) -> Any:
        """Return the next message; raises ReadError if it is the text of an error, or missing."""
        try:
            if not self._connection.poll(_TIMEOUT):
                self.stop()
                raise ReadError(f"libCZI gave no answer for {_TIMEOUT} s")
            found = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ReadError(self._end()) from error
        if isinstance(found, str):
            raise ReadError(found)
        return found

    def _end(self) -> str:
        self.stop()
        return f"the process of libCZI ended with status {self._running.returncode}"

    @property
    def ended(self) -> bool:
        return self._running.poll() is not None

    def stop(self) -> None:
        self._connection.close()
        self._running.kill()
        self._running.wait()


def _metadata(xml: str) -> FileMetadata:
    """um/px and objective power; distances are in metres."""
    root = ElementTree.fromstring(xml)
    sizes: dict[str, float] = {}
    for distance in root.iterfind(".//Scaling/Items/Distance"):
        value = distance.findtext("Value")
        if value and float(value) > 0:
            sizes[distance.get("Id", "")] = float(value) * 1e6
    power = root.findtext(".//Objectives/Objective/NominalMagnification")
    mpp = (sizes["X"], sizes["Y"]) if {"X", "Y"} <= sizes.keys() else None
    return FileMetadata(mpp, "CZI scaling", float(power) if power else None)
