"""Stacks said in letters: one residual layer a letter, and how letters are spread to reach given shares.

``M`` is a recurrent mixer, ``*`` attention, ``-`` an MLP, ``E`` a mixture of experts: ``"M-M*-"``. Waleffe et al., 2024
(2406.07887).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formwright.kit.errors import SpecError, all_of

LETTERS = {"M": "a recurrent mixer", "*": "attention", "-": "an MLP", "E": "a mixture of experts"}


def stacked(pattern: str, nodes: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers that ``pattern`` spells, each letter as its node of ``nodes``; SpecError for any other letter."""
    known = ", ".join(f"{letter!r} ({LETTERS[letter]})" for letter in nodes)
    wrong = [
        f"pattern: {letter!r} at place {place} is no layer here; known letters: {known}"
        for place, letter in enumerate(pattern)
        if letter not in nodes
    ]
    all_of(SpecError, wrong if pattern else ["pattern is empty; it needs one letter a layer"])
    return [dict(nodes[letter]) for letter in pattern]


def allocated(layers: int, attention: float, mlp: float) -> str:
    """A pattern of ``layers`` letters with these shares of ``*`` and ``-``, the rest ``M``, each spread evenly.

    Attention is placed first, with equal gaps before, between and behind; MLPs are then spread over what remains, the
    last one at the end. SpecError where the shares are not between 0 and 1 or sum to more than 1.
    """
    if layers < 1 or not (0 <= attention <= 1 and 0 <= mlp <= 1 and attention + mlp <= 1):
        raise SpecError(
            f"pattern: shares {attention} of attention and {mlp} of MLPs in {layers} layers cannot be met; give at "
            "least one layer and shares from 0 up that sum to at most 1"
        )
    heads = round(layers * attention)
    pattern = _spread(["M"] * layers, "*", (layers - heads) / (heads + 1))
    dense = round(layers * mlp)
    free = layers - heads
    return "".join(_spread(pattern, "-", (free - dense) / dense) if dense else pattern)


def _spread(pattern: list[str], letter: str, gap: float) -> list[str]:
    """``pattern`` with ``letter`` in place of an ``M`` after every ``gap`` of them, fractions carried on."""
    out, left = [], gap
    for old in pattern:
        if old != "M":
            out.append(old)
        elif left < 0.5:
            out.append(letter)
            left += gap
        else:
            out.append(old)
            left -= 1
    return out
