"""Tensors on a device that this machine lacks: like Apple's, it has no float64, and will not
compute with tensors of the CPU."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("mps")


class Elsewhere(torch.Tensor):
    """Numbers of the CPU that say they are on MPS. What the device could not do is an error."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        if inner.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=MPS
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        target = kwargs.pop("device", MPS)
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        if not copies and any(not isinstance(t, cls) and t.dim() for t in tensors):
            raise RuntimeError(f"{function}: tensors on MPS and on the CPU")
        inner = tree_map(lambda a: a.inner if isinstance(a, cls) else a, (args, kwargs))
        result = function(*inner[0], **inner[1])
        if torch.device(target) != MPS:
            return result
        return tree_map(lambda r: cls(r) if isinstance(r, torch.Tensor) else r, result)


class Arrivals(TorchFunctionMode):
    """Lets tensors of the CPU be moved there, and an identity be made there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function not in (torch.Tensor.to, torch.eye) or isinstance(args[0], Elsewhere):
            return function(*args, **kwargs)
        places = [kwargs.pop("device", None), *(a for a in args if isinstance(a, torch.device))]
        args = [a for a in args if not isinstance(a, torch.device)]
        result = function(*args, **kwargs)
        return Elsewhere(result) if MPS in places else result
