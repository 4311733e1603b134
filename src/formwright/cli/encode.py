"""``formwright encode``: texts to vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from formwright.cli.common import Adapters, Model, Plugin, Text, Threads, emit, load, read_texts, say, set_threads
from formwright.kit.errors import SpecError
from formwright.registry import register


@register("verb", "encode", summary="texts to vectors")
def encode(
    model: Model,
    texts: Annotated[list[str] | None, typer.Argument(help="texts; or --data, or lines on standard input")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="a table (see predict) or a text file, a text a line")
    ] = None,
    text: Text = None,
    out: Annotated[Path | None, typer.Option("--out", help="a .npy file; without it JSON is printed")] = None,
    batch: Annotated[int, typer.Option("--batch", help="texts at once")] = 32,
    threads: Threads = None,
    adapter: Adapters = None,
    plugin: Plugin = None,
) -> None:
    """Texts to vectors: float32, normalised as the model says."""
    set_threads(threads)
    if batch < 1:
        raise SpecError(f"--batch {batch} must be at least 1")
    rows = read_texts(data, text, texts)
    if out is not None and out.suffix != ".npy":
        raise SpecError(f"--out {out}: vectors are written as .npy")
    vectors = load(model, plugin, adapter).encode(rows, batch_size=batch)
    if out is None:
        emit([{"text": row, "vector": [round(float(v), 7) for v in vector]} for row, vector in zip(rows, vectors)])
        return
    import io

    import numpy as np

    from formwright.kit.files import write_atomic

    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    write_atomic(out, buffer.getvalue())
    say(f"  wrote {out}: {vectors.shape[0]} vectors of {vectors.shape[1]}")
