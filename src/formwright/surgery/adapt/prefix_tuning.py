"""Prefix tuning: learned keys and values before every text, in every layer.

Li and Liang, 2021 (2101.00190). While training, a network makes them (``hidden`` features); :func:`fold` then keeps
what it makes and throws it away. ``hidden`` 0 trains them as they are, which is P-tuning v2 (Liu et al., 2022,
2110.07602). A recurrent mixer has no keys: there the state before the first token is learned, which starts at zero. A
prefix is not the identity at the start, since it takes part of every softmax. Cost: 2 length width parameters a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from formwright.kit.errors import Refusal, SpecError, all_of, unknown
from formwright.models.items import part_name
from formwright.models.model import Entry
from formwright.parts.base import Part
from formwright.registry import Paper, register
from formwright.surgery.adapt._attach import Attaches, Node, chosen_items, laid_out, sublayers
from formwright.surgery.adapt._changes import count
from formwright.surgery.adapt.switch import numbers
from formwright.surgery.base import Plan, on


@register(
    "surgery",
    "prefix-tuning",
    paper=Paper("Li and Liang", 2021, "2101.00190"),
    summary="learned keys and values, or initial states, in every layer",
)
class PrefixTuning(Attaches):
    """Options, beside those of every adapter (where, name, train, seed):

    length: keys a layer, default 30. hidden: features of the network that makes them, default 512; 0: none.
    """

    own = {"length": 30, "hidden": 512}
    examples = ({"length": 3, "hidden": 4, "name": "made"}, {"length": 2, "hidden": 0, "name": "other"})

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        return count(f"{self.name}: length", options["length"]) + count(f"{self.name}: hidden", options["hidden"], 0)

    def nodes(self, model: Any, where: Any, options: Mapping[str, Any]) -> dict[str, Node]:
        return prefixes(model, where, self.name, length=options["length"], hidden=options["hidden"])

    def exact(self, plan: Plan) -> bool:
        return all(node["part"] != "prefix" for node in plan.decisions["items"].values())


def prefixes(model: Any, where: Any, what: str, **options: Any) -> dict[str, Node]:
    """What each chosen mixer can have before its first token; a Refusal naming those that can have nothing."""
    items = chosen_items(model, where, ("mixer",), what)
    found = {id: before(item.part, **options) for id, item in items.items()}
    bare = [(id, part_name(items[id].part)) for id, node in found.items() if node is None]
    all_of(
        Refusal,
        [
            f"{what}: {id} ({name}) has neither keys of its own nor a state that could be learned; leave it out (where)"
            for id, name in bare
        ],
    )
    return {id: node for id, node in found.items() if node is not None}


def before(part: Part, **options: Any) -> Node | None:
    """The adapter that stands before the first token of ``part``, or None where none can."""
    if part.prefixes:
        q: Any = part
        return {"part": "prefix", "heads": q.heads, "kv_heads": q.kv_heads, "head_width": q.head_width, **options}
    slots = part.slots()
    if not slots or not part.traits.streams or any(slot.kind != "fixed" for slot in slots.values()):
        return None
    return {
        "part": "initial-state",
        "slots": {name: list(slot.shape) for name, slot in slots.items()},
        "exact": [name for name, slot in slots.items() if slot.dtype is not None],
    }


def fold(model: Any, name: str = "default") -> Any:
    """Keep the keys and values that the prefix ``name``'s network makes now, and drop the network; returns the model.

    The outputs stay the same. The model's history then says that there never was one. SpecError for an unknown name,
    Refusal where the adapter has no network.
    """
    known = numbers(model)
    if name not in known:
        raise SpecError(f"fold: {unknown('adapter', name, known)}")
    held = sublayers(model)
    places = [i for i, entry in enumerate(model.history) if _made(entry, name)]
    if not places:
        raise Refusal(f"fold: adapter {name!r} has no network that makes its prefix")
    entry = model.history[places[-1]]
    items = {id: {**node, "hidden": 0} if node.get("part") == "prefix" else node for id, node in _items(entry).items()}
    plan = Plan.from_dict(entry.data)
    plan = replace(plan, decisions={**plan.decisions, "items": items})
    for id, node in items.items():
        if node["part"] != "prefix":
            continue
        old = held[id].adapters[name]
        new: Any = on(laid_out(held[id], node, plan).to(old.out.weight.dtype), old).train(old.training)
        with torch.no_grad():
            for learned, value in zip((new.k, new.v), old.learned()):
                learned.copy_(value)
        if old.gate is not None:
            new.gate = old.gate
        held[id].adapters[name] = new
    del model.adapters[name]
    model.history[places[-1]] = Entry(entry.kind, entry.name, plan.to_dict())
    return model


def _items(entry: Entry) -> dict[str, Node]:
    return entry.data.get("decisions", {}).get("items", {}) if entry.kind == "surgery" else {}


def _made(entry: Entry, name: str) -> bool:
    """Whether a line of the history added a prefix of that name with a network."""
    held = _items(entry)
    own = bool(held) and entry.data["decisions"].get("name") == name
    return own and any(node.get("part") == "prefix" and node.get("hidden") for node in held.values())
