"""Adapters of whole sublayers: small modules that stand behind, beside or before a part, chosen row by row.

    ctx' = enter(x, ctx)      what a part has learned to stand before its first token
    y    = part(x, ctx')
    y'   = y + change(x, y)   a function of the part's output (behind it) or of its input (beside it)

An item holds them as ``adapters`` by name; its part, its slots and the names of their tensors are untouched. As with
adapters of linears, ``ctx.adapters`` picks one for each row (each document, when packed), -1 for none, and ``active``
is the one of calls that name none. Cost: that of the adapters a call may use; rows of others are masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from formwright.parts.base import Cost, Shape, own_parameters
from formwright.parts.context import Context
from formwright.parts.linears.adapted import spread

#: The number of an adapter that belongs to every row of every call: nobody chooses it, and nobody can leave it out.
EVERY = -2


class Adapter(nn.Module):
    """One adapter of one sublayer. ``number`` is what ``ctx.adapters`` calls it, the same all over a model.

    Constructors make empty parameters; ``reset(generator)`` fills them. ``forward`` gives what is added to the part's
    output, or None; ``begin`` what stands before the part's first token.
    """

    number: int = 0
    #: Options that the tests build it with, at width 32.
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def common(self) -> nn.Module | None:
        """A new module of what this adapter shares with its like in other sublayers; None where it shares nothing."""
        return None

    def share(self, common: nn.Module) -> None:
        """Use ``common``, which the model holds under the adapter's name."""

    def begin(self, x: Tensor, ctx: Context) -> Mapping[str, Tensor]:
        """What the part begins with: a state by the names of its slots (1 or B, ...), or keys and values ``k``, ``v``
        (1 or B, P, G, D). Empty for an adapter that only changes outputs."""
        return {}

    def forward(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor | None:
        """What is added to the part's output ``y``, from that and the part's input ``x`` (B, L, W)."""
        return None

    def cost(self, shape: Shape) -> Cost:
        return own_parameters(self)


class Adapters(nn.ModuleDict):
    """The adapters of one sublayer by name. ``active`` is the number used where a call names none; it is not saved."""

    active: int = 0

    def held(self) -> Iterator[Adapter]:
        yield from self._modules.values()  # type: ignore[misc]

    def used(self, adapter: Adapter) -> bool:
        """Whether a call that names none uses this one."""
        return adapter.number in (self.active, EVERY)

    def awake(self, ctx: Context) -> bool:
        """Whether a call may use any of them."""
        return ctx.adapters is not None or any(map(self.used, self.held()))

    def enter(self, x: Tensor, ctx: Context) -> Context:
        """``ctx`` with what the part begins with."""
        begun = {}
        for adapter in self.held():
            if ctx.adapters is not None or adapter.number == self.active:
                values = adapter.begin(x, ctx)
                if values:
                    begun[adapter.number] = values
        if not begun:
            return ctx
        rows = len(x) if ctx.offsets is None else len(ctx.offsets) - 1
        if ctx.adapters is None:
            start = dict(begun[self.active])
            start = start if "k" in start else {name: t.expand(rows, *t.shape[1:]) for name, t in start.items()}
        else:
            spread(ctx.adapters, x, ctx)  # complains of a wrong number of rows
            start = _picked(begun, ctx.adapters, rows)
        return ctx.replace(start={f"{ctx.path}.{name}": value for name, value in start.items()})

    def leave(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        """The part's output ``y`` (B, L, W) as its adapters change it; ``x`` is what the part read."""
        chosen = None if ctx.adapters is None else spread(ctx.adapters, y, ctx)
        for adapter in self.held():
            if chosen is None and not self.used(adapter):
                continue
            mask = None if chosen is None or adapter.number == EVERY else chosen == adapter.number
            added = adapter(x, y, ctx)
            if added is not None:
                added = added if mask is None else torch.where(mask, added, 0.0)
                y = y + added.to(y.dtype)
        return y

    def cost(self, shape: Shape) -> Cost:
        """All adapters' parameters; products of a call that names none: the active one's."""
        total = Cost()
        for adapter in self.held():
            cost = adapter.cost(shape)
            total = total + Cost(cost.parameters, cost.macs if self.used(adapter) else 0, cost.state_bytes)
        return total


def _picked(begun: Mapping[int, Mapping[str, Tensor]], adapters: Tensor, rows: int) -> dict[str, Tensor]:
    """For each row what its own adapter begins with: nothing (a state of zeros, no keys) where it has none."""
    first = next(iter(begun.values()))
    prefix = "k" in first
    longest = max(values["k"].shape[1] for values in begun.values()) if prefix else 0
    found: dict[str, Tensor] = {}
    for name, like in first.items():
        shape = (rows, longest, *like.shape[2:]) if prefix else (rows, *like.shape[1:])
        out = like.new_zeros(shape)
        for number, values in begun.items():
            value = values[name]
            if prefix:
                value = nn.functional.pad(value, (0, 0, 0, 0, 0, longest - value.shape[1]))
            out = torch.where((adapters == number).reshape(-1, *[1] * (out.dim() - 1)), value, out)
        found[name] = out
    if prefix:
        sizes = sum((adapters == number) * values["k"].shape[1] for number, values in begun.items())
        found["seen"] = torch.arange(longest, device=adapters.device)[None] < sizes[:, None]  # type: ignore[index]
    return found
