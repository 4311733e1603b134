"""``lm``: bits per byte on the user's own text: files of text, or a column of a table.

Every file below a folder is read as UTF-8 (hidden ones are left out) and stays whole on one side of the splits; fewer
than three files are cut into pieces first, and that is said. Of a table (CSV, TSV, JSONL, Parquet, a saved data set)
every row's text is a document. Nothing is held whole: training reads documents of natural length from a cache of their
ids, packed without padding. Cost: two readings of the files, and tokenising them once.
"""

from __future__ import annotations

from pathlib import Path

from formwright.kit.errors import DataError, SpecError
from formwright.registry import register
from formwright.tasks._documents import from_column, from_files
from formwright.tasks._formats import is_rows
from formwright.tasks._stream import StreamedLanguage


@register("task", "lm", summary="bits per byte of your own texts: --data FOLDER, or --data TABLE --text COLUMN")
class Language(StreamedLanguage):
    """Bits per byte over text files or the rows of a table.

    data: a folder (read with its subfolders), a file of text, or a table. text: the table's column; guessed where
    exactly one fits, and the guess is said. length: tokens a window, and of a piece of a document in training. rows:
    windows a batch. tokens: of a packed training batch, at most (default: rows x length). limit: bytes of select and of
    test that are scored at most. strict: refuse files that are not UTF-8 text instead of skipping them, and in a
    table rows without text (None: only files).

    Raises:
        DataError: no such folder or column, files that are not UTF-8 (all of them in one sentence), too little text.
    """

    def __init__(
        self,
        data: str | Path,
        text: str | None = None,
        length: int = 256,
        rows: int = 8,
        tokens: int | None = None,
        limit: int = 400_000,
        seed: int = 0,
        strict: bool | None = None,
    ) -> None:
        path = Path(data).expanduser()
        if not path.exists():
            raise DataError(f"{path} does not exist")
        if is_rows(path):
            documents = from_column(path, text, bool(strict))
        elif text is not None:
            raise SpecError(f"--text {text}: {path.name} is no table, so it has no columns")
        else:
            documents = from_files(path, strict is not False)
        super().__init__(documents, length=length, rows=rows, tokens=tokens, limit=limit, seed=seed)
