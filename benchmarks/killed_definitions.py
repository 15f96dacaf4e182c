"""The study of the environment with 50 retries without delay, for ``benchmarks/kills.py``."""

import dagster as dg

from nic_assets.build import build_defs
from nic_assets.orchestration import batches
from nic_core.cohort import load_cohort
from nic_core.store import Store

batches.RETRIES = dg.RetryPolicy(max_retries=50)
defs = build_defs(load_cohort(), Store.from_environment())
