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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError, unknown
from formwright.ops import native
from formwright.ops.mamba_step import MOST, Layer, Memory, Weights, mamba_step
from formwright.ops.selective_scan import selective_scan
from formwright.parts.base import Cost, Part, Shape, Slot, Step, Traits, element_bytes, hooked
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.parts.norms.norms import RMSNorm
from formwright.parts.pieces import Kept, pieced
from formwright.parts.short_conv import ShortConv
from formwright.parts.streaming import refuse_rules
from formwright.registry import Paper, register

#: What may be chosen by the token; each of them otherwise is a learned constant.
SELECTIVE = ("delta", "B", "C")
#: The slots that a whole step reads at once, and what must stand in them.
SLOTS = ("in_proj", "x_proj", "dt_proj", "out_proj", "conv")
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
        self._layer: Layer | None = None
        self.axes = {"in_proj": ("2*inner", "stream"), **self.axes, "out_proj": ("stream", "inner")}

    def settle(self) -> None:
        super().settle()
        uniform(self.in_proj)
        uniform(self.out_proj, self._depth**-0.5)

    @pieced
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        refuse_rules(ctx, "mamba")
        step = self.step(ctx, None, joins=False)
        if step is not None and step.takes(x):
            return step.run((step,), x, [])
        x, z = self.in_proj(ctx.clear(x), ctx).chunk(2, -1)
        return self.out_proj(self.mixed(x, z, ctx), ctx)

    def step(self, ctx: Context, norm: nn.Module | None, before: bool = False, joins: bool = True) -> Step | None:
        """The next token of every row of a stream."""
        state = ctx.state
        if state is None or isinstance(state, Kept):  # a piece of a longer text is no token of a stream
            return None
        if ctx.lengths is not None or not ctx.visible.simple or not 0 < len(state.seen) <= MOST:
            return None
        if norm is not None and not (before and type(norm) is RMSNorm and not hooked(norm)):
            return None
        weights = self._weights(norm)
        if weights is None or not native.usable(*[t for t in weights if t is not None]):
            return None
        layer = self._compiled(weights, 0.0 if norm is None else norm.eps, joins)  # type: ignore[arg-type]
        return None if layer is None else Token.of(layer, ctx, len(state.seen))

    def _compiled(self, weights: Weights, eps: float, joins: bool) -> Layer | None:
        """Kept while nothing that it was made of changes: this is asked for at every token."""
        kept = self._layer
        if kept is not None and kept.key == Layer.key_of(weights, eps, joins):
            return kept
        self._layer = Layer(weights, eps, joins) if Layer.takes(weights) else None
        return self._layer

    def _weights(self, norm: nn.Module | None = None) -> Weights | None:
        """What a whole step reads, if everything is chosen by the token and nobody put another kind into a slot or
        wants one to be called."""
        held, own = self._modules, self._parameters  # where a look-up takes a fifth of the time of an attribute
        slots: list[Any] = [held.get(name) for name in SLOTS]
        if [type(slot) for slot in slots] != KINDS or len(self.selective) < len(SELECTIVE):
            return None
        if any(hooked(slot) for slot in slots):
            return None
        read: list[Any] = [(slot._parameters["weight"], slot._parameters.get("bias")) for slot in slots]
        (into, into_bias), (x, x_bias), (dt, no_bias), (out, out_bias), (conv, conv_bias) = read
        if x_bias is not None or no_bias is not None:
            return None
        gain: Any = None if norm is None else norm._parameters["weight"]
        bias, rates, skip = (own[name] for name in ("dt_bias", "A_log", "D"))
        return Weights(gain, into, into_bias, conv, conv_bias, x, dt, bias, rates, skip, out, out_bias)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        # Copies make their own: pointers cannot be copied.
        return {**self.__dict__, "_layer": None}


class Token(NamedTuple):
    """The next token of a stream through one layer, as a step that runs together with those of its neighbours."""

    layer: Layer
    ctx: Context
    memory: Memory

    @classmethod
    def of(cls, layer: Layer, ctx: Context, rows: int) -> Token | None:
        """None where what the stream remembers takes the layer's own pieces."""
        window = ctx.slot("conv", lambda: torch.zeros(rows, *layer.window))
        h = ctx.slot("h", lambda: torch.zeros(rows, *layer.memory))
        if not native.usable(window, h):
            return None
        return cls(layer, ctx, Memory(window.contiguous(), h.contiguous()))

    @staticmethod
    def takes(x: Tensor) -> bool:
        return x.shape[1] == 1 and native.usable(x)

    @staticmethod
    def run(steps: Sequence[Token], x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
        """SpecError where the stream has other rows than x."""
        rows = len(steps[0].memory.window)
        if len(x) != rows:
            raise SpecError(f"{steps[0].ctx.path}: a stream of {rows} rows is given {len(x)}; use one state a batch")
        y, after = mamba_step(x, [step.layer for step in steps], [step.memory for step in steps])
        for step, (window, h) in zip(steps, after):
            step.ctx.keep("conv", window)
            step.ctx.keep("h", h)
        return y


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
