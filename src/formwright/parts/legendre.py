"""Cells of the Legendre memory unit: a scalar signal of the input, its fixed memory, and a layer that reads both.

    u_t = f_u(input(x_t)),   M_t = transition M_{t-1} + drive u_t,   h_t = f_h(hidden([M_t ; x_t]))

Voelker, Kajic and Eliasmith, 2019; without a way back from h or M to u it runs in parallel (Chilkuri and Eliasmith,
2021, 2102.11417). The spiking cell (Liu, Datta, Li and Beerel, 2024, 2402.04882) puts neurons in the place of f_u and
f_h, and between M and its reader. Cost: W + hidden (order + W) multiply-accumulates a token and those of the memory;
state: ``order`` values, spiking also a voltage a neuron.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.ops.legendre_memory import legendre_memory, legendre_memory_macs
from formwright.parts.activations import activation as activation_named
from formwright.parts.base import Cost, Shape, Slot, cost_sum, costed
from formwright.parts.context import Context
from formwright.parts.linears.dense import Dense
from formwright.parts.norms.batch import BatchNorm
from formwright.parts.spikes import LIF
from formwright.parts.streaming import by_rows, remembered, slot_bytes


class Cell(nn.Module):
    """(B, L, W) -> (B, L, hidden). Slots ``input`` (1, W) and ``hidden`` (hidden, order + W)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        order: int,
        theta: float,
        activation: str = "relu",
        input_activation: str = "relu",
    ) -> None:
        super().__init__()
        if order < 1 or hidden < 1:
            raise SpecError(f"order={order} and hidden={hidden} must be at least 1")
        if not 0 < theta < float("inf"):
            raise SpecError(f"theta={theta} must be a finite number above 0: the window that is remembered, in tokens")
        self.theta = float(theta)
        self.activation, self.input_activation = activation_named(activation), activation_named(input_activation)
        self.input = Dense(width, 1, True, "input")
        self.hidden = Dense(order + width, hidden, True, "hidden")

    @property
    def order(self) -> int:
        """Coefficients in the memory."""
        return self.hidden.in_features - self.input.in_features

    def slots(self) -> dict[str, Slot]:
        return {"memory": remembered(self.order, like=self.hidden.dense_weight())}

    def signal(self, x: Tensor, ctx: Context) -> Tensor:
        """u (B, L, 1)."""
        return self.input_activation(self.input(x, ctx))

    def read(self, memory: Tensor, ctx: Context) -> Tensor:
        """What of the memory (B, L, order) the reader gets."""
        return memory

    def fire(self, x: Tensor, ctx: Context) -> Tensor:
        """f_h."""
        return self.activation(x)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        memory = by_rows(self.signal(x, ctx)[..., 0], ctx, lambda u, lengths: self._remember(u, lengths, ctx))
        return self.fire(self.hidden(torch.cat((self.read(memory, ctx), x), -1), ctx), ctx)

    def _remember(self, u: Tensor, lengths: Tensor | None, ctx: Context) -> Tensor:
        start = None if ctx.state is None else ctx.state.get(f"{ctx.path}.memory")
        memory, last = legendre_memory(u, self.order, self.theta, start, lengths)
        ctx.keep("memory", last)
        return memory

    def cost(self, shape: Shape) -> Cost:
        held = cost_sum([child.cost(shape) for _, child in costed(self)])
        macs = sum(legendre_memory_macs(length, self.order, self.theta, shape.past > 0) for length in shape.lengths)
        return held + Cost(0, macs, slot_bytes(self.slots(), len(shape.lengths), self))


class SpikingCell(Cell):
    """Neurons fire u, h and (``spike_memory``) what is read of the memory; ``norm``: batch norms before them."""

    def __init__(
        self,
        width: int,
        hidden: int,
        order: int,
        theta: float,
        *,
        tau: float = 2.0,
        norm: bool = True,
        spike_memory: bool = True,
    ) -> None:
        super().__init__(width, hidden, order, theta)
        self.input_norm = BatchNorm(1) if norm else None
        self.memory_norm = BatchNorm(order) if norm and spike_memory else None
        self.hidden_norm = BatchNorm(hidden) if norm else None
        self.input_lif, self.hidden_lif = LIF("input", tau=tau), LIF("hidden", tau=tau)
        self.memory_lif = LIF("read", tau=tau) if spike_memory else None

    def slots(self) -> dict[str, Slot]:
        sizes = {self.input_lif: 1, self.hidden_lif: self.hidden.out_features}
        if self.memory_lif is not None:
            sizes[self.memory_lif] = self.order
        like = self.hidden.dense_weight()
        return {**super().slots(), **{layer.slot: remembered(size, like=like) for layer, size in sizes.items()}}

    def signal(self, x: Tensor, ctx: Context) -> Tensor:
        return spiked(self.input(x, ctx), self.input_norm, self.input_lif, ctx)

    def read(self, memory: Tensor, ctx: Context) -> Tensor:
        return spiked(memory, self.memory_norm, self.memory_lif, ctx)

    def fire(self, x: Tensor, ctx: Context) -> Tensor:
        return spiked(x, self.hidden_norm, self.hidden_lif, ctx)


def spiked(x: Tensor, norm: BatchNorm | None, layer: LIF | None, ctx: Context) -> Tensor:
    """``layer(norm(x))``, either left out where it is None."""
    x = x if norm is None else norm(x, ctx)
    return x if layer is None else layer(x, ctx)
