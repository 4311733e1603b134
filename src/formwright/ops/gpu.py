"""Whether kernels for GPUs may be used: they are written in Triton, which is no dependency and never imported here."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor


@functools.lru_cache(maxsize=1)
def installed() -> bool:
    """Whether the package triton is there."""
    return importlib.util.find_spec("triton") is not None


def on_gpu(x: Tensor) -> bool:
    """Whether ``x`` lies where a kernel can reach it and there is a compiler for it; elsewhere other forms run."""
    return x.is_cuda and installed()
