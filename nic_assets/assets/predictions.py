"""Champions, and the predictions of every slide by them."""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import dagster as dg
import polars as pl

from nic_assets.assets import checks
from nic_assets.assets.inputs import PREDICTION_INPUTS, REGISTERED_CHAMPION, report_versions
from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.executors import CPU_TAGS
from nic_assets.orchestration.metadata import OWNERS, code_version, picture, table
from nic_assets.orchestration.retries import retried_asset, retry_transient_errors
from nic_assets.partitions import Partitions
from nic_assets.tags import PARTIAL_INPUTS, REFRESH_TAG
from nic_assets.tracking import Tracking, TrackingError
from nic_assets.tracking.champions import (
    NO_CHAMPION,
    champion_version,
    download_model,
    find_predicting_version,
)
from nic_core import steps
from nic_core.cohort import Cohort, CohortError, SurvivalTarget, Target
from nic_core.numbers import format_number
from nic_core.store import PredictionKey, Store
from nic_core.types import Pixels
from nic_core.view.addresses import champion_layer, slide_page

if TYPE_CHECKING:
    from nic_core.models.files import ModelCard

PICTURE_WIDTH = 600  # px of a picture in the UI


def prediction_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """Return the assets of group ``predictions``; none for a cohort without targets."""
    if not partitions.cohort.targets:
        return []

    @batch_asset(
        checks=[checks.champion_exists],
        partitions_def=partitions.targets,
        deps=["registered_model", REGISTERED_CHAMPION],
        group_name="predictions",
        kinds={"pytorch", "mlflow"},
        tags=PARTIAL_INPUTS,
        op_tags=CPU_TAGS,
        code_version=code_version(1),
    )
    def champion(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """The registered model that predicts a target, copied into the store."""
        from nic_core.models.files import ModelFileError

        with retry_transient_errors():
            found = {
                target: find_predicting_version(tracking, cohort.target(target))
                for target in context.partition_keys
            }
        # before the provenance is read: what is downloaded below is what was found here
        report_versions(
            context.instance,
            REGISTERED_CHAMPION,
            {target: champion_version(version) for target, version in found.items()},
        )

        def make(target: str) -> Product:
            registered = found[target]
            if registered is None:
                steps.remove_champion(store, target)
                problem = checks.champion_exists(cohort.target(target), None)
                return Product(version=NO_CHAMPION, checks={checks.champion_exists: problem})
            version = steps.ChampionVersion(
                name=registered.name,
                version=int(registered.version),
                run=str(registered.run_id),
                encoder=registered.tags.get("encoder", ""),
            )
            with download_model(tracking, registered) as folder:
                card = steps.make_champion(store, target, version, folder)
            stored = steps.load_champion(cohort, store, target)
            assert stored is not None
            return Product(
                version=stored.digest,
                metadata={
                    "model": version.name,
                    "version": version.version,
                    "encoder": card.encoder,
                    "training_cohort": card.training.name,
                    "training_slides": len(card.training.slides),
                    "training_scanners": list(card.training.scanners),
                    "training_mpp": list(card.training.mpp),
                    "distance_limit": stored.model.reference.limit,
                    "held_out_distances": sorted(map(float, stored.model.reference.held_out)),
                    "mlflow_model": dg.MetadataValue.url(
                        tracking.page(registered.name, registered.version)
                    ),
                    "folder": dg.MetadataValue.path(store.champion(target)),
                },
                checks={checks.champion_exists: None},
            )

        yield from materialize_each(
            context,
            make,
            parse=str,
            path=store.champion,
            expected=(CohortError, ModelFileError, TrackingError),
        )

    @batch_asset(
        partitions_def=partitions.targets,
        deps=[
            champion,
            # which encoder's grids are used depends on the champion
            dg.AssetDep("grid_manifest", partition_mapping=dg.AllPartitionMapping()),
            "quality_report",
            "slide_index",
        ],
        group_name="predictions",
        kinds={"polars", "parquet"},
        tags={REFRESH_TAG: "eager", **PARTIAL_INPUTS},
        op_tags=CPU_TAGS,
        code_version=code_version(1, partitions.cohort.targets),
    )
    def prediction_plan(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """What each slide is predicted from: the champion and the grids of its unit.

        Reports the slides whose inputs are new or changed.
        """
        from nic_core.models.files import ModelFileError

        def make(target: str) -> Product:
            plan = steps.make_prediction_plan(cohort, store, target)
            if plan.problem is not None:
                context.log.warning(plan.problem)
            known = plan.table.drop_nulls("version")
            versions = {
                str(PredictionKey(champion=target, slide=slide)): version
                for slide, version in known.select("slide", "version").iter_rows()
            }
            changed = report_versions(context.instance, PREDICTION_INPUTS, versions)
            waiting = plan.table.filter(pl.col("version").is_null())["slide"].to_list()
            return Product(
                version=steps.digest(plan.table.rows()),
                metadata={
                    "dagster/row_count": plan.table.height,
                    "predicted": plan.table["reason"].null_count(),
                    "changed": changed,
                    "waiting": waiting,
                    **({"problem": plan.problem} if plan.problem is not None else {}),
                    "preview": table(
                        plan.table.head(20).select("slide", "unit", "encoder", "reason")
                    ),
                    "file": dg.MetadataValue.path(store.prediction_plan(target)),
                },
            )

        yield from materialize_each(
            context,
            make,
            parse=str,
            path=store.prediction_plan,
            expected=(CohortError, ModelFileError),
        )

    @batch_asset(
        checks=checks.OF_SLIDES["prediction"],
        partitions_def=partitions.predictions,
        deps=[PREDICTION_INPUTS],
        group_name="predictions",
        kinds={"polars", "zarr", "image"},
        op_tags=CPU_TAGS,
        code_version=code_version(3),
    )
    def prediction(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """The champion's prediction of a slide or its patient, with the heatmap of the slide and
        its distance to the training cohort."""
        from nic_core.grids import GridError
        from nic_core.models.files import ModelFileError
        from nic_core.models.prediction import ModelMismatchError
        from nic_core.slides import SlideError

        # the version is a part of the key: the champion may be replaced during a long run
        load = cache(lambda target, version: steps.load_champion(cohort, store, target))

        def make(key: PredictionKey) -> Product:
            row = steps.planned(store, key)
            reason = row["reason"]
            if reason is not None:
                steps.remove_prediction(store, key)
                return Product(
                    version=steps.digest(reason),
                    metadata={"not_predicted": str(reason)},
                    checks=dict.fromkeys(checks.OF_SLIDES["prediction"]),
                )
            stored = load(key.champion, steps.read_champion_version(store, key.champion))
            if stored is None:
                raise CohortError(
                    f"target '{key.champion}' has no champion; materialize 'prediction_plan' again"
                )
            made = steps.make_prediction(cohort, store, stored, key, row)
            found, card = made.row.row(0, named=True), stored.model.card
            record = steps.read_record(store, key.slide)
            return Product(
                version=made.version,
                metadata={
                    "prediction": table(prediction_table(made.row, card)),
                    "distance": found["distance"],
                    "distance_percentile": found["distance_percentile"],
                    "distance_limit": stored.model.reference.limit,
                    "in_training": found["in_training"],
                    "slides": found["slides"],
                    "failed": found["failed"],
                    "model": str(stored.version),
                    "encoder": card.encoder,
                    "heatmap_of": "all networks"
                    if made.fold is None
                    else f"the network of fold {made.fold}, which was not trained on the patient",
                    **_pictures(key, made),
                    "look": dg.MetadataValue.url(
                        slide_page(key.slide, champion_layer(key.champion))
                    ),
                    "folder": dg.MetadataValue.path(store.prediction(key)),
                },
                checks={
                    checks.near_training_cohort: checks.near_training_cohort(
                        found["distance"], found["distance_percentile"], stored.model.reference
                    ),
                    checks.mpp_as_in_training: checks.mpp_as_in_training(record.mpp, card.training),
                    checks.scanner_as_in_training: checks.scanner_as_in_training(
                        steps.slide_scanner(store, key.slide), card.training
                    ),
                    checks.quality_as_in_cohort: checks.quality_as_in_cohort(made.problems),
                },
            )

        yield from materialize_each(
            context,
            make,
            parse=PredictionKey.parse,
            path=store.prediction,
            expected=(CohortError, GridError, ModelFileError, ModelMismatchError, SlideError),
        )

    @retried_asset(
        deps=[prediction, "slide_index"],
        group_name="predictions",
        kinds={"polars", "parquet"},
        owners=OWNERS,
        tags={REFRESH_TAG: "eager", **PARTIAL_INPUTS},
        op_tags=CPU_TAGS,
        code_version=code_version(1),
    )
    def predictions_report(
        cohort: dg.ResourceParam[Cohort], store: dg.ResourceParam[Store]
    ) -> Events:
        """All predictions in one table, a row for each unit and target."""
        from nic_core.models.distance import FAR_PERCENTILE

        with retry_transient_errors():
            report = steps.make_predictions_report(cohort, store)
        shown = [column for column in report.columns if not column.startswith("fold_")]
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(steps.digest(report.rows())),
            metadata={
                "dagster/row_count": report.height,
                "units": {
                    target.name: report.filter(target=target.name).height
                    for target in cohort.targets
                },
                "beyond_99th_percentile": report.filter(
                    pl.col("distance_percentile") > FAR_PERCENTILE
                ).height,
                "preview": table(report.select(shown).head(20)),
                "file": dg.MetadataValue.path(store.predictions_report),
                "csv": dg.MetadataValue.path(store.predictions_report.with_suffix(".csv")),
            },
        )

    return [champion, prediction_plan, prediction, predictions_report]


def prediction_table(row: pl.DataFrame, card: "ModelCard") -> pl.DataFrame:
    """Return the prediction of a unit as rows: name, value, lowest and highest of the folds.

    Parameters
    ----------
    row
        :attr:`nic_core.steps.Prediction.row`.
    card
        Card of the model.
    """
    from nic_core.models.kinds import kind_of

    values = row.row(0, named=True)
    times = [c for c in row.columns if c.startswith("survival_")]
    conclusions = [c for c in ("class", "risk_group", "median_survival") if c in row.columns]
    rows = []
    for name in (*kind_of(card.target).prediction_columns, *conclusions, *times):
        folds = [values.get(f"fold_{k}_{name}") for k in range(len(card.networks))]
        known = [fold for fold in folds if fold is not None]
        ends = [format_number(end(known)) if known else None for end in (min, max)]
        value = values[name]
        shown = format_number(value) if isinstance(value, float) else value
        rows.append((quantity_name(name, card.target), shown, *ends))
    schema = ["quantity", "value", "lowest_of_folds", "highest_of_folds"]
    return pl.DataFrame(rows, schema=dict.fromkeys(schema, pl.String), orient="row")


def quantity_name(column: str, target: Target) -> str:
    """Return what a column of a prediction is in words, with the unit of a time."""
    unit = target.unit if isinstance(target, SurvivalTarget) else ""
    if column == "median_survival":
        return f"median survival ({unit})"
    if column.startswith("survival_"):
        return f"alive after {column.removeprefix('survival_')} {unit}"
    return column.replace("_", " ")


def _pictures(
    key: PredictionKey, made: "steps.Prediction"
) -> Mapping[str, dg.MarkdownMetadataValue | dg.TableMetadataValue]:
    """Return heat, patches and their places for the UI; nothing for a slide without heatmap."""
    if made.overlay is None or made.patches is None or made.extremes is None:
        return {}
    name = f"{key.champion} on {key.slide}"
    return {
        "heat": picture(_shrunk(made.overlay), f"{name}: heat"),
        "patches": picture(_shrunk(made.patches), f"{name}: patches of highest and of lowest heat"),
        "patch_places": table(made.extremes),
    }


def _shrunk(pixels: Pixels) -> Pixels:
    """Reduce a picture to :data:`PICTURE_WIDTH`: the event log keeps it for every prediction."""
    import numpy as np
    from PIL import Image

    height, width = pixels.shape[:2]
    if width <= PICTURE_WIDTH:
        return pixels
    size = PICTURE_WIDTH, max(1, round(height * PICTURE_WIDTH / width))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
