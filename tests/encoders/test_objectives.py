from __future__ import annotations

import dataclasses
import json
from itertools import pairwise, product

import numpy as np
import polars as pl
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.distributions import Normal, kl_divergence

from nic_core.cohort import EncoderSpec, PatchTask
from nic_core.encoders import EncoderError, load_encoder, save_encoder, train_encoder, training_loop
from nic_core.encoders.encoder import build_encoder
from nic_core.encoders.networks import (
    ClassHead,
    PatchEncoder,
    StridedEncoder,
    TellezEncoder,
    pool_patches,
)
from nic_core.encoders.objectives import sampling, vae
from nic_core.encoders.objectives.bigan import BidirectionalGAN, Discriminator, Generator
from nic_core.encoders.objectives.contrastive import Contrastive
from nic_core.encoders.objectives.sampling import Sampler, pool_stored
from nic_core.encoders.objectives.vae import Decoder, VariationalAutoencoder
from nic_core.encoders.patch_tasks import TABLE_SCHEMA, PatchDataset, build_patch_task
from nic_core.encoders.training import OBJECTIVES

from .conftest import make_dataset, write_image

pytestmark = pytest.mark.slow


def convolution(inputs: int, outputs: int) -> int:
    return 9 * inputs * outputs + outputs


def dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def norm(channels: int) -> int:
    return 4 * channels  # with running statistics, as Keras counts


def count(*modules: nn.Module) -> int:
    return sum(
        tensor.numel()
        for module in modules
        for name, tensor in module.state_dict().items()
        if "num_batches" not in name
    )


def stack(*channels: int) -> int:
    return sum(convolution(a, b) + norm(b) for a, b in pairwise(channels))


@pytest.fixture(scope="module")
def tasks():
    return [make_dataset(side=64, each=30), make_dataset("other", side=64, each=30, seed=3)]


@pytest.fixture(scope="module")
def neighbours():
    """A task whose images have 2 x 2 adjacent patches."""
    dataset = make_dataset(side=64, each=80)
    table = dataset.table.sort("split", "group").with_columns(
        index=pl.int_range(pl.len(), dtype=pl.Int64)
    )
    place = pl.int_range(pl.len()).over("split", "group")
    table = table.with_columns(
        source=pl.format("{}-{}", "group", place // 4),
        row=place // 2 % 2,
        column=place % 2,
    )
    return dataclasses.replace(dataset, table=table)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("mtl", {"task_weights": "uncertainty"}),
        ("vae", {}),
        ("contrastive", {}),
        ("bigan", {}),
    ],
)
def test_networks_are_on_the_device_of_the_encoder(tasks, objective, options):
    encoder = PatchEncoder(TellezEncoder(16, 32)).to("meta")
    made = OBJECTIVES[objective](encoder, tasks, batch=16, validation=8, seed=0, **options)
    parameters = list(made.networks.parameters())
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    trained = {id(parameter) for parameter in parameters}
    for head in made.heads.values():
        assert {id(parameter) for parameter in head.parameters()} <= trained
    for variance in getattr(made, "log_variances", {}).values():
        assert id(variance) in trained


def test_vae_has_the_published_layers():
    encoder, decoder = StridedEncoder(128, 128), Decoder(128, 128)
    assert encoder.convolutions(torch.zeros(2, 3, 128, 128)).shape == (2, 512, 4, 4)
    assert decoder.dense.out_features == 8192
    assert decoder(torch.zeros(2, 128)).shape == (2, 3, 128, 128)
    published = stack(3, 32, 64, 128, 256, 512) + dense(8192, 512) + norm(512) + dense(512, 128)
    assert count(encoder) == published == 5_835_072
    assert count(decoder) == (
        dense(128, 8192) + stack(512, 256, 128, 64, 32, 16) + convolution(16, 3)
    )


def test_bigan_has_the_published_layers():
    generator, discriminator = Generator(128, 64), Discriminator(128, 64)
    assert generator.dense.out_features == 1024
    assert generator(torch.zeros(2, 128)).shape == (2, 3, 64, 64)
    assert count(generator) == (
        dense(128, 1024) + stack(64, 128, 128, 128, 128) + convolution(128, 3)
    )
    assert count(discriminator) == (595_968 + dense(256, 1024) + dense(1024, 1024) + dense(1024, 1))
    assert [layer.p for layer in discriminator.pair if isinstance(layer, nn.Dropout)] == [0.5, 0.5]


def test_heads_have_the_published_layers():
    assert count(ClassHead(128, 9)) == dense(128, 256) + norm(256) + dense(256, 9) == 36_361
    assert count(ClassHead(256, 1)) == dense(256, 256) + norm(256) + dense(256, 1)


def test_kl_is_positive_and_agrees_with_torch():
    mu, log_variance = torch.randn(5, 7), torch.randn(5, 7)
    reference = kl_divergence(Normal(mu, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(vae.kl_divergence(mu, log_variance), reference.mean(), atol=1e-5)
    assert vae.kl_divergence(mu, log_variance) > 0
    assert vae.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_bigan_losses_move_the_discriminator_in_opposite_directions(tasks):
    def mean_logits() -> tuple[float, float]:
        """Mean logits of the discriminator on encoded and on generated patches."""
        embeddings, generated = objective.encoder.network(patches), objective.generator(z)
        real = objective.discriminator(patches, embeddings)
        return real.mean().item(), objective.discriminator(generated, z).mean().item()

    for loss, direction in (("loss/discriminator", 1), ("loss/encoder_generator", -1)):
        torch.manual_seed(0)
        objective = BidirectionalGAN(
            PatchEncoder(TellezEncoder(16, 32)), tasks, batch=16, validation=8, seed=0
        )
        patches, z = objective.batch(torch.Generator().manual_seed(0))
        objective.networks.eval()  # without dropout, only the update changes the logits
        before = mean_logits()
        optimizer = torch.optim.SGD(objective.networks.parameters(), lr=1e-3)
        objective.losses((patches, z))[loss].backward()
        optimizer.step()
        after = mean_logits()
        assert direction * (after[0] - before[0]) > 0
        assert direction * (after[1] - before[1]) < 0


def test_bigan_losses_train_only_their_own_networks(tasks):
    objective = BidirectionalGAN(
        PatchEncoder(TellezEncoder(16, 32)), tasks, batch=8, validation=8, seed=0
    )
    objective.networks.train()
    batch = objective.batch(torch.Generator().manual_seed(0))

    def trained(loss: str) -> set[str]:
        objective.networks.zero_grad()
        objective.losses(batch)[loss].backward()
        return {
            name
            for name, network in objective.networks.items()
            if any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
        }

    assert trained("loss/discriminator") == {"discriminator"}
    assert trained("loss/encoder_generator") == {"encoder", "generator"}


def test_contrastive_pairs_have_the_published_shares(neighbours):
    objective = Contrastive(
        PatchEncoder(TellezEncoder(16, 32)), [neighbours], batch=16, validation=16, seed=0
    )
    pairs, same = objective.training_pairs[0].draw(4000, torch.Generator().manual_seed(0))
    assert abs(same.mean() - 0.5) < 0.03
    assert (pairs[same, 0] == pairs[same, 1]).all()
    first, second = (neighbours.table[pairs[~same, column]] for column in (0, 1))
    together = (first["source"] == second["source"]).to_numpy()
    assert abs(together.mean() - 0.75) < 0.04
    step = (first["row"] - second["row"]).abs() + (first["column"] - second["column"]).abs()
    assert set(step.to_numpy()[together]) == {1}
    assert (first["group"] != second["group"]).to_numpy()[~together].all()
    assert set(neighbours.table[pairs.ravel()]["split"]) == {"train"}


def test_positive_pairs_are_two_variants_of_one_patch(neighbours, monkeypatch):
    colours = np.arange(len(neighbours.table), dtype=np.uint8)  # the patch's number
    pixels = np.broadcast_to(colours[:, None, None, None], neighbours.patches.shape).copy()
    objective = contrastive(dataclasses.replace(neighbours, patches=pixels))
    monkeypatch.setattr(sampling, "augment", lambda patches, _: patches)
    batch = objective.batch(torch.Generator().manual_seed(0))
    first, second = (side.mean(dim=(1, 2, 3)) for side in (batch.first, batch.second))
    assert 0 < batch.same.sum() < len(batch.same)
    assert torch.equal(first == second, batch.same == 1)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_adjacent_patches_are_found_at_any_slide_resolution(tmp_path, mpp):
    rng = np.random.default_rng(0)
    for number in range(10):
        tifffile.imwrite(
            tmp_path / f"s{number}.tif",
            rng.integers(0, 256, (256, 512, 3), dtype=np.uint8),
            tile=(128, 128), photometric="rgb", resolution=(1e4 / mpp, 1e4 / mpp),
            resolutionunit="CENTIMETER",
        )  # fmt: skip
        write_image(tmp_path / "all.png", np.full((8, 16), 255, np.uint8))
        square = [[0, 0], [256, 0], [256, 128], [0, 128], [0, 0]]
        region = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [square]},
            "properties": {"classification": {"name": "tumour"}},
        }
        (tmp_path / f"s{number}.geojson").write_text(json.dumps(region))
    rows = [(f"s{n}.tif", f"s{n}.geojson", f"p{n}", mpp, "all.png") for n in range(10)]
    schema = ["path", "annotations", "patient", "mpp", "mask"]
    pl.DataFrame(rows, schema=schema, orient="row").write_csv(tmp_path / "slides.csv")
    slides = {"table": tmp_path / "slides.csv", "background_label": "normal"}
    task = PatchTask(name="cut", organ="breast", slides=slides, group_column="patient")
    dataset = build_patch_task(task, patch=32, mpp=0.5, seed=0)
    objective = contrastive(dataset)
    pairs = objective.training_pairs[0].adjacent
    first, second = (dataset.table[pairs[:, column]] for column in (0, 1))
    assert (first["source"] == second["source"]).all()
    moved = pl.DataFrame({"x": first["x"] - second["x"], "y": first["y"] - second["y"]})
    cell = int(32 * 0.5 / mpp)
    assert set(moved.rows()) == {(cell, 0), (-cell, 0), (0, cell), (0, -cell)}
    rows, columns = 256 // cell, 512 // cell
    a_slide = 2 * (rows * (columns - 1) + (rows - 1) * columns)
    assert len(pairs) == a_slide * dataset.table.filter(split="train")["source"].n_unique()


@pytest.mark.parametrize("declared", [0.25, 1.0])
def test_adjacent_patches_are_found_at_any_image_resolution(tmp_path, declared):
    rng = np.random.default_rng(0)
    side = int(64 * 0.5 / declared)
    for label, number in product(("a", "b"), range(6)):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        write_image(tmp_path / label / f"{number}.png", pixels)
    task = PatchTask(name="images", organ="none", mpp=declared, folder=tmp_path)
    pairs = contrastive(build_patch_task(task, patch=32, mpp=0.5, seed=0)).training_pairs[0]
    assert len(pairs.adjacent) == 8 * len(pairs.rows) / 4  # 2 x 2 patches per image


def contrastive(task):
    return Contrastive(PatchEncoder(TellezEncoder(16, 32)), [task], batch=16, validation=16, seed=0)


def test_without_adjacent_patches_pairs_of_one_group_are_used(tasks, caplog):
    objective = contrastive(tasks[0])
    assert "'stripes', train split: no image has adjacent patches" in caplog.text
    pairs, same = objective.training_pairs[0].draw(4000, torch.Generator().manual_seed(0))
    assert (pairs[same, 0] == pairs[same, 1]).all()
    assert (pairs[~same, 0] != pairs[~same, 1]).all()
    first, second = (tasks[0].table[pairs[~same, column]]["group"] for column in (0, 1))
    assert abs((first == second).mean() - 0.75) < 0.04
    train = set(tasks[0].rows("train"))
    assert set(pairs.ravel()) == train  # every patch is used


@pytest.mark.parametrize(
    "group",
    [pl.lit("one"), pl.col("index").cast(pl.String)],
    ids=["a single group", "each patch alone"],
)
def test_contrastive_requires_groups_and_adjacent_patches(tasks, group):
    table = tasks[0].table.with_columns(group=group)
    with pytest.raises(EncoderError, match="'contrastive' cannot use patch task 'stripes'"):
        contrastive(dataclasses.replace(tasks[0], table=table))


def test_contrastive_head_has_a_dense_layer_of_256(neighbours):
    objective = contrastive(neighbours)
    assert count(objective.pair_head) == dense(2 * 16, 256) + norm(256) + dense(256, 1)
    batch = objective.batch(torch.Generator().manual_seed(0))
    assert batch.first.shape == batch.second.shape == (16, 3, 32, 32)
    assert objective.patches_per_step == 32
    assert (batch.first != batch.second).any()


@pytest.mark.parametrize(
    ("objective", "rate", "selection"),
    [
        ("mtl", 1e-2, ("validation/balanced_accuracy", "max")),
        ("supervised", 1e-2, ("validation/balanced_accuracy", "max")),
        ("vae", 1e-3, ("validation/loss", "min")),
        ("contrastive", 1e-2, ("validation/accuracy", "max")),
        ("bigan", 2e-4, None),
    ],
)
def test_rate_batch_and_selection_are_as_published(tasks, objective, rate, selection):
    assert OBJECTIVES[objective].learning_rate == rate
    assert EncoderSpec(name="x", objective=objective, tasks=("a",)).batch == 64
    encoder = PatchEncoder(TellezEncoder(16, 32)).to("meta")
    given = tasks[:1] if objective == "supervised" else tasks
    chosen = OBJECTIVES[objective](encoder, given, batch=16, validation=8, seed=0).selection
    assert (chosen and (chosen.value, chosen.mode)) == selection
    schedule = (training_loop.REDUCTION, training_loop.LOWEST_RATE, training_loop.STEPS)
    assert schedule == (0.1, 1e-5, 200_000)


@given(
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    pooling=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_stored_patches_are_pooled_like_the_encoder_input(shares, pooling, seed):
    side = 4 * len(shares) * pooling
    stored = np.random.default_rng(seed).integers(0, 256, (sum(shares), side, side, 3), np.uint8)
    pixels = torch.from_numpy(stored)
    pooled = pool_stored(pixels, pooling)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, pool_patches(pixels.permute(0, 3, 1, 2), pooling))


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_sampler_balances_classes_of_any_size(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    rows = [
        (k, f"{k}", 0, 0, 0, 0, str(label), label, "g", "train") for k, label in enumerate(labels)
    ]
    table = pl.DataFrame(rows, schema=TABLE_SCHEMA, orient="row")
    pixels = np.zeros((len(rows), 2, 2, 3), np.uint8)
    task = PatchDataset("t", "none", tuple(map(str, range(len(counts)))), 0.5, pixels, table)
    generator = torch.Generator().manual_seed(seed)
    for by_class in (True, False):
        sampler = Sampler([task], 6000, by_class=by_class, device=torch.device("cpu"))
        (drawn,) = sampler.draw(generator)
        shares = np.bincount(labels[drawn], minlength=len(counts)) / 6000
        expected = np.full(len(counts), 1 / len(counts)) if by_class else counts / np.sum(counts)
        assert np.abs(shares - expected).max() < 0.035  # more than 5 standard deviations
        assert set(drawn) <= set(range(len(rows)))


@pytest.mark.parametrize("architecture", ["tellez2020", "tellez2019"])
def test_vae_learns_to_reconstruct_and_is_saved(tasks, tmp_path, architecture):
    spec = EncoderSpec(
        name="vae", objective="vae", tasks=("stripes", "other"), patches_seen=192, batch=16,
        architecture=architecture,
    )  # fmt: skip
    result = train_encoder(spec, tasks, patch=64, mpp=0.5, embedding_size=16, device="cpu")
    history = result.history
    assert history["loss/mse"][-1] < 0.9 * history["loss/mse"][0]
    assert result.encoder.card.training["learning_rate"] == 1e-3
    assert result.encoder.heads == {}
    save_encoder(tmp_path, result.encoder)
    pixels = tasks[0].patches[:9]
    loaded = load_encoder(tmp_path)
    assert np.array_equal(loaded.embed(pixels), result.encoder.embed(pixels))
    with torch.inference_mode():
        plain = loaded.module(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    assert np.allclose(plain, loaded.embed(pixels), atol=1e-4 * np.abs(plain).max())


def test_bigan_has_a_fixed_rate_and_repeats_with_its_seed(tasks):
    spec = EncoderSpec(
        name="bigan", objective="bigan", tasks=("stripes", "other"), patches_seen=48, batch=16
    )
    first, again = (
        train_encoder(spec, tasks, patch=64, mpp=0.5, embedding_size=16, device="cpu")
        for _ in range(2)
    )
    assert set(first.history["learning_rate"]) == {2e-4}
    assert first.encoder.card == again.encoder.card  # including dropout


def test_contrastive_training_learns_to_classify_pairs(neighbours):
    # each patch has another grey level, which augmentation changes only slightly
    grey = np.random.default_rng(0).integers(30, 226, len(neighbours.table))
    pixels = np.broadcast_to(grey[:, None, None, None], neighbours.patches.shape)
    easy = dataclasses.replace(neighbours, patches=pixels.astype(np.uint8))
    spec = EncoderSpec(
        name="c", objective="contrastive", tasks=("stripes",), patches_seen=6400, batch=32,
        learning_rate=2e-3,
    )  # fmt: skip
    result = train_encoder(spec, [easy], patch=64, mpp=0.5, embedding_size=16, device="cpu")
    assert result.history["validation/accuracy"].max() > 0.7
    assert result.encoder.card.scores == {}


def test_vae_loss_is_mse_plus_weighted_kl(tasks):
    objective = VariationalAutoencoder(
        PatchEncoder(TellezEncoder(16, 32)), tasks, batch=8, validation=8, seed=0
    )
    losses = objective.losses(objective.batch(torch.Generator().manual_seed(0)))
    assert torch.isclose(losses["loss"], losses["loss/mse"] + 5e-5 * losses["loss/kl"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "vae"}, "needs at least one task"),
        ({"objective": "supervised", "tasks": ("a", "b")}, "takes one task"),
        (
            {"objective": "vae", "tasks": ("a",), "task_weights": "uncertainty"},
            "applies to objective 'mtl' only",
        ),
        (
            {"objective": "mtl", "tasks": ("a",), "architecture": "tellez2019"},
            "is for the objectives vae and",
        ),
        ({"objective": "mtl", "tasks": ("a", "a")}, r"\['a'\] occurs more than once"),
    ],
)
def test_invalid_specs_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        EncoderSpec(name="x", **values)


@pytest.mark.parametrize("patch", [30, 32, 60, 61, 62, 63, 64, 66, 96, 100, 128, 130])
@pytest.mark.parametrize(
    ("objective", "architecture"),
    [
        *product(("mtl", "vae", "contrastive", "bigan"), ["tellez2020"]),
        ("vae", "tellez2019"),
        ("contrastive", "tellez2019"),
    ],
)
def test_check_patch_agrees_with_the_networks(objective, architecture, patch):
    spec = EncoderSpec(name="x", objective=objective, tasks=("a",), architecture=architecture)
    try:
        network = build_encoder(architecture, patch=patch, embedding_size=8).network
        if objective == "vae":
            Decoder(8, patch)
        if objective == "bigan":
            Generator(8, network.side)
    except (ValueError, EncoderError):
        with pytest.raises(ValueError, match=f"encoder 'x': .*, not {patch}$"):
            spec.check_patch(patch)
    else:
        spec.check_patch(patch)


@pytest.mark.parametrize("names", [("type", "values"), ("train", "float")])
def test_a_task_may_have_any_name(names):
    tasks = [make_dataset(name, side=64, each=15) for name in names]
    spec = EncoderSpec(
        name="x", objective="mtl", tasks=names, patches_seen=48, batch=16,
        task_weights="uncertainty",
    )  # fmt: skip
    encoder = train_encoder(spec, tasks, patch=64, mpp=0.5, embedding_size=8, device="cpu").encoder
    assert tuple(encoder.card.tasks) == names
