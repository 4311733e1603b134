"""Whether a model is what a configuration says: both laid out, compared module by module.

Two models agree when their modules, parameter shapes and plain settings agree. What differs comes back as sentences
that name the item or slot, so that a refusal to write tells the reader which surgery stands in the way.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from formwright.models.items import Residual
from formwright.parts.base import LinearLike, TableLike
from formwright.parts.context import Visible

#: Settings that change nothing of what a model computes once trained.
SILENT = {
    "training",
    "rate",
    "std",
    "labels",
    "id",
    "local",
    "block",
    "axes",
    "traits",
    "reads",
    "writes",
    "wants_bias",
}


def kind_of(module: Any) -> str:
    return getattr(type(module), "registered", ("", type(module).__name__))[1]


def differences(model: Any, reference: Any, title: str) -> list[str]:
    """Sentences for everything in which ``model`` is not ``reference``; empty when they agree."""
    found: list[str] = []
    whose = f"which {title} configurations cannot say"
    towers = getattr(model, "towers", None)
    if (towers is None) != (getattr(reference, "towers", None) is None):
        return [f"it is {'one tower' if towers is None else 'a system of towers'}, {whose}"]
    if towers is not None:
        if set(towers) != set(reference.towers):
            return [f"its towers are {', '.join(towers)}, {title} has {', '.join(reference.towers)}"]
        for name, tower in towers.items():
            found += [f"tower {name}: {line}" for line in differences(tower, reference.towers[name], title)]
        return found
    for item in model.walk():
        if isinstance(item, Residual) and item.dropped:
            found.append(f"{item.id} is dropped, {whose}")
    if found:
        return found
    ours, theirs = ({item.id: item for item in m.walk()} for m in (model, reference))
    found += [f"{id} is one layer more, {whose}" for id in ours if id not in theirs]
    found += [f"{id} is missing" for id in theirs if id not in ours]
    for what, slots, other in (
        ("slot", model.slots(), reference.slots()),
        ("table", model.tables(), reference.tables()),
    ):
        for address, slot in slots.items():
            if address in other and type(slot) is not type(other[address]):
                found.append(f"{what} {address} is {kind_of(slot)}, {whose}")
    if found:
        return found
    return _modules(model, reference, title)


def _modules(model: nn.Module, reference: nn.Module, title: str) -> list[str]:
    found = []
    ours, theirs = dict(model.named_modules()), dict(reference.named_modules())
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        mine, wanted = ours.get(name), theirs.get(name)
        if mine is None or wanted is None:
            extra = mine if wanted is None else wanted
            verb = "has" if wanted is None else "lacks"
            found.append(f"it {verb} {name} ({kind_of(extra)}), where a {title} configuration says otherwise")
            continue
        if type(mine) is not type(wanted):
            found.append(f"{name} is {kind_of(mine)}, a {title} configuration says {kind_of(wanted)}")
            continue
        found += [f"{name or 'the model'}: {line}" for line in _settings(mine, wanted, title)]
    return found


def _settings(mine: nn.Module, wanted: nn.Module, title: str) -> list[str]:
    found = []
    for kind in ("_parameters", "_buffers"):
        held, other = getattr(mine, kind), getattr(wanted, kind)
        for name in {**held, **other}:
            a, b = (None if t.get(name) is None else tuple(t[name].shape) for t in (held, other))
            if a != b:
                found.append(f"{name} has shape {a}, a {title} configuration says {b}")
    if hasattr(mine, "spec"):
        return found  # the model itself: its settings are its name and history
    for name, value in vars(mine).items():
        if name.startswith("_") or name in SILENT or isinstance(value, (LinearLike, TableLike)):
            continue
        other = vars(wanted).get(name)
        if isinstance(value, Visible) and isinstance(other, Visible):
            value, other = ((rule.causal, rule.window) for rule in (value, other))
        if _plain(value) and value != other:
            found.append(f"{name} is {value!r}, a {title} configuration says {other!r}")
    return found


def _plain(value: Any) -> bool:
    return value is None or callable(value) or isinstance(value, (bool, int, float, str, tuple, list, dict))
