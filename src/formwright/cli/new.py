"""``formwright new``: a complete working example of a part, a surgery, a task or an op, under a name of your own.

What it writes is what CONTRIBUTING.md shows and the tests run, so the starting point always works: as a plug-in
(``FILE.py:NAME`` wherever a name may stand), or moved into the package, where the registry finds it.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import string
from pathlib import Path
from typing import Annotated

import typer

from formwright import registry
from formwright.cli.common import say
from formwright.kit.errors import DataError, SpecError, all_of, unknown
from formwright.registry import register

TEMPLATES = Path(__file__).parent / "templates"
#: what -> (kinds whose names it may not repeat, its home in the package, what to type to use the file as it lies there)
WHATS = {
    "part": (registry.LAYER_KINDS, "parts/mixers", 'in a layer list: {{"part": "{file}:{attribute}"}}'),
    "surgery": (("surgery",), "surgery/compress", "formwright apply MODEL {file}:{attribute} --out DIR"),
    "task": (("task",), "tasks", "formwright measure MODEL --task {file}:{attribute}"),
    "op": (("op",), "ops", "from {module} import {attribute}"),
}
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def class_name(name: str) -> str:
    """``token-shift`` -> ``TokenShift``."""
    return "".join(word.capitalize() for word in name.split("-"))


def function_name(name: str) -> str:
    """``token-shift`` -> ``token_shift``; also the name of the file."""
    return name.replace("-", "_")


def attribute(what: str, name: str) -> str:
    """What the file defines: a class for parts and surgeries, a function for tasks and ops."""
    return class_name(name) if what in ("part", "surgery") else function_name(name)


def render(what: str, name: str) -> str:
    """The source of the example of that kind under that name."""
    template = string.Template((TEMPLATES / f"{what}.py.txt").read_text(encoding="utf-8"))
    return template.substitute(name=name, class_name=class_name(name), function_name=function_name(name))


def check(what: str, name: str) -> None:
    """SpecError for an unknown kind of example and for names that cannot be used."""
    if what not in WHATS:
        raise SpecError(unknown("kind of example", what, WHATS))
    if not NAME.fullmatch(name):
        suggestion = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip(
            "-0123456789"
        )
        hint = f"; did you mean {suggestion!r}?" if NAME.fullmatch(suggestion) else ""
        raise SpecError(f"name {name!r} must be lower-case words joined by '-', such as token-shift{hint}")
    problems = [
        f"{kind} {name!r} is taken by {known.module}; choose another name"
        for kind in WHATS[what][0]
        if (known := registry.entries().get((kind, name))) is not None
    ]
    defined = attribute(what, name)
    if keyword.iskeyword(function_name(name)) or hasattr(builtins, defined):
        problems.append(f"name {name!r} is a word of Python; choose another name")
    elif defined in imported(render(what, name)):
        problems.append(f"name {name!r} would hide {defined!r}, which the example itself uses; choose another name")
    all_of(SpecError, problems)


def imported(source: str) -> set[str]:
    """The names that a source file imports."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {(alias.asname or alias.name).split(".")[0] for node in nodes for alias in node.names}


def checkout() -> Path | None:
    """The source checkout that this package runs from, or None for an installed package."""
    root = registry.ROOT.parent.parent
    return root if registry.ROOT.parent.name == "src" and (root / "pyproject.toml").is_file() else None


@register("verb", "new", summary="write a working part, surgery, task or op to start from")
def new(
    what: Annotated[str, typer.Argument(help="part, surgery, task or op")],
    name: Annotated[str, typer.Argument(help="its name, such as token-shift")],
    out: Annotated[Path | None, typer.Option("--out", help="the file to write (default: NAME.py here)")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the file if it exists")] = False,
) -> None:
    """Write a complete working example of a part, a surgery, a task or an op, under a name of your own."""
    from formwright.kit.files import write_atomic

    check(what, name)
    file = Path(f"{function_name(name)}.py") if out is None else out
    if file.suffix != ".py":
        raise SpecError(f"--out {file}: the example is a Python file, so the name must end in .py")
    if not file.parent.is_dir():
        raise DataError(f"folder {file.parent} does not exist")
    if file.exists() and not force:
        raise DataError(f"{file} already exists; choose another --out, or --force to replace it")
    write_atomic(file, render(what, name))
    _, home, use = WHATS[what]
    say(f"  wrote {file}")
    say(f"  use it as it is: {use.format(file=file, module=file.stem, attribute=attribute(what, name))}")
    root = checkout()
    if root is not None:
        place = f"src/formwright/{home}/{function_name(name)}.py"
        say(f"  make it part of the package: move it to {root / place}, then python -m formwright.registry")
