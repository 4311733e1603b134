"""Fuse: one adapter from the style half of one partly learnable projection and the content half of another.

    up = [A; B of style],   down = [C, D of content]

Xu et al., 2024 (2403.19456). Both must have been made with the same seed, so that their fixed halves A and C are the
same bits; otherwise what each learned means nothing to the other, and it is refused. The result trains both halves
further. Cost: one adapter, where two that are merged are two.
"""

from __future__ import annotations

from typing import Any

import torch

from formwright.kit.errors import SpecError, all_of, unknown
from formwright.registry import Paper, register
from formwright.surgery.adapt._changes import held
from formwright.surgery.adapt.partly_learnable import PartlyLearnable, PartlyLearnableSurgery
from formwright.surgery.adapt.switch import numbers, wrapped
from formwright.surgery.base import Displaced, Plan, check_options


@register("surgery", "fuse", paper=Paper("Xu et al.", 2024, "2403.19456"), summary="one adapter from halves of two")
class Fuse(PartlyLearnableSurgery):
    """Options: content, style: names of two partly learnable adapters. name: of the new one, default "fused". train,
    precondition: as there."""

    tunes = False  # it joins what was trained
    examples = ({"content": "default", "style": "default"},)  # type: ignore[assignment]
    after = "partly-learnable"
    own = {"content": "content", "style": "style", "precondition": None}

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options(self.name, options, (*self.own, "name", "train"))
        given = {**self.own, "name": "fused", **options}
        all_of(SpecError, self.problems(model, given["content"], given["style"]))
        source = halves(model, given["content"])
        some = next(iter(source.values()))
        plain: dict[str, Any] = {key: given[key] for key in ("name", "train") if key in given}
        made = super().plan(model, **plain, where=list(source))
        decisions = {
            **made.decisions,
            "rank": some.A.shape[1],
            "prior": some.prior,
            "dropout": some.rate,
            "role": "both",
            "content": given["content"],
            "style": given["style"],
            "precondition": given["precondition"],
        }
        return self.made(model, dict(options), decisions)

    def wrong(self, options: Any) -> list[str]:
        return []

    def shared(self, options: Any, slots: Any) -> dict[str, Any]:
        return {"rank": 1, "prior": "plain", "dropout": 0.0, "role": "both", "precondition": None}

    def change(self) -> type[PartlyLearnable]:
        return PartlyLearnable

    def problems(self, model: Any, content: str, style: str) -> list[str]:
        """Why the two cannot be fused; empty where they can."""
        known = numbers(model)
        missing = [unknown("adapter", name, known) for name in (content, style) if name not in known]
        if missing:
            return [f"fuse: {sentence}" for sentence in missing]
        one, two = halves(model, content), halves(model, style)
        if set(one) != set(two) or not one:
            apart = sorted(set(one) ^ set(two)) or ["no slot holds both"]
            return [f"fuse: {content!r} and {style!r} must be partly learnable and in the same slots, not {apart[0]}"]
        return [sentence for address in one for sentence in _apart(address, one[address], two[address])]

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        """The halves; where the two are not there, as when a fused adapter is loaded alone, values come from a file."""
        content, style = (halves(model, plan.decisions[key]) for key in ("content", "style"))
        for address, change in held(model, plan).items():
            change.reset(torch.Generator().manual_seed(0))
            if address in content and address in style:
                for name, source in (("A", style), ("B", style), ("C", content), ("D", content)):
                    getattr(change, name).copy_(getattr(source[address], name))

    def words(self, plan: Plan) -> str:
        decided = plan.decisions
        return (
            f"Fused the content of {decided['content']!r} and the style of {decided['style']!r} into "
            f"{decided['name']!r}, in {len(decided['slots'])} linears."
        )


def halves(model: Any, name: str) -> dict[str, PartlyLearnable]:
    """The partly learnable projections of that name, by slot."""
    found = {address: slot.held().get(name) for address, slot in wrapped(model).items()}
    return {address: change for address, change in found.items() if isinstance(change, PartlyLearnable)}


def _apart(address: str, content: PartlyLearnable, style: PartlyLearnable) -> list[str]:
    if content.A.shape != style.A.shape:
        return [f"fuse: at {address} the ranks are {content.A.shape[1]} and {style.A.shape[1]}; they must be equal"]
    if not (torch.equal(content.A, style.A) and torch.equal(content.C, style.C)):
        return [f"fuse: at {address} the fixed halves differ; make both adapters with the same seed, rank and prior"]
    return []
