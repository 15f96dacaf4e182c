"""A whole study on a tiny cohort, by Dagster's API and command line."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dagster as dg
import mlflow
import numpy as np
import polars as pl
import pytest
import tifffile
import torch
import yaml
import zarr
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from rich.console import Console

from nic_assets.assets.inputs import SLIDE_FILE
from nic_assets.build import build_defs
from nic_assets.operations.refresh import refresh
from nic_core import steps
from nic_core.cohort import load_cohort
from nic_core.encoders import load_encoder, save_encoder
from nic_core.encoders.encoder import encoder_tensors, weights_hash
from nic_core.encoders.files import read_card
from nic_core.encoders.probes import KNN, LINEAR
from nic_core.grids import open_grid, read_colours
from nic_core.grids.preview import COLOURS_ATTRIBUTE
from nic_core.maps.heatmaps import TIFF, read_heatmap
from nic_core.models.files import ensemble_module, load_model
from nic_core.pictures import FIGURES
from nic_core.reports import RESULT_SCHEMA
from nic_core.store import GridKey, ModelKey, Store

pytestmark = pytest.mark.slow

LAYERS = {
    "encoders": {"patch_task_source", "encoder_entry", "patch_task", "encoder", "encoder_probe"},
    "grids": {"grid", "grid_manifest", "embedding_colours", "grid_preview"},
    "models": {"target_entry", "target_folds", "target_grids", "slide_model", "explanation"},
    "registry": {"registered_encoder", "registered_model"},
    "predictions": {
        "registered_champion",
        "champion",
        "prediction_plan",
        "prediction_inputs",
        "prediction",
        "predictions_report",
    },
    "reports": {"probability_map", "map_scores", "evaluation_report"},
    "slides": {"slide_file", "slide_index", "slide", "patch_table", "quality_report"},
}


class Study:
    """Definitions, store and instance of a cohort."""

    def __init__(self, cohort: Path, root: Path) -> None:
        self.cohort = load_cohort(cohort)
        self.store = Store(root / "store")
        self.defs = build_defs(self.cohort, self.store)
        (root / "dagster").mkdir()
        self.instance = dg.DagsterInstance.local_temp(str(root / "dagster"))

    def refresh(self) -> list[str]:
        return refresh(self.defs, self.instance, Console(quiet=True))

    def runs(self) -> int:
        return self.instance.get_runs_count()


def study_of_one_slide(
    tiny_cohort: Path, root: Path, encoder: dict[str, object]
) -> tuple[Study, str]:
    """Return a study of the first slide and one encoder, and the slide's id."""
    slides = pl.read_csv(tiny_cohort.parent / "slides.csv", infer_schema=False).head(1)
    slides = slides.select("slide", "patient", path=f"{tiny_cohort.parent}/" + pl.col("path"))
    slides.write_csv(root / "slides.csv")
    settings = load_cohort(tiny_cohort).settings
    cohort = {
        "name": "other",
        "slides": {"table": "slides.csv"},
        "encoders": [encoder],
        "settings": {"patch": settings.patch, "mpp": settings.mpp},
    }
    (root / "cohort.yaml").write_text(yaml.safe_dump(cohort))
    return Study(root / "cohort.yaml", root), slides["slide"][0]


@pytest.fixture(scope="module")
def study(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(tiny_cohort, tmp_path_factory.mktemp("study"))
    assert study.refresh() == []
    return study


def test_every_layer_declares_its_assets(study):
    graph = study.defs.resolve_asset_graph()
    groups: dict[str, set[str]] = {}
    for key in graph.get_all_asset_keys():
        groups.setdefault(graph.get(key).group_name, set()).add(key.to_user_string())
    assert groups == LAYERS


def test_every_asset_has_description_owner_and_code_version(study):
    graph = study.defs.resolve_asset_graph()
    for key in graph.materializable_asset_keys:
        node = graph.get(key)
        assert node.description, key
        assert node.owners, key
        assert node.code_version, key


def test_gpu_assets_are_tagged_and_share_a_pool(study):
    graph = study.defs.resolve_asset_graph()
    for name in ("encoder", "grid", "slide_model"):
        definition = graph.get(dg.AssetKey(name)).assets_def
        assert definition.op.tags["nic/device"] == "gpu"
        assert definition.op.pool == "gpu"


def test_every_partition_of_every_asset_is_materialized(study):
    graph = study.defs.resolve_asset_graph()
    for key in graph.materializable_asset_keys:
        definition = graph.get(key).partitions_def
        if definition is None:
            assert study.instance.get_latest_materialization_event(key) is not None
        else:
            expected = set(definition.get_partition_keys(dynamic_partitions_store=study.instance))
            assert study.instance.get_materialized_partitions(key) == expected, key


def test_a_grid_has_an_embedding_at_every_kept_cell(study):
    for slide in study.instance.get_dynamic_partitions("slides"):
        key = GridKey(encoder="mtl-4", slide=slide)
        cells = steps.read_cells(study.cohort, study.store, key).filter("kept")
        grid = open_grid(study.store.grid(key))
        assert grid.shape[0] == 128
        assert int(grid.valid.sum()) == cells.height > 0


def colours_of_previews(study: Study, encoder: str) -> set[str]:
    """The hash of the colours of every preview of an encoder."""
    keys = [
        GridKey(encoder=encoder, slide=s) for s in study.instance.get_dynamic_partitions("slides")
    ]
    previews = [zarr.open_group(study.store.grid_preview(key), mode="r") for key in keys]
    return {str(group.attrs[COLOURS_ATTRIBUTE]) for group in previews}


def test_pages_link_to_the_viewer(study):
    viewer = "http://127.0.0.1:8765"
    [slide, *_] = study.instance.get_dynamic_partitions("slides")
    expected = {
        ("slide", slide): f"{viewer}/slide/{slide}#layers=tissue:0.6",
        ("grid", f"mtl-4|{slide}"): f"{viewer}/slide/{slide}#layers=grid.mtl-4:0.6",
        ("slide_model", "mtl-4|growth"): f"{viewer}/target/growth",
    }
    found = {key: event(study, *key).metadata["look"].value for key in expected}
    assert found == expected
    explained = event(study, "explanation", "mtl-4|growth").metadata
    for end in ("highest", "lowest"):
        assert explained[f"look at the {end}"].value.endswith("#layers=heat.growth.mtl-4:0.6")


def test_all_previews_of_an_encoder_have_the_same_colours(study):
    hashes = set()
    for encoder in study.cohort.encoders:
        colours = read_colours(study.store.embedding_colours(encoder.name))
        assert colours_of_previews(study, encoder.name) == {colours.hash}
        hashes.add(colours.hash)
    assert len(hashes) == len(study.cohort.encoders)
    [slide, *_] = study.instance.get_dynamic_partitions("slides")
    shown = event(study, "grid_preview", f"mtl-4|{slide}").metadata["preview"]
    assert shown.value.startswith(f"![{slide}, coloured by embedding](data:image/jpeg")


def test_every_slide_of_every_model_is_explained_at_its_embeddings(study):
    for target in study.cohort.targets:
        tested = (
            pl.read_parquet(study.store.target_folds(target.name))["slides"].explode().to_list()
        )
        for encoder in study.cohort.encoders:
            folder = study.store.explanation(ModelKey(encoder=encoder.name, target=target.name))
            assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted(tested)
            for slide in tested:
                valid = open_grid(
                    study.store.grid(GridKey(encoder=encoder.name, slide=slide))
                ).valid
                np.testing.assert_array_equal(np.isfinite(read_heatmap(folder / slide)), valid)
            scores = pl.read_parquet(folder / "scores.parquet")
            assert scores["auc"].is_between(0, 1).all()
            assert set(scores["map"]) <= {item.name for item in study.cohort.maps}


def test_the_report_holds_every_target_encoder_and_task(study):
    results = pl.read_parquet(study.store.evaluation_report / "results.parquet")
    assert results.schema == RESULT_SCHEMA
    models = results.filter(kind="target").select("about", "encoder").unique()
    assert models.height == 6
    assert set(results.filter(kind="patch task")["about"]) == {
        task.name for task in study.cohort.patch_tasks
    }
    assert results.filter(kind="map").height == 1
    assert set(results["part"]) >= {"cross-validated", "test"}


def test_mlflow_holds_parameters_curves_and_pictures_of_a_training(study):
    client = registry(study)
    version = client.get_model_version_by_alias("encoder-mtl-4", "candidate")
    run = client.get_run(version.run_id)
    assert run.info.run_name == f"mtl-4 ({study.cohort.name})"
    assert run.data.params["patches_seen"] == "256"
    assert run.data.tags["organ"] == ", ".join(sorted({t.organ for t in study.cohort.patch_tasks}))
    tasks = [task.name for task in study.cohort.patch_tasks]
    pictures = {"augmented_patches", "training_curves", *(f"confusion_{task}" for task in tasks)}
    assert {
        *(f"{name}.png" for name in pictures),
        "validation_confusion.json",
        "model-card.md",
    } <= {item.path for item in client.list_artifacts(version.run_id)}
    epochs = [metric.step for metric in client.get_metric_history(version.run_id, "loss")]
    assert epochs == list(range(1, len(epochs) + 1))
    for task in tasks:
        for score in ("balanced_accuracy", "f1"):
            name = f"validation/{task}/{score}"
            assert len(client.get_metric_history(version.run_id, name)) == len(epochs)
    assert pictures | {"test_scores"} <= set(event(study, "encoder", "mtl-4").metadata)


def registry(study: Study) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{study.store.mlflow / 'mlflow.db'}")


def test_every_encoder_and_model_is_registered_with_its_origin(study):
    client, cohort = registry(study), study.cohort
    counts = {
        model.name: len(client.search_model_versions(f"name='{model.name}'"))
        for model in client.search_registered_models()
    }
    assert counts == {f"encoder-{encoder.name}": 1 for encoder in cohort.encoders} | {
        f"model-{target.name}": len(cohort.encoders) for target in cohort.targets
    }
    made = [(f"encoder-{e.name}", "candidate", "encoder", e.name) for e in cohort.encoders]
    made += [
        (f"model-{t.name}", f"candidate-{e.name}", "slide_model", f"{e.name}|{t.name}")
        for t in cohort.targets
        for e in cohort.encoders
    ]
    for name, alias, asset, partition in made:
        version = client.get_model_version_by_alias(name, alias)
        assert version.tags["cohort"] == cohort.name
        assert version.tags["dagster/asset_key"] == asset
        assert version.tags["dagster/partition"] == partition
        training = study.instance.get_run_by_id(version.tags["dagster/run_id"])
        assert training.asset_selection == {dg.AssetKey(asset)}
        metadata = event(study, f"registered_{asset.rpartition('_')[2]}", partition).metadata
        page, run_page = (metadata[f"mlflow_{what}"].value for what in ("model", "run"))
        assert f"/models/{name}/versions/{version.version}?" in page
        assert f"/runs/{version.run_id}?" in run_page
        encoder = read_card(study.store.encoder(partition.partition("|")[0]))
        assert version.tags["weights_hash"] == encoder.weights_hash


def scores_of(
    client: mlflow.MlflowClient, version: mlflow.entities.model_registry.ModelVersion
) -> list[mlflow.entities.Metric]:
    """Return the metrics that MLflow shows with a version."""
    return client.get_logged_model(version.source.removeprefix("models:/")).metrics


def datasets(client: mlflow.MlflowClient, run: str) -> dict[str, str]:
    inputs = client.get_run(run).inputs.dataset_inputs
    return {item.dataset.name: item.dataset.digest for item in inputs}


def test_a_registered_encoder_has_its_patch_tasks_and_scores(study):
    client, card = registry(study), read_card(study.store.encoder("mtl-4"))
    version = client.get_model_version_by_alias("encoder-mtl-4", "candidate")
    identities = {f"patch_task/{task}": identity for task, identity in card.data.items()}
    assert datasets(client, version.run_id) == {k: v[:36] for k, v in identities.items()}
    assert {tag: version.tags[f"data/{tag}"] for tag in card.data} == card.data
    assert version.tags["tasks"] == ", ".join(card.tasks)
    metrics = {metric.key: metric for metric in scores_of(client, version)}
    for task, scores in card.scores.items():
        name = f"test/{task}/patch_head/balanced_accuracy"
        value = metrics[name].value
        assert value == scores.balanced_accuracy
        bounds = tuple(metrics[f"{name}_{end}"].value for end in ("low", "high") if scores.interval)
        assert bounds == (scores.interval or ())
        assert metrics[name].dataset_name == f"patch_task/{task}"
        assert f"| {task} | patch head | test | balanced accuracy | {value:.3f} " in (
            version.description
        )


def test_a_registered_model_has_its_grids_folds_and_scores(study):
    client = registry(study)
    version = client.get_model_version_by_alias("model-growth", "candidate-mtl-4")
    folds = study.instance.fetch_materializations(
        dg.AssetRecordsFilter(dg.AssetKey("target_folds"), asset_partitions=["growth"]), limit=1
    ).records[0]
    grids = study.instance.fetch_materializations(
        dg.AssetRecordsFilter(dg.AssetKey("target_grids"), asset_partitions=["mtl-4|growth"]),
        limit=1,
    ).records[0]
    assert datasets(client, version.run_id) == {
        name: event.asset_materialization.tags["dagster/data_version"]
        for name, event in (("target_folds/growth", folds), ("target_grids/mtl-4/growth", grids))
    }
    card = load_model(study.store.slide_model(ModelKey(encoder="mtl-4", target="growth"))).card
    auc = next(m for m in card.metrics if (m.model, m.split, m.metric) == ("network", "cv", "auc"))
    metrics = {m.key: m.value for m in scores_of(client, version)}
    name = "cross-validated/small_grid_CNN/AUC"
    found = [metrics[f"{name}{part}"] for part in ("", "_low", "_high")]
    assert found == [auc.value, auc.low, auc.high]
    kept = {Path(item.path).name for item in client.list_artifacts(version.run_id, "product")}
    assert kept == {
        path.name
        for path in study.store.slide_model(ModelKey(encoder="mtl-4", target="growth")).iterdir()
    } - {FIGURES}
    # the figures are beside the product, once
    drawn = study.store.slide_model(ModelKey(encoder="mtl-4", target="growth")) / FIGURES
    assert {path.name for path in drawn.iterdir()} <= {
        item.path for item in client.list_artifacts(version.run_id)
    }


def test_the_champion_is_the_newest_model_that_was_promoted(study):
    client = registry(study)
    for target in study.cohort.targets:
        promoted = [0]
        for version in client.search_model_versions(f"name='model-{target.name}'"):
            if re.match("becomes champion as the first|replaces", version.tags["champion"]):
                promoted.append(int(version.version))
        # the tiny models may all fail their permutation control: then there is no champion
        aliases = client.get_registered_model(f"model-{target.name}").aliases
        assert int(aliases.get("champion", 0)) == max(promoted)


def event(study: Study, asset: str, partition: str) -> dg.AssetMaterialization:
    """The latest materialization of a partition."""
    [record] = study.instance.fetch_materializations(
        dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[partition]), limit=1
    ).records
    assert record.asset_materialization is not None
    return record.asset_materialization


def test_the_models_metadata_say_which_is_champion_and_why(study):
    client = registry(study)
    for target in study.cohort.targets:
        versions = client.search_model_versions(f"name='model-{target.name}'")
        assert versions
        for version in versions:
            partition = version.tags["dagster/partition"]
            metadata = event(study, "registered_model", partition).metadata
            assert metadata["champion"].value == version.tags["champion"]


def test_checks_cover_every_partition_of_the_study(study):
    graph = study.defs.resolve_asset_graph()
    for check in graph.asset_check_keys:
        [record] = study.instance.event_log_storage.get_latest_asset_check_execution_by_key(
            [check]
        ).values()
        result = record.evaluation
        assert isinstance(result, dg.AssetCheckEvaluation), check
        definition = graph.get(check.asset_key).partitions_def
        if definition is None:
            continue
        every = definition.get_partition_keys(dynamic_partitions_store=study.instance)
        assert result.metadata["partitions"].value == len(every), check
        problems = {
            partition: found
            for partition in every
            if (
                found := event(study, check.asset_key.to_user_string(), partition)
                .metadata["checks"]
                .value[check.name]
            )
            != "passed"
        }
        assert result.metadata["problems"].value == problems
        assert result.passed is not bool(problems)


def test_scores_are_numbers_in_the_metadata_that_the_ui_plots(study):
    for target in study.cohort.targets:
        key = ModelKey(encoder="mtl-4", target=target.name)
        metadata = event(study, "slide_model", str(key)).metadata
        card = load_model(study.store.slide_model(key)).card
        metric = {"growth": "auc", "survival": "harrell_c"}.get(target.name, "spearman")
        [row] = [
            m for m in card.metrics if (m.model, m.split, m.metric) == ("network", "cv", metric)
        ]
        names = [f"cross_validated_{metric}{end}" for end in ("", "_low", "_high")]
        for name, value in zip(names, (row.value, row.low, row.high), strict=True):
            assert isinstance(metadata[name], dg.FloatMetadataValue)
            assert metadata[name].value == value
        assert f"test_{metric}" in metadata
    card = read_card(study.store.encoder("mtl-4"))
    metadata = event(study, "encoder", "mtl-4").metadata
    for task, scores in card.scores.items():
        assert metadata[f"{task}_balanced_accuracy"].value == scores.balanced_accuracy


def test_a_removed_slide_leaves_the_results_of_checks(study, tiny_cohort, tmp_path):
    shutil.copytree(tiny_cohort.parent, tmp_path / "demo")
    smaller = Study(tmp_path / "demo" / "cohort.yaml", tmp_path)
    jobs = smaller.defs.resolve_implicit_global_asset_job_def()

    def make(asset: str, *partitions: str) -> None:
        tags = (
            {
                ASSET_PARTITION_RANGE_START_TAG: partitions[0],
                ASSET_PARTITION_RANGE_END_TAG: partitions[-1],
            }
            if partitions
            else {}
        )
        assert jobs.execute_in_process(
            instance=smaller.instance, asset_selection=[dg.AssetKey(asset)], tags=tags
        ).success

    def partitions() -> int:
        key = dg.AssetCheckKey(dg.AssetKey("slide"), "tissue_found")
        [record] = smaller.instance.event_log_storage.get_latest_asset_check_execution_by_key(
            [key]
        ).values()
        return record.evaluation.metadata["partitions"].value

    make("slide_index")
    first, second = smaller.instance.get_dynamic_partitions("slides")[:2]
    make("slide", first, second)
    assert partitions() == 2
    [path] = (tmp_path / "demo" / "slides").glob(f"{first}.*")
    path.unlink()
    make("slide_index")
    assert partitions() == 1


CLEAN = """
import sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nic_core", "nic_assets", "dagster"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nowhere())
import mlflow, numpy, torch
uri, folder = sys.argv[1:]
mlflow.set_tracking_uri(uri)
for name in ("encoder-mtl-4", "model-survival"):
    given = numpy.load(f"{folder}/{name}.npy")
    where = f"models:/{name}@{'candidate' if name[0] == 'e' else 'candidate-mtl-4'}"
    if name[0] == "e":  # a slide model's function takes slide files, with this project's code
        numpy.save(f"{folder}/{name}.pyfunc.npy", mlflow.pyfunc.load_model(where).predict(given))
    with torch.no_grad():
        found = mlflow.pytorch.load_model(where)(torch.from_numpy(given)).numpy()
    numpy.save(f"{folder}/{name}.torch.npy", found)
assert not {name.partition(".")[0] for name in sys.modules} & {"nic_core", "nic_assets"}
"""


def test_registered_networks_predict_the_same_without_this_project(study, tmp_path):
    random = np.random.default_rng(0)
    patches = random.integers(0, 256, (5, 3, 128, 128), np.uint8)
    crops = random.normal(size=(3, 128, 8, 8)).astype(np.float32)
    np.save(tmp_path / "encoder-mtl-4.npy", patches)
    np.save(tmp_path / "model-survival.npy", crops)
    uri = f"sqlite:///{study.store.mlflow / 'mlflow.db'}"
    command = [sys.executable, "-I", "-c", CLEAN, uri, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    encoder = load_encoder(study.store.encoder("mtl-4"))
    model = ensemble_module(
        load_model(study.store.slide_model(ModelKey(encoder="mtl-4", target="survival"))).networks
    )
    with torch.no_grad():
        ours = {
            "encoder-mtl-4": encoder.module(torch.from_numpy(patches)).numpy(),
            "model-survival": model(torch.from_numpy(crops)).numpy(),
        }
    for name, expected in ours.items():
        for flavour in ("torch", "pyfunc") if name == "encoder-mtl-4" else ("torch",):
            found = np.load(tmp_path / f"{name}.{flavour}.npy")
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_registered_encoder_follows_its_alias(study, tiny_cohort, tmp_path, monkeypatch):
    shutil.copy(study.store.mlflow / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    pinned = {"name": "blessed", "objective": "registered", "version": "encoder-mtl-4@champion"}
    routine, slide = study_of_one_slide(tiny_cohort, tmp_path, pinned)
    assert "set the alias 'champion' on a version of 'encoder-mtl-4'" in routine.refresh()[0]

    def weights() -> str:
        grid = open_grid(routine.store.grid(GridKey(encoder="blessed", slide=slide)))
        return grid.provenance.weights_hash

    def events() -> int:
        return len(routine.instance.fetch_materializations(dg.AssetKey("grid"), limit=9).records)

    client.set_registered_model_alias("encoder-mtl-4", "champion", "1")
    assert routine.refresh() == []
    card = read_card(study.store.encoder("mtl-4"))
    assert (
        weights() == card.weights_hash == read_card(routine.store.encoder("blessed")).weights_hash
    )

    numbers = []  # a version of the same weights, and one of others
    encoder = load_encoder(study.store.encoder("mtl-4"))
    experiment = client.create_experiment("by hand", (tmp_path / "artifacts").as_uri())
    for shift in (0.0, 1.0):
        module = copy.deepcopy(encoder.module)
        with torch.no_grad():
            next(module.parameters()).add_(shift)
        hashed = weights_hash(card.architecture, encoder_tensors(module, encoder.heads))
        other = replace(
            encoder, module=module, card=card.model_copy(update={"weights_hash": hashed})
        )
        save_encoder(tmp_path / f"by {shift}", other)
        run = client.create_run(experiment)
        client.log_artifacts(run.info.run_id, str(tmp_path / f"by {shift}"), "product")
        source = f"runs:/{run.info.run_id}/product"
        version = client.create_model_version(
            "encoder-mtl-4", source, run.info.run_id, tags={"weights_hash": hashed}
        )
        numbers.append(version.version)
    client.set_registered_model_alias("encoder-mtl-4", "champion", numbers[0])
    assert routine.refresh() == []
    assert events() == 1
    client.set_registered_model_alias("encoder-mtl-4", "champion", numbers[1])
    assert routine.refresh() == []
    assert events() == 2
    assert weights() == hashed != card.weights_hash
    client.delete_registered_model_alias("encoder-mtl-4", "champion")
    assert routine.refresh() == []  # without the alias the version stays as it was
    assert events() == 2


def test_a_second_refresh_only_scans(study):
    before = study.runs()
    events = len(study.instance.all_logs(study.instance.get_runs()[0].run_id))
    assert events > 0
    assert study.refresh() == []
    (run,) = study.instance.get_runs(limit=study.runs() - before)
    assert run.asset_selection == {dg.AssetKey("slide_index")}


def test_a_changed_slide_is_compressed_again_and_no_other(
    study, tiny_cohort, tmp_path, monkeypatch
):
    shutil.copytree(tiny_cohort.parent, tmp_path / "demo")
    shutil.copytree(study.store.root, tmp_path / "store")
    changed = Study(tmp_path / "demo" / "cohort.yaml", tmp_path)
    first, second = sorted((tmp_path / "demo" / "slides").iterdir())[:2]
    changed.refresh()
    before = {p.name: p.stat().st_ino for p in (tmp_path / "store/grids/mtl-4").iterdir()}
    shutil.copy(second, first)
    assert changed.refresh() == []
    after = {p.name: p.stat().st_ino for p in (tmp_path / "store/grids/mtl-4").iterdir()}
    assert [name for name in before if before[name] != after[name]] == [f"{first.stem}.zarr"]
    grids = [
        open_grid(changed.store.grid(GridKey(encoder="mtl-4", slide=s.stem)))
        for s in (first, second)
    ]
    np.testing.assert_array_equal(grids[0].embeddings[:], grids[1].embeddings[:])
    colours = read_colours(changed.store.embedding_colours("mtl-4"))
    assert colours != read_colours(study.store.embedding_colours("mtl-4"))
    assert colours_of_previews(changed, "mtl-4") == {colours.hash}
    assert changed.instance.get_materialized_partitions(SLIDE_FILE)


def test_an_attention_network_is_trained_and_explained(study, tiny_cohort, tmp_path):
    models = yaml.safe_load(tiny_cohort.read_text())["settings"]["models"] | {"network": "mil"}
    shutil.copytree(study.store.root, tmp_path / "store")
    other = Study(edited(tiny_cohort, tmp_path, {"settings": {"models": models}}), tmp_path)
    done = other.defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=other.instance,
        partition_key=dg.MultiPartitionKey({"encoder": "mean-rgb", "target": "growth"}),
        asset_selection=[dg.AssetKey("slide_model"), dg.AssetKey("explanation")],
    )
    assert done.success
    for asset in ("slide_model", "explanation"):
        made = other.instance.get_materialized_partitions(dg.AssetKey(asset))
        assert made == {"mean-rgb|growth"}
    model = load_model(other.store.slide_model(ModelKey(encoder="mean-rgb", target="growth")))
    assert model.card.settings.network == "mil"
    for slide in pl.read_parquet(other.store.target_folds("growth"))["slides"].explode():
        folder = other.store.explanation(ModelKey(encoder="mean-rgb", target="growth")) / slide
        heat, valid = (
            read_heatmap(folder),
            open_grid(other.store.grid(GridKey(encoder="mean-rgb", slide=slide))).valid,
        )
        np.testing.assert_array_equal(np.isfinite(heat), valid)
        assert np.nanstd(heat) > 0
        np.testing.assert_array_equal(tifffile.imread(folder / TIFF), heat)


def test_the_report_holds_both_probes_of_every_encoder_and_task(study):
    probes = pl.read_parquet(study.store.evaluation_report / "results.parquet").filter(
        pl.col("model").is_in([LINEAR, KNN]), metric="balanced accuracy"
    )
    assert set(probes.select("encoder", "about", "model").rows()) == {
        (encoder.name, task.name, model)
        for encoder in study.cohort.encoders
        for task in study.cohort.patch_tasks
        for model in (LINEAR, KNN)
    }
    event = study.instance.get_latest_materialization_event(dg.AssetKey("encoder_probe"))
    assert {"embeddings", "nearest_patches", "scores"} <= set(event.asset_materialization.metadata)


# --- imported encoders ---------------------------------------------------------------------


def scripted(path: Path, factor: float) -> None:
    """Write an archive: the means of three channels over the quarters of a patch."""
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    example = torch.rand(1, 3, 32, 32)
    torch.jit.trace(torch.nn.Sequential(Scale(factor), network), example).save(path)


class Scale(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels * self.factor


def test_an_imported_network_is_an_encoder_like_any_other(tiny_cohort, tmp_path):
    scripted(tmp_path / "means.pt", 1.0)
    settings = load_cohort(tiny_cohort).settings
    network = {
        "patch": settings.patch,
        "mpp": settings.mpp,
        "embedding_size": 12,
        "preprocess": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize": 32},
    }
    encoder = {"name": "means", "objective": "imported", "file": "means.pt", "network": network}
    study, slide = study_of_one_slide(tiny_cohort, tmp_path, encoder)
    assert study.refresh() == []
    grid = open_grid(study.store.grid(GridKey(encoder="means", slide=slide)))
    assert grid.shape[0] == 12
    assert grid.valid.any()
    client = mlflow.MlflowClient(f"sqlite:///{study.store.mlflow / 'mlflow.db'}")
    assert client.search_registered_models() == []

    def versions(asset: str) -> list[str]:
        events = study.instance.fetch_materializations(dg.AssetKey(asset), limit=100).records
        return [e.asset_materialization.tags["dagster/data_version"] for e in events]

    scripted(tmp_path / "means.pt", 2.0)
    assert study.refresh() == []
    made = {asset: versions(asset) for asset in ("encoder", "grid", "patch_table")}
    assert [len(set(made[asset])) for asset in made] == [2, 2, 1]
    assert len(made["patch_table"]) == 1
    (tmp_path / "means.pt").unlink()
    assert study.refresh() == [f"encoder: 1 of 1 failed: means: encoder 'means': "
                               f"{tmp_path / 'means.pt'} does not exist; "
                               "correct 'file' in the cohort file"]  # fmt: skip


def test_targets_that_cannot_be_cross_validated_stop_alone(tiny_cohort, tmp_path):
    labels = pl.read_csv(tiny_cohort.parent / "labels.csv")
    few = pl.when(pl.int_range(pl.len()) < 2).then(pl.lit("high")).otherwise(pl.lit("low"))
    labels.with_columns(few=few, rare=pl.int_range(pl.len()) == 0, same=pl.lit(1)).write_csv(
        tmp_path / "labels.csv"
    )
    targets = [
        {"name": "good", "kind": "regression", "column": "score"},
        {"name": "few", "kind": "classification", "column": "few", "classes": ["low", "high"]},
        {"name": "same", "kind": "regression", "column": "same"},
        {"name": "absent", "kind": "regression", "column": "Score"},
    ]
    edit = {
        "labels": "labels.csv",
        "targets": targets,
        "encoders": [{"name": "rgb", "objective": "mean_rgb"}],
        "maps": [],
        "patch_tasks": [],
    }
    study = Study(edited(tiny_cohort, tmp_path, edit), tmp_path)
    job = study.defs.resolve_implicit_global_asset_job_def()
    assert job.execute_in_process(
        instance=study.instance, asset_selection=[dg.AssetKey("slide_index")]
    ).success
    made = job.execute_in_process(
        instance=study.instance,
        asset_selection=[dg.AssetKey("target_folds")],
        tags={ASSET_PARTITION_RANGE_START_TAG: "good", ASSET_PARTITION_RANGE_END_TAG: "absent"},
        raise_on_error=False,
    )
    (failure,) = made.get_step_failure_events()
    text = failure.step_failure_data.user_failure_data.description
    for words in (
        ("'few'", "2 of", "patients in split 'cv' have class 'high'"),
        ("'same'", "labels to train on are 1"),
        ("absent: ", "no column 'Score'", "did you mean 'score'"),
    ):
        assert all(word in text for word in words), text
    assert "'good'" not in text
    assert study.store.target_folds("good").exists()


# --- the command line ------------------------------------------------------------------------


def edited(cohort: Path, root: Path, edit: dict[str, object]) -> Path:
    """Write the cohort file with some fields replaced and absolute paths."""
    data = yaml.safe_load(cohort.read_text())
    for name in ("labels",):
        data[name] = str(cohort.parent / data[name])
    data["slides"] = {"table": str(cohort.parent / "slides.csv")}
    for task in data["patch_tasks"]:
        task["table"] = str(cohort.parent / task["table"])
    path = root / "cohort.yaml"
    path.write_text(yaml.safe_dump(data | edit))
    return path


def test_the_command_line_materializes_a_partition_and_a_range(materialize, tiny_cohort, tmp_path):
    assert materialize(tiny_cohort, "slide_index").returncode == 0
    one = materialize(tiny_cohort, "slide", "--partition", "demo-01-1")
    assert one.returncode == 0, one.stderr
    table = materialize(tiny_cohort, "patch_table", "--partition", "128px-0.5um|demo-01-1")
    assert table.returncode == 0, table.stderr
    slides, tables = (tmp_path / "store" / name for name in ("slides", "patch_tables/128px-0.5um"))
    assert [path.name for path in slides.iterdir()] == ["demo-01-1"]
    assert [path.stem for path in tables.iterdir()] == ["demo-01-1"]
    some = materialize(tiny_cohort, "slide", "--partition-range", "demo-02-1...demo-03-1")
    assert some.returncode == 0, some.stderr
    assert len(list(slides.iterdir())) > 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            {"slides": {"folders": [{"path": "/nowhere"}]}},
            "/nowhere is not a folder",
        ),
        ({"encoders": [{"name": "x", "objective": "magic"}]}, "encoders.0.objective"),
    ],
)
def test_an_invalid_cohort_fails_with_one_error_and_writes_nothing(
    materialize, tiny_cohort, tmp_path, edit, message
):
    result = materialize(edited(tiny_cohort, tmp_path, edit), "slide_index")
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert not (tmp_path / "store" / "slides").exists()


def test_a_missing_slide_file_is_named_and_left_out(materialize, tiny_cohort, tmp_path):
    table = pl.read_csv(tiny_cohort.parent / "slides.csv", infer_schema=False)
    gone = table.with_columns(
        pl.when(pl.int_range(pl.len()) == 0)
        .then(pl.lit("gone.tif"))
        .otherwise(pl.lit(f"{tiny_cohort.parent}/") + pl.col("path"))
        .alias("path"),
        truth=pl.lit(None, pl.String),
    )
    gone.write_csv(tmp_path / "slides.csv")
    cohort = edited(tiny_cohort, tmp_path, {"slides": {"table": "slides.csv"}})
    result = materialize(cohort, "slide_index")
    # the other slides are indexed, and a check warns of this one
    assert result.returncode == 0
    assert "is left out: path" in result.stdout + result.stderr
    assert "gone.tif does not exist" in result.stdout + result.stderr
    index = pl.read_parquet(tmp_path / "store" / "slide_index" / "slides.parquet")
    assert index.height == gone.height - 1


def test_an_unknown_partition_fails(materialize, tiny_cohort):
    result = materialize(tiny_cohort, "encoder", "--partition", "no-such-encoder")
    assert result.returncode != 0
    assert "no-such-encoder" in result.stdout + result.stderr


def test_the_definitions_validate(dagster, tiny_cohort):
    result = dagster(tiny_cohort, "definitions", "validate")
    assert result.returncode == 0, result.stderr
