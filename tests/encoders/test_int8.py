"""Tests of int8 inference: near float32, the same for any batch, refused where it cannot run."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nic_core import steps
from nic_core.cohort import EncoderSpec, load_cohort
from nic_core.encoders import Encoder, EncoderError, save_encoder, train_encoder
from nic_core.encoders.encoder import with_embedding
from nic_core.encoders.inference import BATCH, embed_patches
from nic_core.encoders.int8 import _carried, _quantized
from nic_core.encoders.networks import MeanRGB, PatchEncoder, StridedEncoder, pool_patches
from nic_core.encoders.similarity import Similarity, similarity
from nic_core.store import PatchTaskKey, Store
from tests.encoders.conftest import encoder_of

from .conftest import make_dataset

pytestmark = pytest.mark.slow

EMBEDDINGS = ["dense", "pooled", "both"]


@pytest.fixture(scope="module")
def trained() -> Encoder:
    """A small encoder of the published architecture, trained for a moment."""
    tasks = [make_dataset(each=20), make_dataset("tilt", kinds=(0, 1), each=20, seed=1)]
    spec = EncoderSpec(
        name="small", objective="mtl", tasks=["stripes", "tilt"], patches_seen=640, batch=32
    )
    return train_encoder(spec, tasks, patch=128, mpp=0.5, embedding_size=16, device="cpu").encoder


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    """Patches of seeds that the training did not draw, uint8 (40, 128, 128, 3)."""
    return make_dataset(each=20, seed=5).patches


@pytest.mark.usefixtures("can_run_int8")
@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("reading", ["patch", "input"])
def test_int8_embeddings_are_near_those_in_float32(trained, patches, embedding, reading):
    encoder = with_embedding(trained, embedding)
    if reading == "input":
        pixels = torch.from_numpy(patches).permute(0, 3, 1, 2)
        patches = pool_patches(pixels).round().byte().permute(0, 2, 3, 1).numpy()
    prepared = encoder.prepare("cpu", "int8", reading)
    assert (prepared.precision, prepared.side) == ("int8", patches.shape[1])
    found = embed_patches(prepared, patches)
    near = similarity(found, embed_patches(encoder.prepare("cpu", "float32", reading), patches))
    assert near.cosine > 0.999
    assert near.cosine_p1 > 0.998
    assert 0 < near.distance < 0.05


@pytest.mark.usefixtures("can_run_int8")
def test_the_released_encoder_in_int8_is_near_float32(published, real_data):
    from nic_core.compression.similarity import slide_similarity
    from nic_core.encoders.keras_import import import_keras_encoder
    from nic_core.slides import open_slide

    encoder = import_keras_encoder(published / "encoder_multitask-4.h5", "released")
    with open_slide(real_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        near = slide_similarity(
            slide, encoder.prepare("cpu", "float32"), encoder.prepare("cpu", "int8")
        )
    assert near.patches > 100
    assert near.cosine > 0.999
    assert near.cosine_p1 > 0.995
    assert near.distance < 0.05


@pytest.mark.usefixtures("can_run_int8")
def test_int8_embeddings_do_not_depend_on_the_batch_or_the_thread(trained, patches):
    prepared = trained.prepare("cpu", "int8")
    pixels = torch.from_numpy(patches[:BATCH]).permute(0, 3, 1, 2)
    together = prepared.module(pixels)
    for size in (1, 5):
        parts = torch.cat([prepared.module(part) for part in pixels.split(size)])
        # the feature maps are equal; the readout rounds in float32
        assert (parts - together).abs().max() < 2e-6 * together.abs().max()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(prepared.module, [pixels.contiguous()] * 8):
            assert torch.equal(found, together)
    again = trained.prepare("cpu", "int8").module(pixels)
    assert torch.equal(again, together)


@pytest.mark.usefixtures("can_run_int8")
def test_mean_rgb_stays_in_float32_if_int8_is_set():
    prepared = encoder_of(MeanRGB(), "mean_rgb", 3).prepare("cpu", "int8")
    assert prepared.precision == "float32"


@pytest.mark.usefixtures("can_run_int8")
def test_int8_does_not_load_what_reports_its_use(trained):
    trained.prepare("cpu", "int8")
    assert "openvino" in sys.modules
    assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]


def test_int8_of_another_architecture_is_refused():
    encoder = encoder_of(PatchEncoder(StridedEncoder(16)), "tellez2019", 16)
    with pytest.raises(
        EncoderError, match="'e': precision int8 is for the architecture tellez2020"
    ):
        encoder.prepare("cpu", "int8")


def test_int8_on_a_gpu_is_refused_with_the_remedy(trained, monkeypatch):
    monkeypatch.setattr(
        "nic_core.encoders.encoder.resolve_device", lambda device: torch.device("cuda:0")
    )
    with pytest.raises(EncoderError, match="int8 is for CPUs.* cuda:0; set the precision to auto"):
        trained.prepare("auto", "int8")


def test_int8_without_dot_products_is_refused(trained, monkeypatch):
    monkeypatch.setattr("nic_core.encoders.int8.cpu_has_vnni", lambda: False)
    with pytest.raises(EncoderError, match="needs a processor with int8 dot products"):
        trained.prepare("cpu", "int8")


def test_int8_without_openvino_says_what_to_install(trained, monkeypatch):
    monkeypatch.setattr("nic_core.encoders.int8.cpu_has_vnni", lambda: True)
    monkeypatch.setattr("nic_core.encoders.int8.find_spec", lambda name: None)
    with pytest.raises(EncoderError, match=r"pip install 'nic-pathology\[openvino\]'"):
        trained.prepare("cpu", "int8")


def test_openvino_is_imported_for_int8_only(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # an import fails
    for precision in ("auto", "float32", "bfloat16"):
        trained.prepare("cpu", precision)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), pooling=st.sampled_from([1, 2]))
def test_carried_rounding_keeps_the_sums_of_weights(seed: int, pooling: int):
    values = np.random.default_rng(seed).normal(0, 30, (4, 3, 3, 3))
    weights = values.repeat(pooling, 2).repeat(pooling, 3)
    rounded = _carried(weights, pooling)
    assert np.array_equal(rounded, np.round(rounded))
    assert np.abs(rounded - weights).max() <= 1 + 1e-9
    kernel = (rounded - weights).sum((2, 3))
    assert np.abs(kernel).max() <= 0.5 + 1e-9
    blocks = (rounded - weights).reshape(4, 3, 3, pooling, 3, pooling).sum((3, 5))
    assert np.abs(blocks).max() <= 1 + 1e-9


@pytest.mark.parametrize("pooling", [None, 1, 2])
def test_each_output_channel_has_its_own_step(pooling: int | None):
    scales = np.array([1e-3, 1.0, 50.0, 0.0])[:, None, None, None]
    weights = np.random.default_rng(0).uniform(-1, 1, (4, 3, 6, 6)) * scales
    steps, size = _quantized(weights, pooling)
    assert steps.dtype == np.int8
    assert (np.abs(steps[:3]).max((1, 2, 3)) >= 125).all()
    assert (np.abs(steps * size - weights) <= 1.001 * size).all()
    assert not steps[3].any()


def test_similarity_is_that_of_the_definition():
    exact = np.array([[3.0, 0.0], [0.0, 3.0]])
    found = np.array([[3.0, 0.0], [3.0, 3.0]])
    near = similarity(found, exact)
    assert near.cosine == pytest.approx((1 + np.sqrt(0.5)) / 2)
    assert near.cosine_p1 == pytest.approx(np.sqrt(0.5) + 0.01 * (1 - np.sqrt(0.5)))
    # distances 0 and 3; each embedding is 3 / sqrt(2) from the mean
    assert near.distance == pytest.approx(np.sqrt(4.5) / np.sqrt(4.5))
    assert near.patches == 2
    assert similarity(exact, exact) == Similarity(1.0, 1.0, 0.0, 2)


@pytest.mark.usefixtures("can_run_int8")
def test_the_probe_compares_the_grids_precision_with_float32(trained, tiny_cohort, tmp_path):
    cohort, store = load_cohort(tiny_cohort), Store(tmp_path)
    save_encoder(store.encoder("mtl-4"), trained)
    key = PatchTaskKey(geometry="128px-0.5um", task="lymph_node")
    steps.make_patch_task(cohort, store, key)

    def compare(precision: str):
        compression = cohort.settings.compression.model_copy(update={"precision": precision})
        changed = cohort.settings.model_copy(update={"compression": compression})
        return steps.encoder_similarity(
            cohort.model_copy(update={"settings": changed}), store, "mtl-4"
        )

    assert compare("float32") is None
    found = compare("int8")
    assert found["task"].to_list() == ["lymph_node"]
    assert found["cosine"][0] > 0.99
