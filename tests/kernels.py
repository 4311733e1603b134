"""Kernels for GPUs in tests: run by Triton's interpreter on the CPU, and compiled for a GPU that need not be there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
#: How far a value may be off, as a share of the largest.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def interpreted(script: str) -> None:
    """Run ``script`` in a process of its own, since the interpreter takes the compiler's place in all of it."""
    paths = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def compiled(kernel: Any, absent: str, **sizes: Any) -> None:
    """Compile a kernel for a GPU, without a GPU: the interpreter takes much that the compiler refuses. ``absent`` names
    the pointers that are None."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = {**dict.fromkeys(absent.split()), **sizes}
    kinds = {name: "*fp32" if name.endswith("_at") else "i32" for name in kernel.arg_names}
    kinds |= {name: "*i64" for name in ("starts_at", "lengths_at", "owners_at") if name in kinds}
    source = ASTSource(kernel, {**kinds, **dict.fromkeys(fixed, "constexpr")}, fixed)
    options = {"num_warps": 1, "enable_fp_fusion": True}  # unset, it warns
    assert build(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]


def agree(
    form: Any,
    general: Callable[..., tuple[Tensor, Tensor]],
    tensors: Any,
    lengths: Tensor | None,
    offsets: Tensor | None,
    *settings: Any,
) -> None:
    """Both passes of a kernel give the values and gradients of ``general``, computed in float64 from equal inputs."""
    from formwright.ops.passes import Passes

    single, double = (
        type(tensors)(*(t if t is None else t.to(kind or t.dtype).requires_grad_() for t in tensors))
        for kind in (None, torch.float64)
    )
    rest = (form.rows(tensors[0], lengths, offsets), *settings)
    outputs = Passes.apply(form, general, type(tensors), rest, *single), general(*double)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs[0]]
    grads = [_gradients(pair, held, directions) for pair, held in zip(outputs, (single, double))]
    for mine, wanted in zip((*outputs[0], *grads[0]), (*outputs[1], *grads[1]), strict=True):
        assert mine.shape == wanted.shape
        scale = float(wanted.detach().abs().max()) + 1e-6
        torch.testing.assert_close(mine.double() / scale, wanted / scale, rtol=0, atol=TOLERANCE[mine.dtype])


def _gradients(outputs: Sequence[Tensor], held: Any, directions: Sequence[Tensor]) -> Sequence[Tensor]:
    given = [t for t in held if t is not None]
    towards = [d.to(out.dtype) for d, out in zip(directions, outputs)]
    return torch.autograd.grad(list(outputs), given, towards, allow_unused=True, materialize_grads=True)
