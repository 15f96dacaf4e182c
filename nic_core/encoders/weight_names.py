"""Names of weights: from transformers and DINOv2 to timm.

The same vision transformer has other names of its tensors in each library. :func:`timm_names`
renames the tensors of two libraries to those of ``timm.models.vision_transformer``, which computes
the same function:

transformers (``ViTModel``, ``Dinov2Model``), for example Phikon and Phikon-v2
    The query, key and value layers of a block become one layer ``qkv``, in this order. Left out are
    the tensors that a class token does not depend on: ``embeddings.mask_token`` and ``pooler``.
DINOv2 (the repository of its authors), for example the ViT-L/14 of Kaiko
    ``register_tokens`` becomes ``reg_token``, and the position embedding of the class token is
    added to the class token, as in timm's own conversion. ``mask_token`` is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(\w+)")
_QKV = {f"attention.attention.{part}": part for part in ("query", "key", "value")}
_LAYERS = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_LAYER_SCALES = {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}
_OUTSIDE_BLOCKS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_UNUSED = ("embeddings.mask_token", "pooler.")


def timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a vision transformer under timm's names.

    The library is recognised by ``embeddings.cls_token`` (transformers) or ``mask_token`` (DINOv2).
    Tensors of other networks, and tensors without a counterpart in timm, keep their names.
    """
    if "embeddings.cls_token" in tensors:
        return _from_transformers(tensors)
    if "mask_token" in tensors:
        return _from_dinov2(tensors)
    return dict(tensors)


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_UNUSED):
            continue
        block = _BLOCK.fullmatch(name)
        if block is None:
            renamed[_OUTSIDE_BLOCKS.get(name, name)] = tensor
            continue
        number, layer, kind = block.groups()
        if layer in _QKV:
            qkv.setdefault(f"blocks.{number}.attn.qkv.{kind}", {})[_QKV[layer]] = tensor
        elif f"{layer}.{kind}" in _LAYER_SCALES:
            renamed[f"blocks.{number}.{_LAYER_SCALES[f'{layer}.{kind}']}"] = tensor
        else:
            renamed[f"blocks.{number}.{_LAYERS.get(layer, layer)}.{kind}"] = tensor
    for name, parts in qkv.items():
        if len(parts) == len(_QKV):  # an incomplete layer is reported as missing
            renamed[name] = torch.cat([parts[part] for part in _QKV.values()])
    return renamed


def _from_dinov2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {name: tensor for name, tensor in tensors.items() if name != "mask_token"}
    if {"register_tokens", "cls_token", "pos_embed"} <= renamed.keys():
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed
