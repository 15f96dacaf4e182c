"""Tests of external networks: TorchScript, torch.export and timm, in local files."""

from __future__ import annotations

import contextlib
import json
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from nic_core.cohort import ExternalNetwork, Geometry, ImportedEncoder, Preprocess, TimmModel
from nic_core.compression import compress_slide
from nic_core.encoders import EncoderError, import_encoder, load_encoder, save_encoder
from nic_core.slides import content_identity, open_slide
from nic_core.tiling.patches import patch_table
from nic_core.tiling.tissue import TissueMask
from tests.slides.conftest import paint, write_tiff

pytestmark = pytest.mark.slow

PREPROCESS = Preprocess(mean=(0.7, 0.5, 0.6), std=(0.2, 0.3, 0.25), resize=48)
NETWORK = ExternalNetwork(patch=64, mpp=0.5, embedding_size=5, preprocess=PREPROCESS)
SIDE = 48


class Small(nn.Module):
    """A small network with convolution, BatchNorm, dropout and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 5, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.dense = nn.Linear(4 * 11 * 11, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        maps = functional.relu(self.norm(self.convolution(pixels)))
        return self.dense(self.dropout(maps.view(maps.shape[0], -1)))


@pytest.fixture(scope="module")
def network() -> Small:
    torch.manual_seed(3)
    small = Small()
    small(torch.randn(8, 3, SIDE, SIDE))  # running statistics that are not the initial ones
    return small.eval()


def export(network: nn.Module, path: Path, *, dynamic: bool = True) -> Path:
    batch = ({0: torch.export.Dim("batch")},) if dynamic else None
    example = (torch.rand(2, 3, SIDE, SIDE),)
    torch.export.save(torch.export.export(network, example, dynamic_shapes=batch), path)
    return path


def script(network: nn.Module, path: Path) -> Path:
    torch.jit.script(network).save(path)
    return path


@pytest.fixture(scope="module")
def files(network: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    return {
        "exported": export(network, folder / "small.pt2"),
        "script": script(network, folder / "small.pt"),
    }


def entry(file: Path, network: ExternalNetwork | None = NETWORK) -> ImportedEncoder:
    return ImportedEncoder(name="small", objective="imported", file=file, network=network)


def load(file: Path, network: ExternalNetwork = NETWORK):
    return import_encoder(entry(file, network), Geometry(64, 0.5, 64))


def expected(network: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Compute embeddings independently: scale, resize, standardise, forward."""
    images = torch.from_numpy(pixels / 255).permute(0, 3, 1, 2).contiguous()
    images = functional.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    for channel in range(3):
        images[:, channel] -= PREPROCESS.mean[channel]
        images[:, channel] /= PREPROCESS.std[channel]
    with torch.no_grad():
        return network(images.float()).numpy()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("kind", ["exported", "script"])
def test_external_network_keeps_its_embeddings(kind, files, network, pixels, tmp_path):
    encoder = load(files[kind])
    embeddings = encoder.embed(pixels)
    np.testing.assert_allclose(embeddings, expected(network, pixels), rtol=1e-4, atol=1e-5)
    save_encoder(tmp_path / "e", encoder)
    again = load_encoder(tmp_path / "e")
    assert again.card == encoder.card
    np.testing.assert_array_equal(again.embed(pixels), embeddings)


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-3), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("kind", ["exported", "script"])
def test_external_network_compresses_a_slide(kind, precision, error, files, network, tmp_path):
    path = write_tiff(tmp_path / "slide.tif", paint(700, 500), mpp=0.5)
    encoder = load(files[kind])
    with open_slide(path) as slide:
        mask = TissueMask(np.random.default_rng(0).random((44, 32)) < 0.8, 8.0)
        table = patch_table("s", slide, mask, Geometry(64, 0.5, 64), tissue=0.6)
        grid = compress_slide(
            slide,
            table,
            encoder.prepare("cpu", precision),
            slide_id="s",
            slide_identity=content_identity(path),
            workers=2,
        )
        kept = table.filter("kept")
        assert 0 < kept.height < table.height
        assert int(grid.valid.sum()) == kept.height
        for row in kept.iter_rows(named=True):
            patch = slide.read(row["x"], row["y"], 64, 64, 0.5)
            found = np.asarray(grid.embeddings[:, row["row"], row["column"]], np.float32)
            np.testing.assert_allclose(
                found, expected(network, patch[None])[0], rtol=2e-3, atol=error
            )
    assert grid.provenance.weights_hash == encoder.card.weights_hash
    assert grid.provenance.precision == precision


def test_hash_covers_file_and_preprocessing(files):
    other = NETWORK.model_copy(
        update={"preprocess": PREPROCESS.model_copy(update={"mean": (0.5, 0.5, 0.5)})}
    )
    hashes = {
        load(files["exported"]).card.weights_hash,
        load(files["exported"], other).card.weights_hash,
        load(files["script"]).card.weights_hash,
    }
    assert len(hashes) == 3
    assert load(files["script"]).card.weights_hash in hashes


def test_a_modified_network_file_is_refused(files, tmp_path):
    save_encoder(tmp_path, load(files["script"]))
    with zipfile.ZipFile(tmp_path / "network.pt", "a") as archive:
        archive.writestr("small/extra/note", "changed")
    with pytest.raises(EncoderError, match="hash differs"):
        load_encoder(tmp_path)
    (tmp_path / "network.pt").unlink()
    with pytest.raises(EncoderError, match="no encoder here"):
        load_encoder(tmp_path)


# --- networks with another interface ---------------------------------------------------------


def test_a_fixed_batch_size_is_refused(network, tmp_path):
    with pytest.raises(EncoderError, match="does not accept float32 .* dynamic batch"):
        load(export(network, tmp_path / "fixed.pt2", dynamic=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_size": 6}, r"3 patches has shape \(3, 5\), but finite numbers \(3, 6\)"),
        (
            {"preprocess": PREPROCESS.model_copy(update={"resize": 40})},
            r"does not accept float32 \(B, 3, 40, 40\)",
        ),
    ],
)
def test_sizes_that_differ_from_the_entry_are_refused(change, message, files):
    with pytest.raises(EncoderError, match=message):
        load(files["script"], NETWORK.model_copy(update=change))


def test_a_network_in_training_mode_is_refused(tmp_path):
    class Noisy(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return functional.dropout(pixels.mean((2, 3)), 0.5, True)

    three = NETWORK.model_copy(update={"embedding_size": 3})
    with pytest.raises(EncoderError, match="evaluation mode"):
        load(script(Noisy(), tmp_path / "noisy.pt"), three)


def test_embeddings_that_are_not_finite_are_refused(tmp_path):
    class Broken(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.mean((2, 3)) / 0

    three = NETWORK.model_copy(update={"embedding_size": 3})
    with pytest.raises(EncoderError, match="finite numbers"):
        load(script(Broken(), tmp_path / "broken.pt"), three)


def test_an_encoder_folder_of_another_geometry_is_refused(files, tmp_path):
    save_encoder(tmp_path / "small", load(files["script"]))
    folder = entry(tmp_path / "small", None)
    assert import_encoder(folder, Geometry(64, 0.5, 32)).card.patch == 64
    with pytest.raises(EncoderError, match="entry says 224 px at 1; write 'patch: 64' and 'mpp: 0"):
        import_encoder(folder, Geometry(224, 1.0, 224))


def test_file_and_description_must_match(files, tmp_path):
    for file, network, message in (
        (tmp_path / "x.onnx", NETWORK, "not an encoder file; supported: a folder, .h5"),
        (tmp_path / "x.pt2", None, "needs 'preset'"),
        (tmp_path / "x.h5", NETWORK, "leave 'network' out"),
        (tmp_path / "x.safetensors", NETWORK, "is required for files of weights"),
        (
            tmp_path / "x.pt",
            NETWORK.model_copy(update={"timm": TimmModel(model="r")}),
            "not allowed for others",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            entry(file, network)
    with pytest.raises(EncoderError, match="does not exist"):
        load(tmp_path / "gone.pt2")


# --- files that would execute code -----------------------------------------------------------


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def rewrite(source: Path, out: Path, change) -> Path:
    """Copy an archive; ``change(name, data)`` returns the new bytes of each member."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out


def refused(path: Path, canary: Path, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        load(path)
    assert not canary.exists()


def test_a_pickle_in_an_exported_archive_is_not_loaded(files, tmp_path):
    canary = tmp_path / "canary"
    torch.save((Trap(canary),), tmp_path / "trap")
    trap = (tmp_path / "trap").read_bytes()
    path = rewrite(
        files["exported"],
        tmp_path / "trap.pt2",
        lambda name, data: trap if name.endswith("sample_inputs/model.pt") else data,
    )
    refused(path, canary, "cannot read this export")
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert canary.exists()  # torch.export.load alone does execute the pickle


def test_a_pickled_constant_is_not_loaded(files, tmp_path):
    canary = tmp_path / "canary"
    path = rewrite(files["exported"], tmp_path / "trap.pt2", lambda _, data: data)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("small/data/constants/opaque_obj_0", pickle.dumps(Trap(canary)))
    refused(path, canary, "opaque_obj_0")


def test_an_operator_outside_the_allowed_ones_is_refused(files, tmp_path):
    def change(name: str, data: bytes) -> bytes:
        return data.replace(b"torch.ops.aten.relu.default", b"torch.os.system")

    path = rewrite(files["exported"], tmp_path / "system.pt2", change)
    refused(path, tmp_path / "canary", r"refused, because .*torch\.os\.system")


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_a_pickled_network_is_not_loaded(suffix, tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / f"model{suffix}"
    torch.save({"weight": Trap(canary)}, path)
    timm = NETWORK.model_copy(update={"timm": TimmModel(model="r")})
    stub = types.ModuleType("timm")
    stub.create_model = lambda *_, **__: Small()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "timm", stub)
        with pytest.raises(EncoderError, match="other objects than tensors"):
            load(path, timm)
    assert not canary.exists()


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x05\x06" + bytes(18)])
def test_other_files_are_refused(suffix, content, tmp_path):
    path = tmp_path / f"other{suffix}"
    path.write_bytes(content)
    with pytest.raises(EncoderError, match=rf"other\{suffix}: not a "):
        load(path)


@pytest.mark.parametrize("kind", ["exported", "script"])
def test_a_truncated_or_damaged_archive_is_refused(kind, files, tmp_path):
    whole = files[kind].read_bytes()
    for number, data in enumerate((whole[: len(whole) // 2], b"x" * 400 + whole[400:])):
        path = tmp_path / f"{number}{files[kind].suffix}"
        path.write_bytes(data)
        with pytest.raises(EncoderError, match=path.name):
            load(path)


# --- timm ------------------------------------------------------------------------------------


def test_timm_weights_are_loaded_from_a_local_file(network, pixels, tmp_path, monkeypatch):
    """timm is replaced by a stub; the last test of this file uses the real one."""
    calls = []

    def create_model(model: str, **arguments: object) -> nn.Module:
        calls.append((model, arguments))
        return Small()

    stub = types.ModuleType("timm")
    stub.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", stub)
    timm = NETWORK.model_copy(update={"timm": TimmModel(model="small", arguments={"depth": 2})})
    weights = {**network.state_dict(), "head.weight": torch.zeros(2, 5)}
    save_file(weights, tmp_path / "small.safetensors")
    torch.save(weights, tmp_path / "small.bin")

    encoder = load(tmp_path / "small.safetensors", timm)
    assert calls[0] == ("small", {"pretrained": False, "num_classes": 0, "depth": 2})
    np.testing.assert_allclose(
        encoder.embed(pixels), expected(network, pixels), rtol=1e-4, atol=1e-5
    )
    save_encoder(tmp_path / "e", encoder)
    again = load_encoder(tmp_path / "e")
    np.testing.assert_array_equal(again.embed(pixels), encoder.embed(pixels))
    assert load(tmp_path / "small.bin", timm).card.weights_hash == again.card.weights_hash

    card = json.loads((tmp_path / "e" / "card.json").read_text())
    card["pixels"]["mean"] = [0, 0, 0]
    (tmp_path / "e" / "card.json").write_text(json.dumps(card))
    with pytest.raises(EncoderError, match="hash differs"):
        load_encoder(tmp_path / "e")

    del weights["dense.bias"]
    save_file(weights | {"surplus": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(EncoderError, match=r"missing \['dense.bias'\], unknown \['surplus'\]"):
        load(tmp_path / "other.safetensors", timm)


def test_error_without_timm_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    timm = NETWORK.model_copy(update={"timm": TimmModel(model="resnet18")})
    with pytest.raises(EncoderError, match=r"pip install 'nic-pathology\[timm\]'"):
        load(tmp_path / "x.safetensors", timm)


def test_a_timm_model_becomes_an_encoder(tmp_path):
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm is not installed, or its torchvision does not match PyTorch: {error}")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "resnet.safetensors")
    network = ExternalNetwork(
        patch=64,
        mpp=0.5,
        embedding_size=512,
        preprocess=PREPROCESS,
        timm=TimmModel(model="resnet10t"),
    )
    encoder = load(tmp_path / "resnet.safetensors", network)
    patch = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    with torch.no_grad():
        images = torch.from_numpy(patch / 255).permute(0, 3, 1, 2)
        images = functional.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PREPROCESS.mean, PREPROCESS.std))
        features = model.forward_head(
            model.forward_features(((images - mean) / std).float()), pre_logits=True
        )
    np.testing.assert_allclose(encoder.embed(patch), features.numpy(), rtol=1e-3, atol=1e-4)
