"""Counting what a call really does: multiply-accumulates of its products, and the largest tensor it makes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmm_.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.mv.default: (0, 1),
    aten.addmv.default: (1, 2),
    aten.dot.default: (0, 1),
}


class Counter(TorchDispatchMode):
    """``macs`` of matrix products, convolutions and fused attention; ``peak`` elements of the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.peak = 0
        #: tensors made on a device that holds memory
        self.real: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.macs += _macs(func, args, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                # A view makes nothing, so an expanded tensor counts what it holds.
                self.peak = max(self.peak, leaf.untyped_storage().nbytes() // max(1, leaf.element_size()))
                if leaf.device.type != "meta":
                    self.real.append(str(func))
        return out


def _macs(func: Any, args: Any, out: Any) -> int:
    if func in _PRODUCTS:
        a, b = (args[index] for index in _PRODUCTS[func])
        return a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
    if "scaled_dot_product" in str(func) and "backward" not in str(func):
        q, k, v = args[:3]
        return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
    if func is aten.convolution.default:
        weight = args[1]
        return out.numel() * weight[0].numel()
    return 0
