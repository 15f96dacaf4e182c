"""A simulated second device, to test on a CPU that no step mixes devices.

Its tensors report the device ``meta`` and are computed by the CPU, so results must equal the CPU's
exactly. As on a GPU, an operation on tensors of both devices fails, and so does numpy on a tensor
of the second device. Features that only CUDA has (its random state, page-locked memory) are not
simulated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten


class There(torch.Tensor):
    """A tensor on the second device."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        there: There = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device="meta"
        )
        there.here = here
        return there

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Context in which ``meta`` is a device that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, There) for x in tree_leaves((args, kwargs))) or _is_meta(kwargs):
            self.operations += 1
            return compute(func, args, kwargs)
        return func(*args, **kwargs)


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    target = kwargs.get("device")
    inside = {**kwargs, "device": torch.device("cpu")} if target is not None else kwargs
    here = tree_map_only(There, lambda x: x.here, (args, inside))
    if func is aten._to_copy.default:
        found = func(*here[0], **here[1])
        goes = _is_meta(kwargs) or (target is None and isinstance(tensors[0], There))
        return There(found) if goes else found
    # as with CUDA, a scalar tensor of the CPU works on any device, and copies cross devices
    on_cpu = [x for x in tensors if not isinstance(x, There) and x.ndim]
    if on_cpu and func is not aten.copy_.default:
        raise RuntimeError(f"{func}: tensors of the CPU and of the second device")
    found = func(*here[0], **here[1])
    if func is aten._local_scalar_dense.default:
        return found
    found = tree_map_only(torch.Tensor, There, found)
    return return_and_correct_aliasing(func, args, kwargs, found)


def _is_meta(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta"
