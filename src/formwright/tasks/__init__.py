"""Tasks: data and a metric behind one protocol, found by name.

    task("retrieval/stdlib", pool=500)
    task("classification", data="tickets.csv", text="body", label="queue")
    task("my_task.py:echo", length=256)

Registered tasks are classes whose options are their constructor's; a file of the user's own may hold a task object, a
class, a function that returns one, or what ``task.generated`` and ``task.from_files`` make of a function.
"""

from __future__ import annotations

import inspect
from typing import Any

from formwright import registry
from formwright.kit.errors import SpecError, nearest
from formwright.tasks.base import Task
from formwright.tasks.custom import from_files, generated

__all__ = ["Task", "task"]


class _Tasks:
    """``task(name, **options)``, with the decorators for a user's own file as attributes."""

    generated = staticmethod(generated)
    from_files = staticmethod(from_files)

    def __call__(self, name: str | Task, **options: Any) -> Task:
        """The task called ``name`` with its options; a Task object is given back as it is.

        name: a registered task, or ``FILE.py:NAME``.

        Raises:
            SpecError: no such task, or an option it does not have; the nearest name is given.
            DataError: the data cannot be used.
        """
        if isinstance(name, Task):
            return name.with_options(**options)
        found = registry.resolve("task", name)
        if isinstance(found, Task):
            return found.with_options(**options)
        if not callable(found):
            raise SpecError(f"{name} is a {type(found).__name__}, not a task")
        _check_options(name, found, options)
        made = found(**options)
        if isinstance(made, Task):
            return made
        raise SpecError(f"{name} gives a {type(made).__name__}, not a task (formwright.tasks.Task)")


def _check_options(name: str, maker: Any, options: dict[str, Any]) -> None:
    """SpecError for options that the maker does not take and for those it cannot do without, in one go."""
    parameters = inspect.signature(maker).parameters
    problems = []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known = ", ".join(parameters) or "none"
        problems += [
            f"task {name!r} has no option {option!r}{nearest(option, parameters)} (options: {known})"
            for option in options
            if option not in parameters
        ]
    needed = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and key not in options
    ]
    problems += [f"task {name!r} needs {key}=…" for key in needed]
    if problems:
        raise SpecError("\n".join(problems))


task = _Tasks()
