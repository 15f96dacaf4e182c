"""The jobs that the UI offers."""

from __future__ import annotations

import pytest

from nic_assets.build import build_defs
from nic_core.cohort import load_cohort
from nic_core.store import Store

pytestmark = pytest.mark.slow


def test_jobs_in_order_make_every_asset_after_its_inputs(tiny_cohort, tmp_path):
    defs = build_defs(load_cohort(tiny_cohort), Store(tmp_path))
    graph = defs.resolve_asset_graph()
    made = set()
    for job in defs.jobs or ():
        own = defs.resolve_job_def(job.name).asset_layer.selected_asset_keys
        assert not own & made
        made |= own
        for key in own:
            assert graph.get(key).parent_keys & graph.materializable_asset_keys <= made
    assert made == graph.materializable_asset_keys
