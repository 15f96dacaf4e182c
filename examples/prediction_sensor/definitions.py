"""A sensor that reacts to new predictions, beside the definitions of the study.

Start Dagster with this file instead of the module ``nic_assets.definitions``::

    dagster dev -f examples/prediction_sensor/definitions.py
"""

from __future__ import annotations

import dagster as dg
import polars as pl

from nic_assets.definitions import defs as study
from nic_core.models.distance import FAR_PERCENTILE
from nic_core.store import Store


@dg.asset_sensor(
    asset_key=dg.AssetKey("predictions_report"),
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Runs after each new table of predictions.",
)
def announce_predictions(
    context: dg.SensorEvaluationContext,
    asset_event: dg.EventLogEntry,
    store: dg.ResourceParam[Store],
) -> dg.SkipReason:
    """Announce each new table of predictions; replace the print by a call of your own system."""
    report = pl.read_parquet(store.predictions_report)
    far = report.filter(pl.col("distance_percentile") > FAR_PERCENTILE)
    text = f"{report.height} units predicted, {far.height} of them far from the training cohort"
    print(text)
    return dg.SkipReason(text)


defs = dg.Definitions.merge(study, dg.Definitions(sensors=[announce_predictions]))
