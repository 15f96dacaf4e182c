"""What Dagster loads: the study that the environment names."""

from __future__ import annotations

from nic_assets.build import build_defs
from nic_core.cohort import load_cohort
from nic_core.store import Store

defs = build_defs(load_cohort(), Store.from_environment())
