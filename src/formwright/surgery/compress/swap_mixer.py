"""Swap the mixer: put another way of mixing tokens in place of attention, and keep its trained projections.

Query, key, value and output slots move over as they are, whatever kind of linear they hold; what the new mixer has
besides starts from its own ``reset``, keyed by (seed, item). Options that both mixers take, such as heads, causal and
rotary, carry over unless given; the plan names those that are lost. Outputs change, so healing follows; what is gained
is the new mixer's cost in length.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import torch

from formwright import registry
from formwright.kit.errors import FormwrightError, Refusal, SpecError, all_of, unknown
from formwright.models.items import part_name
from formwright.parts.base import Part, initialise, linears
from formwright.parts.make import make_part, options_of
from formwright.registry import register
from formwright.surgery.base import Displaced, Plan, Surgery, check_options, on

ROLES = ("q", "k", "v", "o")


@register("surgery", "swap-mixer", summary="another mixer in attention's place, with its projections")
class SwapMixer(Surgery):
    """Options: ``mixer`` (its registered name), ``options`` (of that mixer, over those that carry over), ``where``
    (patterns of items, default every one that holds attention), ``seed`` (of what is new).

    ``decisions["swap"]`` maps each item to the options of its new mixer and may be edited.
    """

    family = "compress"
    examples = (
        {"mixer": "attention", "options": {"window": 3}},
        {"mixer": "attention", "options": {"window": 4}, "where": ["b0.*"]},
    )

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options("swap-mixer", options, ("mixer", "options", "where", "seed"))
        known = registry.names("mixer")
        mixer, given, seed = options.get("mixer"), options.get("options", {}), options.get("seed", 0)
        problems = [] if mixer in known else [f"swap-mixer: {unknown('mixer', str(mixer), known)}"]
        if not isinstance(given, dict):
            problems.append(f"swap-mixer: options={given!r} must be an object")
        if isinstance(seed, bool) or not isinstance(seed, int):
            problems.append(f"swap-mixer: seed={seed!r} must be a whole number")
        all_of(SpecError, problems)
        swap, reasons = {}, []
        for id in _chosen(model, options.get("where")):
            old = model.item(id).part
            swap[id] = {**_carried(old, str(mixer)), **given}
            reasons += _reasons(id, old, str(mixer), swap[id])
        all_of(Refusal, reasons)
        if not swap:
            raise Refusal("swap-mixer: this model has no attention; say where")
        parts = dict(model.parts())
        moving = [_moving(parts[id], _laid(str(mixer), swap[id], parts[id])) for id in swap]
        fresh = [role for role in ROLES if not all(role in moved for moved in moving)]
        lost = sorted({name for id in swap for name in _lost(parts[id], str(mixer))})
        decisions = {"mixer": mixer, "swap": swap, "seed": seed, "fresh": fresh, "lost": lost}
        return self.made(model, dict(options), decisions)

    def check(self, model: Any, plan: Plan) -> None:
        held, problems = dict(model.parts()), []
        for id, options in plan.decisions["swap"].items():
            if id not in held:
                problems.append(f"swap-mixer: {unknown('item', id, held)}")
            else:
                problems += _reasons(id, held[id], plan.decisions["mixer"], options)
        all_of(SpecError, problems)

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        displaced: Displaced = {}
        for id, options in plan.decisions["swap"].items():
            item = model.item(id)
            old = item.part
            floats = (p.dtype for p in old.parameters() if p.is_floating_point())
            new = on(
                _laid(plan.decisions["mixer"], options, old).to(next(floats, torch.get_default_dtype())), old
            ).train(old.training)
            for role in _moving(old, new):
                setattr(new, role, getattr(old, role))
            displaced[id], item.part = old, new
        return displaced

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        for id, old in displaced.items():
            new = model.item(id).part
            moved = {role: getattr(new, role) for role in _moving(old, new)}
            for role in moved:
                setattr(new, role, None)
            initialise(new, plan.decisions["seed"], id)
            for role, slot in moved.items():
                setattr(new, role, slot)

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        for id, old in displaced.items():
            model.item(id).part = old

    def words(self, plan: Plan) -> str:
        count, fresh = len(plan.decisions["swap"]), plan.decisions.get("fresh", [])
        kept = [role for role in ROLES if role not in fresh]
        stayed = f"slots {', '.join(kept)} kept their weights" if kept else "nothing of their weights was kept"
        anew = f" and {', '.join(fresh)} start anew" if kept and fresh else ""
        lost = plan.decisions.get("lost", [])
        without = f"; it has no {', '.join(lost)}, which they had" if lost else ""
        return f"Put {plan.decisions['mixer']} in place of {count} mixers; {stayed}{anew}{without}."

    def short(self, plan: Plan) -> str:
        return str(plan.decisions["mixer"])


def _chosen(model: Any, where: Any) -> list[str]:
    """Ids of the items whose mixer is to be exchanged."""
    held = {id: part for id, part in model.parts() if all(hasattr(part, role) for role in ROLES)}
    if where is None:
        return [id for id, part in held.items() if part_name(part) == "attention"]
    patterns = [where] if isinstance(where, str) else list(where)
    all_of(
        SpecError,
        [f"swap-mixer: {unknown('item', p, held)}" for p in patterns if not fnmatch.filter(held, p)],
    )
    return [id for id in held if any(fnmatch.fnmatchcase(id, pattern) for pattern in patterns)]


def _settings(old: Any) -> dict[str, Any]:
    """How the old mixer was set, by the names of options; without those that stand at nothing."""
    rule = getattr(old, "rule", None)
    norms = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}
    settings = {
        "heads": getattr(old, "heads", None),
        "kv_heads": getattr(old, "kv_heads", None),
        "head_width": getattr(old, "head_width", None),
        "causal": old.traits.causal,
        "window": getattr(rule, "window", None),
        "bias": old.q.dense_bias() is not None,
        "out_bias": old.o.dense_bias() is not None,
        "rotary": getattr(old, "rotary", None),
        "distance": getattr(old, "distance", None),
        "qk_norm": norms.get(type(getattr(old, "q_norm", None)).__name__),
        "scale": getattr(old, "scale", None),
        "dropout": getattr(old, "rate", 0.0),
    }
    return {name: value for name, value in settings.items() if value is not None}


def _carried(old: Any, mixer: str) -> dict[str, Any]:
    """The old mixer's settings that the new one takes as options."""
    taken = options_of(registry.resolve("mixer", mixer))
    return {name: value for name, value in _settings(old).items() if name in taken}


def _lost(old: Any, mixer: str) -> list[str]:
    """Settings that shape what the old mixer computes and that the new one has no option for."""
    taken = options_of(registry.resolve("mixer", mixer))
    shaping = ("window", "rotary", "distance", "qk_norm", "scale")
    return [name for name in shaping if name in _settings(old) and name not in taken]


def _laid(mixer: str, options: dict[str, Any], old: Any) -> Part:
    with torch.device("meta"):
        return make_part({"part": f"mixer:{mixer}", **options}, old.o.out_features)


def _moving(old: Any, new: Any) -> list[str]:
    """Slots of the same name and size."""
    theirs = dict(linears(new))
    return [
        role
        for role in ROLES
        if role in theirs
        and (theirs[role].out_features, theirs[role].in_features)
        == (getattr(old, role).out_features, getattr(old, role).in_features)
    ]


def _reasons(id: str, old: Any, mixer: str, options: dict[str, Any]) -> list[str]:
    """Everything that stands against the exchange of one item's mixer."""
    if getattr(old, "memory", None) is not None:
        return [f"swap-mixer: {id} attends to another tower, which {mixer} would not"]
    try:
        new = _laid(mixer, options, old)
    except FormwrightError as error:
        return [f"swap-mixer: {id}: {line}" for line in str(error).split("\n")]
    theirs = dict(linears(new))
    reasons = [
        f"swap-mixer: {id}: slot {role} is {_size(getattr(old, role))}, and in {mixer} {_size(theirs[role])}; "
        "grouped heads need a mixer that takes them"
        for role in ROLES
        if role in theirs and role not in _moving(old, new)
    ]
    if old.traits.causal and not new.traits.causal:
        reasons.append(f"swap-mixer: {id} is causal and {mixer} would not be: give options={{'causal': True}}")
    return reasons


def _size(slot: Any) -> str:
    return f"{slot.out_features} x {slot.in_features}"
