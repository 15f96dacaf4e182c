"""Definitions of a study: assets, jobs, sensors, resources and executor for one cohort."""

from __future__ import annotations

import dagster as dg

from nic_assets.assets.encoders import encoder_assets
from nic_assets.assets.external import external_evaluation_assets
from nic_assets.assets.grids import grid_assets
from nic_assets.assets.inputs import external_assets
from nic_assets.assets.models import model_assets
from nic_assets.assets.predictions import prediction_assets
from nic_assets.assets.registry import registry_assets
from nic_assets.assets.reports import report_assets
from nic_assets.assets.slides import slide_assets
from nic_assets.automation import automate, study_sensors
from nic_assets.jobs import study_jobs
from nic_assets.orchestration.executors import chosen_executor
from nic_assets.orchestration.logs import brief_logger
from nic_assets.partitions import Partitions
from nic_assets.tracking import Tracking
from nic_core.cohort import Cohort
from nic_core.store import Store


def build_defs(cohort: Cohort, store: Store) -> dg.Definitions:
    """Return the definitions of the study of ``cohort`` in ``store``."""
    partitions = Partitions(cohort)
    made = [
        *slide_assets(partitions),
        *encoder_assets(partitions),
        *grid_assets(partitions),
        *model_assets(partitions),
        *registry_assets(partitions),
        *prediction_assets(partitions),
        *external_evaluation_assets(partitions),
    ]
    made += report_assets(partitions, [spec for asset in made for spec in asset.check_specs])
    jobs = study_jobs(partitions)
    return dg.Definitions(
        assets=[*external_assets(partitions), *automate(made, cohort.automation)],
        jobs=jobs.values(),
        sensors=study_sensors(cohort, jobs["slide_index"]),
        resources={"cohort": cohort, "store": store, "tracking": Tracking.in_store(store)},
        executor=chosen_executor(),
        loggers={"console": brief_logger},
    )
