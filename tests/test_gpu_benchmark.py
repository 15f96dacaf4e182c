"""The benchmark of the GPU runs on a CPU in tiny sizes, and reports each part."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.gpu import PARTS, TINY, main, run_part

pytestmark = [pytest.mark.slow, pytest.mark.integration]


def test_all_parts_run_in_tiny_sizes_and_write_json_and_table(tmp_path):
    parts = [name for name in PARTS if name != "tests"]  # this test is one of pytest already
    assert main([str(tmp_path), "--tiny", *(f"--part={name}" for name in parts)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["tiny"]
    assert {part["part"]: part["failed"] for part in found["parts"]} == dict.fromkeys(parts)
    assert all(part["figures"] for part in found["parts"])
    table = (tmp_path / "gpu.md").read_text()
    assert "tiny sizes: not a measurement of speed" in table
    assert all(f"| {name} |" in table for name in parts)


def test_a_failed_part_is_reported_with_its_figures_and_reason():
    report = run_part("encoder training", replace(TINY, accuracy=1.1))
    assert report.failed is not None
    assert "balanced accuracy" in report.failed
    assert "expected 1.10" in report.failed
    assert report.figures
