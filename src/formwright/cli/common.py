"""What several verbs share: the task's options, seeds, threads, output as text or JSON."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from formwright.kit.errors import DataError, SpecError

Model = Annotated[str, typer.Argument(help="a directory, an installed package with weights, or a cached hub id")]
TaskName = Annotated[
    str | None,
    typer.Option("--task", help="retrieval/stdlib, lm/stdlib, classification, retrieval, lm, or FILE.py:NAME"),
]
Data = Annotated[
    str | None, typer.Option("--data", help="your table (CSV, TSV, JSONL, Parquet, a saved data set) or texts")
]
Text = Annotated[str | None, typer.Option("--text", help="column of the text")]
Label = Annotated[str | None, typer.Option("--label", help="column of the label")]
Pair = Annotated[str | None, typer.Option("--pair", help="column of a second text")]
Query = Annotated[str | None, typer.Option("--query", help="column of the query, for retrieval")]
Document = Annotated[str | None, typer.Option("--document", help="column of the right document, for retrieval")]
Metric = Annotated[
    str | None, typer.Option("--metric", help="accuracy, macro-f1 ...; the default is printed with its reason")
]
Seed = Annotated[int, typer.Option("--seed", help="of every random choice")]
Threads = Annotated[int | None, typer.Option("--threads", help="processor threads (default: PyTorch's)")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Out = Annotated[Path | None, typer.Option("--out", help="where to write")]
Strict = Annotated[bool, typer.Option("--strict", help="refuse bad rows and uncertain results instead of saying so")]
Yes = Annotated[bool, typer.Option("--yes", help="go on where the data cannot certify what was asked for")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="a directory with an adapter of the model, ours or peft's; may be repeated"),
]
Plugin = Annotated[
    Path | None, typer.Option("--plugin", help="a file of yours that registers names used inside a checkpoint")
]


def set_threads(threads: int | None) -> None:
    """One thread budget for everything; refused beyond the cores there are."""
    if threads is None:
        return
    import os

    import torch

    cores = os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise SpecError(f"--threads {threads}: this machine has {cores} cores, give 1 to {cores}")
    torch.set_num_threads(threads)


def load(name: str, plugin: Path | None = None, adapters: list[str] | None = None) -> Any:
    """The model of that name, with warnings printed as plain lines; the last of ``adapters`` is the one in use."""
    warnings.showwarning = lambda message, *rest, **more: say(f"note: {message}")  # type: ignore[assignment]
    from formwright.hub import load as load_model

    model = load_model(name, plugin=None if plugin is None else str(plugin))
    for directory in adapters or ():
        from formwright.hub import load_adapter
        from formwright.surgery.adapt.switch import numbers, use

        before = numbers(model)
        load_adapter(model, directory)
        for added in [one for one in numbers(model) if one not in before]:
            use(model, added)
    return model


def make_task(name: str | None, **options: Any) -> Any:
    """The task of the command line's options; None without ``--task`` and ``--data``."""
    given = {key: value for key, value in options.items() if value is not None and value is not False}
    if name is None:
        if given.keys() - {"seed"}:
            raise SpecError("--data needs --task: classification, retrieval or lm")
        return None
    from formwright.tasks import task

    return task(name, **given)


def read_texts(data: Path | None, text: str | None, given: list[str] | None = None) -> list[str]:
    """Texts of a column of a table, the lines of a text file, or those given on the command line."""
    if data is None:
        if given:
            return given
        if sys.stdin.isatty():
            raise SpecError("give texts, or --data FILE (with --text COLUMN for a table)")
        return [line.rstrip("\n") for line in sys.stdin]
    from formwright.tasks.tables import is_rows, read_table

    if not data.is_file() and not is_rows(data):
        raise DataError(f"{data} does not exist or is not a file")
    if is_rows(data):
        table = read_table(data)
        column = table.column(text) if text is not None else only_column(table)
        return [row[column] for row in table.rows]
    try:
        return data.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{data} is not UTF-8 (byte {error.start}); convert it first") from None


def only_column(table: Any) -> str:
    """The column to read where none was named: the only one, or the one people call text."""
    likely = [name for name in table.columns if name.casefold() in ("text", "body", "sentence", "document")]
    if len(table.columns) == 1 or len(likely) == 1:
        return table.columns[0] if len(table.columns) == 1 else likely[0]
    raise DataError(f"{table.name}: say which column holds the text with --text (columns: {', '.join(table.columns)})")


def say(line: str = "") -> None:
    """A line of progress or explanation, on stderr so that output can be piped."""
    typer.echo(line, err=True)


def emit(data: Any) -> None:
    """Plain data as JSON on stdout; numbers that are not finite become null."""
    typer.echo(json.dumps(finite(data), indent=1, ensure_ascii=False))


def finite(data: Any) -> Any:
    import math

    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
