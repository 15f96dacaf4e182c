"""Presets: published networks by name, as ``preset`` of an imported encoder.

A preset is everything about a network except its weights, which come from a local file: input,
preprocessing, architecture, pooling, size of the embedding, licence, and the address at which the
weights are asked for. It takes patches of the size that the network takes, so that no patch is
resized; only Prov-GigaPath crops.

Sources, and what they do not confirm. [T] is the code of TRIDENT (github.com/mahmoodlab/TRIDENT,
``patch_encoder_models/load.py``), which repeats the model cards; [L] is the table of licences in
github.com/rendeirolab/lazyslide-models. Where a source says "20x", the table says 0.5 um/px.

uni, uni2-h
    Model, preprocessing and licence: github.com/mahmoodlab/UNI, README. Resolution: 20x, from the
    paper (Chen et al. 2024), which also trains on 256 and 512 px; 224 px is the network's input.
virchow
    Licence: the model card. Resolution: Vorontsov et al. 2024. Model and pooling: [T].
virchow2
    Licence: the model card. Model and pooling: [T]; the 4 register tokens are left out. Trained at
    0.25 to 2 um/px (Zimmermann et al. 2024); 0.5 um/px is [choice].
h-optimus-0
    Model, preprocessing, size and resolution: github.com/bioptimus/releases, README. Licence: [L].
h-optimus-1
    Model and preprocessing: [T]. Licence: [L]. Resolution: not confirmed; as h-optimus-0.
prov-gigapath
    Preprocessing and terms of use: github.com/prov-gigapath/prov-gigapath, README: a tile of 256 px
    of which the central 224 px are encoded. Model: [T]. Licence: [L]. Resolution: 20x, from the
    paper (Xu et al. 2024).
phikon
    Model, pooling and preprocessing: [T]. LayerNorm as in timm: history of the model card's
    repository. Licence: github.com/owkin/HistoSSLscaling. Resolution: 20x, from the paper (Filiot
    et al. 2023).
phikon-v2
    Model and licence: the model card. Pooling and preprocessing: [T]. Resolution: 20x, from the
    paper (Filiot et al. 2024).
ctranspath
    Preprocessing, resolution (1 um/px is recommended) and licence: github.com/Xiyue-Wang/TransPath,
    README and ``get_features_CTransPath.py``. A Swin transformer with a convolutional stem, which
    timm does not have: an exported graph is required.
conch
    Preprocessing (448 px, mean and std of CLIP), embedding (before projection) and licence:
    github.com/mahmoodlab/CONCH. Its attentional pooling is not in timm: an exported graph is
    required. The sources state no resolution; 0.5 um/px is [choice].
kaiko-vits16, kaiko-vits8, kaiko-vitb16, kaiko-vitb8, kaiko-vitl14
    Model, preprocessing and licence: github.com/kaiko-ai/towards_large_pathology_fms. Trained at
    several resolutions (Aben et al. 2024); 0.5 um/px is [choice]. kaiko-vitl14 has position
    embeddings for 518 px, which timm interpolates.
resnet50
    timm's ``resnet50.tv_in1k``: torchvision's weights of ImageNet, BSD-3-Clause. Patch and
    resolution are [choice].

A correction of a row changes embeddings, so it raises the code version of the asset ``encoder``.
"""

from __future__ import annotations

from dataclasses import dataclass

from nic_core.cohort.encoders import ExternalNetwork, Preprocess, PresetName, TimmModel, Tokens

IMAGENET = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP = Preprocess(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
BIOPTIMUS = Preprocess(mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517))
HALF = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

Arguments = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class Preset:
    """A published network.

    Attributes
    ----------
    network
        Input, output and timm model; without ``timm`` an exported graph is required.
    licence
        Licence of the weights.
    address
        Web page at which the weights are asked for.
    """

    network: ExternalNetwork
    licence: str
    address: str


def licence_of(preset: str | None) -> str:
    """Return the licence of a preset's weights; empty for None and for names not in the table."""
    return {str(name): known.licence for name, known in PRESETS.items()}.get(preset or "", "")


def _vit(
    model: str,
    size: int,
    arguments: Arguments | None = None,
    *,
    tokens: Tokens = "class",
    patch: int = 224,
    preprocess: Preprocess = IMAGENET,
) -> ExternalNetwork:
    return ExternalNetwork(
        patch=patch,
        mpp=0.5,
        embedding_size=size,
        preprocess=preprocess,
        timm=TimmModel(model=model, arguments=arguments or {}, tokens=tokens),
    )


def _kaiko(model: str, size: int, arguments: Arguments | None = None) -> Preset:
    return Preset(
        _vit(model, size, arguments, preprocess=HALF),
        "Kaiko non-commercial",
        "https://github.com/kaiko-ai/towards_large_pathology_fms",
    )


# feed-forward layers of SwiGLU, half of whose first layer is a gate
_SWIGLU: Arguments = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
_VIRCHOW: Arguments = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, **_SWIGLU}
_OPTIMUS: Arguments = {"img_size": 224, "init_values": 1e-5}
_UNI2: Arguments = {
    "img_size": 224,
    "patch_size": 14,
    "depth": 24,
    "num_heads": 24,
    "init_values": 1e-5,
    "embed_dim": 1536,
    "mlp_ratio": 2.66667 * 2,
    "no_embed_class": True,
    "reg_tokens": 8,
    **_SWIGLU,
}
_GIGAPATH: Arguments = {
    "img_size": 224,
    "patch_size": 16,
    "embed_dim": 1536,
    "depth": 40,
    "num_heads": 24,
    "init_values": 1e-5,
    "mlp_ratio": 5.33334,
}
_NO_DERIVATIVES = "CC-BY-NC-ND-4.0"
_HUB = "https://huggingface.co"

PRESETS: dict[PresetName, Preset] = {
    "uni": Preset(
        _vit("vit_large_patch16_224", 1024, {"init_values": 1e-5}),
        _NO_DERIVATIVES,
        f"{_HUB}/MahmoodLab/UNI",
    ),
    "uni2-h": Preset(
        _vit("vit_giant_patch14_224", 1536, _UNI2), _NO_DERIVATIVES, f"{_HUB}/MahmoodLab/UNI2-h"
    ),
    "virchow": Preset(
        _vit("vit_huge_patch14_224", 2560, _VIRCHOW, tokens="class+mean"),
        "Apache-2.0",
        f"{_HUB}/paige-ai/Virchow",
    ),
    "virchow2": Preset(
        _vit("vit_huge_patch14_224", 2560, {**_VIRCHOW, "reg_tokens": 4}, tokens="class+mean"),
        _NO_DERIVATIVES,
        f"{_HUB}/paige-ai/Virchow2",
    ),
    "h-optimus-0": Preset(
        _vit("vit_giant_patch14_reg4_dinov2", 1536, _OPTIMUS, preprocess=BIOPTIMUS),
        "Apache-2.0",
        f"{_HUB}/bioptimus/H-optimus-0",
    ),
    "h-optimus-1": Preset(
        _vit("vit_giant_patch14_reg4_dinov2", 1536, _OPTIMUS, preprocess=BIOPTIMUS),
        _NO_DERIVATIVES,
        f"{_HUB}/bioptimus/H-optimus-1",
    ),
    "prov-gigapath": Preset(
        _vit(
            "vit_giant_patch14_dinov2",
            1536,
            _GIGAPATH,
            patch=256,
            preprocess=IMAGENET.model_copy(update={"crop": 224}),
        ),
        "Apache-2.0, research only",
        f"{_HUB}/prov-gigapath/prov-gigapath",
    ),
    "phikon": Preset(
        _vit("vit_base_patch16_224", 768), "Owkin non-commercial", f"{_HUB}/owkin/phikon"
    ),
    "phikon-v2": Preset(
        _vit("vit_large_patch16_224", 1024, {"init_values": 1.0}),
        "Owkin non-commercial",
        f"{_HUB}/owkin/phikon-v2",
    ),
    "ctranspath": Preset(
        ExternalNetwork(patch=224, mpp=1.0, embedding_size=768, preprocess=IMAGENET),
        "GPL-3.0, non-commercial",
        "https://github.com/Xiyue-Wang/TransPath",
    ),
    "conch": Preset(
        ExternalNetwork(patch=448, mpp=0.5, embedding_size=512, preprocess=CLIP),
        _NO_DERIVATIVES,
        f"{_HUB}/MahmoodLab/CONCH",
    ),
    "kaiko-vits16": _kaiko("vit_small_patch16_224", 384),
    "kaiko-vits8": _kaiko("vit_small_patch8_224", 384),
    "kaiko-vitb16": _kaiko("vit_base_patch16_224", 768),
    "kaiko-vitb8": _kaiko("vit_base_patch8_224", 768),
    "kaiko-vitl14": _kaiko(
        "vit_large_patch14_reg4_dinov2", 1024, {"img_size": 518, "dynamic_img_size": True}
    ),
    "resnet50": Preset(
        ExternalNetwork(
            patch=224,
            mpp=0.5,
            embedding_size=2048,
            preprocess=IMAGENET,
            timm=TimmModel(model="resnet50"),
        ),
        "BSD-3-Clause",
        f"{_HUB}/timm/resnet50.tv_in1k",
    ),
}
