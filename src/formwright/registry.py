"""Names: every part, surgery, task, op, objective, proof, recipe and verb under the name the literature uses.

Registering is one decorator on one class or function in one file; nothing else is edited::

    @register("mixer", "mamba", paper=Paper("Gu and Dao", 2023, "2312.00752"))
    class Mamba(Part): ...

Looking a name up imports that one file, so listing names, ``--help`` and tab completion never import torch. The list
comes from ``_index.json``, which ``python -m formwright.registry`` writes by reading the source files (never by
importing them); files that the index does not know yet, such as one just added, are read on the spot.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from formwright.kit.errors import SpecError, nearest, unknown

ROOT = Path(__file__).parent
INDEX = ROOT / "_index.json"
#: Where each kind lives below the package. A kind is unique by (kind, name).
HOMES: dict[str, tuple[str, ...]] = {
    "mixer": ("parts/mixers",),
    "channel": ("parts/channels",),
    "combinator": ("parts/combinators",),
    "linear": ("parts/linears",),
    "adapter": ("parts/adapters",),
    "change": ("surgery/adapt",),
    "norm": ("parts/norms",),
    "combine": ("parts/combines",),
    "stem": ("parts/stems",),
    "head": ("parts/heads",),
    "conditioner": ("parts/conditioners",),
    "reshape": ("parts/reshapes",),
    "op": ("ops",),
    "surgery": ("surgery/adapt", "surgery/compress", "surgery/grow"),
    "task": ("tasks",),
    "objective": ("objectives",),
    "family": ("hub/families",),
    "export": ("hub/exports",),
    "recipe": ("models/recipes",),
    "proof": ("proofs",),
    "verb": ("cli",),
}
#: Kinds that may stand as ``{"part": NAME}`` in a layer list.
LAYER_KINDS = ("mixer", "channel", "combinator")

T = TypeVar("T")


@dataclass(frozen=True)
class Paper:
    """Who published the idea, when, and its arXiv number where it has one."""

    authors: str
    year: int
    arxiv: str = ""

    def __str__(self) -> str:
        return f"{self.authors}, {self.year}" + (f", arXiv {self.arxiv}" if self.arxiv else "")


@dataclass(frozen=True)
class Entry:
    """One registered name, known without importing its module."""

    kind: str
    name: str
    module: str
    attribute: str
    summary: str = ""
    paper: Paper | None = None

    def load(self) -> Any:
        return getattr(importlib.import_module(self.module), self.attribute)


_plugins: dict[tuple[str, str], Any] = {}


def register(kind: str, name: str, *, paper: Paper | None = None, summary: str | None = None) -> Callable[[T], T]:
    """Register a class or function. ``kind`` and ``name`` are literal strings, so that the index can be read.

    The object gets ``registered = (kind, name)`` and ``paper``. Inside the package the file itself is the record; a
    plug-in file's names are remembered when it is loaded. A name already taken by another file is a SpecError.
    """
    if kind not in HOMES:
        raise SpecError(unknown("kind", kind, HOMES))

    def decorate(target: T) -> T:
        target.registered = (kind, name)  # type: ignore[attr-defined]
        target.paper = paper  # type: ignore[attr-defined]
        module = getattr(target, "__module__", "")
        if not module.startswith("formwright."):
            known = entries().get((kind, name))
            holder = known.module if known is not None else _holder(kind, name, module)
            if holder:
                raise SpecError(f"{kind} {name!r} is already registered by {holder}; choose another name")
            _plugins[(kind, name)] = target
        return target

    return decorate


def _holder(kind: str, name: str, module: str) -> str:
    """The other plug-in module that has the name; a file that is loaded again only replaces its own."""
    held = getattr(_plugins.get((kind, name)), "__module__", "")
    return held if held != module else ""


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def _read(path: Path) -> list[Entry]:
    """The registrations in one source file, read from its syntax tree."""
    source = path.read_text(encoding="utf-8")
    if "@register(" not in source:
        return []
    module = ".".join(("formwright", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    found = []
    named: dict[str, ast.expr] = {}  # constants of the file, such as a paper that several names share
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named[node.targets[0].id] = node.value
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        doc = (ast.get_docstring(node) or "").strip().split("\n\n")[0].split("\n")[0]
        for call in node.decorator_list:
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register"):
                continue
            kind, name = (_literal(argument) for argument in call.args[:2])
            if kind not in HOMES or not isinstance(name, str):
                place = f"{path.name}, line {call.lineno}"
                raise SpecError(f"{place}: register takes a kind ({', '.join(HOMES)}) and a name, both literal strings")
            options = {keyword.arg: keyword.value for keyword in call.keywords}
            paper = options.get("paper")
            paper = named.get(paper.id) if isinstance(paper, ast.Name) else paper
            stated = None
            if isinstance(paper, ast.Call):
                stated = Paper(
                    *[_literal(a) for a in paper.args], **{k.arg: _literal(k.value) for k in paper.keywords if k.arg}
                )
            summary = _literal(options.get("summary")) or doc
            found.append(Entry(kind, name, module, node.name, summary, stated))
    return found


def _sources() -> list[str]:
    found = []
    for homes in HOMES.values():
        for home in homes:
            for folder, folders, files in os.walk(ROOT / home):
                folders[:] = [name for name in folders if not name.startswith(("_", "."))]
                found += [
                    os.path.relpath(os.path.join(folder, name), ROOT).replace(os.sep, "/")
                    for name in files
                    if name.endswith(".py")
                ]
    return sorted(set(found))


def scan(files: Iterable[str] | None = None) -> list[Entry]:
    """Read the registrations of ``files`` (relative to the package; default all), refusing a name taken twice."""
    seen: dict[tuple[str, str], Entry] = {}
    for name in _sources() if files is None else files:
        for entry in _read(ROOT / name):
            key = (entry.kind, entry.name)
            if key in seen:
                raise SpecError(f"{entry.kind} {entry.name!r} is registered by {seen[key].module} and {entry.module}")
            seen[key] = entry
    return [seen[key] for key in sorted(seen)]


@functools.lru_cache(maxsize=1)
def entries() -> dict[tuple[str, str], Entry]:
    """Every registered name of the package, without importing any of them."""
    known: dict[tuple[str, str], Entry] = {}
    listed: set[str] = set()
    if INDEX.is_file():
        record = json.loads(INDEX.read_text(encoding="utf-8"))
        present = set(_sources())
        listed = set(record["files"])
        for item in record["entries"]:
            paper = Paper(**item.pop("paper")) if item.get("paper") else item.pop("paper", None)
            entry = Entry(**item, paper=paper)
            source = entry.module.removeprefix("formwright.").replace(".", "/")
            if f"{source}.py" in present or f"{source}/__init__.py" in present:
                known[(entry.kind, entry.name)] = entry
    for entry in scan(name for name in _sources() if name not in listed):
        known[(entry.kind, entry.name)] = entry
    return known


def names(kind: str) -> list[str]:
    """The registered names of a kind, plug-ins included, sorted."""
    return sorted({name for k, name in entries() if k == kind} | {name for k, name in _plugins if k == kind})


def find(kind: str, name: str) -> Entry:
    """The entry of a name inside the package; SpecError with the nearest name otherwise."""
    entry = entries().get((kind, name))
    if entry is None:
        raise SpecError(unknown(kind, name, names(kind)))
    return entry


def resolve(kind: str, name: str) -> Any:
    """The class or function registered as ``kind:name``; ``FILE.py:NAME`` loads a file of the user's own."""
    if (kind, name) in _plugins:
        return _plugins[(kind, name)]
    if is_path(name):
        return load_plugin(name)
    return find(kind, name).load()


def resolve_layer(name: str) -> Any:
    """The part that may stand in a layer list under ``name`` (or ``kind:name`` where two kinds share it)."""
    kind, _, rest = name.partition(":")
    if kind in LAYER_KINDS and rest:
        return resolve(kind, rest)
    if is_path(name):
        return load_plugin(name)
    kinds = [kind for kind in LAYER_KINDS if name in names(kind)]
    if not kinds:
        raise SpecError(unknown("part", name, [n for k in LAYER_KINDS for n in names(k)]))
    if len(kinds) > 1:
        raise SpecError(f"part {name!r} is ambiguous: write " + " or ".join(f"{kind}:{name}" for kind in kinds))
    return resolve(kinds[0], name)


def is_path(name: str) -> bool:
    """Whether ``name`` has the form ``FILE.py:NAME``."""
    path, _, attribute = name.rpartition(":")
    return path.endswith(".py") and bool(attribute)


#: The only plug-in files that may be imported while data is being read; None: any that the user names.
_only: contextvars.ContextVar[tuple[Path, ...] | None] = contextvars.ContextVar("_only", default=None)


@contextlib.contextmanager
def only_plugins(files: Iterable[str | Path] = ()) -> Iterator[None]:
    """Inside, ``FILE.py:NAME`` finds a file of that name among ``files`` and no other: data never imports code."""
    token = _only.set(tuple(Path(file).expanduser().resolve() for file in files))
    try:
        yield
    finally:
        _only.reset(token)


def _permitted(file: Path) -> Path:
    """``file`` itself where nothing is restricted or it is imported already, else the permitted file of its name."""
    only = _only.get()
    if only is None or _module_name(file) in sys.modules:
        return file
    for permitted in only:
        if permitted.name == file.name:
            return permitted
    raise SpecError(f"needs plug-in {file.name}: load with --plugin {file.name} (in Python plugin={file.name!r})")


def _module_name(file: Path) -> str:
    return f"formwright_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"


def load_plugin(name: str) -> Any:
    """Import ``FILE.py`` (or ``FILE.py:NAME``, then its attribute), once a process. The user asked for this code by its
    path."""
    path, attribute = (name, "") if name.endswith(".py") else name.rpartition(":")[::2]
    file = _permitted(Path(path).expanduser().resolve())
    module_name = _module_name(file)
    module = sys.modules.get(module_name)
    if module is None and not file.is_file():
        raise SpecError(f"plug-in file {path} does not exist")
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise SpecError(f"plug-in {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not attribute:
        return module
    if not hasattr(module, attribute):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise SpecError(f"{path} has no {attribute!r}{nearest(attribute, public)}")
    return getattr(module, attribute)


def main() -> None:
    """Write the index beside this file."""
    record: dict[str, list] = {"files": _sources(), "entries": [asdict(entry) for entry in scan()]}
    INDEX.write_text(json.dumps(record, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(record['entries'])} names from {len(record['files'])} files")


if __name__ == "__main__":
    main()
