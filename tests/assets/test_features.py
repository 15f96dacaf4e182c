"""A study with an encoder of objective ``features`` beside an ordinary one, on the same slides."""

from __future__ import annotations

import shutil
from pathlib import Path

import dagster as dg
import h5py
import numpy as np
import polars as pl
import pytest
import yaml
from rich.console import Console

from nic_assets.build import build_defs
from nic_assets.operations.refresh import refresh
from nic_core import steps
from nic_core.cohort import Cohort, CohortError, load_cohort
from nic_core.encoders import EncoderError, load_encoder
from nic_core.encoders.files import read_card, verify_encoder
from nic_core.grids import grid_hash, open_grid
from nic_core.grids.export import PROVENANCE, export_grid
from nic_core.grids.features import FeaturesError
from nic_core.models.files import load_model
from nic_core.store import GridKey, ModelKey, Store


@pytest.fixture(scope="module")
def study_file(
    tiny_cohort: Path,
    mean_rgb_study: tuple[Cohort, Store],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A cohort file whose encoder ``exported`` has the grids of ``mean-rgb`` as files."""
    root = tmp_path_factory.mktemp("features")
    _, store = mean_rgb_study
    for path in sorted((store.root / "grids" / "mean-rgb").glob("*.zarr")):
        export_grid(open_grid(path), root / "exported", "trident-h5")
    study = yaml.safe_load(tiny_cohort.read_text())
    study["encoders"] = [
        {"name": "mean-rgb", "objective": "mean_rgb"},
        {
            "name": "exported",
            "objective": "features",
            "folder": f"{root}/exported",
            "embedding_size": 3,
        },
    ]
    study["targets"] = [target for target in study["targets"] if target["name"] == "growth"]
    study["patch_tasks"] = study["patch_tasks"][:1]
    study.pop("maps")
    copied = root / "cohort.yaml"
    copied.write_text(yaml.safe_dump(study))
    for part in tiny_cohort.parent.iterdir():
        if part.name not in ("cohort.yaml", "store"):
            (root / part.name).symlink_to(part)
    return copied


def test_grids_of_features_equal_those_exported(study_file, mean_rgb_study, tmp_path):
    cohort, store = load_cohort(study_file), Store(tmp_path)
    index = steps.make_slide_index(cohort, store).index
    with pytest.raises(EncoderError, match="no encoder here"):
        steps.make_features_grid(
            cohort, store, GridKey(encoder="exported", slide=index["slide"][0])
        )
    card = steps.make_features_encoder(cohort, store, "exported")
    assert read_card(store.encoder("exported")) == card
    assert (card.architecture, card.embedding_size) == ("features", 3)
    assert (card.patch, card.mpp) == (128, 0.5)
    for slide in index["slide"]:
        grid = steps.make_features_grid(cohort, store, GridKey(encoder="exported", slide=slide))
        original = mean_rgb_study[1].grid(GridKey(encoder="mean-rgb", slide=slide))
        assert grid_hash(grid) == grid_hash(original)
        assert grid.provenance.weights_hash == card.weights_hash
    with pytest.raises(CohortError, match="'mean-rgb' does not have objective 'features'"):
        steps.make_features_grid(cohort, store, GridKey(encoder="mean-rgb", slide=slide))


def test_features_have_no_network(study_file, tmp_path):
    cohort, store = load_cohort(study_file), Store(tmp_path)
    with pytest.raises(EncoderError, match="'exported' is a folder of features"):
        steps.make_encoder(cohort, store, "exported")
    steps.make_features_encoder(cohort, store, "exported")
    verify_encoder(store.encoder("exported"))
    with pytest.raises(EncoderError, match="'exported' has no network, since its embeddings were"):
        load_encoder(store.encoder("exported"))


def test_an_encoder_of_features_cannot_be_reused(study_file, tmp_path):
    study = yaml.safe_load(study_file.read_text())
    study["encoders"].append({"name": "again", "objective": "reused", "encoder": "exported"})
    path = study_file.with_name("reused.yaml")
    path.write_text(yaml.safe_dump(study))
    with pytest.raises(CohortError, match="encoder that can be reused 'exported' is not defined"):
        load_cohort(path)


def test_a_study_of_features_alone_has_no_probes_and_patch_tasks(study_file):
    study = yaml.safe_load(study_file.read_text())
    path = study_file.with_name("alone.yaml")
    path.write_text(yaml.safe_dump(study | {"encoders": study["encoders"][1:]}))
    cohort = load_cohort(path)
    graph = build_defs(cohort, Store(path.parent / "alone")).resolve_asset_graph()
    assert not {dg.AssetKey("patch_task"), dg.AssetKey("encoder_probe")} & set(
        graph.get_all_asset_keys()
    )
    assert list(cohort.geometries) == ["128px-0.5um"]


def versions(instance: dg.DagsterInstance, asset: str) -> dict[str, str]:
    """The latest data version of every partition."""
    found = instance.event_log_storage.get_latest_tags_by_partition(
        dg.AssetKey(asset), dg.DagsterEventType.ASSET_MATERIALIZATION, ["dagster/data_version"]
    )
    return {key: tags["dagster/data_version"] for key, tags in found.items()}


@pytest.mark.slow
def test_models_take_features_of_scanners_with_other_um_px(study_file, tmp_path):
    shutil.copytree(study_file.parent, tmp_path / "study", symlinks=True)
    file = tmp_path / "study" / "cohort.yaml"
    file.write_text(study_file.read_text().replace(str(study_file.parent), f"{tmp_path}/study"))
    table = tmp_path / "study" / "slides.csv"
    slides = pl.read_csv(table, infer_schema=False)
    table.unlink()  # it is a link
    first = slides["slide"][0]
    slides.with_columns(mpp=pl.when(slide=first).then(pl.lit("0.47"))).write_csv(table)
    for path in (tmp_path / "study" / "exported").iterdir():
        with h5py.File(path, "a") as changed:
            del changed.attrs[PROVENANCE]  # a file as TRIDENT writes it, without um/px
    cohort, store = load_cohort(file), Store(tmp_path / "store")
    steps.make_slide_index(cohort, store)
    steps.make_features_encoder(cohort, store, "exported")
    for slide in slides["slide"]:
        made = steps.make_features_grid(cohort, store, GridKey(encoder="exported", slide=slide))
        assert made.provenance.mpp == (0.47 if slide == first else 0.5)
    steps.make_grid_manifest(store, "exported")
    steps.make_target_folds(cohort, store, "growth")
    key = ModelKey(encoder="exported", target="growth")
    steps.make_target_grids(store, key)
    _, card = steps.make_slide_model(cohort, store, key)
    assert (card.patch, card.mpp, card.stride) == (128, 0.5, 128)


@pytest.mark.slow
def test_only_changed_files_change_grids_and_models(study_file, tmp_path):
    shutil.copytree(study_file.parent, tmp_path / "study", symlinks=True)
    text = study_file.read_text().replace(str(study_file.parent), f"{tmp_path}/study")
    file = tmp_path / "study" / "cohort.yaml"
    file.write_text(text)
    cohort, store = load_cohort(file), Store(tmp_path / "store")
    defs = build_defs(cohort, store)
    (tmp_path / "dagster").mkdir()
    instance = dg.DagsterInstance.local_temp(str(tmp_path / "dagster"))

    def update() -> list[str]:
        return refresh(defs, instance, Console(quiet=True))

    assert update() == []
    before = versions(instance, "grid")
    slides = sorted(key.partition("|")[2] for key in before if key.startswith("exported|"))
    assert len(slides) == 12
    for slide in slides:
        assert before[f"exported|{slide}"] == before[f"mean-rgb|{slide}"]
    assert instance.get_materialized_partitions(dg.AssetKey("encoder_probe")) == {"mean-rgb"}
    key = ModelKey(encoder="exported", target="growth")
    model = load_model(store.slide_model(key))
    assert model.card.weights_hash == read_card(store.encoder("exported")).weights_hash
    assert (store.explanation(key) / "scores.parquet").exists()
    results = pl.read_parquet(store.evaluation_report / "results.parquet")
    assert {"mean-rgb", "exported"} <= set(results.filter(kind="target")["encoder"])
    compared = pl.read_parquet(store.evaluation_report / "comparisons.parquet")
    assert not compared.is_empty()

    assert update() == []
    runs = instance.get_runs_count()
    with h5py.File(tmp_path / "study" / "exported" / f"{slides[3]}.h5", "a") as changed:
        changed["features"][0, 0] += 1
    assert update() == []
    assert instance.get_runs_count() > runs
    after = versions(instance, "grid")
    assert [k for k in after if after[k] != before[k]] == [f"exported|{slides[3]}"]

    (tmp_path / "study" / "exported" / f"{slides[5]}.h5").unlink()
    [problem] = [line for line in update() if "grid" in line]
    assert "no file has the features" in problem
    assert slides[5] in problem
    grid = open_grid(store.grid(GridKey(encoder="exported", slide=slides[0])))
    assert grid.provenance.weights_hash == read_card(store.encoder("exported")).weights_hash
    with pytest.raises(FeaturesError, match=f"no file has the features of slide '{slides[5]}'"):
        steps.make_features_grid(cohort, store, GridKey(encoder="exported", slide=slides[5]))


def test_the_versions_of_encoders_follow_the_files_of_features(study_file, tmp_path):
    shutil.copytree(study_file.parent / "exported", tmp_path / "exported")
    text = study_file.read_text().replace(f"{study_file.parent}/exported", f"{tmp_path}/exported")
    path = study_file.with_name("moved.yaml")
    path.write_text(text)
    cohort, store = load_cohort(path), Store(tmp_path / "store")
    before = steps.encoder_versions(cohort, store)
    assert steps.encoder_versions(cohort, store) == before
    added = next((tmp_path / "exported").iterdir())
    shutil.copyfile(added, added.with_name("another.h5"))
    after = steps.encoder_versions(cohort, store)
    assert after["exported"] != before["exported"]
    assert after["mean-rgb"] == before["mean-rgb"]
    weights = steps.make_features_encoder(cohort, store, "exported").weights_hash
    with h5py.File(added, "a") as file:
        file["features"][:] = np.asarray(file["features"]) + 1
    assert steps.make_features_encoder(cohort, store, "exported").weights_hash != weights
