"""Training from the weights of another encoder, and what the embedding of an encoder contains."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from nic_core import steps
from nic_core.cohort import Cohort, EncoderSpec, Geometry, ImportedEncoder, InitialWeights
from nic_core.encoders import (
    EncoderError,
    InitialEncoder,
    import_encoder,
    initial_weights_version,
    load_encoder,
    load_initial_weights,
    save_encoder,
    save_patch_task,
    task_probabilities,
    train_encoder,
)
from nic_core.encoders.encoder import Encoder, with_embedding
from nic_core.encoders.files import read_card
from nic_core.encoders.networks import BN_EPSILON, SLOPE
from nic_core.encoders.probes import probe_table, task_embeddings
from nic_core.store import PatchTaskKey, Store

from .conftest import make_dataset

pytestmark = pytest.mark.slow

SIZES = {"patch": 94, "mpp": 0.5, "embedding_size": 16, "device": "cpu"}


def spec(**changes: object) -> EncoderSpec:
    values = {"name": "b", "objective": "mtl", "tasks": ("stripes",), "patches_seen": 64}
    return EncoderSpec(**values | {"batch": 32} | changes)


@pytest.fixture(scope="module")
def stripes():
    return make_dataset(side=94)


@pytest.fixture(scope="module")
def first(stripes) -> Encoder:
    """An encoder trained from random weights."""
    return train_encoder(spec(name="a", learning_rate=3e-3), [stripes], **SIZES).encoder


def started(
    first: Encoder, data: list, *, freeze: int = 0, origin: str = "encoder 'a'", **changes: object
) -> Encoder:
    start = InitialWeights(encoder="a", freeze=freeze)
    return train_encoder(
        spec(initial_weights=start, **changes),
        data,
        **SIZES,
        initial=InitialEncoder(first, origin),
    ).encoder


def tensors(encoder: Encoder) -> dict[str, torch.Tensor]:
    return encoder.module.state_dict()


def test_frozen_blocks_keep_weights_and_statistics(first, stripes):
    before, after = tensors(first), tensors(started(first, [stripes], freeze=2))
    blocks = {name: int(name.split(".")[2]) // 3 for name in before if "convolutions" in name}
    assert set(blocks.values()) == {0, 1, 2, 3}
    for name, block in blocks.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(before[name], after[name]) == (block < 2), name
    assert not torch.equal(before["network.dense.weight"], after["network.dense.weight"])


def test_without_a_step_of_size_the_start_is_kept(first, stripes):
    after = started(first, [stripes], freeze=4, learning_rate=1e-30)
    for name, value in tensors(first).items():
        assert torch.equal(value, tensors(after)[name]), name
    for name, value in first.heads["stripes"].named_parameters():
        assert torch.allclose(value, dict(after.heads["stripes"].named_parameters())[name])
    assert after.card.weights_hash != first.card.weights_hash  # statistics of the head


def test_a_head_is_taken_over_only_with_the_same_classes(first, caplog):
    other = make_dataset(classes=("coarse", "fine"), side=94)
    with caplog.at_level(logging.WARNING):
        encoder = started(first, [other])
    assert encoder.card.initial_weights.heads == ()
    assert "task 'stripes' of the initial weights (encoder 'a') has other classes" in caplog.text


def test_the_card_records_the_start_and_its_training_data(first, stripes):
    unseen = make_dataset("unseen", side=94, seed=7)
    second = started(first, [unseen], tasks=("unseen",), freeze=1)
    record = second.card.initial_weights
    assert record.origin == "encoder 'a'"
    assert record.weights_hash == first.card.weights_hash
    assert (record.frozen_blocks, record.heads, record.mpp) == (1, (), 0.5)
    assert record.training_recorded
    assert second.card.seen_data == {"stripes": stripes.identity, "unseen": unseen.identity}
    assert second.card.training["learning_rate"] == 2e-4
    assert second.card.training["initial_weights_hash"] == first.card.weights_hash
    scores = probe_table(second, [task_embeddings(second, task) for task in (stripes, unseen)])
    assert scores["in_training"].all()


def test_the_probe_leaves_open_what_a_released_start_has_seen(first, stripes):
    imported = first.card.model_copy(update={"objective": "imported", "data": {}})
    second = started(Encoder(imported, first.module, first.heads), [stripes])
    unseen = make_dataset("unseen", side=94, seed=7)
    scores = probe_table(second, [task_embeddings(second, task) for task in (stripes, unseen)])
    assert scores["in_training"].to_list() == [True, True, None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_size": 8}, "have size of the dense code 16, but its network has 8"),
        ({"patch": 128}, "have patch size 94 px, but its network has 128 px"),
    ],
)
def test_weights_of_another_size_are_refused(first, stripes, change, message):
    sizes = SIZES | change
    task = make_dataset(side=sizes["patch"])
    with pytest.raises(EncoderError, match=message):
        train_encoder(
            spec(initial_weights=InitialWeights(encoder="a")),
            [task],
            **sizes,
            initial=InitialEncoder(first, "encoder 'a'"),
        )


def test_weights_of_another_architecture_are_refused(stripes):
    mean = train_encoder(EncoderSpec(name="m", objective="mean_rgb"), [], **SIZES).encoder
    with pytest.raises(EncoderError, match="architecture mean_rgb, but its network has tellez2020"):
        started(mean, [stripes])


def test_a_start_that_is_named_but_not_given_is_refused(stripes):
    with pytest.raises(EncoderError, match="belong together"):
        train_encoder(spec(initial_weights=InitialWeights(encoder="a")), [stripes], **SIZES)


def test_a_killed_training_resumes_to_the_same_weights(first, stripes, tmp_path):
    class Killed(Exception):
        pass

    def kill(done: int, _: int) -> None:
        if done >= 96:
            raise Killed

    entry = spec(initial_weights=InitialWeights(encoder="a", freeze=1), patches_seen=128)
    initial, checkpoint = InitialEncoder(first, "encoder 'a'"), tmp_path / "training.pt"
    with pytest.raises(Killed):
        train_encoder(
            entry, [stripes], **SIZES, initial=initial, checkpoint=checkpoint, progress=kill
        )
    seen: list[int] = []
    resumed = train_encoder(
        entry,
        [stripes],
        **SIZES,
        initial=initial,
        checkpoint=checkpoint,
        progress=lambda done, _: seen.append(done),
    )
    whole = train_encoder(entry, [stripes], **SIZES, initial=initial)
    assert seen[0] > 32
    assert resumed.encoder.card == whole.encoder.card
    other = InitialEncoder(with_embedding(first, "both"), "encoder 'a'")
    seen.clear()
    train_encoder(
        entry,
        [stripes],
        **SIZES,
        initial=other,
        checkpoint=checkpoint,
        progress=lambda done, _: seen.append(done),
    )
    assert seen[0] == 32  # another start is another training


# --- steps -----------------------------------------------------------------------------------


def study(root: Path, **start: object) -> tuple[Cohort, Store]:
    """A cohort whose encoder b starts from other weights, and a store with its patch task."""
    tasks = [{"name": "stripes", "organ": "none", "mpp": 0.5, "folder": root / "images"}]
    settings = {"patch": 94, "embedding_size": 16}
    common = {"objective": "mtl", "tasks": ["stripes"], "patches_seen": 64, "batch": 32}
    cohort = Cohort.model_validate(
        {
            "name": "study",
            "slides": {"table": root / "slides.csv"},
            "patch_tasks": tasks,
            "encoders": [
                {"name": "b", **common, "initial_weights": start},
                {"name": "a", **common, "learning_rate": 3e-3},
            ],
            "settings": settings,
        }
    )
    store = Store(root / "store")
    task = store.patch_task(PatchTaskKey(geometry="94px-0.5um", task="stripes"))
    task.mkdir(parents=True)
    save_patch_task(task, make_dataset(side=94))
    return cohort, store


def test_an_encoder_of_the_study_is_a_start_once_it_is_made(tmp_path):
    cohort, store = study(tmp_path, encoder="a")
    with pytest.raises(EncoderError, match="'b' starts from encoder 'a', which is not in"):
        steps.make_encoder(cohort, store, "b", device="cpu")
    unmade = steps.encoder_versions(cohort, store)
    steps.make_encoder(cohort, store, "a", device="cpu")
    made = steps.encoder_versions(cohort, store)
    assert made["b"] != unmade["b"]
    assert made["a"] == unmade["a"]
    card = steps.make_encoder(cohort, store, "b", device="cpu").encoder.card
    assert card.initial_weights.weights_hash == read_card(store.encoder("a")).weights_hash
    assert steps.encoder_versions(cohort, store) == made
    (watched,) = steps.initial_weight_files(cohort, store)
    assert watched == store.encoder("a") / "card.json"


def test_a_folder_and_a_changed_folder_are_starts_of_other_versions(tmp_path, first):
    folder = tmp_path / "given"
    cohort, store = study(tmp_path, file=folder)
    versions = [steps.encoder_versions(cohort, store)["b"]]
    with pytest.raises(EncoderError, match=r"'b': .*given does not exist; correct 'initial_wei"):
        steps.make_encoder(cohort, store, "b", device="cpu")
    for encoder in (first, with_embedding(first, "both")):
        save_encoder(folder, encoder)
        versions.append(steps.encoder_versions(cohort, store)["b"])
        assert initial_weights_version(folder) == encoder.card.weights_hash
    assert len(set(versions)) == 3
    assert steps.make_encoder(cohort, store, "b", device="cpu").encoder.card.initial_weights


def test_a_damaged_start_has_a_version_and_fails_alone(tmp_path, first):
    folder = tmp_path / "given"
    save_encoder(folder, first)
    cohort, store = study(tmp_path, file=folder)
    sound = steps.encoder_versions(cohort, store)
    (folder / "card.json").write_text("{}")
    damaged = steps.encoder_versions(cohort, store)
    assert damaged["b"] != sound["b"]
    assert damaged["a"] == sound["a"]
    with pytest.raises(EncoderError, match="not an encoder card of format"):
        steps.make_encoder(cohort, store, "b", device="cpu")


def test_a_registered_start_is_left_to_the_registry(tmp_path, first):
    cohort, store = study(tmp_path, version="encoder-x@champion")
    assert set(steps.encoder_versions(cohort, store)) == {"a"}
    assert steps.initial_weight_files(cohort, store) == []
    with pytest.raises(EncoderError, match="encoder-x@champion of a model registry, which this st"):
        steps.make_encoder(cohort, store, "b", device="cpu")
    save_encoder(tmp_path / "download", first)
    made = steps.make_encoder(
        cohort, store, "b", device="cpu", downloaded=tmp_path / "download"
    ).encoder
    assert made.card.initial_weights.origin == "encoder-x@champion"
    assert cohort.encoder("b").registered_start.version == "encoder-x@champion"


def test_a_released_keras_file_is_a_start(published, stripes):
    path = published / "encoder_multitask-4.h5"
    released = load_initial_weights(path, "b")
    task = make_dataset(side=128, each=20)
    result = train_encoder(
        spec(initial_weights=InitialWeights(file=path), patches_seen=8, batch=8),
        [task],
        **SIZES | {"patch": 128, "embedding_size": 128},
        initial=InitialEncoder(released, str(released.card.source)),
    )
    record = result.encoder.card.initial_weights
    assert record.origin.startswith("encoder_multitask-4.h5 sha256:")
    assert not record.training_recorded
    assert result.encoder.card.training["learning_rate"] == 2e-4


# --- embeddings ------------------------------------------------------------------------------


def statistics(encoder: Encoder, pixels: np.ndarray) -> np.ndarray:
    """Mean and deviation of the last feature maps, computed layer by layer in float64."""
    weights = {name: value.double() for name, value in encoder.module.state_dict().items()}
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5)) / 255 * 2 - 1
    for block in range(4):
        at = f"network.convolutions.{3 * block}"
        x = torch.nn.functional.conv2d(x, weights[f"{at}.weight"], weights[f"{at}.bias"], stride=2)
        x = torch.where(x > 0, x, SLOPE * x)
        at = f"network.convolutions.{3 * block + 2}"
        mean, variance, scale, shift = (
            weights[f"{at}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (variance + BN_EPSILON).sqrt() * scale + shift
    flat = x.flatten(2).numpy()
    return np.concatenate([flat.mean(2), flat.std(2)], 1)


def test_pooled_numbers_are_mean_and_deviation_of_the_last_maps(first, stripes):
    pixels = stripes.patches[:5]
    expected = statistics(first, pixels)
    dense, pooled, both = (
        with_embedding(first, name).embed(pixels) for name in ("dense", "pooled", "both")
    )
    assert pooled.shape == (5, 256)
    assert np.allclose(pooled, expected, rtol=1e-4, atol=1e-5)
    assert np.allclose(both, np.concatenate([dense, pooled], 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("embedding", ["pooled", "both"])
def test_an_encoder_with_pooled_numbers_is_saved_and_loaded(
    first, stripes, embedding, tmp_path: Path
):
    trained = train_encoder(
        spec(name="a", learning_rate=3e-3, embedding=embedding), [stripes], **SIZES
    ).encoder
    # the same training as with the dense code
    assert all(torch.equal(tensors(first)[k], v) for k, v in tensors(trained).items())
    assert trained.card.scores == first.card.scores
    assert trained.card.weights_hash != first.card.weights_hash
    save_encoder(tmp_path / "e", trained)
    loaded = load_encoder(tmp_path / "e")
    pixels = stripes.patches[:3]
    assert loaded.card == trained.card
    assert loaded.card.embedding_size == loaded.embed(pixels).shape[1]
    assert np.array_equal(loaded.embed(pixels), trained.embed(pixels))
    entry = ImportedEncoder(name="d", objective="imported", file=tmp_path / "e", embedding="dense")
    again = import_encoder(entry, Geometry(94, 0.5, 94))
    assert again.card.weights_hash == first.card.weights_hash
    assert np.array_equal(again.embed(pixels), first.embed(pixels))


def test_heads_read_the_dense_code_of_both_and_refuse_pooled(first, stripes):
    pixels = stripes.patches[:4]
    expected = task_probabilities(first, "stripes", first.embed(pixels))
    both = with_embedding(first, "both")
    found = task_probabilities(both, "stripes", both.embed(pixels))
    assert np.allclose(found, expected, atol=1e-6)
    pooled = with_embedding(first, "pooled")
    with pytest.raises(EncoderError, match="pooled embeddings, but its heads take the dense code"):
        task_probabilities(pooled, "stripes", pooled.embed(pixels))


def test_pooled_numbers_need_the_published_network_and_two_positions(stripes):
    small = make_dataset(side=62)
    encoder = train_encoder(spec(patches_seen=32), [small], **SIZES | {"patch": 62}).encoder
    with pytest.raises(EncoderError, match="patches of 62 px have one position"):
        with_embedding(encoder, "pooled")
    mean = train_encoder(EncoderSpec(name="m", objective="mean_rgb"), [], **SIZES).encoder
    with pytest.raises(EncoderError, match="is for the architecture tellez2020, not mean_rgb"):
        with_embedding(mean, "both")


@pytest.mark.parametrize("embedding", ["pooled", "both"])
def test_a_released_encoder_is_imported_with_pooled_numbers(published, embedding):
    path = published / "encoder_multitask-4.h5"
    entry = ImportedEncoder(name="r", objective="imported", file=path, embedding=embedding)
    encoder = import_encoder(entry, Geometry(128, 0.5, 128))
    pixels = make_dataset(side=128, each=5).patches[:4]
    found = encoder.embed(pixels)
    assert found.shape[1] == encoder.card.embedding_size == {"pooled": 256, "both": 384}[embedding]
    expected = statistics(encoder, pixels)
    assert np.abs(found[:, -256:] - expected).max() < 1e-4 * np.abs(expected).max()
