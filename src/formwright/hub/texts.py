"""What a model needs to read texts and name classes, as plain data and files: tokenizers, limits, prompts, labels.

A tokenizer's files lie in the directory as they came (several tokenizers of a system in folders of their own), so that
other libraries read them too; only settings that the files do not state are written into the record.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from formwright.kit.errors import DataError
from formwright.models.tokenizer import Tokenizer
from formwright.parts.heads.pooling import Head


def faces(model: Any) -> Iterator[tuple[str, Any]]:
    """("", model), and the towers of a system: whatever carries text settings."""
    yield "", model
    yield from getattr(model, "towers", nn.ModuleDict()).items()


def _folders(model: Any) -> dict[int, tuple[str, Tokenizer]]:
    """Every tokenizer once, by identity, with the folder that its files lie in."""
    found: dict[int, tuple[str, Tokenizer]] = {}
    for _, face in faces(model):
        if face.tokenizer is not None and id(face.tokenizer) not in found:
            found[id(face.tokenizer)] = (f"tokenizer-{len(found) + 1}/" if found else "", face.tokenizer)
    return found


def _files(tokenizer: Tokenizer) -> dict[str, bytes]:
    return {"tokenizer.json": tokenizer.backend.to_str().encode(), **tokenizer.files}


def tokenizer_files(model: Any) -> dict[str, bytes]:
    """Path inside the directory -> content."""
    return {f"{folder}{name}": data for folder, held in _folders(model).values() for name, data in _files(held).items()}


def text_settings(model: Any) -> dict[str, Any]:
    """name of a tower ("" the model itself) -> its length limit, prompts and tokenizer."""
    folders = _folders(model)
    found = {}
    for name, face in faces(model):
        line: dict[str, Any] = {}
        if face.max_length is not None:
            line["max_length"] = face.max_length
        if getattr(face, "prompts", None):
            line["prompts"] = dict(face.prompts)
        if face.tokenizer is not None:
            folder, tokenizer = folders[id(face.tokenizer)]
            line["tokenizer"] = {"folder": folder, "files": sorted(_files(tokenizer))}
            if tokenizer.settings != _stated(tokenizer.files):
                line["tokenizer"]["settings"] = tokenizer.settings
        if line:
            found[name] = line
    return found


def labels(model: Any) -> dict[str, list[str]]:
    """Path of each head that names its classes -> their names."""
    heads = {name: module for name, module in model.named_modules() if isinstance(module, Head)}
    return {name: list(held) for name, head in heads.items() if (held := getattr(head, "labels", None))}


def _stated(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The settings that a tokenizer's own files state."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        with contextlib.suppress(ValueError):
            settings.update(json.loads(files.get(name, b"{}")))
    return settings


def restore(model: Any, record: Mapping[str, Any], directory: Path) -> None:
    """Give a model the settings of its record; DataError where they do not fit it."""
    heads = {name: module for name, module in model.named_modules() if isinstance(module, Head)}
    for where, names in record.get("labels", {}).items():
        if where not in heads:
            raise DataError(f"{directory}: labels of a head {where!r} that the model lacks")
        heads[where].labels = list(names)  # type: ignore[assignment]
    made: dict[str, Tokenizer] = {}
    towers = dict(faces(model))
    for name, line in record.get("texts", {}).items():
        if name not in towers:
            raise DataError(f"{directory}: text settings of a tower {name!r} that the model lacks")
        face = towers[name]
        face.max_length = line.get("max_length")
        if "prompts" in line:
            face.prompts = dict(line["prompts"])
        if "tokenizer" in line:
            folder = line["tokenizer"]["folder"]
            if folder not in made:
                made[folder] = _tokenizer(directory, line["tokenizer"], record["files"])
            face.tokenizer = made[folder]


def _tokenizer(directory: Path, line: Mapping[str, Any], listed: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    folder, names = line["folder"], line["files"]
    for name in (*names, "tokenizer.json"):
        if f"{folder}{name}" not in listed:  # listed files are checked to be there and inside the directory
            raise DataError(f"{directory}: the tokenizer needs {folder}{name}, which the record does not list")
    files = {name: (directory / f"{folder}{name}").read_bytes() for name in names}
    try:
        backend = Backend.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # the library raises bare exceptions
        raise DataError(f"{directory / folder / 'tokenizer.json'} is not a tokenizer: {error}") from None
    return Tokenizer(backend, files, line.get("settings", _stated(files)))
