"""An op over rows by its kernel, both passes; other forms where there is none, and for second derivatives.

Ops whose kernels have a backward pass of their own keep them in ``native.py`` (float32 on the CPU) and ``triton.py``
(on a GPU). Both have the three functions of :class:`Kernel`, and :func:`run` does the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from formwright.ops import gpu, native
from formwright.ops.rows import Rows

Outputs = tuple[Tensor, Tensor]


class Kernel(Protocol):
    """A module that computes an op. ``tensors`` are what gradients flow to, ``settings`` all else that is given."""

    def rows(self, x: Tensor, lengths: Tensor | None, offsets: Tensor | None) -> Rows:
        """The rows as :meth:`forward` and :meth:`backward` take them."""

    def forward(self, tensors: Any, rows: Any, *settings: Any, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, what is remembered, and with ``keep`` whatever the backward pass needs besides ``tensors``."""

    def backward(
        self, grad_y: Tensor, grad_final: Tensor | None, kept: Tensor | None, tensors: Any, rows: Any, *settings: Any
    ) -> Sequence[Tensor | None]:
        """Gradients of ``tensors``, in their order."""


def run(
    op: str,
    general: Callable[..., Outputs],
    tensors: Any,
    lengths: Tensor | None,
    offsets: Tensor | None,
    *settings: Any,
) -> Outputs:
    """y and what is remembered, by the kernel of ``op`` that takes ``tensors`` (a named tuple, x first, None for what
    is not given), or ``general(*tensors)``."""
    kernel = _kernel(op, tensors)
    if kernel is None:
        return general(*tensors)
    rows = kernel.rows(tensors[0], lengths, offsets)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return Passes.apply(kernel, general, type(tensors), (rows, *settings), *tensors)
    return kernel.forward(tensors, rows, *settings, keep=False)[:2]


def _kernel(op: str, tensors: Sequence[Tensor | None]) -> Any:
    if native.reachable(*tensors):
        return _module(op, "native")
    return _module(op, "triton") if gpu.reachable(*tensors) else None


@functools.cache
def _module(op: str, form: str) -> Any:
    return import_module(f"formwright.ops.{op}.{form}")


class Passes(torch.autograd.Function):
    """(kernel, general, named tuple, what else the kernel takes, *tensors) -> y, what is remembered."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, general: Any, named: Any, rest: tuple, *tensors: Any) -> Outputs:
        y, final, kept = kernel.forward(named(*tensors), *rest, keep=True)
        ctx.save_for_backward(*tensors, kept)
        ctx.given = kernel, general, named, rest
        ctx.set_materialize_grads(False)  # what is remembered is seldom used, and its gradient then costs nothing
        return y, final

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        *tensors, kept = ctx.saved_tensors
        kernel, general, named, rest = ctx.given
        wanted = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            grads = native.differentiated(general, tensors, wanted, (grad_y, grad_final))
        else:
            grad_y = torch.zeros_like(tensors[0]) if grad_y is None else grad_y
            grads = kernel.backward(grad_y, grad_final, kept, named(*tensors), *rest)
        return *[None] * 4, *(grad if want else None for grad, want in zip(grads, wanted))
