"""Where a model came from, kept with it: its first configuration, small files, and weights that it does not use.

``model.source`` is nested plain data with bytes and tensors in it. In a directory it is ``source.json``, where bytes
stand as text (or base64) and tensors as keys of ``source.safetensors``, so that a changed model can still be written
back in the terms of the library that it was read from.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from formwright.hub import tensors
from formwright.kit.errors import DataError

PLAIN, VALUES = "source.json", "source.safetensors"


def write_source(source: Any, directory: Path) -> list[str]:
    """Write ``source``; returns the names of the files, none where there is nothing to say or JSON cannot say it."""
    found: dict[str, Tensor] = {}
    try:
        plain = json.dumps(_plain(source, found, ""), indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return []
    if not source:
        return []
    (directory / PLAIN).write_text(plain + "\n", encoding="utf-8")
    return [PLAIN, *(tensors.write(found, directory, "source") if found else [])]


def _plain(value: Any, found: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, found, f"{path}/{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, found, f"{path}/{index}") for index, inner in enumerate(value)]
    if isinstance(value, Tensor):
        found[path] = value
        return {"$tensor": path}
    if isinstance(value, bytes):
        try:
            return {"$text": value.decode("utf-8")}
        except UnicodeDecodeError:
            return {"$base64": base64.b64encode(value).decode("ascii")}
    return value


def read_source(directory: Path) -> Any:
    """What :func:`write_source` wrote, or None."""
    path = directory / PLAIN
    if not path.is_file():
        return None
    try:
        return _whole(json.loads(path.read_text(encoding="utf-8")), _values(directory))
    except (ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged: {error}") from None


def _values(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("source*.safetensors")):
        try:
            found.update({name: value.clone() for name, value in load_file(path).items()})
        except SafetensorError as error:
            raise DataError(f"{path} is damaged: {error}") from None
    return found


def _whole(value: Any, found: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_whole(inner, found) for inner in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (key, inner), *_ = value.items()
        if key == "$tensor":
            return found[inner]
        if key == "$text":
            return inner.encode("utf-8")
        if key == "$base64":
            return base64.b64decode(inner)
    return {key: _whole(inner, found) for key, inner in value.items()}
