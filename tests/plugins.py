"""Plug-ins in tests: what a file registers while a test runs is forgotten after it, so that no other test sees it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from formwright import registry


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    names, modules = dict(registry._plugins), set(sys.modules)
    try:
        yield
    finally:
        registry._plugins.clear()
        registry._plugins.update(names)
        for name in set(sys.modules) - modules:
            if name.startswith("formwright_plugin_"):
                del sys.modules[name]
