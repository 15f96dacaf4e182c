"""What Dagster loads: the study that the environment names."""

from __future__ import annotations

import logging

from nic_assets.build import build_defs
from nic_assets.orchestration.mistakes import definitions_without_traceback, show_wrong_arguments
from nic_assets.tracking.database import check_dagster_storage
from nic_core.cohort import load_cohort
from nic_core.store import Store

with definitions_without_traceback():
    check_dagster_storage()
    defs = build_defs(load_cohort(), Store.from_environment())
show_wrong_arguments()

# Dagster hands the library's lines to the run's loggers (`python_logs` in dagster.yaml); some
# imports give the root logger a handler of its own, which would print each a second time
logging.getLogger("nic_core").propagate = False
