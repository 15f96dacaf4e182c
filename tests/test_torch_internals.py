"""Tests of PyTorch's private interfaces: presence, and the fallback without each of them."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nic_core
from nic_core import torch_internals
from nic_core.devices import resolve_precision
from nic_core.encoders.encoder import Encoder, EncoderCard
from nic_core.encoders.inference import FoldedEncoder, FusedEncoder
from nic_core.encoders.networks import PatchEncoder, TellezEncoder
from nic_core.torch_internals import cpu_has_amx, has_fused_convolution
from tests.encoders.test_networks import random_patches, with_random_statistics

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
OPERATORS = torch_internals._FUSED_OPERATORS


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN and AMX are for x86 CPUs")
def test_this_release_of_pytorch_has_every_private_interface():
    assert has_fused_convolution(), f"torch.ops.mkldnn lacks one of {OPERATORS}"
    assert hasattr(torch.cpu, "_is_amx_tile_supported")
    assert hasattr(torch.cpu, "_is_vnni_supported")


def test_only_one_module_uses_private_interfaces_of_pytorch():
    private = re.compile(r"\btorch(\.\w+)*\._[a-z]|\bfrom torch\S*\._|ops\.mkldnn")
    root = Path(nic_core.__file__).parent
    users = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if private.search(path.read_text())
    }
    assert users == {"torch_internals.py"}


@pytest.mark.skipif(not has_fused_convolution(), reason="this PyTorch has no fused convolution")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("missing", OPERATORS)
def test_embeddings_are_the_same_without_fused_convolution(missing, precision, monkeypatch):
    torch.manual_seed(0)
    module = PatchEncoder(with_random_statistics(TellezEncoder()))
    card = EncoderCard(
        name="e",
        architecture="tellez2020",
        objective="mtl",
        patch=128,
        mpp=0.5,
        embedding_size=128,
        weights_hash="0",
    )
    pixels = random_patches(5)

    def embed() -> tuple[type, torch.Tensor]:
        prepared = Encoder(card, module).prepare("cpu", precision)
        with torch.inference_mode():
            return type(prepared.module), prepared.module(pixels)

    kind, fused = embed()
    assert kind is FusedEncoder
    present = {name: getattr(torch.ops.mkldnn, name) for name in OPERATORS if name != missing}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**present))
    kind, folded = embed()
    assert kind is FoldedEncoder
    tolerance = {"float32": 2e-6, "bfloat16": 2e-2}[precision]
    assert (fused - folded).abs().max() < tolerance * fused.abs().max()


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_only_with_matrix_units(has: bool, expected: str, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: has)
    for device in (CPU, torch.device("cuda")):
        assert resolve_precision("auto", device) == expected
        assert resolve_precision("float32", device) == "float32"


def test_auto_is_float32_without_the_amx_query(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not cpu_has_amx()
    assert resolve_precision("auto", CPU) == "float32"
    assert resolve_precision("bfloat16", CPU) == "bfloat16"
