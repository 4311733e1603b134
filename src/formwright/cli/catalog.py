"""``formwright catalog``: everything there is, by kind, with its paper."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from formwright import registry
from formwright.cli.common import Json, emit
from formwright.kit.errors import SpecError, unknown
from formwright.registry import register


def rows(kind: str | None = None, search: str = "") -> list[dict[str, Any]]:
    """Plain rows of every registered name, without importing any of them."""
    found = []
    for (of, name), entry in sorted(registry.entries().items()):
        text = f"{of} {name} {entry.summary} {entry.paper or ''}".casefold()
        if (kind is None or of == kind) and search.casefold() in text:
            found.append({"kind": of, "name": name, "summary": entry.summary, "paper": str(entry.paper or "")})
    return found


@register("verb", "catalog", summary="list parts, surgeries, tasks, recipes, proofs, with their papers")
def catalog(
    search: Annotated[str, typer.Argument(help="only what contains this")] = "",
    kind: Annotated[str | None, typer.Option("--kind", help="only this kind: mixer, surgery, task, ...")] = None,
    json: Json = False,
) -> None:
    """List parts, surgeries, tasks, recipes and proofs, with their papers."""
    if kind is not None and kind not in registry.HOMES:
        raise SpecError(unknown("kind", kind, registry.HOMES))
    found = rows(kind, search)
    if json:
        emit(found)
        return
    if not found:
        typer.echo(f"nothing matches {search!r}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("kind", "name", "what it is", "paper"):
        table.add_column(name, no_wrap=name in ("kind", "name"))
    for row in found:
        table.add_row(row["kind"], row["name"], row["summary"], row["paper"])
    Console().print(table)
