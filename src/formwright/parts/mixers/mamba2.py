"""Mamba-2: a recurrence whose decay is one number a head and token, so that whole chunks become matrix products.

One projection gives a gate z, the values x with the groups' B and C, and the step Δ of each head. x, B and C pass a
short causal convolution and SiLU; then ``S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t B_t^T``, ``y_t = S_t C_t + D x_t``; y is
gated by SiLU(z) and only then normalised, group by group. Dao and Gu, 2024 (2405.21060); as one layer of hybrids:
Waleffe et al., 2024 (2406.07887).

Cost: d (2 E + 2 G N + H) + E d multiply-accumulates a token for the projections (E = expand d, H = E / P heads), and
those of :mod:`formwright.ops.ssd`, linear in length. State: N numbers a channel of E and the convolution's last tokens,
whatever the length; the recurrence is kept in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import SpecError, all_of
from formwright.ops.ssd import CHUNK, chunk_of, ssd
from formwright.parts.base import Cost, Part, Shape, Slot, Traits, cost_sum, costed, own_parameters
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.parts.pieces import pieced
from formwright.parts.short_conv import ShortConv
from formwright.parts.streaming import refuse_rules
from formwright.registry import Paper, register

#: Steps Δ start between these, and no lower than the floor.
STEPS, STEP_FLOOR = (1e-3, 1e-1), 1e-4
#: Decay rates -A start evenly between these.
RATES = (1.0, 16.0)


class GatedRMSNorm(nn.Module):
    """``x SiLU(z)`` divided by its root mean square over each of ``groups`` equal pieces, times weight (E)."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        wide = at_least_single(x) * F.silu(at_least_single(z))
        pieces = wide.unflatten(-1, (self.groups, -1))
        pieces = pieces * torch.rsqrt(pieces.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * pieces.flatten(-2).to(x.dtype)

    def cost(self, shape: Shape) -> Cost:
        return Cost(self.weight.numel())


def at_least_single(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@register("mixer", "mamba2", paper=Paper("Dao and Gu", 2024, "2405.21060"), summary="state-space dual")
class Mamba2(Part):
    """Slots ``in_proj`` (2 E + 2 G N + H, W), whose rows are z, x, B, C and Δ in this order, and ``out_proj`` (W, E).

    Args:
        state: N, numbers remembered per channel.
        head_width, expand, groups: P, E / W, and the number G of groups of heads that share B and C.
        kernel, conv_bias: of the short convolution.
        bias: biases of both projections.
        step_range: least and greatest Δ; null for no bound.
        norm_groups: pieces that are normalised each for itself; default G.
        eps: of the norm.
        residual: factor on the starting weights of ``out_proj``; 1 / sqrt(layers) in the published models.
        chunk: tokens whose pairs are multiplied out; changes the speed only.
    """

    traits = Traits(causal=True, streams=True)
    axes = {"in_proj": ("gate+inner+groups*state+heads", "stream"), "out_proj": ("stream", "inner")}
    examples = (
        {"state": 8, "head_width": 16},
        {
            "state": 4,
            "head_width": 8,
            "groups": 2,
            "kernel": 3,
            "conv_bias": False,
            "bias": True,
            "step_range": [0.005, 1.5],
            "norm_groups": 1,
            "residual": 0.5,
            "chunk": 5,
        },
    )

    def __init__(
        self,
        width: int,
        *,
        state: int = 128,
        head_width: int = 64,
        expand: int = 2,
        groups: int = 1,
        kernel: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        step_range: Sequence[float | None] = (None, None),
        norm_groups: int | None = None,
        eps: float = 1e-5,
        residual: float = 1.0,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        inner = expand * width
        pieces = groups if norm_groups is None else norm_groups
        all_of(SpecError, list(_problems(inner, state, head_width, groups, pieces, step_range, chunk)))
        heads = inner // head_width
        self.groups = groups
        self._chunk, self._residual = chunk, residual  # of the speed and the start alone: no settings of the model
        self.least, self.most = step_range
        self.in_proj = Dense(width, 2 * inner + 2 * groups * state + heads, bias, "in_proj")
        self.conv = ShortConv(inner + 2 * groups * state, kernel, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(inner, pieces, eps)
        self.out_proj = Dense(inner, width, bias, "out_proj")

    @property
    def heads(self) -> int:
        return self.D.shape[0]

    @property
    def inner(self) -> int:
        return self.norm.weight.shape[0]

    @property
    def state(self) -> int:
        return (self.conv.weight.shape[0] - self.inner) // (2 * self.groups)

    def reset(self, generator: torch.Generator) -> None:
        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(self.heads, generator=generator)

        self.A_log.copy_(uniform(*RATES).log())
        self.D.fill_(1.0)
        steps = uniform(*(math.log(step) for step in STEPS)).exp().clamp(min=STEP_FLOOR)
        self.dt_bias.copy_(steps + (-torch.expm1(-steps)).log())  # the inverse of softplus

    def settle(self) -> None:
        if self._residual != 1.0:
            self.out_proj.scale_in(self._residual)

    def slots(self) -> dict[str, Slot]:
        kind = torch.promote_types(self.D.dtype, torch.float32)
        shape = (self.heads, self.inner // self.heads, self.state)
        return {**self.conv.slot("conv"), "ssm": Slot("fixed", shape, kind)}

    @pieced
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        refuse_rules(ctx, "mamba2")
        heads, inner, shared = self.heads, self.inner, self.groups * self.state
        sizes = (inner, inner + 2 * shared, heads)
        z, mixed, steps = self.in_proj(ctx.clear(x), ctx).split(sizes, -1)
        values, B, C = self.conv(mixed, ctx).split((inner, shared, shared), -1)
        dt = F.softplus(at_least_single(steps) + at_least_single(self.dt_bias))
        if self.least is not None or self.most is not None:
            dt = dt.clamp(self.least, self.most)
        y, final = ssd(
            values.unflatten(-1, (heads, -1)),
            ctx.clear(dt),  # in the padding Δ = 0, which leaves the state as it is
            -at_least_single(self.A_log).exp(),
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
            self.D,
            start=self._start(x, ctx),
            resets=_begins(x, ctx),
            chunk=self._chunk,
        )
        ctx.keep("ssm", final)
        return self.out_proj(self.norm(y.flatten(-2), z), ctx)

    def _start(self, x: Tensor, ctx: Context) -> Tensor | None:
        if not ctx.begins:
            return None
        slot = self.slots()["ssm"]
        return ctx.slot("ssm", lambda: torch.zeros(len(x), *slot.shape, dtype=slot.dtype, device=x.device))

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        held = cost_sum([child.cost(shape) for _, child in costed(self)]) + own_parameters(self)
        slot = self.slots()["ssm"]
        assert slot.dtype is not None
        kept = len(shape.lengths) * math.prod(slot.shape) * slot.dtype.itemsize
        return held + Cost(0, sum(self._macs(length) for length in shape.lengths), kept)

    def _macs(self, length: int) -> int:
        """Products of one row: pairs inside each chunk, then states written and read."""
        q = chunk_of(length, self._chunk)
        chunks = -(-length // q)
        return chunks * q * (q * (self.groups * self.state + self.inner) + 2 * self.inner * self.state)


def _begins(x: Tensor, ctx: Context) -> Tensor | None:
    """(1, T) bool: tokens that begin a document of the packed layout."""
    if ctx.offsets is None:
        return None
    begins = torch.zeros(x.shape[1] + 1, dtype=torch.bool, device=x.device)
    return begins.index_fill(0, ctx.offsets, True)[None, :-1]


def _problems(
    inner: int, state: int, head_width: int, groups: int, pieces: int, steps: Sequence[float | None], chunk: int
) -> list[str]:
    found = [
        f"{name}={value!r} must be a whole number of at least 1"
        for name, value in {"expand*width": inner, "state": state, "head_width": head_width, "groups": groups,
                            "norm_groups": pieces, "chunk": chunk}.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]  # fmt: skip
    if found:
        return found
    if inner % head_width:
        found.append(f"head_width={head_width} must divide expand * width = {inner}")
    elif inner // head_width % groups:
        found.append(f"groups={groups} must divide the {inner // head_width} heads")
    if inner % pieces:
        found.append(f"norm_groups={pieces} must divide expand * width = {inner}")
    bounds = [bound for bound in steps if bound is not None]
    if len(steps) != 2 or any(bound < 0 for bound in bounds) or bounds != sorted(bounds):
        found.append(f"step_range={list(steps)} must be a least and a greatest step, both from 0 up, or null")
    return found
