"""Every command and every Python example of the README and the pages runs as it is written.

They run in a copy of the project's folder, on a demo cohort of twelve small slides. A block that
cannot run here carries the comment ``<!-- not run: REASON -->`` on the line above it, and its test
is skipped with that reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent, indent

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.integration]

PROJECT = Path(__file__).parents[1]
COPIED = (".env", "dagster.yaml", "workspace.yaml", "pyproject.toml")
# from what a page makes to what the pages after it read
FIRST = ("docs/tutorials/operator.md",)
TARGETS = ("growth", "survival")  # those that the pages name
# the numbers of a training that takes minutes, and those of one that takes seconds
SHORTER = {"patches_seen: 6000": "patches_seen: 256, batch: 32", "epochs: 20,": "epochs: 2,"}

BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>.*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>bash|console|python)[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of commands or Python in a page."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None  # why it is not run

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    pages = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
    found = []
    for path in pages:
        page, text = path.relative_to(PROJECT).as_posix(), path.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("language")) + 1
            body = dedent(match["text"])
            if match["language"] == "console":  # commands after a prompt, among their output
                lines = body.splitlines()
                body = "\n".join(line[2:] for line in lines if line.startswith(("$ ", "> ")))
            found.append(Block(page, line, match["language"], body, match["reason"]))
    return sorted(found, key=lambda block: (block.page not in FIRST, block.page, block.line))


def parameters() -> list[object]:
    """Return each distinct block once; those that are not run with their reason."""
    distinct = {(block.language, block.text): block for block in reversed(blocks())}
    kept = set(distinct.values())
    return [
        pytest.param(
            block,
            id=str(block),
            marks=[] if block.reason is None else pytest.mark.skip(reason=block.reason),
        )
        for block in blocks()
        if block in kept
    ]


@pytest.fixture(scope="module")
def project(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's folder with the demo cohort in ``data/demo``."""
    root = tmp_path_factory.mktemp("project")
    for name in COPIED:
        shutil.copy(PROJECT / name, root)
    for name in ("nic_assets", "nic_core"):
        (root / name).symlink_to(PROJECT / name)
    (root / ".venv").symlink_to(sys.prefix)
    shutil.copytree(tiny_cohort.parent, root / "data" / "demo")
    cohort = root / "data" / "demo" / "cohort.yaml"
    entries = yaml.safe_load(cohort.read_text())
    entries["targets"] = [entry for entry in entries["targets"] if entry["name"] in TARGETS]
    cohort.write_text(yaml.safe_dump(entries))
    return root


def environment(commands: Path) -> dict[str, str]:
    own = ("NIC_", "DAGSTER_", "MLFLOW_", "PYTEST_")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(own)},
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
    }


@pytest.mark.parametrize("block", parameters())
def test_block(block: Block, project: Path, commands: Path):
    text = block.text
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    program = [commands / "python"] if block.language == "python" else ["bash", "-euo", "pipefail"]
    done = subprocess.run(
        [*program, "-c", text],
        cwd=project,
        env=environment(commands),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{indent(text, '  ')}\n{done.stdout[-4000:]}"


def test_every_block_that_is_not_run_has_a_reason():
    assert [str(block) for block in blocks() if block.reason is not None and not block.reason] == []
    assert sum(block.reason is None for block in blocks()) > 40
