"""Whether kernels for GPUs may be used: they are written in Triton, which is no dependency and never imported here."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from formwright.ops.native import PLAIN, watched

#: Types that kernels read; they compute in float32.
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=1)
def installed() -> bool:
    """Whether the package triton is there."""
    return importlib.util.find_spec("triton") is not None


def on_gpu(x: Tensor) -> bool:
    """Whether ``x`` lies where a kernel can reach it and there is a compiler for it; elsewhere other forms run."""
    return x.is_cuda and installed()


def reachable(*tensors: Tensor | None) -> bool:
    """Whether kernels may be handed these, None aside: something, on the GPU in use, in single precision at most, and
    nobody watching. A wanted gradient is no hindrance."""
    given = [t for t in tensors if t is not None]
    if not all(on_gpu(t) and type(t) in PLAIN and t.dtype in TYPES and t.numel() for t in given) or watched():
        return False
    return all(t.get_device() == torch.cuda.current_device() for t in given)
