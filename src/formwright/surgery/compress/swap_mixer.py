"""Swap the mixer: put another way of mixing tokens in place of attention, and keep its trained projections.

Query, key, value and output slots move over as they are, whatever kind of linear they hold; where the new mixer takes
no groups of heads, grouped keys and values are repeated for each of their heads. What it has besides starts from its
own ``reset``, keyed by (seed, item). Options that both mixers take, such as heads, causal and rotary, carry over unless
given, and a table of fixed length is as long as the model's positions; the plan names what starts anew and what is
lost. Outputs change, so healing follows: ``fw.heal(model, original, texts, steps=...)``, or ``--heal STEPS`` of
``formwright apply``. What is gained is the new mixer's cost in length.
"""

from __future__ import annotations

import fnmatch
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from formwright import registry
from formwright.kit.errors import FormwrightError, Refusal, SpecError, all_of, unknown
from formwright.models.items import part_name
from formwright.parts.base import LinearLike, Part, initialise, linears
from formwright.parts.beside import Adapter
from formwright.parts.make import make_part, options_of
from formwright.registry import register
from formwright.surgery.base import Displaced, Plan, Surgery, check_options, on

ROLES = ("q", "k", "v", "o")
#: Settings that shape what a mixer computes; one that the new mixer has no option for is lost.
SHAPING = ("window", "rotary", "distance", "qk_norm", "scale")


@register("surgery", "swap-mixer", summary="another mixer in attention's place, with its projections")
class SwapMixer(Surgery):
    """Options: ``mixer`` (its registered name), ``options`` (of that mixer, over those that carry over), ``where``
    (patterns of items, default every one that holds attention), ``seed`` (of what is new).

    ``decisions["swap"]`` maps each item to the options of its new mixer and may be edited. ``fresh`` names what of the
    new mixers starts anew, ``unused`` the trained slots that have no place in them, ``repeated`` those that are
    repeated for heads of their own, and ``lost`` what else they no longer do.
    """

    family = "compress"
    examples = (
        {"mixer": "attention", "options": {"window": 3}},
        {"mixer": "linear-attention"},
        {"mixer": "attention", "options": {"window": 4}, "where": ["b0.*"]},
    )

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options("swap-mixer", options, ("mixer", "options", "where", "seed"))
        known = registry.names("mixer")
        mixer, given, seed = str(options.get("mixer")), options.get("options", {}), options.get("seed", 0)
        problems = [] if mixer in known else [f"swap-mixer: {unknown('mixer', mixer, known)}"]
        if not isinstance(given, dict):
            problems.append(f"swap-mixer: options={given!r} must be an object")
        if isinstance(seed, bool) or not isinstance(seed, int):
            problems.append(f"swap-mixer: seed={seed!r} must be a whole number")
        all_of(SpecError, problems)
        held = {id: model.item(id).part for id in _chosen(model, options.get("where"))}
        if not held:
            raise Refusal("swap-mixer: this model has no attention; say where")
        swap = {id: {**_carried(old, mixer, given), **_length(model, mixer), **given} for id, old in held.items()}
        all_of(Refusal, [line for id, old in held.items() for line in _reasons(model, id, old, mixer, swap[id])])
        decisions = {"mixer": mixer, "swap": swap, "seed": seed, **_changes(held, mixer, swap)}
        made = self.made(model, dict(options), decisions)
        if decisions["unused"]:
            warnings.warn(f"swap-mixer: {self.words(made)} Heal the model before it is used.", stacklevel=3)
        return made

    def check(self, model: Any, plan: Plan) -> None:
        held, problems = dict(model.parts()), []
        for id, options in plan.decisions["swap"].items():
            if id not in held:
                problems.append(f"swap-mixer: {unknown('item', id, held)}")
            else:
                problems += _reasons(model, id, held[id], plan.decisions["mixer"], options)
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
            for role, rows in _moving(old, new).items():
                slot = getattr(old, role)
                setattr(new, role, slot if rows is None else slot.take(out=rows))
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
        count, mixer = len(plan.decisions["swap"]), plan.decisions["mixer"]
        fresh, unused, repeated, lost = (
            plan.decisions.get(name, []) for name in ("fresh", "unused", "repeated", "lost")
        )
        kept = [role for role in ROLES if role not in unused and role not in fresh]
        changes = {
            "repeated for each of their heads": repeated,
            "without a place in it": unused if kept else [],
            "starting anew": fresh,
            "lost": lost,
        }
        said = [f"slots {', '.join(kept)} kept their weights" if kept else "nothing of their weights was kept"]
        said += [f"{what}: {', '.join(names)}" for what, names in changes.items() if names]
        return f"Put {mixer} in place of {count} mixers: {'; '.join(said)}."

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


def _carried(old: Any, mixer: str, given: dict[str, Any]) -> dict[str, Any]:
    """The old mixer's settings that the new one takes as options, in its own measure."""
    taken = options_of(registry.resolve("mixer", mixer))
    found = {name: value for name, value in _settings(old).items() if name in taken}
    if mixer == "longformer" and "window" in found and not given.get("causal", old.traits.causal):
        found["window"] = 2 * found["window"] - 1  # attention counts one side, longformer both
    return found


def _length(model: Any, mixer: str) -> dict[str, int]:
    """The length of the new mixer's table where it must have one: as far as the model reads."""
    option = options_of(registry.resolve("mixer", mixer)).get("length")
    needed = option is not None and option.default is inspect.Parameter.empty
    return {"length": model.limit} if needed and model.limit is not None else {}


def _changes(held: dict[str, Any], mixer: str, swap: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """What a plan says of weights and settings, over all items."""
    taken = options_of(registry.resolve("mixer", mixer))
    fresh, unused, repeated, lost = (dict[str, None]() for _ in range(4))
    for id, old in held.items():
        new = _laid(mixer, swap[id], old)
        moving = _moving(old, new)
        fresh |= dict.fromkeys(
            name for name in (path.split(".")[0] for path, _ in new.named_parameters()) if name not in moving
        )
        unused |= dict.fromkeys(role for role in ROLES if role not in moving)
        repeated |= dict.fromkeys(role for role, rows in moving.items() if rows is not None)
        settings = _settings(old)
        lost |= dict.fromkeys(name for name in SHAPING if name in settings and name not in taken)
        if new.traits.causal and not old.traits.causal:
            lost |= {"sight of later tokens": None}
    return {"fresh": list(fresh), "unused": list(unused), "repeated": list(repeated), "lost": list(lost)}


def _laid(mixer: str, options: dict[str, Any], old: Any) -> Part:
    with torch.device("meta"):
        return make_part({"part": f"mixer:{mixer}", **options}, old.o.out_features)


def _moving(old: Any, new: Any) -> dict[str, Tensor | None]:
    """Slots that the new mixer takes over, and which rows of them: None is all, once."""
    theirs, found = dict(linears(new)), dict[str, Tensor | None]()
    for role in ROLES:
        if role not in theirs:
            continue
        ours = getattr(old, role)
        if _size(ours) == _size(theirs[role]):
            found[role] = None
        elif role in ("k", "v") and _groups(ours, theirs[role], old):
            heads = torch.arange(ours.out_features).unflatten(0, (old.kv_heads, -1))
            found[role] = heads.repeat_interleave(theirs[role].out_features // ours.out_features, 0).flatten()
    return found


def _groups(ours: LinearLike, theirs: LinearLike, old: Any) -> bool:
    """Whether ``theirs`` has a head for each query where ``ours`` has one for several."""
    grouped = getattr(old, "kv_heads", old.heads) < old.heads
    return grouped and ours.in_features == theirs.in_features and theirs.out_features == old.q.out_features


def _reasons(model: Any, id: str, old: Any, mixer: str, options: dict[str, Any]) -> list[str]:
    """Everything that stands against the exchange of one item's mixer."""
    if any(slot.kind == "memory" for slot in old.slots().values()):
        return [f"swap-mixer: {id} attends to another tower, which {mixer} would not"]
    known = options_of(registry.resolve("mixer", mixer))
    missing = [name for name, o in known.items() if o.default is inspect.Parameter.empty and name not in options]
    if "length" in missing:
        return [
            f"swap-mixer: {id}: {mixer} has a table of fixed length, and this model's positions have no end: say "
            "options={'length': TOKENS}, the longest text it shall read"
        ]
    if missing:
        return [f"swap-mixer: {id}: {mixer} needs {', '.join(missing)}: say options={{{missing[0]!r}: ...}}"]
    try:
        new = _laid(mixer, options, old)
    except FormwrightError as error:
        return [f"swap-mixer: {id}: {line}" for line in str(error).split("\n")]
    theirs, moving = dict(linears(new)), _moving(old, new)
    reasons = [
        f"swap-mixer: {id}: adapter {name!r} is what {part_name(old)} begins with, and would mean nothing to {mixer}; "
        "undo it first"
        for name, adapter in (model.item(id).adapters or {}).items()
        if type(adapter).begin is not Adapter.begin and not (old.prefixes and new.prefixes)
    ]
    reasons += [
        f"swap-mixer: {id}: slot {role} is {_said(getattr(old, role))}, and in {mixer} {_said(theirs[role])}; "
        "leave out the options that change its size"
        for role in ROLES
        if role in theirs and role not in moving
    ]
    if old.traits.causal and not new.traits.causal:
        remedy = "give options={'causal': True}" if options.get("causal") is False else "choose a causal mixer"
        reasons.append(f"swap-mixer: {id} is causal and {mixer} would not be: {remedy}")
    reasons += [
        f"swap-mixer: {id}: {mixer} with these options reads {name!r}, which no conditioner of this model fills"
        for name in new.reads
        if name not in model.conditioners
    ]
    return reasons


def _size(slot: LinearLike) -> tuple[int, int]:
    return slot.out_features, slot.in_features


def _said(slot: LinearLike) -> str:
    return f"{slot.out_features} x {slot.in_features}"
