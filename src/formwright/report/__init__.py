"""Reports: one result as a table in the terminal, a picture, a page and a model card, all from the same plain data.

Nothing here knows a model or needs torch. ``data`` is the dictionary that :mod:`formwright.report.schema` describes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formwright.kit.files import PathLike, write_atomic
from formwright.report.schema import Front


def table(data: dict[str, Any] | Front, width: int = 100, color: bool = False) -> str:
    """The result as the terminal prints it, no line wider than ``width`` cells (60 or more)."""
    from formwright.report import terminal

    return terminal.table(Front.from_json(data), width, color)


def write(data: dict[str, Any] | Front, directory: PathLike) -> list[Path]:
    """Write ``report.html`` and ``pareto.png`` into an existing directory, each in one step; their paths."""
    from formwright.report import html, plot  # matplotlib only where a picture is wanted

    front, folder = Front.from_json(data), Path(directory)
    png = plot.picture(front)
    contents: dict[str, bytes | str] = {"report.html": html.page(front, png), "pareto.png": png}
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [folder / name for name in contents]
