"""TOML of plain data: tables, lists, strings, numbers and truth values, equal after writing and reading.

Read by Python's own ``tomllib`` (``tomli`` before Python 3.11). TOML has no word for nothing, so keys that hold None
are left out of tables.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formwright.kit.errors import DataError, SpecError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def loads(text: str, name: str = "the text") -> dict[str, Any]:
    """The tables of a TOML text; DataError that begins with ``name`` and says the line."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{name} is not TOML: {error}") from None


def read(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; DataError that names the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from None
    return loads(text, str(path))


def value(text: str) -> Any:
    """What ``text`` means on the right of ``=``; a word that TOML does not know is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def dumps(data: Mapping[str, Any]) -> str:
    """``data`` as TOML: plain values first, then a ``[table]`` for every mapping."""
    return "\n".join(_lines(data, ())) + "\n"


def plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` as it is after writing and reading."""
    return loads(dumps(data))


def _lines(data: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = [f"{_key(key)} = {_inline(held)}" for key, held in data.items() if not isinstance(held, Mapping | None)]
    tables = {key: held for key, held in data.items() if isinstance(held, Mapping)}
    lines = [f"[{'.'.join(map(_key, path))}]"] if path and (plain or not tables) else []
    lines += plain
    for key, held in tables.items():
        inner = _lines(held, (*path, key))
        lines += ["", *inner] if lines else inner
    return lines


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's as well, but for one control character that JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _inline(held: Any) -> str:
    if isinstance(held, bool):
        return str(held).lower()
    if isinstance(held, int):
        return str(held)
    if isinstance(held, float):
        return repr(float(held)) if math.isfinite(held) else "nan" if math.isnan(held) else f"{held:+}"
    if isinstance(held, str):
        return _string(held)
    if isinstance(held, (list, tuple)):
        return f"[{', '.join(map(_inline, held))}]"
    if isinstance(held, Mapping):
        return f"{{{', '.join(f'{_key(k)} = {_inline(v)}' for k, v in held.items() if v is not None)}}}"
    raise SpecError(f"TOML has no form for {held!r}")
