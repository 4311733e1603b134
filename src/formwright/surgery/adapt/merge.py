"""Merge: fold what was added to a linear back into one plain weight.

A slot with LoRA becomes ``W + scaling B A``, one with (IA)^3 ``l W``, each method as it says itself; a low-rank slot
becomes ``second first``: the same function to rounding, without the extra products (or, for low rank, with the dense
ones again). What cannot be folded without changing results is refused: integer weights would be rounded anew. Undone
with its displaced modules kept, it gives the very bits back. Hu et al., 2021 (2106.09685), section 4.1. Cost: one small
product a slot.
"""

from __future__ import annotations

from typing import Any

import torch

from formwright.kit.errors import Refusal, SpecError, all_of, unknown
from formwright.parts.base import LinearLike, kind_of
from formwright.parts.linears.adapted import Adapted
from formwright.parts.linears.dense import Dense
from formwright.registry import Paper, register
from formwright.surgery.adapt._training import put_back, remember
from formwright.surgery.adapt.switch import beside_weights, numbers, wrapped
from formwright.surgery.base import Displaced, Plan, Promises, Surgery, check_options, chosen_slots, core, on


@register("surgery", "merge", paper=Paper("Hu et al.", 2021, "2106.09685"), summary="fold adapters into plain weights")
class Merge(Surgery):
    """Options: adapter: which one stays, where slots hold several (the others are lost). where: slots to fold (roles,
    items, addresses), default all that hold adapters; a low-rank slot that is named here is multiplied out."""

    family = "adapt"
    examples = ({},)
    after = "lora"

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options("merge", options, ("adapter", "where"))
        adapter, known = options.get("adapter"), numbers(model)
        if adapter is not None and adapter not in known:
            raise SpecError(f"merge: {unknown('adapter', adapter, known)}")
        apart = beside_weights(model)
        if adapter in apart or (adapter is None and apart and apart == set(known)):
            raise Refusal(
                f"merge: {adapter or ', '.join(sorted(apart))!r} stands around whole sublayers or before texts, where "
                "no weight says what it does; keep it as an adapter"
            )
        if options.get("where") is None:
            slots = list(wrapped(model))
        else:
            chosen = chosen_slots(model, options["where"], (), "merge: where")
            slots = [address for address in chosen if not isinstance(model.slot(address), Dense)]
        if not slots:
            raise Refusal("merge: no slot holds an adapter, so there is nothing to fold in")
        made_room = (entry.data.get("decisions", {}) for entry in model.history if entry.kind == "surgery")
        free: dict[str, list[str]] = next((d["before"] for d in made_room if "number" in d), {"frozen": []})
        decisions = {"slots": slots, "adapter": adapter, "free": free, "before": remember(model)}
        made = self.made(model, dict(options), decisions)
        self.check(model, made)
        return made

    def check(self, model: Any, plan: Plan) -> None:
        known, problems = model.slots(), []
        for address in plan.decisions["slots"]:
            if address not in known:
                problems.append(f"merge: {unknown('slot', address, known)}")
                continue
            problems += _obstacles(address, known[address])
        if plan.decisions["adapter"] is None and len(numbers(model)) > 1:
            names = ", ".join(numbers(model))
            problems.append(f"merge: the model holds adapters {names}: say which one stays (adapter=NAME)")
        all_of(Refusal, problems)

    def promises(self, plan: Plan) -> Promises:
        return Promises(preserves_function=1e-5 if plan.decisions["adapter"] is None else None)

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        displaced: Displaced = {}
        for address in plan.decisions["slots"]:
            slot = model.slot(address)
            bias = core(slot).dense_bias()
            with torch.device("meta"):
                dense = Dense(slot.in_features, slot.out_features, bias is not None, slot.role)
            dense.to(_dtype(slot)).train(slot.training)
            displaced[address] = model.set_slot(address, on(dense, slot))
        if not wrapped(model):
            put_back(model, plan.decisions["free"])
        return displaced

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        for address in list(displaced):
            old, new = displaced.pop(address), model.slot(address)
            weight, bias = _folded(old, plan.decisions["adapter"])
            new.weight.copy_(weight)
            if new.bias is not None:
                new.bias.copy_(bias)

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        super().restore(model, plan, displaced)
        put_back(model, plan.decisions["before"])

    def words(self, plan: Plan) -> str:
        which = f"the adapter {plan.decisions['adapter']!r}" if plan.decisions["adapter"] else "the adapters"
        return f"Folded {which} into {len(plan.decisions['slots'])} plain weights."


def _folded(slot: LinearLike, name: str | None) -> tuple[Any, Any]:
    """Weight and bias of a slot with the adapter ``name``, or its only one, folded in."""
    return slot.folded(name) if isinstance(slot, Adapted) else (slot.dense_weight(), slot.dense_bias())


def _dtype(slot: LinearLike) -> torch.dtype:
    return next((p.dtype for p in core(slot).parameters() if p.is_floating_point()), torch.get_default_dtype())


def _obstacles(address: str, slot: LinearLike) -> list[str]:
    held = {kind_of(module) for module in slot.modules() if isinstance(module, LinearLike) and core(module) is module}
    return [
        f"merge: {address} is {kind_of(slot)}: folding into {kind} weights would round them anew and change the "
        "results; keep the adapter beside them, or merge before the weights are made so"
        for kind in sorted(held - FOLDS)
    ]


#: Kinds whose weight can be stated exactly.
FOLDS = {"dense", "low-rank"}
