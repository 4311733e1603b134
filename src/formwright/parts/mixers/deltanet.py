"""DeltaNet: linear attention whose memory corrects what it stores.

    e_t = v_t - S_{t-1}^T k_t,    S_t = S_{t-1} + beta_t k_t e_t^T,    y_t = o(norm(S_t^T q_t) [* silu(gate_t)])

Writing under a key replaces what was read there, in the share beta_t, where linear attention adds to it. Queries and
keys pass a short convolution, SiLU and an L2 norm; the output a norm of each head with one shared weight. Yang et al.,
2024 (2406.06484), on the fast weights of Schlag et al., 2021 (2102.11174), whose feature maps are options. With
``neg_eigval`` beta reaches 2, so that a state can flip: Grazzi et al., 2024 (2411.12537). Cost: 4 width^2 + width heads
multiply-accumulates a token and those of ``ops/delta_rule``, linear in the length. State: heads x dk x dv and three
windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import SpecError, unknown
from formwright.ops.delta_rule import delta_rule, delta_rule_map
from formwright.ops.delta_rule.chunked import products
from formwright.parts.base import Cost, LinearLike, Part, Shape, Slot, Traits, element_bytes, project
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.parts.mixers._projected import head_sizes
from formwright.parts.norms.norms import RMSNorm
from formwright.parts.pieces import pieced
from formwright.parts.short_conv import ShortConv
from formwright.parts.streaming import refuse_rules
from formwright.registry import Paper, register

#: Feature maps of queries and keys; those with no negative value may be divided by their sum.
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "identity": lambda x: x,
}
POSITIVE = ("elu1", "relu")
NORMS = ("l2", "sum")


@register("mixer", "deltanet", paper=Paper("Yang et al.", 2024, "2406.06484"), summary="a memory that corrects itself")
class DeltaNet(Part):
    """Slots ``q``, ``k`` (heads*dk, W), ``v``, ``gate`` (heads*dv, W), ``beta`` (heads, W) and ``o`` (W, heads*dv).

    Args:
        heads, head_width, value_width: dk defaults to W / heads, dv to dk.
        conv: taps of the convolutions before q, k and v; None for none.
        feature: of q and k: "silu", "elu1" (1 + ELU), "relu" or "identity".
        qk_norm: of q and k of each head: "l2", or "sum" for features that are never negative.
        neg_eigval: rates in (0, 2) instead of (0, 1).
        gate: multiply the normed output by silu(gate(x)).
    """

    #: What the memory does with a token; an instance may be given another rule, to compare within the same layer.
    rule = staticmethod(delta_rule)
    traits = Traits(causal=True, streams=True)
    examples = (
        {"heads": 2},
        {"heads": 2, "head_width": 6, "value_width": 10, "conv": None, "gate": True, "neg_eigval": True},
        {"heads": 4, "conv": 3, "feature": "elu1", "qk_norm": "sum"},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_width: int | None = None,
        value_width: int | None = None,
        conv: int | None = 4,
        feature: str = "silu",
        qk_norm: str = "l2",
        neg_eigval: bool = False,
        gate: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _, dk = head_sizes(width, heads, None, head_width)
        if feature not in FEATURES:
            raise SpecError(unknown("feature", feature, FEATURES))
        if qk_norm not in NORMS:
            raise SpecError(unknown("qk_norm", qk_norm, NORMS))
        if qk_norm == "sum" and feature not in POSITIVE:
            raise SpecError(f"qk_norm='sum' divides by a sum that feature={feature!r} can make zero; use 'l2'")
        dv = dk if value_width is None else value_width
        self.feature, self.qk_norm, self.most = feature, qk_norm, 2.0 if neg_eigval else 1.0
        self.q = Dense(width, heads * dk, False, "q")
        self.k = Dense(width, heads * dk, False, "k")
        self.v = Dense(width, heads * dv, False, "v")
        self.beta = Dense(width, heads, False, "beta")
        self.gate = Dense(width, heads * dv, False, "gate") if gate else None
        silu = feature == "silu"
        self.q_conv = None if conv is None else ShortConv(heads * dk, conv, bias=False, silu=silu)
        self.k_conv = None if conv is None else ShortConv(heads * dk, conv, bias=False, silu=silu)
        self.v_conv = None if conv is None else ShortConv(heads * dv, conv, bias=False)
        self.norm = RMSNorm(dv, norm_eps)
        self.o = Dense(heads * dv, width, False, "o")
        self.axes = {
            "q": ("heads*head", "stream"),
            "k": ("heads*head", "stream"),
            "v": ("heads*value", "stream"),
            "beta": ("heads", "stream"),
            "o": ("stream", "heads*value"),
            **({"gate": ("heads*value", "stream")} if gate else {}),
        }

    @property
    def heads(self) -> int:
        return self.beta.out_features

    @property
    def memory(self) -> tuple[int, int, int]:
        """(heads, dk, dv): the shape of a row's state."""
        return self.heads, self.q.out_features // self.heads, self.v.out_features // self.heads

    def slots(self) -> dict[str, Slot]:
        """The memory, in float32 at least, and the windows of the convolutions."""
        wide = torch.float32 if element_bytes(self) < 4 else None
        found = {"memory": Slot("fixed", self.memory, wide)}
        for name in ("q_conv", "k_conv", "v_conv"):
            conv = getattr(self, name)
            found |= {} if conv is None else conv.slot(name)
        return found

    @pieced
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        refuse_rules(ctx, "deltanet")
        if ctx.offsets is not None and ctx.state is not None:
            raise SpecError(f"{ctx.path}: deltanet streams in the padded layout; give lengths instead of offsets")
        x = ctx.clear(x)
        q, k, v, beta, *gate = self._inputs(x, ctx)
        if ctx.offsets is None:
            kind = torch.float64 if x.dtype == torch.float64 else torch.float32
            start = ctx.slot("memory", lambda: x.new_zeros(len(x), *self.memory, dtype=kind))
            mixed, last = self.rule(q, k, v, beta, start)
            ctx.keep("memory", last)
        else:
            spans = ctx.spans()
            mixed, _ = self.rule(q, k, v, beta, borders=[0, *(stop for _, stop in spans)])
        mixed = self.norm(mixed)
        for opened in gate:
            mixed = mixed * F.silu(opened).view_as(mixed)
        return self.o(mixed.flatten(2), ctx)

    def mixing_matrix(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, H, L, L): the share of every earlier value in each output, for padded x from an empty memory."""
        q, k, _, beta, *_ = self._inputs(ctx.clear(x), ctx.replace(state=None))
        return delta_rule_map(q, k, beta)

    def _inputs(self, x: Tensor, ctx: Context) -> list[Tensor]:
        """q, k, v (B, L, H, d), rates (B, L, H) that are zero in the padding, and the gate where there is one."""
        slots: list[LinearLike] = [self.q, self.k, self.v, self.beta]
        q, k, v, beta, *gate = project(slots + ([] if self.gate is None else [self.gate]), x, ctx)
        v = F.silu(v) if self.v_conv is None else self.v_conv(v, ctx, "v_conv")
        q = self._featured(q, self.q_conv, ctx, "q_conv")
        k = self._featured(k, self.k_conv, ctx, "k_conv")
        beta = ctx.clear(self.most * torch.sigmoid(beta))
        return [q, k, v.unflatten(-1, (self.heads, -1)), beta, *gate]

    def _featured(self, x: Tensor, conv: ShortConv | None, ctx: Context, name: str) -> Tensor:
        """(B, L, heads*dk) -> (B, L, heads, dk): convolved, mapped, normalised in float32 at least."""
        if conv is not None:
            x = conv(x, ctx, name)
        if conv is None or not conv.silu:
            x = FEATURES[self.feature](x)
        heads = x.unflatten(-1, (self.heads, -1))
        wide = heads if heads.dtype == torch.float64 else heads.float()
        if self.qk_norm == "sum":
            return (wide / (wide.sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        heads, dk, dv = self.memory
        # Rows stand side by side, padded to the longest.
        longest = max(shape.lengths, default=0)
        macs = len(shape.lengths) * heads * products(longest, dk, dv)
        state = len(shape.lengths) * heads * dk * dv * max(4, element_bytes(self))
        return super().cost(shape, knobs) + Cost(0, macs, state)
