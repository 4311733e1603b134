"""Texts tokenised once: ids and borders of documents in two flat files, mapped into memory and used again.

    CACHE/tokens/KEY/  ids.bin (uint16 or uint32) · borders.bin (int64, D + 1) · store.json (sizes and sha256)

KEY says which texts and which tokenizer, so that a changed file or tokenizer makes another store. A store is written
beside its place and put there in one step; one whose bytes are not those it was written with is made again. CACHE is
``FORMWRIGHT_CACHE``, else ``formwright`` in the user's cache directory (``XDG_CACHE_HOME``); it may be deleted at any
time. Cost: tokenising, once; 2 or 4 bytes a token on disk; opening reads the files once.
"""

from __future__ import annotations

import json
import os
import uuid
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from formwright.kit.errors import DataError
from formwright.kit.files import replacing, sha256, write_atomic
from formwright.kit.progress import Progress
from formwright.tasks._documents import Document, cut
from formwright.tasks.base import digest

FORMAT = 1
#: Characters tokenised at once.
BATCH = 1 << 20


def cache() -> Path:
    """The directory of what can be made again."""
    own = os.environ.get("FORMWRIGHT_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "formwright"


def tokenizer_print(tokenizer: Any) -> str:
    """Which tokenizer it is, by its files; one that has none is known to nobody, so its store is not found again."""
    files = getattr(tokenizer, "files", None)
    if not files:
        return uuid.uuid4().hex
    return digest({name: content.hex() for name, content in files.items()})


class Tokens:
    """``ids`` (T,) of all documents end to end and ``borders`` (D + 1,), both mapped from files."""

    def __init__(self, folder: Path) -> None:
        record = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        for name, known in record["files"].items():
            if sha256(folder / name) != known:
                raise ValueError(f"{name} is not what was written")
        self.ids = _mapped(folder / "ids.bin", record["dtype"])
        self.borders = _mapped(folder / "borders.bin", "int64")


def _mapped(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def tokens_of(
    read: Callable[[], Iterator[Document]],
    tokenizer: Any,
    which: str,
    characters: int,
    *,
    whole: bool = True,
    show: bool | None = None,
) -> Tokens:
    """The store of the documents that ``read`` gives, made unless it is there; ``which`` says which they are.

    ``characters``: about how many there are, for the progress line. ``whole``: each begins with the tokenizer's start
    token and ends with its end token, where it has them.
    """
    folder = cache() / "tokens" / digest(FORMAT, which, whole, tokenizer_print(tokenizer))[:32]
    if folder.is_dir():
        try:
            return Tokens(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"the token cache {folder} is damaged ({error}); it is made again", stacklevel=2)
    with replacing(folder, overwrite=True) as temporary, Progress("tokenise", characters, show=show) as bar:
        _write(temporary, _encoded(read(), tokenizer, whole), getattr(tokenizer, "size", 1 << 32), bar)
    return Tokens(folder)


class _Piece(NamedTuple):
    """Ids of a run of ``characters`` of a document, and whether the document ends there."""

    ids: list[int]
    ends: bool
    characters: int


def _write(folder: Path, pieces: Iterable[_Piece], size: int, bar: Progress) -> None:
    """The files of a store; ``size`` is the tokenizer's, which no id reaches."""
    dtype = "uint16" if size <= 1 << 16 else "uint32"
    stops, total, done = array("q", [0]), 0, 0
    with (folder / "ids.bin").open("wb") as file:
        for piece in pieces:
            ids = np.array(piece.ids, dtype=np.int64)
            if len(ids) and not 0 <= ids.min() <= ids.max() < size:
                raise DataError(f"the tokenizer gives the id {ids.max()}, which is beyond its size {size}")
            ids.astype(dtype).tofile(file)
            total, done = total + len(ids), done + piece.characters
            if piece.ends:
                stops.append(total)
                bar.update(done, f"{total / 1e6:.1f}M tokens")
    np.array(stops, dtype=np.int64).tofile(folder / "borders.bin")
    files = {name: sha256(folder / name) for name in ("ids.bin", "borders.bin")}
    write_atomic(folder / "store.json", json.dumps({"format": FORMAT, "dtype": dtype, "files": files}))


def _encoded(documents: Iterable[Document], tokenizer: Any, whole: bool) -> Iterator[_Piece]:
    """The documents in pieces, about ``BATCH`` characters tokenised at once; ``whole`` as in :func:`tokens_of`."""
    start, end = (_edge(tokenizer, name) if whole else [] for name in ("start_id", "end_id"))

    def encode() -> Iterator[_Piece]:
        for text, ids, (opens, ends) in zip(texts, tokenizer.encode(texts, special=False), edges):
            yield _Piece((start if opens else []) + ids + (end if ends else []), ends, len(text))

    texts: list[str] = []
    edges: list[tuple[bool, bool]] = []
    size = 0
    for document in documents:
        for text, opens, ends in _marked(cut(document)):
            texts.append(text)
            edges.append((opens, ends))
            size += len(text)
            if size >= BATCH:
                yield from encode()
                texts, edges, size = [], [], 0
    yield from encode()


def _edge(tokenizer: Any, name: str) -> list[int]:
    found = getattr(tokenizer, name, None)
    return [] if found is None else [found]


def _marked(pieces: Iterator[str]) -> Iterator[tuple[str, bool, bool]]:
    """Each piece, whether it is the first, and whether it is the last."""
    opens, piece = True, next(pieces, None)
    while piece is not None:
        following = next(pieces, None)
        yield piece, opens, following is None
        opens, piece = False, following
