"""Documents that can be read again and again without being held: the texts of a folder, a file, or a column.

A document comes as blocks of its text in order, so that a single file may be larger than memory too. Cost: a reading
of the files each time, in constant memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from formwright.kit.errors import DataError
from formwright.tasks._formats import Rows, open_rows, present
from formwright.tasks.tables import Table, check_text, guess, running_text

#: Pieces of text are at most so many characters where nothing else is asked for.
PIECE = 8192
#: Characters read from a file at once.
BLOCK = 1 << 20
#: Rows looked at to choose the column of the text, and about how many characters of them at most.
LOOK, LOOK_CHARACTERS = 1000, 1 << 18
TEXTS = ("text", "texts", "content", "body", "document", "sentence")

Document = Iterable[str]


@dataclass(frozen=True)
class Documents:
    """``read()`` -> the documents in their order, from the start every time; ``notes`` say what they are, and ``whole``
    whether each really begins and ends where it does, rather than being a piece of a longer text."""

    name: str
    read: Callable[[], Iterator[Document]]
    notes: list[str] = field(default_factory=list)
    whole: bool = True


def cut(blocks: Iterable[str], most: int = PIECE) -> Iterator[str]:
    """A document in runs of whole lines of at most ``most`` characters; a longer line is cut."""
    current: list[str] = []
    size = 0
    for block in blocks:
        for line in block.splitlines(keepends=True):
            for start in range(0, len(line), most):
                part = line[start : start + most]
                if size + len(part) > most:
                    yield "".join(current)
                    current, size = [], 0
                current.append(part)
                size += len(part)
    if current:
        yield "".join(current)


def from_files(root: Path, strict: bool) -> Documents:
    """The text files below a folder, hidden ones left out, or one file; fewer than three are cut into pieces.

    DataError naming all files that are not UTF-8 unless they are to be left out (``strict`` false).
    """
    found, broken = [], []
    for path in [root] if root.is_file() else _visible(root):
        try:
            for _ in blocks_of(path):
                pass
            found.append(path)
        except DataError:
            broken.append(path.name if path == root else path.relative_to(root).as_posix())
    listed = ", ".join(broken[:8]) + (f", … ({len(broken)} in all)" if len(broken) > 8 else "")
    if broken and strict:
        raise DataError(f"{root.name}: not UTF-8 text: {listed}; convert or remove them, or say strict=False")
    notes = [f"{len(found)} files"]
    if broken:
        notes.append(f"{len(broken)} files skipped: not UTF-8 text ({listed})")
    if len(found) >= 3:
        return Documents(root.name, lambda: (blocks_of(path) for path in found), notes)
    notes.append(f"fewer than three files, so they are split in pieces of {PIECE} characters")
    return Documents(root.name, lambda: ([piece] for path in found for piece in cut(blocks_of(path))), notes, False)


def from_column(path: str | Path, text: str | None, strict: bool) -> Documents:
    """A row's text a document, from any table of :mod:`formwright.tasks._formats`; the column may be guessed."""
    rows = open_rows(path)
    head = _head(rows)
    if text is None:
        fits = [column for column in head.columns if running_text(head, column)]
        text, said = guess(head, "text", "--text", TEXTS, fits)
        rows.notes.append(said)
    check_text(head, head.column(text))
    column = text

    def read() -> Iterator[Document]:
        for place, row in rows.read():
            value = row.get(column, "")
            if strict and not value.strip():
                raise DataError(f"{rows.name}: empty {column} ({rows.unit} {place})")
            yield [value]

    return Documents(rows.name, read, rows.notes)


def _head(rows: Rows) -> Table:
    """The first rows as a table, to know the columns by."""
    found, size = [], 0
    for place, row in islice(rows.read(), LOOK):
        found.append((place, row))
        size += sum(map(len, row.values()))
        if size >= LOOK_CHARACTERS:
            break
    columns = tuple(dict.fromkeys(column for _, row in found for column in row))
    if not found:
        raise DataError(f"{rows.name} has no rows")
    filled = tuple({column: row.get(column, "") for column in columns} for _, row in found)
    return Table(rows.name, columns, filled, tuple(place for place, _ in found), unit=rows.unit)


def blocks_of(path: Path) -> Iterator[str]:
    """A file's text in blocks. DataError where it is not UTF-8."""
    try:
        with present(path).open(encoding="utf-8-sig", newline="") as file:
            while block := file.read(BLOCK):
                yield block
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8: {error.reason}") from None


def _visible(root: Path) -> Sequence[Path]:
    """Files below ``root`` in the order of their paths, none of them hidden or in a hidden folder."""
    found = [path for path in root.rglob("*") if path.is_file()]
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    return sorted(visible, key=lambda path: path.relative_to(root).as_posix())
