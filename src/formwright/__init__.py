"""Formwright: Transformers, and what comes after them, made cheaper, adaptable, servable and understandable.

``import formwright as fw`` imports nothing heavy; each name loads its module when first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

#: public name -> (module, attribute)
_PUBLIC = {
    "load": ("formwright.hub", "load"),
    "save": ("formwright.hub", "save"),
    "build": ("formwright.models.build", "build"),
    "ModelSpec": ("formwright.spec", "ModelSpec"),
    "SystemSpec": ("formwright.spec", "SystemSpec"),
    "Batch": ("formwright.models.batch", "Batch"),
    "Context": ("formwright.parts.context", "Context"),
    "Paper": ("formwright.registry", "Paper"),
    "register": ("formwright.registry", "register"),
    "plan": ("formwright.surgery", "plan"),
    "apply": ("formwright.surgery", "apply"),
    "undo": ("formwright.surgery", "undo"),
    "copy": ("formwright.surgery", "copy"),
    "task": ("formwright.tasks", "task"),
    "measure": ("formwright.measure", "measure"),
    "slim": ("formwright.search", "slim"),
    "train": ("formwright.training", "train"),
    "adapt": ("formwright.training.adapt", "adapt"),
    "heal": ("formwright.training", "heal"),
    "generate": ("formwright.engine", "generate"),
    "State": ("formwright.engine.state", "State"),
    "export": ("formwright.hub", "export"),
    "FormwrightError": ("formwright.kit.errors", "FormwrightError"),
    "Refusal": ("formwright.kit.errors", "Refusal"),
}

__all__ = ["__version__", *sorted(_PUBLIC)]


class _Package(ModuleType):
    """``fw.measure`` is the function of that name, also after the package ``formwright.measure`` was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module, attribute = _PUBLIC[name]
        value = getattr(importlib.import_module(module), attribute)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'formwright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
