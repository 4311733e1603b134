"""``formwright predict``: labels for the rows of a table; its columns and their order stay."""

from __future__ import annotations

import csv
import io
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from formwright.cli.common import Adapters, Model, Out, Pair, Plugin, Text, Threads, load, only_column, say, set_threads
from formwright.kit.errors import SpecError
from formwright.registry import register

#: What a table is written as, by its suffix.
WRITTEN = (".csv", ".tsv", ".jsonl")


@register("verb", "predict", summary="labels for the rows of a table")
def predict(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="a table: CSV, TSV, JSONL, Parquet, or a saved data set")],
    text: Text = None,
    pair: Pair = None,
    out: Out = None,
    batch: Annotated[int, typer.Option("--batch", help="rows at once")] = 32,
    threads: Threads = None,
    adapter: Adapters = None,
    plugin: Plugin = None,
) -> None:
    """Add the columns label and probability to a table."""
    set_threads(threads)
    from formwright.kit.files import write_atomic
    from formwright.tasks.tables import read_table

    table = read_table(data)
    column = table.column(text) if text is not None else only_column(table)
    other = table.column(pair) if pair is not None else None
    clash = [name for name in ("label", "probability") if name in table.columns]
    if clash:
        raise SpecError(f"{table.name} already has a column {clash[0]!r}; rename it first")
    suffix = (out or data).suffix.lower()
    if out is None and suffix not in WRITTEN:
        suffix = ".csv"
    if suffix not in WRITTEN:
        raise SpecError(f"--out {out}: a table ends in .csv, .tsv or .jsonl")
    texts = [row[column] for row in table.rows]
    found = load(model, plugin, adapter).predict(
        texts, [row[other] for row in table.rows] if other else None, batch_size=batch
    )
    rows = [{**row, "label": p["label"], "probability": f"{p['probability']:.4f}"} for row, p in zip(table.rows, found)]
    buffer = io.StringIO()
    if suffix == ".jsonl":
        for row in rows:
            buffer.write(jsonlib.dumps(row, ensure_ascii=False) + "\n")
    else:
        columns = [*table.columns, "label", "probability"]
        writer = csv.DictWriter(buffer, columns, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if out is None:
        typer.echo(buffer.getvalue(), nl=False)
    else:
        write_atomic(out, buffer.getvalue())
        say(f"  wrote {out}: {len(rows)} rows")
