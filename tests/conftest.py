"""What several tests share: a tiny demo cohort, painted once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from nic_core.demo.cohort import make_demo


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort file of a dozen small slides and a few patches, with quick settings."""
    root = tmp_path_factory.mktemp("demo")
    cohort = make_demo(root, slides=12, patches_per_task=60, side=1024, workers=1)
    text = cohort.read_text()
    for old, new in (
        ("patches_seen: 32000", "patches_seen: 256\n  batch: 32"),
        ("crop: 24", "crop: 8"),
        ("epochs: 50", "epochs: 2\n    bootstrap: 50"),
    ):
        assert old in text
        text = text.replace(old, new)
    cohort.write_text(text)
    return cohort
