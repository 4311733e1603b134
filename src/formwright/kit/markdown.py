"""Tables in Markdown, for pages that programs write."""

from __future__ import annotations

from typing import Any


def cell(text: Any) -> str:
    """Text as a cell of a table, in one line."""
    return " ".join(str(text).replace("|", "\\|").replace("``", "`").split())


def table(columns: list[str], rows: list[list[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join(head + [f"| {' | '.join(row)} |" for row in rows])
