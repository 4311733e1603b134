"""The running Python's own standard library as text: real data on every machine, without a download.

``modules`` gives the source files; ``functions`` gives every function or method with a docstring as (module, summary,
source without the docstring). Test suites, generated tables, installed packages, IDLE and 2to3 are left out. Cost:
reading 0.1 s, parsing 5 s on one core, once per process.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Container, Iterator
from pathlib import Path

#: Tests and fixtures, generated encodings, installed packages, and two applications that are no library.
SKIPPED = frozenset(
    ["test", "tests", "encodings", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3"]
)
LEAST_WORDS = 3
LEAST_LINES = 2


def version() -> str:
    """``"3.11.7"``."""
    return ".".join(str(number) for number in sys.version_info[:3])


@functools.lru_cache(maxsize=1)
def modules() -> tuple[tuple[str, str], ...]:
    """(path below the library with ``/``, source text), sorted by path; files that are no text are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        for name in files:
            if name.endswith(".py"):
                path = Path(folder, name)
                try:
                    with tokenize.open(path) as stream:
                        found.append((path.relative_to(root).as_posix(), stream.read()))
                except (OSError, SyntaxError, UnicodeDecodeError):
                    continue
    return tuple(sorted(found))


@functools.lru_cache(maxsize=1)
def definitions() -> tuple[tuple[str, str, str], ...]:
    """(module path, summary, source without docstring) of every function of 2 lines of source or more.

    The summary is "" where there is none of 3 words or more.
    """
    found = []
    for module, source in modules():
        # No triple quote means, in this library, no docstring; parsing is what costs.
        if '"""' not in source and "'''" not in source:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines()
        for node in _definitions(tree):
            doc = ast.get_docstring(node)
            query = summary(doc) if doc else ""
            document = without_docstring(lines, node) if doc else joined(lines[node.lineno - 1 : node.end_lineno])
            if document.count("\n") + 1 >= LEAST_LINES:
                found.append((module, query if len(query.split()) >= LEAST_WORDS else "", document))
    return tuple(found)


@functools.lru_cache(maxsize=1)
def functions() -> tuple[tuple[str, str, str], ...]:
    """(module path, summary, source) of every function with a summary of 3 words or more and 2 lines of source."""
    return tuple(row for row in definitions() if row[1])


def unlabelled(left_out: Container[str]) -> list[str]:
    """Sources of functions that no summary describes, of every module that is not left out, each once."""
    return list(dict.fromkeys(row[2] for row in definitions() if not row[1] and row[0] not in left_out))


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods in source order; expressions are not entered, they hold no definitions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from _definitions(child)


def summary(docstring: str) -> str:
    """The first sentence of the first paragraph, white space normalised."""
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    sentence = re.match(r".+?[.!?](?=\s+[A-Z(]|$)", paragraph)
    return sentence.group(0) if sentence else paragraph


def joined(lines: list[str]) -> str:
    """Lines of source, empty ones left out, dedented."""
    return textwrap.dedent("\n".join(line.rstrip() for line in lines if line.strip()))


def without_docstring(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The definition's source from its ``def`` on, its docstring and empty lines left out, dedented."""
    doc = node.body[0]
    head = lines[node.lineno - 1 : doc.lineno - 1]
    if doc.lineno == node.lineno:
        head = [lines[node.lineno - 1].encode()[: doc.col_offset].decode().rstrip()]
    body = lines[doc.end_lineno or doc.lineno : node.end_lineno]
    return joined(head + body)


@functools.lru_cache(maxsize=1)
def topics() -> tuple[tuple[str, str], ...]:
    """(name, text) of the language reference that ``help()`` shows; empty where Python came without it."""
    try:
        from pydoc_data.topics import topics as found
    except ImportError:
        return ()
    return tuple((f"topics/{name}", text) for name, text in sorted(found.items()))
