"""PyTorch's private interfaces; no other module of the project uses any.

PyTorch may rename or remove them in any release. Each has a check whether this build of PyTorch
has it, and its caller has a fallback that needs public interfaces only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FUSED_OPERATORS = ("_convolution_pointwise", "_reorder_convolution_weight")


def has_fused_convolution() -> bool:
    """Return whether this build of PyTorch has oneDNN's fused convolution (x86 CPUs).

    The operators are private because ``torch.compile`` is the public way to them, at the price of
    a C++ compiler and a minute of compilation in each process. Without them, the convolution and
    LeakyReLU run as separate public operators
    (:class:`~nic_core.encoders.inference.FoldedEncoder`): the same embeddings, but slower.
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and all(hasattr(torch.ops.mkldnn, name) for name in _FUSED_OPERATORS)


def reorder_weight(convolution: nn.Conv2d) -> Tensor:
    """Return the weight of an unpadded convolution in the memory layout of oneDNN's kernels.

    A weight in PyTorch's own layout is reordered at every call. Requires
    :func:`has_fused_convolution`.
    """
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    weight: Tensor = reorder(convolution.weight, [0, 0], convolution.stride, [1, 1], 1, None)
    return weight


def convolve_leaky_relu(
    maps: Tensor, weight: Tensor, bias: Tensor, stride: list[int], slope: float
) -> Tensor:
    """Convolve without padding and apply LeakyReLU in one kernel.

    Separate operators read and write the feature maps once more. Requires
    :func:`has_fused_convolution`; ``weight`` is that of :func:`reorder_weight`.
    """
    convolve = torch.ops.mkldnn._convolution_pointwise
    result: Tensor = convolve(
        maps, weight, bias, [0, 0], stride, [1, 1], 1, "leaky_relu", [slope], ""
    )
    return result


def cpu_has_vnni() -> bool:
    """Return whether the CPU has AVX512-VNNI, dot products of int8 that do not overflow.

    Without this query the answer is ``False``, and precision ``int8`` is refused.
    """
    query = getattr(torch.cpu, "_is_vnni_supported", None)
    return query is not None and bool(query())


def cpu_has_amx() -> bool:
    """Return whether the CPU has AMX, the matrix units that make bfloat16 faster than float32.

    PyTorch has no public query of CPU features. Without this one the answer is ``False``, and
    precision ``auto`` is float32 on the CPU.
    """
    query = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return query is not None and bool(query())
