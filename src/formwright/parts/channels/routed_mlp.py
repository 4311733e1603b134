"""A perceptron cut into blocks of hidden units, of which every token takes the best few.

    y = sum over the ``top`` blocks g of x:  down_g(c_g act(c_g up_g(x))),   c_g = 2 sigmoid(router(x))_g

Gui et al., 2023 (2310.10365), SPT. Blocks together hold a whole perceptron's weights; at c = 1 and with every block
taken it is that perceptron. The factor carries the router's gradient, and multiplies all that a slot adds, adapters
included. Each block's tokens are gathered, so products stay dense. Cost: top / blocks of the perceptron's
multiply-accumulates a token, and width x blocks for the router.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.parts.activations import activation as activation_named
from formwright.parts.base import Cost, LinearLike, Part, Shape, Traits, cost_sum, dropout, own_parameters
from formwright.parts.context import EMPTY, Context
from formwright.parts.linears.dense import Dense
from formwright.registry import Paper, register


@register(
    "channel", "routed-mlp", paper=Paper("Gui et al.", 2023, "2310.10365"), summary="each token takes a few blocks"
)
class RoutedMLP(Part):
    """Slots ``router`` (blocks, W), and for each block ``up.0`` ... (hidden / blocks, W), ``gate.0`` ... where gated,
    and ``down.0`` ... (W, hidden / blocks). Every block's ``down`` adds its bias, so each holds 1 / top of the whole.

    Args:
        hidden: units of all blocks together. blocks, top: how many blocks, and how many of them a token takes.
        gated: down(act(gate(x)) * up(x)) instead, with the factor on both.
        balance: weight of a loss that is least where blocks are taken equally often (Fedus et al., 2021, 2101.03961).
    """

    traits = Traits(causal=True, streams=True, gradient="piecewise")
    examples = (
        {"hidden": 48},
        {"hidden": 24, "blocks": 3, "top": 1, "gated": True, "activation": "silu", "bias": False, "balance": 0.1},
    )

    def __init__(
        self,
        width: int,
        *,
        hidden: int,
        blocks: int = 4,
        top: int = 2,
        gated: bool = False,
        activation: str = "gelu",
        bias: bool = True,
        balance: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if blocks < 1 or hidden % blocks:
            raise SpecError(f"blocks={blocks} does not divide the {hidden} hidden units")
        if not 1 <= top <= blocks:
            raise SpecError(f"top={top} must be at least 1 and at most blocks={blocks}")
        self.top, self.rate, self.balance = top, dropout, balance
        self.activation, self.activation_name = activation_named(activation), activation
        each = hidden // blocks
        self.router = Dense(width, blocks, True, "router")
        self.up = nn.ModuleList(Dense(width, each, bias, "up") for _ in range(blocks))
        self.gate = nn.ModuleList(Dense(width, each, bias, "gate") for _ in range(blocks if gated else 0))
        self.down = nn.ModuleList(Dense(each, width, bias, "down") for _ in range(blocks))
        self.axes = {"router": ("blocks", "stream")}
        for index in range(blocks):
            self.axes |= {f"up.{index}": ("hidden", "stream"), f"down.{index}": ("stream", "hidden")}
            self.axes |= {f"gate.{index}": ("hidden", "stream")} if gated else {}

    @property
    def blocks(self) -> int:
        return len(self.down)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        flat = ctx.clear(x).reshape(-1, x.shape[-1])
        share = torch.sigmoid(self.router(flat, ctx))
        taken = share.topk(self.top, -1).indices
        y = torch.zeros_like(flat)
        for index in range(self.blocks):
            rows = self._rows(taken, index)
            # Slots see tokens out of their rows, so what they may ask of the context by row is not theirs to see.
            own = self._block(index, flat[rows], 2.0 * share[rows, index, None])
            y = y.index_add(0, rows, own.to(y.dtype))
        self._declare(share, taken, ctx.valid(x).expand(x.shape[:2]).reshape(-1), ctx)
        return dropout(y.view_as(x), self.rate, ctx, self.training, "dropout")

    def _rows(self, taken: Tensor, index: int) -> Tensor:
        """Tokens that take block ``index``; laid out without values, an equal share of them."""
        if taken.is_meta:
            each = taken.numel() * (index + 1) // self.blocks - taken.numel() * index // self.blocks
            return torch.empty(each, dtype=torch.long, device="meta")
        return (taken == index).any(-1).nonzero()[:, 0]

    def _block(self, index: int, x: Tensor, factor: Tensor) -> Tensor:
        up, down = self._slot(self.up, index), self._slot(self.down, index)
        hidden = up(x) * factor
        if len(self.gate):
            hidden = self.activation(self._slot(self.gate, index)(x) * factor) * hidden
        else:
            hidden = self.activation(hidden)
        return down(hidden * factor)

    @staticmethod
    def _slot(held: nn.ModuleList, index: int) -> LinearLike:
        return held[index]  # type: ignore[return-value]

    def _declare(self, share: Tensor, taken: Tensor, valid: Tensor, ctx: Context) -> None:
        """The balance loss: blocks x sum of (how often a block is taken x how much the router would)."""
        if not (self.training and self.balance and ctx.notes is not None) or not bool(valid.any()):
            return
        often = torch.bincount(taken[valid].flatten(), minlength=self.blocks) / (valid.sum() * self.top)
        share = share[valid]
        wanted = (share / share.sum(-1, keepdim=True)).mean(0)
        ctx.loss(self.balance * self.blocks * (often * wanted).sum())

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        slots: list[Any] = [*self.up, *self.gate, *self.down]
        held = cost_sum([slot.cost(shape) for slot in slots])
        share = Cost(held.parameters, held.macs * self.top // self.blocks)
        return share + self.router.cost(shape) + own_parameters(self)
