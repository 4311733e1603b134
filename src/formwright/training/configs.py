"""Recipes as TOML files, with ``a.b=c`` on top::

    steps = 2000
    lr = 1e-3
    schedule = "wsd"

    [objective]
    name = "causal-lm"
    smoothing = 0.1

Keys are the settings of a :class:`~formwright.training.recipe.Recipe`, all of them optional; ``"none"`` stands for
None. A table ``run`` is left alone: a run writes there what else it was started with, so its own file can be read
again. Everything wrong is said at once, each line with its file or its word and the nearest name that is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from formwright.kit import toml
from formwright.kit.errors import FormwrightError, SpecError, all_of
from formwright.training.recipe import Recipe, make_objective, problems_of

NONE = "none"
#: The table of a run's own file that is no part of its recipe.
RUN = "run"


def read(path: str | Path) -> dict[str, Any]:
    """The settings of a recipe file, checked. DataError: it cannot be read. SpecError: names or kinds are wrong."""
    settings = _with_none({key: value for key, value in toml.read(path).items() if key != RUN})
    problems = problems_of(settings)
    if "objective" in settings and not problems:
        try:
            make_objective(settings["objective"])
        except FormwrightError as error:
            problems += str(error).splitlines()
    all_of(SpecError, [f"{path}: {line}" for line in problems])
    return settings


def overridden(settings: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """``settings`` with every ``key=value`` of ``words`` set; ``objective.smoothing=0.1`` reaches into a table."""
    made, problems = dict(settings), []
    for word in words:
        key, equal, text = word.partition("=")
        first, *inner = key.strip().split(".")
        if not equal or not all((first, *inner)):
            problems.append(f"{word!r} is no setting: write key=value, such as lr=1e-3 or objective.smoothing=0.1")
            continue
        value: Any = toml.value(text.strip())
        if inner:
            value = _placed(made.get(first, {}), inner, value)
        found = problems_of(_with_none({first: value}))
        problems += [f"{word!r}: {line}" for line in found]
        if not found:
            made |= _with_none({first: value})
    all_of(SpecError, problems)
    return made


def _placed(table: Any, path: Sequence[str], value: Any) -> dict[str, Any]:
    """A table with ``value`` at the end of ``path``."""
    first, *rest = path
    held = {"name": table} if isinstance(table, str) else dict(table) if isinstance(table, Mapping) else {}
    return {**held, first: _placed(held.get(first, {}), rest, value) if rest else value}


def _with_none(held: Any) -> Any:
    """Plain data with None for the word that stands for it."""
    if isinstance(held, Mapping):
        return {key: _with_none(value) for key, value in held.items()}
    return None if held == NONE else held


def _with_word(held: Any) -> Any:
    """The opposite of :func:`_with_none`."""
    if held == NONE:
        raise SpecError(f"a recipe cannot hold the word {NONE!r}: in its file that stands for None")
    if isinstance(held, Mapping):
        return {key: _with_word(value) for key, value in held.items()}
    return NONE if held is None else held


def write(recipe: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """A recipe file: the settings of ``Recipe.to_dict()``, and what else a run was started with."""
    defaults = {entry.name: entry.default for entry in fields(Recipe)}
    settings = {
        key: _with_word(value) for key, value in recipe.items() if value is not None or defaults[key] is not None
    }
    return "# formwright train --config FILE repeats this run.\n" + toml.dumps({**settings, RUN: run})


def parse(text: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe and the rest of a file that :func:`write` made."""
    data = toml.loads(text, name)
    run = data.pop(RUN, {})
    return Recipe.from_dict(_with_none(data)).to_dict(), run
