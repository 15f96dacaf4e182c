"""Tests of presets: the table, the import by name, the pooling, the names of weights."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from nic_core.cohort import (
    ExternalNetwork,
    Geometry,
    ImportedEncoder,
    Preprocess,
    PresetName,
    TimmModel,
    presets,
)
from nic_core.cohort.presets import PRESETS, Preset, licence_of
from nic_core.encoders import EncoderError, import_encoder, load_encoder, save_encoder
from nic_core.encoders.external import (
    ExternalEncoder,
    pool_tokens,
    read_weights,
    timm_network,
)
from nic_core.encoders.weight_names import timm_names

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def entry(file: Path, preset: str | None, **fields: Any) -> ImportedEncoder:
    return ImportedEncoder.model_validate(
        {"name": "e", "objective": "imported", "file": file, "preset": preset, **fields}
    )


def weights_file(folder: Path, name: str = "weights.safetensors") -> Path:
    save_file({"x": torch.zeros(1)}, folder / name)
    return folder / name


# --- the table -------------------------------------------------------------------------------


def test_the_table_has_every_name_of_the_cohort_file():
    assert tuple(PRESETS) == get_args(PresetName)


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_resizes_and_every_one_names_its_source(name):
    preset = PRESETS[name]
    assert preset.network.preprocess.resize is None
    assert preset.network.preprocess.input_side(preset.network.patch) in (224, 448)
    assert preset.address.startswith("https://")
    assert preset.licence == licence_of(name)


# --- entries of the cohort file --------------------------------------------------------------


def test_an_unknown_preset_is_refused_with_the_known_names(tmp_path):
    with pytest.raises(ValidationError, match=r"'uni', 'uni2-h', .* or 'resnet50'"):
        entry(tmp_path / "x.bin", "UNI")


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("x.h5", {}, "x.h5 describes its network itself: leave 'preset' out"),
        (".", {}, "describes its network itself: leave 'preset' out"),
        (
            "x.bin",
            {"network": {"patch": 8, "mpp": 1, "embedding_size": 1, "preprocess": "mean"}},
            "'preset' and 'network' both describe the network",
        ),
    ],
)
def test_a_preset_that_contradicts_its_file_is_refused(tmp_path, file, fields, message):
    if fields:
        fields["network"]["preprocess"] = {"mean": [0, 0, 0], "std": [1, 1, 1]}
        fields["network"]["timm"] = {"model": "resnet50"}
    with pytest.raises(ValidationError, match=message):
        entry(tmp_path / file, "uni", **fields)


def test_weights_without_preset_or_network_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="x.bin needs 'preset', .* or 'network'"):
        entry(tmp_path / "x.bin", None)


def test_a_missing_file_names_where_the_weights_are_asked_for(tmp_path):
    with pytest.raises(EncoderError, match="ask for it at https://huggingface.co/owkin/phikon"):
        import_encoder(entry(tmp_path / "phikon.bin", "phikon"), Geometry(224, 0.5, 224))


@pytest.mark.parametrize(("name", "patch", "mpp"), [("ctranspath", 224, 1.0), ("conch", 448, 0.5)])
def test_weights_of_a_network_that_timm_lacks_are_refused(tmp_path, name, patch, mpp):
    with pytest.raises(EncoderError, match=r"export the network .*\(.pt, .ts, .pt2\)"):
        import_encoder(entry(weights_file(tmp_path), name), Geometry(patch, mpp, patch))


class Graph(nn.Module):
    """The mean of each channel, and zeros, as an embedding of ``size``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, pixels: Tensor) -> Tensor:
        return functional.pad(pixels.mean((2, 3)), (0, self.size - 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ctranspath", "virchow"])
def test_an_exported_graph_takes_geometry_and_pixels_from_the_preset(tmp_path, name):
    network = PRESETS[name].network
    file = tmp_path / "graph.pt2"
    batch = ({0: torch.export.Dim("batch")},)
    example = (torch.rand(2, 3, 224, 224),)
    graph = torch.export.export(Graph(network.embedding_size), example, dynamic_shapes=batch)
    torch.export.save(graph, file)
    encoder = import_encoder(entry(file, name), Geometry(224, network.mpp, 224))
    assert (encoder.card.architecture, encoder.card.preset) == ("torch.export", name)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    expected = ((pixels / 255).mean((1, 2)) - IMAGENET[0]) / IMAGENET[1]
    np.testing.assert_allclose(encoder.embed(pixels)[:, :3], expected, atol=1e-5)


# --- crop and pooling ------------------------------------------------------------------------


def test_the_network_receives_the_central_crop():
    preprocess = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), crop=4)
    pixels = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(1, 3, 8, 8)
    seen = ExternalEncoder(nn.Flatten(), preprocess)(pixels)
    expected = pixels[0, :, 2:6, 2:6].flatten() / 255
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("crop", [9, 5])
def test_a_crop_that_is_not_central_is_refused(crop):
    preprocess = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), crop=crop)
    with pytest.raises(ValidationError, match=f"crop: {crop} px is not a central square of 8 px"):
        ExternalNetwork(patch=8, mpp=1, embedding_size=1, preprocess=preprocess)


@given(
    patches=st.integers(1, 3),
    registers=st.integers(0, 4),
    squares=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_pooling_leaves_register_tokens_out(patches, registers, squares, seed):
    output = torch.randn(
        (patches, 1 + registers + squares, 5), generator=torch.Generator().manual_seed(seed)
    )
    both = pool_tokens(output, "class+mean", 1 + registers)
    for patch, found in zip(output.numpy(), both.numpy(), strict=True):
        class_token, *others = patch
        mean = sum(others[registers:]) / squares
        np.testing.assert_allclose(found, np.concatenate([class_token, mean]), atol=1e-6)
    torch.testing.assert_close(pool_tokens(output, "class", 1 + registers), both[:, :5])
    torch.testing.assert_close(pool_tokens(output, "mean", 1 + registers), both[:, 5:])


def test_two_settings_of_the_pooling_are_refused():
    with pytest.raises(ValidationError, match="'tokens' and the argument 'global_pool'"):
        TimmModel(model="vit", arguments={"global_pool": "avg"}, tokens="class")


# --- files of weights ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights, "epoch": 3, "name": "x"},
        lambda weights: {"module." + name: tensor for name, tensor in weights.items()},
        lambda weights: {"state_dict": {"module." + n: tensor for n, tensor in weights.items()}},
    ],
    ids=["plain", "wrapped", "parallel", "both"],
)
def test_weights_are_found_in_a_checkpoint(wrap, tmp_path):
    weights = {"a.weight": torch.ones(2), "b.bias": torch.zeros(1)}
    torch.save(wrap(weights), tmp_path / "x.PTH")
    found = read_weights(tmp_path / "x.PTH")
    assert list(found) == list(weights)
    torch.testing.assert_close(found["a.weight"], weights["a.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"student": {"a": torch.ones(1)}, "teacher": {"a": torch.ones(1)}}, "student, teacher"),
        ({"epoch": 3}, "it holds none"),
        ([torch.ones(1)], "it holds none"),
        (nn.Linear(1, 1), "other objects than tensors"),
    ],
)
def test_other_checkpoints_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(EncoderError, match=f"x.bin: .*{message}.*; save the network's state_dict"):
        read_weights(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"])
def test_a_pointer_of_git_lfs_is_named(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(EncoderError, match=f"{name}: a pointer of Git LFS, not the weights"):
        read_weights(tmp_path / name)


# --- names of weights ------------------------------------------------------------------------


def transformers_weights(width: int, blocks: int, *, dinov2: bool = False) -> dict[str, Tensor]:
    """Random weights under the names of transformers' ``ViTModel`` or ``Dinov2Model``."""
    torch.manual_seed(4)
    tensors = {
        "embeddings.cls_token": torch.randn(1, 1, width),
        "embeddings.position_embeddings": torch.randn(1, 197, width),
        "embeddings.patch_embeddings.projection.weight": torch.randn(width, 3, 16, 16) / 30,
        "embeddings.patch_embeddings.projection.bias": torch.randn(width),
        "layernorm.weight": torch.randn(width),
        "layernorm.bias": torch.randn(width),
    }
    for block in range(blocks):
        layers = {
            "attention.attention.query": (width, width),
            "attention.attention.key": (width, width),
            "attention.attention.value": (width, width),
            "attention.output.dense": (width, width),
            "norm1" if dinov2 else "layernorm_before": (width,),
            "norm2" if dinov2 else "layernorm_after": (width,),
            "mlp.fc1" if dinov2 else "intermediate.dense": (4 * width, width),
            "mlp.fc2" if dinov2 else "output.dense": (width, 4 * width),
        }
        for name, shape in layers.items():
            prefix = f"encoder.layer.{block}.{name}"
            tensors[f"{prefix}.weight"] = torch.randn(shape) / shape[-1] ** 0.5
            tensors[f"{prefix}.bias"] = torch.randn(shape[0])
        if dinov2:
            for number in (1, 2):
                scale = f"encoder.layer.{block}.layer_scale{number}.lambda1"
                tensors[scale] = torch.randn(width)
    surplus = "embeddings.mask_token" if dinov2 else "pooler.dense.weight"
    return tensors | {surplus: torch.randn(1, width)}


def vision_transformer(w: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """Compute the tokens of a vision transformer from transformers' weights, head by head."""
    dinov2 = "embeddings.mask_token" in w
    width = w["layernorm.bias"].numel()
    squares = functional.conv2d(
        images,
        w["embeddings.patch_embeddings.projection.weight"],
        w["embeddings.patch_embeddings.projection.bias"],
        stride=16,
    )
    x = torch.cat(
        [w["embeddings.cls_token"].expand(len(images), 1, width), squares.flatten(2).mT], 1
    )
    x = x + w["embeddings.position_embeddings"]

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    block = 0
    while f"encoder.layer.{block}.attention.output.dense.bias" in w:
        p = f"encoder.layer.{block}."
        y = norm(x, f"{p}{'norm1' if dinov2 else 'layernorm_before'}")
        parts = [linear(y, f"{p}attention.attention.{n}") for n in ("query", "key", "value")]
        outputs = []
        for q, k, v in zip(*(part.chunk(heads, -1) for part in parts), strict=True):
            outputs.append(((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v)
        y = linear(torch.cat(outputs, -1), f"{p}attention.output.dense")
        x = x + y * w.get(f"{p}layer_scale1.lambda1", torch.tensor(1.0))
        y = norm(x, f"{p}{'norm2' if dinov2 else 'layernorm_after'}")
        y = functional.gelu(linear(y, f"{p}{'mlp.fc1' if dinov2 else 'intermediate.dense'}"))
        y = linear(y, f"{p}{'mlp.fc2' if dinov2 else 'output.dense'}")
        x = x + y * w.get(f"{p}layer_scale2.lambda1", torch.tensor(1.0))
        block += 1
    return norm(x, "layernorm")


def test_query_key_and_value_become_one_layer_in_this_order():
    weights = transformers_weights(8, 2)
    renamed = timm_names(weights)
    layer = "encoder.layer.1.attention.attention"
    expected = torch.cat([weights[f"{layer}.{part}.bias"] for part in ("query", "key", "value")])
    torch.testing.assert_close(renamed["blocks.1.attn.qkv.bias"], expected)
    assert not [name for name in renamed if name.startswith(("encoder", "embeddings", "pooler"))]
    del weights[f"{layer}.key.bias"]
    assert "blocks.1.attn.qkv.bias" not in timm_names(weights)


def test_weights_of_other_networks_keep_their_names():
    weights = {"conv1.weight": torch.zeros(1), "encoder.layer.0.x.weight": torch.zeros(1)}
    assert timm_names(weights) == weights


def test_dinov2_adds_the_position_of_the_class_token_to_it():
    weights = {
        "cls_token": torch.full((1, 1, 2), 1.0),
        "pos_embed": torch.arange(8.0).reshape(1, 4, 2),
        "register_tokens": torch.full((1, 4, 2), 3.0),
        "mask_token": torch.zeros(1, 2),
    }
    renamed = timm_names(weights)
    assert sorted(renamed) == ["cls_token", "pos_embed", "reg_token"]
    assert renamed["cls_token"].tolist() == [[[1.0, 2.0]]]
    assert renamed["pos_embed"].tolist() == [[[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]]


# --- timm ------------------------------------------------------------------------------------


def test_the_arguments_of_a_preset_reach_timm(monkeypatch):
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_model(model: str, **arguments: Any) -> nn.Module:
        calls.append((model, arguments))
        network = nn.Identity()
        network.has_class_token = True
        return network

    stub = types.ModuleType("timm")
    stub.create_model = create_model
    stub.layers = types.SimpleNamespace(SwiGLUPacked=nn.Linear)
    monkeypatch.setitem(sys.modules, "timm", stub)
    timm = PRESETS["virchow2"].network.timm
    assert timm is not None
    timm_network(timm)
    model, arguments = calls[0]
    assert model == "vit_huge_patch14_224"
    assert arguments["mlp_layer"] is nn.Linear
    assert (arguments["global_pool"], arguments["num_classes"]) == ("", 0)
    assert (arguments["reg_tokens"], arguments["pretrained"]) == (4, False)
    with pytest.raises(EncoderError, match="timm.layers has no mlp_layer 'SwiGLU'"):
        timm_network(TimmModel(model="vit", arguments={"mlp_layer": "SwiGLU"}))


@pytest.fixture(scope="module")
def timm() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm is not installed, or its torchvision does not match PyTorch: {error}")
    return timm


# what the model cards write, independent of the table: model, arguments, millions of parameters,
# number of class and register tokens, and whether the mean of the patch tokens is appended
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": nn.SiLU}
UNI2_ARGUMENTS = {
    "img_size": 224,
    "patch_size": 14,
    "depth": 24,
    "num_heads": 24,
    "init_values": 1e-5,
    "embed_dim": 1536,
    "mlp_ratio": 2.66667 * 2,
    "no_embed_class": True,
    "reg_tokens": 8,
    "dynamic_img_size": True,
    **SWIGLU,
}
VIRCHOW_ARGUMENTS = {"init_values": 1e-5, "mlp_ratio": 5.3375, "dynamic_img_size": True, **SWIGLU}
GIGAPATH_ARGUMENTS = {
    "img_size": 224,
    "patch_size": 16,
    "embed_dim": 1536,
    "depth": 40,
    "num_heads": 24,
    "init_values": 1e-5,
    "mlp_ratio": 5.33334,
}
OPTIMUS = "vit_giant_patch14_reg4_dinov2"
CARDS: dict[PresetName, tuple[str, dict[str, Any], float, int, bool]] = {
    "uni": ("vit_large_patch16_224", {"init_values": 1e-5}, 303.4, 1, False),
    "uni2-h": ("vit_giant_patch14_224", UNI2_ARGUMENTS, 681.4, 9, False),
    "virchow": ("vit_huge_patch14_224", VIRCHOW_ARGUMENTS, 631.2, 1, True),
    "virchow2": ("vit_huge_patch14_224", {**VIRCHOW_ARGUMENTS, "reg_tokens": 4}, 631.2, 5, True),
    "h-optimus-0": (OPTIMUS, {"img_size": 224, "init_values": 1e-5}, 1134.8, 5, False),
    "h-optimus-1": (OPTIMUS, {"img_size": 224, "init_values": 1e-5}, 1134.8, 5, False),
    "prov-gigapath": ("vit_giant_patch14_dinov2", GIGAPATH_ARGUMENTS, 1135.0, 1, False),
    "phikon": ("vit_base_patch16_224", {}, 85.8, 1, False),
    "phikon-v2": ("vit_large_patch16_224", {"init_values": 1.0}, 303.4, 1, False),
    "kaiko-vits16": ("vit_small_patch16_224", {"dynamic_img_size": True}, 21.7, 1, False),
    "kaiko-vits8": ("vit_small_patch8_224", {"dynamic_img_size": True}, 21.7, 1, False),
    "kaiko-vitb16": ("vit_base_patch16_224", {"dynamic_img_size": True}, 85.8, 1, False),
    "kaiko-vitb8": ("vit_base_patch8_224", {"dynamic_img_size": True}, 85.8, 1, False),
    "kaiko-vitl14": (
        "vit_large_patch14_reg4_dinov2",
        {"dynamic_img_size": True},
        304.4,
        5,
        False,
    ),
}


def published_model(timm: Any, name: PresetName, **changes: Any) -> nn.Module:
    model, arguments, *_ = CARDS[name]
    arguments = {**arguments, **changes}
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    network: nn.Module = timm.create_model(model, pretrained=False, num_classes=0, **arguments)
    return network.eval()


@pytest.mark.parametrize("name", CARDS)
def test_a_preset_has_the_tensors_of_the_published_model(timm, name):
    """On the meta device, which has shapes but no memory."""
    preset = PRESETS[name].network.timm
    assert preset is not None
    with torch.device("meta"):
        found, expected = timm_network(preset), published_model(timm, name)
    shapes = {key: tensor.shape for key, tensor in found.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in expected.state_dict().items()}
    millions = sum(parameter.numel() for parameter in found.parameters()) / 1e6
    assert millions == pytest.approx(CARDS[name][2], abs=0.06)


def with_one_block(name: PresetName, monkeypatch: pytest.MonkeyPatch) -> Preset:
    """Shorten a preset to its first block; the width stays."""
    preset = PRESETS[name]
    timm = preset.network.timm
    assert timm is not None
    short = timm.model_copy(update={"arguments": {**timm.arguments, "depth": 1}})
    shortened = Preset(
        preset.network.model_copy(update={"timm": short}), preset.licence, preset.address
    )
    monkeypatch.setitem(presets.PRESETS, name, shortened)
    return shortened


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_an_imported_preset_equals_the_published_pipeline(timm, name, tmp_path, monkeypatch):
    network = with_one_block(name, monkeypatch).network
    torch.manual_seed(1)
    model = published_model(timm, name, depth=1)
    with torch.no_grad():  # values that are not the initial zeros and ones
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    file = tmp_path / "model.bin"
    torch.save(model.state_dict(), file)
    encoder = import_encoder(entry(file, name), Geometry(network.patch, network.mpp, network.patch))
    side = network.patch
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)

    inner = pixels[:, 16:-16, 16:-16] if name == "prov-gigapath" else pixels
    mean, std = {
        "h-optimus-0": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)),
        "h-optimus-1": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)),
        **dict.fromkeys([n for n in CARDS if n.startswith("kaiko")], ((0.5,) * 3, (0.5,) * 3)),
    }.get(name, IMAGENET)
    images = torch.from_numpy((inner / 255 - mean) / std).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        tokens = model.forward_features(images)
        *_, prefix, mean_too = CARDS[name]
        parts = [tokens[:, 0]] + [tokens[:, prefix:].sum(1) / (tokens.shape[1] - prefix)] * mean_too
    expected = torch.cat(parts, 1).numpy()
    assert expected.shape == (2, network.embedding_size)
    np.testing.assert_allclose(encoder.embed(pixels), expected, rtol=1e-3, atol=1e-4)
    if not mean_too:  # timm pools the class token itself
        with torch.no_grad():
            np.testing.assert_allclose(model(images).numpy(), expected, rtol=1e-4, atol=1e-5)
    if name.startswith("kaiko-vits"):
        save_encoder(tmp_path / "e", encoder)
        again = load_encoder(tmp_path / "e")
        assert again.card == encoder.card
        np.testing.assert_array_equal(again.embed(pixels), encoder.embed(pixels))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width", "heads"), [("phikon", 768, 12), ("phikon-v2", 1024, 16)])
def test_weights_of_transformers_give_the_same_tokens(
    timm, name, width, heads, tmp_path, monkeypatch
):
    with_one_block(name, monkeypatch)
    weights = transformers_weights(width, 1, dinov2=name == "phikon-v2")
    save_file(weights, tmp_path / "model.safetensors")
    encoder = import_encoder(entry(tmp_path / "model.safetensors", name), Geometry(224, 0.5, 224))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    images = torch.from_numpy((pixels / 255 - IMAGENET[0]) / IMAGENET[1]).permute(0, 3, 1, 2)
    doubles = {key: tensor.double() for key, tensor in weights.items()}
    expected = vision_transformer(doubles, images, heads)[:, 0].numpy()
    np.testing.assert_allclose(encoder.embed(pixels), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.slow
def test_weights_of_another_preset_are_refused_in_one_line(timm, tmp_path, monkeypatch):
    with_one_block("uni", monkeypatch)
    file = tmp_path / "phikon.safetensors"
    save_file(transformers_weights(768, 1), file)
    with pytest.raises(EncoderError, match=r"of another size \['cls_token \(1, 1, 768\)") as error:
        import_encoder(entry(file, "uni"), Geometry(224, 0.5, 224))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_resnet50_pools_the_last_map(timm, tmp_path):
    torch.manual_seed(2)
    model = timm.create_model("resnet50", pretrained=False).eval()  # with its classifier
    torch.save(model.state_dict(), tmp_path / "resnet50.pth")
    encoder = import_encoder(entry(tmp_path / "resnet50.pth", "resnet50"), Geometry(224, 0.5, 224))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    images = torch.from_numpy((pixels / 255 - IMAGENET[0]) / IMAGENET[1]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.forward_features(images.float()).mean((2, 3)).numpy()
    np.testing.assert_allclose(encoder.embed(pixels), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_tokens_of_a_network_without_a_class_token_are_refused(timm):
    with pytest.raises(EncoderError, match="'resnet10t' is not a vision transformer"):
        timm_network(TimmModel(model="resnet10t", tokens="class"))
