"""Mamba: a recurrence whose step, input and readout are chosen by each token, between a convolution and a gate.

    [x | z] = in_proj(u)                       x = SiLU(conv(x)), causal, over the last ``conv`` tokens
    [d | B | C] = x_proj(x)                    Delta = softplus(dt_proj(d) + dt_bias)
    h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t,    A = -exp(A_log)
    y_t = out_proj((C_t h_t + D x_t) SiLU(z_t))

Gu and Dao, 2023 (2312.00752). It stands alone in a layer: there is no channel mixer beside it. Cost, with inner width
E = expand W: 3 E W + E (2 rank + 2 state) multiply-accumulates a token in its projections, and about 9 E state
operations of the scan; linear in the length. State: E (conv - 1 + state) numbers a row, whatever the length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError, unknown
from formwright.ops.mamba_step import Weights, mamba_step
from formwright.ops.selective_scan import selective_scan
from formwright.parts.base import Cost, Part, Shape, Slot, Traits, element_bytes
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.parts.pieces import pieced
from formwright.parts.short_conv import ShortConv
from formwright.parts.streaming import refuse_rules
from formwright.registry import Paper, register

#: What may be chosen by the token; each of them otherwise is a learned constant.
SELECTIVE = ("delta", "B", "C")
#: What stands in the slots that a whole step reads at once: projections in, x, dt and out, and the convolution.
KINDS = [Dense] * 4 + [ShortConv]
#: Steps at the start: spread evenly over the orders of magnitude between the first two, and none below the last.
STEP_LEAST, STEP_MOST, STEP_FLOOR = 1e-3, 1e-1, 1e-4


class Core(Part):
    """What stands between the projections in and out: convolution, selection and scan over ``inner`` channels.

    Slots ``x_proj`` and ``dt_proj``, where anything is selective. Parameters ``A_log`` (E, state), ``D`` and
    ``dt_bias`` (E,), and ``B`` or ``C`` (state,) where they are constants.
    """

    traits = Traits(causal=True, streams=True)

    def __init__(
        self, inner: int, state: int, conv: int, rank: int, conv_bias: bool, selective: Sequence[str] | None
    ) -> None:
        super().__init__()
        chosen = SELECTIVE if selective is None else tuple(selective)
        check(inner, state, rank, chosen)
        sizes = {"delta": rank, "B": state, "C": state}
        self.selective = tuple(name for name in SELECTIVE if name in chosen)
        self.conv = ShortConv(inner, conv, bias=conv_bias)
        self.x_proj = Dense(inner, sum(sizes[name] for name in self.selective), False, "x") if chosen else None
        self.dt_proj = Dense(rank, inner, False, "dt") if "delta" in chosen else None
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.D = nn.Parameter(torch.empty(inner))
        self.B = None if "B" in chosen else nn.Parameter(torch.empty(state))
        self.C = None if "C" in chosen else nn.Parameter(torch.empty(state))
        self.axes = {"x_proj": ("selection", "inner")} if self.x_proj is not None else {}
        if self.dt_proj is not None:
            self.axes = {**self.axes, "dt_proj": ("inner", "rank")}

    def reset(self, generator: torch.Generator) -> None:
        inner, state = self.A_log.shape
        spread = math.log(STEP_MOST / STEP_LEAST)
        step = STEP_LEAST * torch.exp(spread * torch.rand(inner, generator=generator))
        step = step.clamp(min=STEP_FLOOR)
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # what softplus turns into ``step``
        self.A_log.copy_(torch.arange(1.0, state + 1).log().expand(inner, state))
        self.D.fill_(1.0)
        if self.B is not None:
            self.B.fill_(1.0)
        if self.C is not None:
            self.C.copy_(torch.randn(state, generator=generator))

    def settle(self) -> None:
        for slot in (self.x_proj, self.dt_proj):
            if slot is not None:
                uniform(slot)

    def slots(self) -> dict[str, Slot]:
        return {**self.conv.slot("conv"), "h": Slot("fixed", tuple(self.A_log.shape), torch.float32)}

    @pieced
    def mixed(self, x: Tensor, z: Tensor, ctx: Context) -> Tensor:
        """x and the gate z (B, L, E) -> (B, L, E), zero in the padding."""
        x = self.conv(x, ctx)
        delta, B, C = self.selected(x, ctx)
        exact = torch.promote_types(x.dtype, torch.float32)
        A = -torch.exp(self.A_log.to(exact))
        initial = None if ctx.offsets is not None else ctx.slot("h", lambda: x.new_zeros(len(x), *A.shape, dtype=exact))
        y, h = selective_scan(x, delta, A, B, C, self.D, z=z, initial=initial, lengths=ctx.lengths, offsets=ctx.offsets)
        ctx.keep("h", h)
        return y

    def selected(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """delta (B, L, E), before softplus, and B and C (B, L, state) of the tokens x (B, L, E)."""
        state, found = self.A_log.shape[1], {}
        if self.x_proj is not None:
            rank = 0 if self.dt_proj is None else self.dt_proj.in_features
            sizes = [rank if name == "delta" else state for name in self.selective]
            found = dict(zip(self.selective, self.x_proj(x, ctx).split(sizes, -1)))
        delta = self.dt_bias.expand_as(x) if self.dt_proj is None else self.dt_proj(found["delta"], ctx) + self.dt_bias
        B = found["B"] if self.B is None else self.B.expand(*x.shape[:2], -1)
        C = found["C"] if self.C is None else self.C.expand(*x.shape[:2], -1)
        return delta, B, C

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        state = len(shape.lengths) * self.A_log.numel() * max(4, element_bytes(self))
        return super().cost(shape, knobs) + Cost(state_bytes=state)


@register("mixer", "mamba", paper=Paper("Gu and Dao", 2023, "2312.00752"))
class Mamba(Core):
    """Slots ``in_proj`` (2 E, W), ``x_proj`` (rank + 2 state, E), ``dt_proj`` (E, rank) and ``out_proj`` (W, E).

    Args:
        state: numbers that each channel remembers. expand: E / W. conv: tokens that the convolution sees.
        rank: of the step's projection; default W / 16 rounded up.
        conv_bias: of the convolution. bias: of the projections in and out.
        selective: which of "delta", "B" and "C" depend on the token (default all); with none of them the recurrence is
            the same for every token.
        depth: layers of the model; ``out_proj`` starts divided by its root, so that the stream does not grow with it.
    """

    traits = Traits(causal=True, streams=True)
    examples = (
        {"state": 4},
        {"expand": 1, "state": 3, "rank": 1, "bias": True, "conv_bias": False, "depth": 4},
        {"state": 2, "conv": 2, "selective": ["B"]},
        {"state": 2, "selective": []},
    )

    def __init__(
        self,
        width: int,
        *,
        state: int = 16,
        expand: int = 2,
        conv: int = 4,
        rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        selective: list[str] | None = None,
        depth: int = 1,
    ) -> None:
        inner = expand * width
        super().__init__(inner, state, conv, step_rank(width, rank), conv_bias, selective)
        self._depth = check_depth(depth)  # of the start alone, so no setting of the model
        self.in_proj = Dense(width, 2 * inner, bias, "in")
        self.out_proj = Dense(inner, width, bias, "out")
        self.axes = {"in_proj": ("2*inner", "stream"), **self.axes, "out_proj": ("stream", "inner")}

    def settle(self) -> None:
        super().settle()
        uniform(self.in_proj)
        uniform(self.out_proj, self._depth**-0.5)

    @pieced
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        refuse_rules(ctx, "mamba")
        if x.shape[1] == 1 and ctx.state is not None and ctx.lengths is None:
            y = self._token(x, ctx)
            if y is not None:
                return y
        x, z = self.in_proj(ctx.clear(x), ctx).chunk(2, -1)
        return self.out_proj(self.mixed(x, z, ctx), ctx)

    def _token(self, x: Tensor, ctx: Context) -> Tensor | None:
        """The next token of every row in one call; None where it takes the pieces."""
        weights = self._weights()
        if weights is None:
            return None
        (inner, states), taps = weights.A_log.shape, weights.conv.shape[1]
        window = ctx.slot("conv", lambda: x.new_zeros(len(x), taps - 1, inner))
        h = ctx.slot("h", lambda: x.new_zeros(len(x), inner, states, dtype=torch.promote_types(x.dtype, torch.float32)))
        done = mamba_step(x, weights, window, h)
        if done is None:
            return None
        y, window, h = done
        ctx.keep("conv", window)
        ctx.keep("h", h)
        return y

    def _weights(self) -> Weights | None:
        """What a whole step reads, if everything is chosen by the token and nobody put another kind into a slot or
        wants one to be called."""
        held, own = self._modules, self._parameters  # where a look-up takes a fifth of the time of an attribute
        slots: list[Any] = [held.get(name) for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv")]
        if len(self.selective) < len(SELECTIVE) or [type(slot) for slot in slots] != KINDS:
            return None
        if any(slot._forward_hooks or slot._forward_pre_hooks for slot in slots):
            return None
        (into, into_bias), (x, x_bias), (dt, no_bias), (out, out_bias), (conv, conv_bias) = (
            (slot._parameters["weight"], slot.bias) for slot in slots
        )
        if x_bias is not None or no_bias is not None:
            return None
        rest = (own["dt_bias"], own["A_log"], own["D"])
        return Weights(into, into_bias, conv, conv_bias, x, dt, *rest, out, out_bias)  # type: ignore[arg-type]


def step_rank(width: int, rank: int | None) -> int:
    return -(-width // 16) if rank is None else rank


def check(inner: int, state: int, rank: int, selective: Sequence[str]) -> None:
    for name, value in (("expand", inner), ("state", state), ("rank", rank)):
        if value < 1:
            raise SpecError(f"{name} must be at least 1")
    for name in selective:
        if name not in SELECTIVE:
            raise SpecError(unknown("selective", name, SELECTIVE))


def check_depth(depth: int) -> int:
    if depth < 1:
        raise SpecError(f"depth={depth} must be at least 1")
    return depth


def uniform(slot: Dense, factor: float = 1.0) -> None:
    """The slot's normal start made uniform within ``factor`` in^(-1/2), through the normal distribution's own function.

    A module may set its children only after they have drawn, without a generator of its own.
    """
    std = (2.0 / (slot.in_features + slot.out_features)) ** 0.5
    slot.weight.copy_(torch.erf(slot.weight / (std * 2**0.5)) * (factor * slot.in_features**-0.5))
