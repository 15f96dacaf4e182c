"""Tests of the settings of a study's folder."""

from __future__ import annotations

import pytest

from studies.settings import check_settings


def test_only_the_settings_of_the_folder_are_accepted(tmp_path):
    check_settings(tmp_path, {"slides": 8, "side": 4})
    check_settings(tmp_path, {"side": 4, "slides": 8})
    with pytest.raises(SystemExit, match=r"made with \{'slides': 8\}; give another --out"):
        check_settings(tmp_path, {"slides": 9, "side": 4})
    with pytest.raises(SystemExit, match=r"made with \{'seeds': None\}"):
        check_settings(tmp_path, {"slides": 8, "side": 4, "seeds": 1})
