"""Training and cross-validation on planted grids, saved models, figures."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from nic_core.cohort import (
    ClassificationTarget,
    CohortError,
    ModelSettings,
    RegressionTarget,
    SurvivalTarget,
)
from nic_core.models.baselines import BASELINES
from nic_core.models.checkpoints import FoldCheckpoints
from nic_core.models.comparison import COMPARISON_SCHEMA, compare_models, comparison_notes
from nic_core.models.crops import Crops, cohort_moments, normalise_for
from nic_core.models.cross_validation import NETWORK, cross_validate
from nic_core.models.distance import TrainingReference
from nic_core.models.explanation import explain
from nic_core.models.figures import (
    evaluation_figure,
    metrics_figure,
    reliability_figure,
    training_figure,
)
from nic_core.models.files import (
    GridSettings,
    ModelFileError,
    TrainingCohort,
    ensemble_module,
    load_model,
    save_model,
)
from nic_core.models.fold_metrics import fold_metrics
from nic_core.models.folds import make_folds, named_folds
from nic_core.models.kinds import kind_of, prediction_array
from nic_core.models.networks import crop_cells
from nic_core.models.training import (
    TrainingError,
    batches,
    fit_fold,
    fitting_threads,
    predict_units,
)
from nic_core.pictures import WIDTH

from .conftest import ArrayGrid
from .second_device import SecondDevice

pytestmark = pytest.mark.slow

RIM = ClassificationTarget(name="rim", kind="classification", column="rim", classes=("none", "rim"))
GRADE = RegressionTarget(name="grade", kind="regression", column="grade")
DEATH = SurvivalTarget(
    name="death", kind="survival", level="patient", time="time", event="event", unit="days"
)
QUICK = ModelSettings(
    network="small", crop_um=1280, epochs=2, crops_at_test=1, bootstrap=50, learning_rate=1e-2
)

CROP = 20  # cells
CARD = {
    "data": {"target_folds/t": "d"},
    "encoder": "e",
    "weights_hash": "abc",
    "patch": 128,
    "mpp": 0.5,
    "stride": 128,
    "grids": GridSettings(precision="float32", reading="patch", colours="stored", tissue=0.6),
    "training": TrainingCohort(
        name="c",
        patients=1,
        units=1,
        slides=("a",),
        digest="d",
        mpp=(0.25,),
        scanners=(),
        without_scanner=1,
    ),
    "reference": TrainingReference(
        mean=np.zeros(16),
        scale=np.ones(16),
        axes=np.eye(2, 16),
        variances=np.ones(2),
        rest=np.ones(1),
        held_out=np.array([1.0, 2.0]),
    ),
}


def labelled(planted, target, seed=0):
    table = planted.table
    if target is RIM:
        return table.with_columns(y=pl.col("rim").cast(pl.Int64)).drop("rim", "grade")
    if target is GRADE:
        return table.with_columns(y="grade").drop("rim", "grade")
    random = np.random.default_rng(seed)
    patients = table.group_by("patient", maintain_order=True).agg(
        pl.col("split", "rim").first(), pl.col("unit").sort().alias("slides")
    )
    death = random.exponential(np.exp(-3.0 * (patients["rim"].to_numpy() - 0.5)))
    leaving = random.uniform(0.5, 6, patients.height)
    return patients.select(
        pl.col("patient").alias("unit"),
        "patient",
        "slides",
        "split",
        time=pl.Series(np.minimum(death, leaving)),
        event=pl.Series(death <= leaving),
    )


def evaluate(planted, target, settings, **options):
    table = labelled(planted, target)
    folds = make_folds(table, target=target, folds=settings.folds, seed=settings.seed)
    return cross_validate(target, table, folds, planted.source, settings, crop=CROP, **options)


def primary(result, model=NETWORK, split="cv"):
    return result.metrics.row(
        by_predicate=(pl.col("model") == model)
        & (pl.col("split") == split)
        & (pl.col("metric") == kind_of(result.target).primary_metric),
        named=True,
    )


@pytest.fixture(scope="module")
def rim(planted):
    return evaluate(planted, RIM, QUICK.model_copy(update={"epochs": 40}))


def test_cnn_learns_arrangement_that_baselines_cannot_see(rim):
    assert primary(rim)["value"] > 0.85
    assert primary(rim)["low"] > 0.7
    for name in BASELINES:
        assert primary(rim, name)["value"] < 0.75


def test_training_on_exchanged_labels_gives_chance_level(planted):
    control = evaluate(
        planted,
        RIM,
        QUICK.model_copy(update={"epochs": 20, "bootstrap": 500, "permute_labels": 1}),
    )
    row = primary(control)
    assert row["low"] < 0.5 < row["high"] or row["value"] < 0.5


def test_folds_of_sites_are_kept_when_labels_are_exchanged(few):
    table = labelled(few, RIM)
    patients = table["patient"].unique().sort()
    names = {patient: "ABCD"[i % 4] for i, patient in enumerate(patients)}
    folds = named_folds(table, target=RIM, names=names, column="site")
    settings = QUICK.model_copy(update={"folds": "site", "permute_labels": 1, "epochs": 1})
    result = cross_validate(RIM, table, folds, few.source, settings, crop=CROP)
    rows = result.predictions.filter(model=NETWORK)
    assert rows["fold_name"].to_list() == [names[patient] for patient in rows["patient"]]
    labels = table.sort("unit")["y"].to_list()
    assert rows.sort("unit")["y"].to_list() != labels


def test_attention_pooling_learns_cell_content(planted):
    mil = QUICK.model_copy(update={"network": "mil", "epochs": 12})
    assert primary(evaluate(planted, GRADE, mil))["value"] > 0.5


def test_survival_functions_decrease_and_are_scored(few):
    result = evaluate(few, DEATH, QUICK)
    for name in (NETWORK, *BASELINES):
        rows = result.predictions.filter(model=name)
        functions = np.array(rows["survival"].to_list())
        assert (np.diff(functions, axis=1) <= 1e-12).all()
        assert ((functions >= 0) & (functions <= 1)).all()
        assert rows["horizons"].n_unique() == 1
        # within a fold, a higher risk gives a lower survival probability at every time
        fold = rows.filter(fold=0).sort("risk")
        assert (np.diff(np.array(fold["survival"].to_list()), axis=0) <= 1e-12).all()
    scored = result.metrics.filter(model=NETWORK)["metric"]
    assert {"harrell_c", "uno_c", "time_auc", "integrated_brier", "log_rank_p"} == set(scored)


@pytest.mark.parametrize("event", [True, False], ids=["one time", "no event"])
def test_a_test_split_that_cannot_be_scored_has_undefined_metrics(few, event):
    table = labelled(few, DEATH).sort("time")
    table = pl.concat(
        [
            table.with_columns(event=pl.int_range(pl.len()) < 6),
            table[:2].with_columns(
                split=pl.lit("test"),
                unit="t" + pl.col("unit"),
                patient="t" + pl.col("patient"),
                time=pl.lit(1.0),
                event=pl.lit(event),
            ),
        ]
    )
    folds = make_folds(table, target=DEATH, folds=4, seed=0)
    result = cross_validate(DEATH, table, folds, few.source, QUICK, crop=CROP)
    assert math.isnan(primary(result, split="test")["value"]) or event
    test = result.metrics.filter(model=NETWORK, split="test", metric="log_rank_p")
    assert math.isnan(test["value"][0])
    assert math.isfinite(primary(result)["value"])
    metrics_figure(result)
    assert evaluation_figure(result, split="test").axes


def test_folds_whose_grids_are_lost_stop_before_training(few):
    table = labelled(few, RIM)
    folds = make_folds(table, target=RIM, folds=4, seed=0)
    kept = folds.filter(pl.col("fold") != 1)
    with pytest.raises(CohortError, match="fold 1 of 3 has no unit"):
        cross_validate(
            RIM, table.join(kept, on="patient", how="semi"), kept, few.source, QUICK, crop=CROP
        )


def test_seeds_repeat_the_network_on_the_same_folds(few):
    one = evaluate(few, GRADE, QUICK)
    three = evaluate(few, GRADE, QUICK.model_copy(update={"seeds": 3}))
    assert three.predictions.equals(one.predictions)
    assert one.metrics["seeds_mean"].null_count() == one.metrics.height
    row = primary(three)
    assert row["seeds_deviation"] > 0
    assert row["seeds_mean"] != row["value"]
    assert three.metrics.filter(model="mean_embedding")["seeds_mean"].null_count() == 4
    assert len(three.networks) == 4


def test_feature_noise_and_dropout_depend_on_the_seed(few):
    wild = QUICK.model_copy(update={"feature_noise": 0.5, "feature_dropout": 0.2})
    first, again = (evaluate(few, GRADE, wild) for _ in range(2))
    assert first.predictions.equals(again.predictions)
    assert not first.history.equals(evaluate(few, GRADE, QUICK).history)


def test_predicted_risk_is_higher_for_earlier_deaths(planted):
    result = evaluate(planted, DEATH, QUICK.model_copy(update={"epochs": 40}))
    assert primary(result)["value"] > 0.6
    risk = result.predictions.filter(model=NETWORK)
    # folds are on one scale
    spread = risk.group_by("fold").agg(pl.col("risk").mean().alias("m"))["m"]
    assert spread.abs().max() < 1.5


@pytest.mark.parametrize("target", [RIM, GRADE, DEATH], ids=lambda t: t.kind)
def test_every_unit_is_predicted_once_by_its_held_out_fold(few, target):
    result = evaluate(few, target, QUICK)
    table = labelled(few, target)
    folds = make_folds(table, target=target, folds=QUICK.folds, seed=QUICK.seed)
    for name in (NETWORK, *BASELINES):
        rows = result.predictions.filter(model=name)
        assert sorted(rows["unit"]) == sorted(table["unit"])
        joined = rows.join(folds, on="patient", suffix="_expected")
        assert (joined["fold"] == joined["fold_expected"]).all()
        assert (joined["fold_name"] == joined["fold_name_expected"]).all()
        assert np.isfinite(prediction_array(kind_of(target), rows)).all()
        of_folds = fold_metrics(target, rows).filter(metric=kind_of(target).primary_metric)
        assert primary(result, name)["folds_mean"] == pytest.approx(of_folds["value"].mean())
        assert primary(result, name)["folds_undefined"] == of_folds["value"].null_count()


def test_test_split_is_predicted_by_the_mean_of_the_folds(few, tmp_path):
    held = pl.col("patient").is_in(["p00", "p01", "p02", "p03"])
    table = labelled(few, GRADE).with_columns(
        split=pl.when(held).then(pl.lit("test")).otherwise("split")
    )
    folds = make_folds(table, target=GRADE, folds=4, seed=0)
    result = cross_validate(GRADE, table, folds, few.source, QUICK, crop=CROP)
    test = result.predictions.filter(model=NETWORK, split="test")
    assert sorted(test["patient"].unique()) == ["p00", "p01", "p02", "p03"]
    assert test["fold"].null_count() == test.height == 8
    units = table.filter(pl.col("split") == "test").sort("unit")
    each = [
        predict_units(m, units, Crops(few.source, m.normalise, 20), count=1, seed=0)[:, 0]
        for m in result.networks
    ]
    np.testing.assert_allclose(test["prediction"], np.mean(each, 0), rtol=1e-6)
    assert set(result.metrics["split"]) == {"cv", "test"}
    # labels of the test split do not enter training
    other = table.with_columns(
        y=pl.when(pl.col("split") == "test").then(-pl.col("y")).otherwise("y")
    )
    again = cross_validate(GRADE, other, folds, few.source, QUICK, crop=CROP)
    assert again.predictions["prediction"].equals(result.predictions["prediction"])


def test_several_slides_of_a_patient_are_averaged(few):
    table = labelled(few, DEATH)
    folds = make_folds(table, target=DEATH, folds=4, seed=0)
    result = cross_validate(DEATH, table, folds, few.source, QUICK, crop=CROP)
    model = result.networks[0]
    crops = Crops(few.source, model.normalise, CROP)
    both = table[:1]
    alone = [both.with_columns(slides=pl.lit([s])) for s in both["slides"][0]]
    one, two = (predict_units(model, t, crops, count=2, seed=0) for t in alone)
    together = predict_units(model, both, crops, count=2, seed=0)
    np.testing.assert_allclose(together, (one + two) / 2, rtol=1e-5)


def normalise_by(planted, units):
    """The normalisation of network `small`, estimated from these units."""
    moments = cohort_moments(units.with_columns(fold=0), planted.source, components=48)
    return normalise_for("small", moments.groups.values())


def test_networks_depend_on_the_seed_only(few):
    first, again = (evaluate(few, RIM, QUICK) for _ in range(2))
    assert first.predictions.equals(again.predictions)
    assert first.history.equals(again.history)
    table = labelled(few, RIM)
    normalise = normalise_by(few, table[:12])
    fitted = [
        fit_fold(RIM, table[:12], table[12:], few.source, normalise, QUICK, crop=CROP, seed=seed)
        for seed in (1, 1, 2)
    ]
    weights = [f.model.network.output.weight for f in fitted]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_keeps_the_global_random_state(few):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    table = labelled(few, RIM)
    normalise = normalise_by(few, table[:12])
    fit_fold(RIM, table[:12], table[12:], few.source, normalise, QUICK, crop=CROP, seed=0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("target", "network"), [(RIM, "small"), (GRADE, "small"), (DEATH, "mil")])
def test_other_device_gives_the_results_of_the_cpu(few, target, network):
    settings = QUICK.model_copy(
        update={
            "network": network,
            "positions": network == "mil",
            "folds": 3,
            "feature_noise": 0.2,
            "feature_dropout": 0.2,
        }
    )
    expected = evaluate(few, target, settings, device="cpu")
    with SecondDevice() as device:
        found = evaluate(few, target, settings, device="meta")
    assert device.operations > 1000
    assert found.history.equals(expected.history)
    assert found.predictions.equals(expected.predictions)
    for one, other in zip(found.networks, expected.networks, strict=True):
        assert one.device.type == "cpu"
        for name, tensor in other.state_dict().items():
            assert torch.equal(one.state_dict()[name], tensor)


def test_missing_device_raises(few):
    with pytest.raises(ValueError, match="device 'cuda:99'"):
        evaluate(few, RIM, QUICK, device="cuda:99")


def test_kept_epoch_has_best_validation_metric_then_loss(rim):
    for fold, best in enumerate(rim.best_epochs):
        rows = rim.history.filter(fold=fold)
        order = rows.sort(["validation_metric", "validation_loss"], descending=[True, False])
        assert order["epoch"][0] == best


def test_tracker_receives_the_history(few):
    seen = []

    class Watch:
        def metrics(self, values, step):
            seen.append((dict(values), step))

    evaluate(few, RIM, QUICK, tracker=Watch())
    assert [step for _, step in seen] == [0, 1] * 4
    assert "fold_3_validation_metric" in seen[-1][0]


def test_loss_that_is_not_finite_raises_with_fold_and_remedy(few):
    huge = {
        s: ArrayGrid(np.where(g.valid, g.embeddings.astype(np.float32), 0), g.valid)
        for s, g in few.grids.items()
    }
    table = labelled(few, GRADE)
    folds = make_folds(table, target=GRADE, folds=4, seed=0)
    wild = QUICK.model_copy(update={"learning_rate": 1e30, "epochs": 5})
    with pytest.raises(TrainingError, match=r"'grade' fold_0.*learning_rate"):
        cross_validate(GRADE, table, folds, huge.__getitem__, wild, crop=CROP)


def test_grid_without_tissue_raises_with_target_and_slide(few):
    grids = dict(few.grids)
    grids["s03-1"] = ArrayGrid(grids["s03-1"].embeddings * 0, np.zeros_like(grids["s03-1"].valid))
    table = labelled(few, RIM)
    folds = make_folds(table, target=RIM, folds=4, seed=0)
    with pytest.raises(CohortError, match=r"'rim'.*'s03-1'.*no tissue"):
        cross_validate(RIM, table, folds, grids.__getitem__, QUICK, crop=CROP)


@pytest.mark.parametrize("rows", [2, 3, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_batch_has_a_single_row(rows, size):
    table = pl.DataFrame({"value": range(rows)})
    found = list(batches(table, size, np.random.default_rng(0)))
    assert min(map(len, found)) >= 2
    assert sorted(np.concatenate(found)) == list(range(rows))


@pytest.mark.parametrize("deaths", [1, 2, 7, 20])
def test_every_survival_batch_has_an_event(deaths):
    table = pl.DataFrame({"event": [True] * deaths + [False] * (40 - deaths)})
    found = list(batches(table, 8, np.random.default_rng(0)))
    assert sorted(np.concatenate(found)) == list(range(40))
    assert all(table["event"].to_numpy()[rows].any() for rows in found)
    assert len(found) == min(5, deaths)


@pytest.mark.parametrize("target", [RIM, GRADE, DEATH], ids=lambda t: t.kind)
def test_loaded_model_equals_the_saved_one(few, tmp_path, target):
    result = evaluate(few, target, QUICK)
    card = save_model(tmp_path / "m", result, **CARD)
    loaded = load_model(tmp_path / "m")
    assert loaded.card == card
    assert card.target == target
    assert len(loaded.networks) == 4
    x = torch.randn(3, 16, 20, 20)
    torch.testing.assert_close(
        ensemble_module(loaded.networks)(x), ensemble_module(result.networks)(x)
    )
    stored = next(m for m in card.metrics if m.metric == kind_of(target).primary_metric)
    value = primary(result)["value"]
    assert stored.value == (None if math.isnan(value) else value)


def test_attention_pooling_can_be_saved_exported_and_explained(few, tmp_path):
    mil = QUICK.model_copy(update={"network": "mil", "positions": True})
    result = evaluate(few, GRADE, mil)
    save_model(tmp_path / "m", result, **CARD)
    loaded = load_model(tmp_path / "m")
    module, x = ensemble_module(loaded.networks), torch.randn(3, 16, 20, 20)
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(module, (x[:2],), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(exported(x), ensemble_module(result.networks)(x))
    grid = few.source("s00-0")
    heat = explain(loaded.networks[:1], grid, GRADE, crop=CROP)
    np.testing.assert_array_equal(np.isfinite(heat), grid.valid)
    trained = explain(result.networks[:1], grid, GRADE, crop=CROP)
    np.testing.assert_allclose(heat, trained, atol=1e-6)


def test_damaged_model_folder_raises(few, tmp_path):
    with pytest.raises(ModelFileError, match="no model here"):
        load_model(tmp_path)
    save_model(tmp_path, evaluate(few, RIM, QUICK), **CARD)
    (tmp_path / "fold-2.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelFileError, match="not a model file"):
        load_model(tmp_path)
    (tmp_path / "fold-2.safetensors").unlink()
    with pytest.raises(ModelFileError, match="no model here"):
        load_model(tmp_path)


@pytest.mark.parametrize("target", [RIM, GRADE, DEATH], ids=lambda t: t.kind)
def test_figures_of_every_target_kind(few, target):
    result = evaluate(few, target, QUICK)
    for figure in (
        evaluation_figure(result),
        training_figure(result),
        metrics_figure(result),
        reliability_figure(result),
    ):
        figure.canvas.draw()
        assert figure.axes
        assert figure.get_figwidth() <= WIDTH
        # every panel with lines says what they are, and every axis has a label
        for axes in figure.axes:
            if len(axes.lines) > 1:
                texts = {label for _, label in zip(*axes.get_legend_handles_labels(), strict=True)}
                assert texts, axes.get_title()
            if axes.axison:
                assert axes.get_xlabel() or axes.get_ylabel()
    assert "chance" in " ".join(legend_texts(metrics_figure(result)))
    assert "chance" in " ".join(legend_texts(training_figure(result)))


def legend_texts(figure):
    return [
        text.get_text()
        for axes in figure.axes
        if (legend := axes.get_legend()) is not None
        for text in legend.get_texts()
    ]


# --- checkpoints of finished folds -----------------------------------------------------------


def halve_cells(grids: dict[str, ArrayGrid]) -> dict[str, ArrayGrid]:
    """Grids of the same content in cells of half the side."""
    return {
        slide: ArrayGrid(
            grid.embeddings.repeat(2, 1).repeat(2, 2), grid.valid.repeat(2, 0).repeat(2, 1)
        )
        for slide, grid in grids.items()
    }


@pytest.fixture(scope="module")
def two_geometries(few, tmp_path_factory):
    """Models of one target on grids of 64 um cells, and of 32 um cells that two slides lack."""
    table = labelled(few, DEATH)
    folds = make_folds(table, target=DEATH, folds=4, seed=0)
    lacking = table.with_columns(
        pl.when(pl.col("unit") == "p01").then(pl.col("slides").list.head(1)).otherwise("slides")
    ).filter(pl.col("unit") != "p00")
    results, cards = {}, {}
    for name, units, grids, stride, precision in (
        ("plain", table, few.grids, 128, "float32"),
        ("halved", lacking, halve_cells(few.grids), 64, "bfloat16"),
    ):
        crop = crop_cells(QUICK, stride * CARD["mpp"])
        own = folds.join(units, on="patient", how="semi")
        results[name] = cross_validate(DEATH, units, own, grids.__getitem__, QUICK, crop=crop)
        changed = {"precision": precision}
        grid_settings = CARD["grids"].model_copy(update=changed)
        cards[name] = save_model(
            tmp_path_factory.mktemp(name),
            results[name],
            **CARD | {"encoder": name, "stride": stride, "grids": grid_settings},
        )
    return results, cards


def test_the_card_states_the_crop_in_cells_and_in_um(two_geometries):
    _, cards = two_geometries
    assert [(c.crop, c.crop_um, c.stride) for c in cards.values()] == [
        (20, 1280, 128),
        (40, 1280, 64),
    ]


def test_models_on_grids_with_other_cells_are_compared_by_unit(two_geometries):
    results, cards = two_geometries
    predictions = {name: result.predictions for name, result in results.items()}
    found = compare_models(DEATH, predictions, resamples=50, seed=0)
    networks = found.filter(first="plain: network", second="halved: network")
    assert set(networks.select("n", "only_first", "only_second", "other_slides").rows()) == {
        (11, 1, 0, 1)
    }
    own = found.filter(first="plain: network", second="plain: mean embedding, linear")
    assert set(own.select("n", "only_first", "only_second", "other_slides").rows()) == {
        (12, 0, 0, 0)
    }
    assert comparison_notes("death", cards, found) == [
        "target 'death': the models differ in more than the encoder: precision of the encoder "
        "float32 (plain), bfloat16 (halved)",
        "target 'death', cross-validated: 'plain: network' and 'halved: network' are compared on "
        "11 units, 1 of them predicted from different slides; 1 more are predicted by the first "
        "only, 0 by the second only",
    ]


def test_another_field_of_view_and_a_lack_of_common_units_are_stated(two_geometries):
    _, cards = two_geometries
    wider = cards["plain"].model_copy(update={"encoder": "wider", "crop": 21, "stride": 130})
    view, units = comparison_notes(
        "death", {"plain": cards["plain"], "wider": wider}, COMPARISON_SCHEMA.to_frame()
    )
    assert view.endswith(": side of a crop 1280 um (plain), 1365 um (wider)")
    assert units == (
        "target 'death': no unit has a cross-validated prediction of both 'plain' and 'wider', so "
        "they are not compared"
    )
    assert comparison_notes("death", {}, COMPARISON_SCHEMA.to_frame()) == []


def test_baselines_do_not_depend_on_the_size_of_cells(few):
    table = labelled(few, GRADE)
    folds = make_folds(table, target=GRADE, folds=4, seed=0)
    once = QUICK.model_copy(update={"epochs": 1})
    plain, fine = (
        cross_validate(GRADE, table, folds, grids.__getitem__, once, crop=crop).predictions
        for grids, crop in ((few.grids, CROP), (halve_cells(few.grids), 2 * CROP))
    )
    for name in BASELINES:
        np.testing.assert_allclose(
            plain.filter(model=name)["prediction"], fine.filter(model=name)["prediction"], rtol=1e-3
        )


class Stopped(BaseException):
    """Stands for Ctrl-C."""


def stop_after(epochs):
    """A progress callback that stops a training after a number of epochs."""

    def progress(done, total):
        if done == epochs:
            raise Stopped

    return progress


def with_test_split(planted, target):
    held = pl.col("patient").is_in(["p00", "p01"])
    return labelled(planted, target).with_columns(
        split=pl.when(held).then(pl.lit("test")).otherwise("split")
    )


@pytest.mark.parametrize("target", [RIM, GRADE, DEATH], ids=lambda t: t.kind)
def test_an_interrupted_training_continues_with_the_next_fold(few, target, tmp_path):
    settings = QUICK.model_copy(update={"seeds": 2})
    table = with_test_split(few, target)
    folds = make_folds(table, target=target, folds=settings.folds, seed=settings.seed)
    whole = cross_validate(target, table, folds, few.source, settings, crop=CROP)
    kept = FoldCheckpoints(tmp_path / "folds", "x")
    per_fold = settings.seeds * settings.epochs
    with pytest.raises(Stopped):
        cross_validate(
            target,
            table,
            folds,
            few.source,
            settings,
            crop=CROP,
            progress=stop_after(2 * per_fold + 1),
            checkpoints=kept,
        )
    assert sorted(path.name for path in kept.folder.iterdir()) == ["fold-0", "fold-1"]
    calls = []
    resumed = cross_validate(
        target,
        table,
        folds,
        few.source,
        settings,
        crop=CROP,
        progress=lambda *done: calls.append(done),
        checkpoints=kept,
    )
    total = settings.folds * per_fold
    # one call for each finished fold, then one for each epoch
    assert calls == [(done, total) for done in (per_fold, *range(2 * per_fold, total + 1))]
    assert resumed.predictions.equals(whole.predictions)
    assert resumed.metrics.equals(whole.metrics)
    assert resumed.history.equals(whole.history)
    assert resumed.best_epochs == whole.best_epochs
    assert resumed.baseline_hazards == whole.baseline_hazards
    for one, other in zip(resumed.networks, whole.networks, strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])


def test_a_tracker_receives_the_curves_of_finished_folds_again(few, tmp_path):
    kept = FoldCheckpoints(tmp_path / "folds", "x")
    evaluate(few, GRADE, QUICK, checkpoints=kept)
    seen = []

    class Watch:
        def metrics(self, values, step):
            seen.append((sorted(values), step))

    evaluate(few, GRADE, QUICK, checkpoints=kept, tracker=Watch())
    fresh = seen.copy()
    seen.clear()
    evaluate(few, GRADE, QUICK, tracker=Watch())
    assert fresh == seen


def test_finished_folds_of_another_training_are_not_used(few, tmp_path, caplog):
    evaluate(few, GRADE, QUICK, checkpoints=FoldCheckpoints(tmp_path / "folds", "one"))
    calls = []
    evaluate(
        few,
        GRADE,
        QUICK,
        checkpoints=FoldCheckpoints(tmp_path / "folds", "other"),
        progress=lambda *done: calls.append(done),
    )
    assert len(calls) == QUICK.folds * QUICK.epochs
    assert "belongs to another training" in caplog.text


def test_a_damaged_finished_fold_names_the_folder_to_delete(few, tmp_path):
    kept = FoldCheckpoints(tmp_path / "folds", "x")
    evaluate(few, GRADE, QUICK, checkpoints=kept)
    (kept.folder / "fold-1" / "network.safetensors").write_bytes(b"cut")
    with pytest.raises(TrainingError, match="fold-1: not a finished fold .*delete this folder"):
        evaluate(few, GRADE, QUICK, checkpoints=kept)


@pytest.mark.parametrize(("crop", "threads"), [(24, 1), (400, 2)])
def test_small_crops_use_one_thread_of_torch_and_blas(crop, threads):
    def in_use() -> set[int]:
        blas = (p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas")
        return {torch.get_num_threads(), *blas}

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threadpool_limits(2, user_api="blas"):
            with fitting_threads(crop):
                assert in_use() == {threads}
            assert in_use() == {2}
    finally:
        torch.set_num_threads(before)
