"""What a slot's lost energy does to the model's output: the exchange rate by which ranks are shared out.

Output energy alone misjudges slots: a few large channels may hold nearly all of it and be normalised away behind. So
each slot is factorised by itself at the rank of an even share, the distance of the model's output to the original's is
measured (restarted at the slot's item), and divided by the share of energy that was lost. Distances grow with the
square of a small change, as lost energy does, so that rate holds for other ranks too. Cost: about half a pass over
2,048 tokens and one eigenvalue problem a slot, and the factors of all slots at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from formwright.models.batch import Batch
from formwright.parts.linears.dense import Dense
from formwright.parts.linears.low_rank import LowRank, break_even
from formwright.surgery.base import set_core
from formwright.surgery.compress._factors import Inputs, axes
from formwright.surgery.compress._ranks import Offer
from formwright.surgery.compress._search import Search, places

#: Tokens of the evidence that are run for each slot.
TOKENS = 2048


@dataclass(frozen=True)
class Trial:
    """One slot held by ``module`` instead."""

    model: Any
    address: str
    module: LowRank
    place: int
    saves: int = 0

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        old = set_core(self.model, self.address, self.module)
        try:
            yield
        finally:
            set_core(self.model, self.address, old)

    def words(self) -> str:
        return f"with {self.address} factorised"


def offers_by_effect(
    model: Any, slots: dict[str, Dense], known: dict[str, Inputs | None], evidence: list[Batch], share: float
) -> dict[str, Offer]:
    """An offer for each slot whose weight is its measured rate; slots outside the layers take the mean rate."""
    at = places(model) if hasattr(model, "run") else {}
    energies, trials = {}, []
    for address, slot in slots.items():
        place = at.get(address.partition(":")[0])
        energies[address], axis = axes(slot.weight, known[address], vectors=place is not None)
        rank = max(1, int(share * break_even(slot.in_features, slot.out_features)))
        if place is not None:
            trials.append(Trial(model, address, _truncated(slot, axis[:, :rank], known[address]), place))
    offers = {address: Offer(slot.in_features, slot.out_features, energies[address]) for address, slot in slots.items()}
    if not trials:
        return offers
    measured = Search(model, _some(evidence), what="low-rank").step([], trials)
    rates = {}
    for trial, distance in zip(trials, measured):
        lost = 1.0 - float(offers[trial.address].kept()[trial.module.rank])
        rates[trial.address] = max(0.0, distance) / max(lost, 1e-9)
    mean = sum(rates.values()) / len(rates)
    return {
        address: Offer(offer.in_features, offer.out_features, offer.energy, rates.get(address, mean))
        for address, offer in offers.items()
    }


def _truncated(slot: Dense, axis: torch.Tensor, inputs: Inputs | None) -> LowRank:
    """The slot at the rank of ``axis`` (out, rank), as the plan would fill it."""
    with torch.device("meta"):
        made = LowRank(slot.in_features, slot.out_features, slot.bias is not None, slot.role, rank=axis.shape[1])
    wide = slot.weight.detach().double()
    first = axis.T @ wide
    values = {"first.weight": first.to(slot.weight), "second.weight": axis.to(slot.weight)}
    if slot.bias is not None:
        bias = slot.bias.detach()
        if inputs is not None and inputs.mean is not None:
            mean = inputs.mean.double()
            bias = bias + (wide @ mean - axis @ (first @ mean)).to(bias)
        values["second.bias"] = bias
    made.load_state_dict(values, assign=True)
    return made.eval()


def _some(evidence: list[Batch]) -> list[Batch]:
    """The first batches, of about ``TOKENS`` positions."""
    found, count = [], 0
    for batch in evidence:
        found.append(batch)
        count += max(tensor.shape[0] * (tensor.shape[1] if tensor.dim() > 1 else 1) for tensor in batch.inputs.values())
        if count >= TOKENS:
            break
    return found
