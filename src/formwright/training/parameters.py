"""Which parameters move, under which address, and in which group of the optimizer.

An address is that of a slot or table with the tensor's name (``b3.attention:q.weight``, ``stem:tokens.weight``), or
for norms and what else stands beside slots the item and the rest (``b3.attention:norm.weight``, ``head:bias``); in a
system the tower stands before (``decoder/b0.mlp:up.weight``). Patterns are shell patterns over addresses; ``!`` takes
away, the last match decides: ``("*", "!stem:*")`` is everything but the stem, ``("b[34].*:[qv]",)`` some projections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from formwright.kit.errors import SpecError, nearest


def addresses(model: Any) -> dict[str, str]:
    """Parameter name -> address, for every parameter of a model or system."""
    if hasattr(model, "towers"):
        return {
            f"towers.{tower}.{name}": f"{tower}/{address}"
            for tower, inner in model.towers.items()
            for name, address in addresses(inner).items()
        }
    known: dict[int, str] = {}
    if hasattr(model, "slots"):
        for address, module in {**model.slots(), **model.tables()}.items():
            for name, parameter in module.named_parameters():
                known.setdefault(id(parameter), f"{address}.{name}")
    ids = sorted((item.id for item in model.walk()), key=len, reverse=True) if hasattr(model, "walk") else []
    return {name: known.get(id(parameter)) or _spelled(name, ids) for name, parameter in model.named_parameters()}


def _spelled(name: str, ids: Sequence[str]) -> str:
    for id in ids:
        if name.startswith(f"{id}."):
            rest = name[len(id) + 1 :]
            return f"{id}:{rest.removeprefix('part.').removeprefix('reshape.')}"
    first, _, rest = name.partition(".")
    if first == "heads":
        head, _, rest = rest.partition(".")
        return f"head:{rest}" if head == "out" else f"head.{head}:{rest}"
    if first == "conditioners":
        conditioner, _, rest = rest.partition(".")
        return f"conditioner.{conditioner}:{rest}"
    return f"{first}:{rest}" if rest else first


def matches(address: str, pattern: str) -> bool:
    """Whether a pattern names an address, or the slot, item or tower that it lies in."""
    return any(fnmatchcase(address, pattern + more) for more in ("", ".*", ":*", "/*"))


def chosen(model: Any, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Name -> parameter for all that require a gradient and match; SpecError for a pattern that matches nothing."""
    known = addresses(model)
    problems = []
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        if not any(matches(address, wanted) for address in known.values()):
            problems.append(f"trainable: {pattern!r} matches no parameter{nearest(wanted, known.values())}")
    if problems:
        raise SpecError("\n".join(problems))
    start = bool(patterns) and patterns[0].startswith("!")
    found = {}
    for name, parameter in model.named_parameters():
        keep = start
        for pattern in patterns:
            if matches(known.get(name, name), pattern.removeprefix("!")):
                keep = not pattern.startswith("!")
        if keep and parameter.requires_grad:
            found[name] = parameter
    return found


#: Tensors of two axes that are no matrices: logarithms of a recurrence's rates, which decay would pull towards 1.
RATES = ("A_log",)


def groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: matrices and tables decay; norms, biases and scalars (below two axes), and rates of
    recurrences, do not."""
    decay, keep = [], []
    for name, parameter in parameters.items():
        rate = name.rpartition(".")[2] in RATES
        (keep if rate or parameter.dim() < 2 else decay).append(parameter)
    made = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in made if group["params"]]


@contextmanager
def only(models: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, gradients are computed for ``parameters`` alone; afterwards everything requires what it did before."""
    free = {id(parameter) for parameter in parameters}
    touched = [p for model in models for p in model.parameters() if p.requires_grad and id(p) not in free]
    for parameter in touched:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in touched:
            parameter.requires_grad_(True)
        for parameter in parameters:
            parameter.grad = None
