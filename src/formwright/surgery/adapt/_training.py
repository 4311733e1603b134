"""Which parameters may train, remembered as plain data so that it can be put back after loading too.

A surgery that trains only its own parameters records what could train before it as names; the shorter of "these were
frozen" and "only these could train" is kept.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any


def remember(model: Any) -> dict[str, list[str]]:
    """{"frozen": names} or {"trainable": names}, whichever is shorter."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {"frozen": frozen} if len(frozen) <= len(trainable) else {"trainable": trainable}


def put_back(model: Any, before: dict[str, list[str]]) -> None:
    """Make trainable what was, by name; a parameter of another name is trainable unless only some were."""
    frozen, only = set(before.get("frozen", ())), before.get("trainable")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name not in frozen if only is None else name in only)


def plain_name(name: str) -> str:
    """A tensor's name without the wrappers around its linear, which come and go."""
    return name.replace(".base.", ".")


def train_only(model: Any, patterns: Sequence[str]) -> None:
    """Freeze everything but the parameters whose names, with or without wrappers, match a shell-style pattern."""
    for name, parameter in model.named_parameters():
        wanted = any(fnmatch.fnmatchcase(one, pattern) for pattern in patterns for one in {name, plain_name(name)})
        if parameter.is_floating_point() or not wanted:
            parameter.requires_grad_(wanted)
