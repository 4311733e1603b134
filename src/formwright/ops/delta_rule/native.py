"""The delta rule by the compiled kernels: float32 on the CPU, rows or packed documents; see ``native.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from functools import partial
from typing import Any

import torch
from torch import Tensor

from formwright.ops import native
from formwright.ops.delta_rule.chunked import again, chunkwise, documents

#: Tokens of a chunk of the kernels.
CHUNK = 32
#: Largest width of a head whose state stays in the second-level cache.
WIDEST = 256

_INPUTS = ("q", "k", "v", "beta", "state")
_GRADIENTS = ("d_out", "d_last", "d_q", "d_k", "d_v", "d_beta", "d_state")


class Call(native.Call):
    """The struct of the same name in ``native.cpp``."""

    _fields_ = native.fields(
        (c_void_p, "q k v beta state out last errors states"),
        (c_void_p, "d_out d_last d_q d_k d_v d_beta d_state borders"),
        (c_int64, "documents heads keys values"),
        (c_float, "scale"),
    )


def suits(*tensors: Tensor) -> bool:
    """Whether the kernels take q, k, v, beta and state; gradients are no matter, :class:`Compiled` makes them."""
    q, _, v = tensors[:3]
    return max(q.shape[-1], v.shape[-1]) <= WIDEST and native.reachable(*tensors)


def _run(entry: str, tensors: dict[str, Tensor], sizes: tuple[int, ...], borders: Sequence[int], scale: float) -> None:
    """Run one pass over ``tensors``, contiguous, by their names in the kernel's call."""
    heads, keys, values = sizes
    call = Call(documents=len(borders) - 1, heads=heads, keys=keys, values=values, scale=scale)
    call.give(borders=borders, **tensors)
    call.run(entry)


def _borders(q: Tensor, borders: Sequence[int] | None) -> Sequence[int]:
    """Rows of equal length are documents as well."""
    return borders if borders is not None else [row * q.shape[1] for row in range(q.shape[0] + 1)]


class Compiled(torch.autograd.Function):
    """Both passes compiled. For the backward one, errors of all tokens and states before all chunks are kept."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float,
        borders: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        inputs = [t.contiguous() for t in (q, k, v, beta, state)]
        out, last = torch.empty_like(inputs[2]), torch.empty_like(inputs[4])
        places, sizes = _borders(q, borders), (*q.shape[2:], v.shape[-1])
        made = {**dict(zip(_INPUTS, inputs)), "out": out, "last": last}
        if any(ctx.needs_input_grad):
            made["errors"] = torch.empty_like(out)
            # Chunks of a document start anew, so document d has its own from place start / CHUNK + d on.
            made["states"] = q.new_empty(q.shape[0] * q.shape[1] // CHUNK + len(places), *sizes)
        _run("fw_delta_rule", made, sizes, places, scale)
        kept = (made["errors"], made["states"]) if "errors" in made else ()
        ctx.save_for_backward(q, k, v, beta, state, *kept)
        ctx.scale, ctx.borders = scale, borders
        return out, last

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, errors, states = ctx.saved_tensors
        if torch.is_grad_enabled() or not suits(*inputs, d_out, d_last):
            return *again(partial(_general, ctx), inputs, ctx.needs_input_grad, d_out, d_last), None, None
        whole = [t.contiguous() for t in inputs]
        grads = [torch.empty_like(t) for t in whole]
        made = dict(zip((*_INPUTS, "errors", "states"), (*whole, errors, states)))
        made |= dict(zip(_GRADIENTS, (d_out.contiguous(), d_last.contiguous(), *grads)))
        q, v = inputs[0], inputs[2]
        _run("fw_delta_rule_backward", made, (*q.shape[2:], v.shape[-1]), _borders(q, ctx.borders), ctx.scale)
        return *grads, None, None


def _general(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The same pass by PyTorch's operations: for second derivatives, and under tracing."""
    run = partial(chunkwise, scale=ctx.scale)
    return run(*inputs) if ctx.borders is None else documents(run, inputs, ctx.borders)
