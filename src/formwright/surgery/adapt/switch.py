"""Which adapter answers: names and numbers of a model's adapters, one for each row, one for all calls.

A choice is a number that the wrappers compare, so switching costs nothing and compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import SpecError, all_of, unknown
from formwright.parts.adapters.prompt import Prompted
from formwright.parts.beside import EVERY, Adapters
from formwright.parts.linears.adapted import Adapted


def wrapped(model: Any) -> dict[str, Adapted]:
    """Every slot that holds adapters, by address."""
    return {address: slot for address, slot in model.slots().items() if isinstance(slot, Adapted)}


def holders(model: Any) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Everything that holds adapters (linears, sublayers, the token table), with its adapters by name."""
    for module in model.modules():
        if isinstance(module, Adapters):
            yield module, module._modules
        elif isinstance(module, (Adapted, Prompted)):
            yield module, module.adapters._modules


def numbers(model: Any) -> dict[str, int]:
    """Every adapter of a model that can be chosen, and its number, oldest first."""
    every = ((name, adapter.number) for _, held in holders(model) for name, adapter in held.items())
    found = {name: number for name, number in every if number != EVERY}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def beside_weights(model: Any) -> set[str]:
    """Names of adapters that stand, wholly or partly, elsewhere than beside linears, so that no weight says them."""
    return {name for holder, held in holders(model) if not isinstance(holder, Adapted) for name in held}


def choose(model: Any, names: Sequence[str | None]) -> Tensor:
    """Adapter names of rows (None: no adapter) -> (B,) int64 for ``model(batch, adapters=...)``."""
    known = numbers(model)
    all_of(SpecError, [unknown("adapter", name, known) for name in names if name is not None and name not in known])
    picked = [-1 if name is None else known[name] for name in names]
    return torch.tensor(picked, dtype=torch.long, device=model.device)


def use(model: Any, name: str | None) -> Any:
    """Make ``name`` the adapter of calls that choose none (None: no adapter); returns the model.

    Adapter 0, the first, is used until then; the choice belongs to this process and is not saved.
    """
    number = int(choose(model, [name])[0])
    for holder, _ in holders(model):
        holder.active = number
    return model
