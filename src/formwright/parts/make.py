"""From plain data to modules: look the name up, check every option against the constructor, construct.

Every complaint names the place in the spec, the option and the nearest known one.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any

from torch import nn

from formwright import registry
from formwright.kit.errors import FormwrightError, SpecError, nearest
from formwright.parts.base import Part


def options_of(target: Any) -> dict[str, inspect.Parameter]:
    """The options a registered class takes besides its width."""
    signature = inspect.signature(target)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        n: p
        for n, p in signature.parameters.items()
        if n not in ("self", "width", "in_width", "site") and p.kind not in several
    }


def construct(target: Any, name: str, width: int, options: Mapping[str, Any]) -> Any:
    """``target(width, **options)`` after checking names, presence and types of all options at once."""
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    known = options_of(target)
    problems = []
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # a plug-in whose annotations cannot be read is not checked by type
        hints = {}
    values = {}
    for key, value in options.items():
        if key not in known:
            problems.append(
                f"{name}: unknown option {key!r}{nearest(key, known)} (options: {', '.join(known) or 'none'})"
            )
            continue
        values[key] = value
        if key in hints:
            try:
                values[key] = TypeAdapter(hints[key]).validate_python(value)
            except ValidationError as error:
                problems.append(f"{name}: option {key}={value!r}: {error.errors()[0]['msg']}")
            except PydanticUserError:
                pass
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            problems.append(f"{name}: option {key!r} is missing")
    if problems:
        raise SpecError("\n".join(problems))
    try:
        return target(width, **values)
    except FormwrightError as error:
        raise type(error)("\n".join(f"{name}: {line}" for line in str(error).splitlines())) from None


def _node(node: Mapping[str, Any] | str, what: str) -> tuple[str, dict[str, Any]]:
    if isinstance(node, str):
        return node, {}
    if not isinstance(node, Mapping) or not isinstance(node.get("part"), str):
        raise SpecError(f"{what} must be a name or {{'part': NAME, ...}}, not {node!r}")
    return node["part"], {key: value for key, value in node.items() if key != "part"}


def make(kind: str, node: Mapping[str, Any] | str, width: int) -> Any:
    """A module of ``kind`` (norm, combine, stem, head, conditioner, reshape ...) from ``{"part": NAME, options}``."""
    name, options = _node(node, kind)
    return construct(registry.resolve(kind, name), name, width, options)


def make_part(node: Mapping[str, Any] | str, width: int) -> Any:
    """A part of a layer list (mixer, channel or combinator) from ``{"part": NAME, options}``."""
    name, options = _node(node, "a part")
    target = registry.resolve_layer(name)
    if not (inspect.isclass(target) and issubclass(target, Part)):
        raise SpecError(f"{name} is {getattr(target, '__name__', target)!r}, which is no subclass of Part")
    return construct(target, name, width, options)


def module_dict(what: str, modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Modules by the names that a spec gives them; a SpecError for names that cannot be part of a tensor's name."""
    held = nn.ModuleDict()
    problems = [f"{what} {complaint}" for name in modules if (complaint := bad_name(name, held))]
    if problems:
        raise SpecError("\n".join(problems))
    held.update(modules)
    return held


def bad_name(name: Any, holder: nn.Module) -> str:
    """Why ``holder`` cannot hold a module called ``name``; empty when it can."""
    if not isinstance(name, str) or not name or set(name) & set("./@: "):
        return f"{name!r} must be a word without any of . / @ : and blanks"
    if hasattr(holder, name) and name not in holder._modules:
        return f"{name!r} cannot be used: PyTorch modules have a member of that name; choose another"
    return ""
