"""Recipes: named plain specs with size arguments. A recipe is one registered function that returns a spec as a dict."""

from __future__ import annotations

import inspect
from typing import Any

from formwright import registry
from formwright.kit.errors import SpecError, all_of, unknown

__all__ = ["recipe"]


def recipe(name: str, **sizes: Any) -> dict[str, Any]:
    """The spec of a recipe, ready for ``fw.build``: ``recipe("gpt-tiny", width=128)``.

    SpecError for an unknown name or size, with the nearest known one.
    """
    make = registry.resolve("recipe", name)
    known = list(inspect.signature(make).parameters)
    all_of(SpecError, [f"recipe {name}: " + unknown("size", size, known) for size in sizes if size not in known])
    return make(**sizes)
