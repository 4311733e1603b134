"""What parts with a recurrence along the sequence share: documents as rows, the bytes of what they remember, and the
rules that they cannot keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from formwright.kit.errors import SpecError
from formwright.parts.base import Slot, element_bytes
from formwright.parts.context import Context


def by_rows(x: Tensor, ctx: Context, run: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """``run(rows (B, L, ...), lengths)`` over padded ``x``, or over the documents of packed ``x`` (1, T, ...)."""
    if ctx.offsets is None:
        return run(x, ctx.lengths)
    if ctx.state is not None:
        raise SpecError(f"{ctx.path}: a recurrence streams in the padded layout; give lengths instead of offsets")
    sizes = [stop - start for start, stop in ctx.spans()]
    if not sizes:
        return run(x, None)
    lengths = torch.tensor(sizes, device=x.device)
    made = run(pad_sequence(x[0].split(sizes), batch_first=True), lengths)
    return made[torch.arange(made.shape[1], device=x.device) < lengths[:, None]][None]


def refuse_rules(ctx: Context, name: str) -> None:
    """SpecError for a rule that a recurrence cannot keep: it reads all that came before and nothing after."""
    if not ctx.visible.simple:
        raise SpecError(
            f"{ctx.path}: {name} reads every earlier token, so it takes no window, prefix, segments or context rule"
        )


def remembered(*shape: int, like: Tensor) -> Slot:
    """A fixed slot of ``shape`` a row; in half precision a recurrence is carried on in float32."""
    half = like.dtype in (torch.float16, torch.bfloat16)
    return Slot("fixed", shape, torch.float32 if half else None)


def slot_bytes(slots: Mapping[str, Slot], rows: int, module: nn.Module) -> int:
    """Bytes of fixed ``slots`` for ``rows`` rows of a part whose values are those of ``module``."""
    own = element_bytes(module)
    return rows * sum(math.prod(s.shape) * (own if s.dtype is None else s.dtype.itemsize) for s in slots.values())
