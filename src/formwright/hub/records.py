"""The JSON record of a directory: one format version, checked when read, with every other file's size and sha256.

A record is written last, so that a directory without one was never finished; and read first, so that a newer format is
told before anything in it is misunderstood.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from formwright.kit.errors import DataError, SpecError, all_of
from formwright.kit.files import sha256

#: Version of the format that is written, and the newest that is read.
FORMAT = 1


def to_json(value: Any) -> str:
    """JSON text of plain data (and of numbers of other libraries); SpecError for anything else, NaN included."""

    def plain(inner: Any) -> Any:
        if isinstance(inner, Mapping):
            return dict(inner)
        if hasattr(inner, "item") and getattr(inner, "ndim", 1) == 0:
            return inner.item()
        raise TypeError(f"a {type(inner).__name__}")

    try:
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=plain) + "\n"
    except (TypeError, ValueError) as error:
        raise SpecError(f"the record holds what JSON cannot say: {error}") from None


def write_record(path: Path, record: Mapping[str, Any], files: Iterable[str]) -> None:
    """Write ``record`` with the sizes and sums of ``files``, which lie beside it."""
    folder = path.parent
    listed = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in files}
    path.write_text(to_json({**record, "files": listed}), encoding="utf-8")


def read_record(path: Path, needed: Mapping[str, type], known: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The record at ``path``; DataError, with all problems at once, where it is not one or is of a newer format.

    ``needed`` and ``known``: key -> type of what must and what may be there; other keys are left alone.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    version = record.get("format") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise DataError(f"{path} states no format version, so it is not a record of Formwright's")
    if version > FORMAT:
        raise DataError(
            f"{path.parent} was written by a newer Formwright (format {version}); "
            f"this one reads up to {FORMAT}: upgrade"
        )
    needed = {"files": dict, **needed}
    problems = [f"{path}: key {key!r} is missing" for key in needed if key not in record]
    problems += [
        f"{path}: {key!r} must be a {kind.__name__}, not a {type(record[key]).__name__}"
        for key, kind in {**needed, **(known or {})}.items()
        if key in record and not isinstance(record[key], kind)
    ]
    for name, stated in record["files"].items() if not problems else ():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\\" in name:
            problems.append(f"{path} names the file {name!r}, which lies outside the directory")
        if not isinstance(stated, dict) or not isinstance(stated.get("bytes"), int):
            problems.append(f"{path} states no size of {name!r}")
    all_of(DataError, problems)
    return record


def check_files(directory: Path, files: Mapping[str, Any], verify: bool = False) -> None:
    """That the listed files are there in their sizes, and with ``verify`` with their sums; all problems at once."""
    problems = []
    for name, stated in files.items():
        file = directory / name
        if not file.is_file():
            problems.append(f"{file} is missing")
            continue
        size = file.stat().st_size
        if size != stated["bytes"]:
            what = "truncated" if size < stated["bytes"] else "changed"
            problems.append(f"{file} is {what}: {size:,} bytes, {stated['bytes']:,} were written")
        elif verify and sha256(file) != stated.get("sha256"):
            problems.append(f"{file} was changed after it was written: its sha256 is not the recorded one")
    all_of(DataError, problems)
