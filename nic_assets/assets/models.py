"""Slide- and patient-level models on grids, one for each encoder and target."""

import dagster as dg
import polars as pl
import torch

from nic_assets.assets import checks
from nic_assets.assets.inputs import TARGET_ENTRY
from nic_assets.orchestration.batches import Events, Product, batch_asset, materialize_each
from nic_assets.orchestration.executors import CPU_TAGS, GPU_POOL, GPU_TAGS
from nic_assets.orchestration.metadata import code_version, figure, log_progress, picture, table
from nic_assets.partitions import Partitions
from nic_assets.tracking import CANDIDATE, TrackedRun, Tracking, TrackingError
from nic_core import steps
from nic_core.cohort import Cohort, CohortError
from nic_core.devices import leased_device
from nic_core.encoders.files import read_card
from nic_core.models.comparison import above_permutation_control, compare_with_champion
from nic_core.models.cross_validation import CrossValidation
from nic_core.models.figures import evaluation_figure, metrics_figure, training_figure
from nic_core.models.files import ModelCard, ensemble_module
from nic_core.models.training import TrainingError
from nic_core.reports import model_results, results_markdown
from nic_core.slides import SlideError
from nic_core.store import ModelKey, Store


def model_assets(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """The assets of this layer, for one cohort; none where it has no target."""
    if not partitions.cohort.targets:
        return []
    settings = partitions.cohort.settings.models

    @batch_asset(
        partitions_def=partitions.targets,
        deps=[TARGET_ENTRY],
        group_name="models",
        kinds={"polars", "parquet"},
        op_tags=CPU_TAGS,
        code_version=code_version(1, settings.folds, settings.seed),
        check_specs=[
            checks.declared("folds_disjoint_by_patient", "target_folds", checks.folds_disjoint)
        ],
    )
    def target_folds(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """A target's labelled units in folds by patient, shared by all encoders."""

        def work(key: str) -> Product:
            folds = steps.make_target_folds(cohort, store, key)
            return Product(
                version=steps.digest(folds.to_dicts()),
                metadata={
                    "dagster/row_count": folds.height,
                    "folds": table(
                        folds.group_by("split", "fold")
                        .agg(units=pl.len(), patients=pl.col("patient").n_unique())
                        .sort("split", "fold")
                    ),
                    "file": dg.MetadataValue.path(store.target_folds(key)),
                },
                checks={"folds_disjoint_by_patient": checks.folds_disjoint(folds)},
            )

        yield from materialize_each(
            context, work, expected=(CohortError,), place=store.target_folds
        )

    @batch_asset(
        partitions_def=partitions.models,
        deps=["grid_manifest", target_folds],
        group_name="models",
        kinds={"pytorch", "mlflow"},
        pool=GPU_POOL,
        op_tags=GPU_TAGS,
        code_version=code_version(3, settings),
        check_specs=[
            checks.declared("above_permutation_control", "slide_model", above_permutation_control),
            dg.AssetCheckSpec(
                "compared_with_champion",
                asset="slide_model",
                description="The alias champion of the target's registered model moves to a new "
                "version that is better, or is the first; the remark says why it moved or stayed.",
            ),
        ],
    )
    def slide_model(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
        tracking: dg.ResourceParam[Tracking],
    ) -> Events:
        """Cross-validated networks from grid to target, their predictions and figures."""

        def work(key: str) -> Product:
            model = ModelKey.parse(key)
            with tracking.run(
                context,
                cohort=cohort,
                partition=key,
                experiment=f"target-{model.target}",
                product=store.slide_model(model),
            ) as run:
                run.params(
                    {"encoder": model.encoder, "target": model.target, **settings.model_dump()}
                )
                evaluated, card = steps.make_slide_model(
                    cohort, store, model, run, log_progress(context), device=device
                )
                run.figure("predictions", evaluation_figure(evaluated))
                run.figure("metrics", metrics_figure(evaluated))
                run.figure("training_curves", training_figure(evaluated))
                log_slide_model(run, evaluated, card, store)
                run.compare_with_champion(
                    lambda champion: compare_with_champion(evaluated, champion)
                )
            steps.mark_logged(store, model)
            assert run.verdict is not None  # the block's last call, and all are through
            return Product(
                version=steps.digest(evaluated.predictions.rows()),
                metadata={
                    "metrics": table(evaluated.metrics),
                    **{name: figure(drawing, name) for name, drawing in run.figures.items()},
                    "folder": dg.MetadataValue.path(store.slide_model(model)),
                    "mlflow_run": dg.MetadataValue.url(run.url),
                    "mlflow_model": dg.MetadataValue.url(run.page),
                },
                checks={
                    "above_permutation_control": above_permutation_control(evaluated),
                    "compared_with_champion": None if run.verdict.compared else run.verdict.words,
                },
                remarks={"compared_with_champion": run.verdict.words},
            )

        with leased_device() as device:
            yield from materialize_each(
                context,
                work,
                expected=(CohortError, TrainingError, TrackingError),
                place=lambda key: store.slide_model(ModelKey.parse(key)),
            )

    @batch_asset(
        partitions_def=partitions.models,
        deps=[slide_model],
        group_name="models",
        kinds={"pytorch", "zarr", "image"},
        op_tags=CPU_TAGS,
        code_version=code_version(1, partitions.cohort.maps),
    )
    def explanation(
        context: dg.AssetExecutionContext,
        cohort: dg.ResourceParam[Cohort],
        store: dg.ResourceParam[Store],
    ) -> Events:
        """What in each slide speaks for its prediction, by networks that have not seen it."""

        def work(key: str) -> Product:
            model = ModelKey.parse(key)
            explained = steps.make_explanation(cohort, store, model)
            return Product(
                version=steps.digest(sorted(explained.versions.items())),
                metadata={
                    **{name: picture(drawn, name) for name, drawn in explained.overlays.items()},
                    "scores": table(
                        explained.scores.group_by("map", "split")
                        .agg(slides=pl.len(), auc=pl.col("auc").mean(), hit=pl.col("hit").mean())
                        .sort("map", "split")
                    ),
                    "folder": dg.MetadataValue.path(store.explanation(model)),
                },
            )

        yield from materialize_each(
            context,
            work,
            expected=(CohortError, SlideError),
            place=lambda key: store.explanation(ModelKey.parse(key)),
        )

    return [target_folds, slide_model, explanation]


def log_slide_model(
    run: TrackedRun, evaluated: CrossValidation, card: ModelCard, store: Store
) -> None:
    """Tell MLflow of a model: its card, data, files, figures, and a version of its target's."""
    target, encoder, crop = card.target.name, card.encoder, card.settings.crop
    results = model_results(card)
    networks = results.filter(model=results["model"][0])
    data = {
        f"grid_manifest/{encoder}": (
            store.grid_manifest(encoder),
            steps.digest(steps.read_grid_manifest(store, encoder).rows()),
        ),
        f"target_folds/{target}": (
            store.target_folds(target),
            steps.digest(pl.read_parquet(store.target_folds(target)).to_dicts()),
        ),
    }
    run.card(card.model_dump(mode="json"))
    run.inputs(data)
    run.files(store.slide_model(ModelKey(encoder=encoder, target=target)))
    run.register(
        ensemble_module(evaluated.networks),
        torch.zeros((2, card.embedding_size, crop, crop)),
        name=f"model-{target}",
        description=f"{card.target.kind}: crop of {crop} x {crop} cells of encoder {encoder} to "
        f"{target}, mean of {card.settings.folds} folds\n\n{results_markdown(networks)}",
        tags={
            "target": target,
            "encoder": encoder,
            "weights_hash": card.weights_hash,
            "tasks": ", ".join(read_card(store.encoder(encoder)).tasks),
            "training_digest": card.training.digest,
            **{f"data/{name}": version for name, (_, version) in data.items()},
        },
        aliases=(f"{CANDIDATE}-{encoder.replace('.', '-')}",),
    )
    run.summary(results)
