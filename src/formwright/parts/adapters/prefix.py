"""Prefix: learned keys and values that stand before a text's own in every attention.

    o(softmax(q [P_k; k]^T) [P_v; v])

Li and Liang, 2021 (2101.00190). While training P may come from a network, P = W2 tanh(W1 E + b1) + b2, whose E and W1
all layers share and which is folded away afterwards; without it this is P-tuning v2 (Liu et al., 2022, 2110.07602). A
prefix has no place: it is seen by every query whatever the rule, and neither rotated nor biased by distance. It takes
part of the softmax from the start, so it is never the identity. Cost: 2 length kv_heads head_width parameters, and 2
length heads head_width multiply-accumulates a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.parts.adapters._gate import Gate
from formwright.parts.adapters.bottleneck import Affine
from formwright.parts.base import Cost, Shape
from formwright.parts.beside import Adapter
from formwright.parts.context import Context
from formwright.registry import Paper, register


class Network(nn.Module):
    """E (length, W), which starts N(0, 1), and W1 with its bias: what all layers' prefixes are made from."""

    def __init__(self, width: int, length: int, hidden: int) -> None:
        super().__init__()
        self.E = nn.Parameter(torch.empty(length, width))
        self.first = Affine(width, hidden, "uniform")

    def reset(self, generator: torch.Generator) -> None:
        self.E.copy_(torch.randn(self.E.shape, generator=generator))

    def forward(self) -> Tensor:
        """(length, hidden)."""
        return torch.tanh(self.first(self.E))

    def cost(self, shape: Shape) -> Cost:
        once = self.first.cost(Shape.full(1, len(self.E)))
        return Cost(self.E.numel() + once.parameters)


@register("adapter", "prefix", paper=Paper("Li and Liang", 2021, "2101.00190"), summary="learned keys and values")
class Prefix(Adapter):
    """``k`` and ``v`` (length, kv_heads, head_width), or, with ``hidden``, the map of the network's features to both.

    Args: ``length``; ``heads`` of the queries, ``kv_heads`` and ``head_width`` of the attention. ``hidden``: features
        of the network that makes them while training, 0 for none. ``gate``: a gate for each sequence multiplies both.
        ``std``: of the start without a network.
    """

    examples = (
        {"length": 3, "heads": 4, "kv_heads": 2, "head_width": 8},
        {"length": 2, "heads": 2, "kv_heads": 2, "head_width": 16, "hidden": 5},
    )

    def __init__(
        self,
        width: int,
        *,
        length: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        hidden: int = 0,
        gate: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if length < 1 or hidden < 0:
            raise SpecError(f"length={length} must be at least 1 and hidden={hidden} at least 0")
        self.width, self.length, self.hidden, self.std = width, length, hidden, std
        self.heads, self.shape = heads, (kv_heads, head_width)
        self.out = Affine(hidden, 2 * kv_heads * head_width, "uniform") if hidden else None
        self.k = None if hidden else nn.Parameter(torch.empty(length, kv_heads, head_width))
        self.v = None if hidden else nn.Parameter(torch.empty(length, kv_heads, head_width))
        self.gate = Gate(width) if gate else None
        self._network: list[Network] = []

    def reset(self, generator: torch.Generator) -> None:
        for learned in (self.k, self.v):
            if learned is not None:
                learned.copy_(self.std * torch.randn(learned.shape, generator=generator))

    def common(self) -> Network | None:
        return Network(self.width, self.length, self.hidden) if self.hidden else None

    def share(self, common: nn.Module) -> None:
        self._network = [common]  # type: ignore[list-item]

    def learned(self) -> tuple[Tensor, Tensor]:
        """Keys and values (length, kv_heads, head_width) as they are now."""
        if self.out is None:
            assert self.k is not None and self.v is not None
            return self.k, self.v
        k, v = self.out(self._network[0]()).unflatten(-1, (2, *self.shape)).unbind(1)
        return k, v

    def begin(self, x: Tensor, ctx: Context) -> Mapping[str, Tensor]:
        k, v = (learned[None] for learned in self.learned())
        if self.gate is not None:
            opened = self.gate(x, ctx)[:, None, None, None]
            k, v = k * opened, v * opened
        return {"k": k, "v": v}

    def cost(self, shape: Shape) -> Cost:
        held = sum(p.numel() for p in self.parameters(recurse=False))
        macs = 2 * self.length * self.heads * self.shape[1] * shape.tokens
        if self.out is not None:
            made = self.out.cost(Shape.full(1, self.length))
            own = self._network[0].first.cost(Shape.full(1, self.length))
            held, macs = held + made.parameters, macs + made.macs + own.macs
        return Cost(held, macs) if self.gate is None else Cost(held, macs) + self.gate.cost(shape)
