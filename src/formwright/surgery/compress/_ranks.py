"""How much rank each weight gets, under one budget of parameters for all of them.

Every slot offers ranks (multiples of ``step``, below break-even) and staying dense. What a choice is worth is the share
of the slot's energy (squared singular values, of the weight or of its output) that it keeps; what it costs is its
parameters. Choices that are best at one exchange rate between the two fill the budget by bisection of that rate; what
is left over goes, a step at a time, where it brings most. Cost: nothing beside the spectra.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from formwright.parts.linears.low_rank import break_even


@dataclass(frozen=True)
class Offer:
    """One slot: its sides and the energy (min(side),) of each rank, largest first. ``weight``: its say in the sum."""

    in_features: int
    out_features: int
    energy: Tensor
    weight: float = 1.0

    @property
    def dense(self) -> int:
        return self.in_features * self.out_features

    @property
    def limit(self) -> int:
        """The largest rank that saves something."""
        best = break_even(self.in_features, self.out_features)
        return best if best * (self.in_features + self.out_features) < self.dense else best - 1

    def kept(self) -> Tensor:
        """(n+1,) share of the energy kept at rank 0 .. n."""
        total = self.energy.sum().clamp(min=1e-300)
        return torch.cat((self.energy.new_zeros(1), self.energy.cumsum(0))) / total


def choices(offer: Offer, step: int) -> list[int]:
    """Ranks to choose from: multiples of ``step`` below break-even (or 1 where none fits)."""
    found = list(range(step, offer.limit + 1, step))
    return found or ([1] if offer.limit >= 1 else [])


def allocate(offers: dict[str, Offer], budget: int, step: int) -> dict[str, int]:
    """Rank of each slot, 0 for dense, with at most ``budget`` parameters of weights if that can be had at all."""
    tables = {name: _table(offer, step) for name, offer in offers.items()}
    # At a rate of 1 a parameter no rank is worth its price, and the cheapest choices are left.
    low, high = 0.0, 1.0
    for _ in range(80):
        rate = (low + high) / 2
        if _spent(tables, rate) > budget:
            low = rate
        else:
            high = rate
    picked = {name: _best(table, high) for name, table in tables.items()}
    room = budget - sum(tables[name][index][1] for name, index in picked.items())
    while True:
        steps = [
            ((table[index + 1][2] - table[index][2]) / max(1, table[index + 1][1] - table[index][1]), name)
            for name, table in tables.items()
            if (index := picked[name]) + 1 < len(table) and table[index + 1][1] - table[index][1] <= room
        ]
        if not steps:
            return {name: tables[name][index][0] for name, index in picked.items()}
        name = max(steps)[1]
        index = picked[name]
        room -= tables[name][index + 1][1] - tables[name][index][1]
        picked[name] = index + 1


#: (rank or 0 for dense, parameters, worth), by rising parameters
Table = list[tuple[int, int, float]]


def _table(offer: Offer, step: int) -> Table:
    kept = offer.kept()
    sides = offer.in_features + offer.out_features
    rows = [(rank, rank * sides, offer.weight * float(kept[rank])) for rank in choices(offer, step)]
    return [*rows, (0, offer.dense, offer.weight)]


def _best(table: Table, rate: float) -> int:
    """Index of the choice whose worth less its price is greatest; the cheaper one on ties."""
    return max(range(len(table)), key=lambda index: (table[index][2] - rate * table[index][1], -index))


def _spent(tables: dict[str, Table], rate: float) -> int:
    return sum(table[_best(table, rate)][1] for table in tables.values())
