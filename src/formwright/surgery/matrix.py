"""The composition matrix: every ordered pair of surgeries either runs or is refused before any work, and why.

A pair runs if, after both, the model answers, what may train gets finite gradients, and a model laid out anew, with
the history replayed and the values read strictly, answers the same to the last bit. A refusal must leave the model as
it was, bit for bit. Cost: seconds, on the small models of :mod:`formwright.surgery.samples`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from formwright import registry
from formwright.kit.errors import FormwrightError
from formwright.surgery.adapt.switch import numbers, use
from formwright.surgery.base import apply, surgery
from formwright.surgery.samples import MODELS, equal, outputs, reloaded, said, state, tokens

RUNS, REFUSES = "runs", "refuses"


def matrix(names: Sequence[str] | None = None, models: Sequence[str] = ("encoder", "decoder")) -> list[dict[str, str]]:
    """One row for each (model, first, second): plain data with ``outcome`` ("runs" or "refuses") and ``why``."""
    names = registry.names("surgery") if names is None else names
    return [pair(model, first, second) for first in names for second in names for model in models]


def pair(model: str, first: str, second: str, reload: Callable[[Any], Any] = reloaded) -> dict[str, str]:
    """Carry ``first`` and then ``second`` out; surgeries that need another one before them get it.

    A surgery that follows itself does so with another example, since the same would often ask for nothing new.
    ``reload`` makes the model anew from what is kept of it.
    Raises AssertionError for a pair that neither runs nor refuses cleanly.
    """
    made = MODELS[model]()
    needed = dict.fromkeys(surgery(name).after for name in (first, second))
    steps = [(name, 0) for name in needed if name and name != first]
    steps += [(first, -1 if first == second else 0), (second, 0)]
    row = {"model": model, "first": first, "second": second, "outcome": RUNS, "why": ""}
    for place, (name, example) in enumerate(steps):
        before, layout, lines = state(made), made.layout(), len(made.history)
        try:
            apply(made, name, tokens(), **surgery(name).examples[example])
        except FormwrightError as error:
            untouched = equal(before, state(made)) and layout == made.layout() and lines == len(made.history)
            assert untouched, f"{name} was refused after it had begun on {model}: {error}"
            alone = "" if place == len(steps) - 1 else f"{name} alone: "
            return {**row, "outcome": REFUSES, "why": alone + str(error).split("\n")[0]}
    _answers(made, f"{first} then {second} on {model}", reload)
    return row


def _answers(made: Any, what: str, reload: Callable[[Any], Any]) -> None:
    """Forward, backward and, from the values alone, the same again; of several adapters the newest, which trains."""
    _newest(made)
    total = torch.zeros(())
    for output in outputs(made).values():
        total = total + output.square().sum()
    trainable = [parameter for parameter in made.parameters() if parameter.requires_grad]
    if total.requires_grad:
        total.backward()
        found = [parameter.grad for parameter in trainable if parameter.grad is not None]
        assert found and all(bool(torch.isfinite(grad).all()) for grad in found), f"{what}: no finite gradient"
        made.zero_grad()
    assert bool(torch.isfinite(total)), f"{what}: the outputs are not finite"
    assert equal(said(made), said(_newest(reload(made)))), f"{what}: a reloaded model answers otherwise"


def _newest(model: Any) -> Any:
    known = list(numbers(model))
    return use(model, known[-1]) if known else model


def table(rows: list[dict[str, str]] | None = None) -> str:
    """The matrix as Markdown: rows are the first surgery, columns the second; refusals are numbered below."""
    rows = matrix() if rows is None else rows
    names = list(dict.fromkeys(row["first"] for row in rows))
    reasons: dict[str, int] = {}
    lines = [f"| first \\ second | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for first in names:
        cells = []
        for second in names:
            found = [row for row in rows if (row["first"], row["second"]) == (first, second)]
            refused = [row for row in found if row["outcome"] == REFUSES]
            numbers = [str(reasons.setdefault(row["why"], len(reasons) + 1)) for row in refused]
            if not refused:
                cells.append("runs")
            elif len(refused) == len(found):
                cells.append(f"refuses ({', '.join(dict.fromkeys(numbers))})")
            else:
                some = ", ".join(f"{row['model']} refuses ({number})" for row, number in zip(refused, numbers))
                cells.append(f"runs; {some}")
        lines.append(f"| **{first}** | {' | '.join(cells)} |")
    notes = [f"{number}. {why}" for why, number in reasons.items()]
    return "\n".join(lines) + ("\n\n" + "\n".join(notes) if notes else "") + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(), end="")
