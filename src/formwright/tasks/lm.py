"""``lm``: bits per byte on the user's own text files.

Every file below a folder is read as UTF-8 (hidden ones are left out) and stays whole on one side of the splits; fewer
than three files are cut into pieces first, and that is said. Cost: reading the files.
"""

from __future__ import annotations

from pathlib import Path

from formwright.kit.errors import DataError
from formwright.registry import register
from formwright.tasks._lm import LanguageTask, pieces
from formwright.tasks.tables import read_text


@register("task", "lm", summary="bits per byte of your own text files: --data FOLDER")
class Language(LanguageTask):
    """Bits per byte over text files.

    data: a folder (read with its subfolders) or a file. length: tokens a window. rows: windows a batch. limit: bytes of
    select and of test that are scored at most. strict: refuse files that are not UTF-8 text instead of skipping them.

    Raises:
        DataError: no such folder, files that are not UTF-8 (all of them in one sentence), too little text.
    """

    def __init__(
        self,
        data: str | Path,
        length: int = 256,
        rows: int = 8,
        limit: int = 400_000,
        seed: int = 0,
        strict: bool = True,
    ) -> None:
        root = Path(data).expanduser()
        if not root.exists():
            raise DataError(f"{root} does not exist")
        documents: list[tuple[str, str]] = []
        broken: list[str] = []
        for path in [root] if root.is_file() else _files(root):
            name = path.relative_to(root).as_posix() if path != root else path.name
            try:
                documents.append((name, read_text(path)))
            except DataError:
                broken.append(name)
        listed = ", ".join(broken[:8]) + (f", … ({len(broken)} in all)" if len(broken) > 8 else "")
        if broken and strict:
            raise DataError(f"{root.name}: not UTF-8 text: {listed}; convert or remove them, or say strict=False")
        notes = [f"{len(documents)} files"]
        if broken:
            notes.append(f"{len(broken)} files skipped: not UTF-8 text ({listed})")
        if len(documents) < 3:
            documents = [(name, part) for name, text in documents for part in pieces(text)]
            notes.append(f"fewer than three files, so they are split in pieces: {len(documents)}")
        super().__init__(root.name, documents, length=length, rows=rows, limit=limit, seed=seed, notes=notes)


def _files(root: Path) -> list[Path]:
    """Files below ``root`` in the order of their paths, none of them hidden or in a hidden folder."""
    found = [path for path in root.rglob("*") if path.is_file()]
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    return sorted(visible, key=lambda path: path.relative_to(root).as_posix())
