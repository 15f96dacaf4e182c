"""The study of the environment with 50 retries without delay, for ``benchmarks/kills.py``."""

import dagster as dg

from nic_assets.orchestration import retries

retries.RETRIES = dg.RetryPolicy(max_retries=50)  # before the assets are declared

from nic_assets.build import build_defs  # noqa: E402
from nic_core.cohort import load_cohort  # noqa: E402
from nic_core.store import Store  # noqa: E402

defs = build_defs(load_cohort(), Store.from_environment())
