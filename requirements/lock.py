"""Write the lock files of this folder: ``make lock``, or ``make lock UPGRADE=--upgrade``.

=================  ==========  ================================================================
constraints.txt    no hashes   one version of every package that any extra or group can bring
platform.txt       hashes      what ``nic-pathology[platform,view]`` needs
image.txt          hashes      what the extras ``kubernetes`` and ``postgres`` add to that
dev.txt            hashes      what the groups ``test``, ``lint`` and ``docs`` add to that
lowest.txt         no hashes   the lowest version of every direct dependency
=================  ==========  ================================================================

torch has other files, with other hashes, for each kind of accelerator, and which of them pip finds
is a setting of the machine. pip asks for a hash of every package or of none. So torch and what only
its CUDA builds need are in ``constraints.txt`` alone, and an installation has two steps::

    pip install --require-hashes --no-deps -r requirements/platform.txt
    pip install -c requirements/constraints.txt -e '.[platform,view]'

The first installs everything but torch and checks the hashes. The second adds torch in the locked
version, from whatever build the machine offers, and this project. ``lowest.txt`` has torch, but not
what only its CUDA builds need, which are gigabytes; it is installed in two steps too, see
``Makefile``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
PYTHON = "3.11"
# torch, and what only its builds for an accelerator bring
CUDA_ONLY = re.compile(r"(triton|cuda-.*|nvidia-.*)$")
PER_BUILD = re.compile(rf"((torch|torchvision)$|{CUDA_ONLY.pattern})")
# packages without a wheel of the lowest version, which are built from source
SOURCE_ONLY = ("antlr4-python3-runtime", "pyvips")
# no lower build is small: torch below this is locked to CUDA packages on Linux
LOWEST_TORCH = "torch==2.13.0"

EXTRAS_AND_GROUPS = ("--all-extras", "--group=dev", "--group=lock")
HASHED = {
    "platform.txt": ("--extra=platform", "--extra=view"),
    "image.txt": ("--extra=kubernetes", "--extra=postgres"),
    "dev.txt": ("--extra=platform", "--extra=view", "--group=dev"),
}
HEADERS = {
    "constraints.txt": "One version of every package that any extra or group can bring.",
    "platform.txt": "What nic-pathology[platform,view] needs, but torch.",
    "image.txt": "What the extras kubernetes and postgres add to platform.txt.",
    "dev.txt": "What the groups test, lint and docs add to platform.txt.",
    "lowest.txt": "The lowest versions of the direct dependencies; of torch the lowest tested.",
}


def compiled(*arguments: str, keep: Path | None = None) -> list[str]:
    """The requirements that uv finds, each with its hashes as one string, sorted by name.

    The versions that stand in the file ``keep`` stay wherever they still fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "requirements.txt")
        if keep is not None and keep.exists():
            shutil.copy(keep, output)
        command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        command += ["--no-emit-index-url", f"--output-file={output}", f"--python-version={PYTHON}"]
        subprocess.run([*command, *arguments, "pyproject.toml"], cwd=FOLDER.parent, check=True)
        return re.split(r"\n(?=\S)", output.read_text().strip())


def name(requirement: str) -> str:
    """The package's name, from ``name==1.0 ; marker``."""
    return re.split(r"[=<>~!;\[ ]", requirement, maxsplit=1)[0]


def write(file: str, requirements: Sequence[str], *, include: str | None = None) -> None:
    """Write a requirements file; nothing in it may name a host."""
    lines = [f"# {HEADERS[file]}", "# Written by requirements/lock.py, which says how to use it."]
    if include is not None:
        lines.append(f"-r {include}")
    text = "\n".join([*lines, *requirements]) + "\n"
    if "://" in text:
        raise ValueError(f"{file} would name a host")
    (FOLDER / file).write_text(text)
    print(f"{file}: {len(requirements)} packages")


def main(upgrade: Sequence[str]) -> None:
    """Resolve, and write the five files.

    Parameters
    ----------
    upgrade
        Options of ``uv pip compile`` such as ``--upgrade``; without one the versions in
        ``constraints.txt`` stay wherever ``pyproject.toml`` still admits them.
    """
    constraints = FOLDER / "constraints.txt"
    universal = ("--universal", "--fork-strategy=fewest")
    found = compiled(*universal, *EXTRAS_AND_GROUPS, *upgrade, keep=constraints)
    write(constraints.name, found)

    platform: list[str] = []
    for file, selection in HASHED.items():
        found = compiled(
            *universal, "--generate-hashes", f"--constraints={constraints}", *selection
        )
        # by the whole requirement: a package may be for fewer machines in the one than in the other
        added = [r for r in found if not PER_BUILD.match(name(r)) and r not in platform]
        write(file, added, include="platform.txt" if platform else None)
        platform = platform or added

    lowest = FOLDER / "lowest.txt"
    lowest.write_text(f"{LOWEST_TORCH}\n")
    found = compiled(
        "--resolution=lowest-direct",
        "--only-binary=:all:",
        *(f"--no-binary={package}" for package in SOURCE_ONLY),
        f"--constraints={lowest}",
        "--extra=platform",
        "--group=test-core",
    )
    write(lowest.name, [r for r in found if not CUDA_ONLY.match(name(r))])


if __name__ == "__main__":
    main(sys.argv[1:])
