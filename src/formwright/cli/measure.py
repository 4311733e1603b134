"""``formwright measure``: what a model costs and, with a task, how good it is."""

from __future__ import annotations

from typing import Annotated

import typer

from formwright.cli.common import (
    Adapters,
    Data,
    Document,
    Json,
    Label,
    Metric,
    Model,
    Pair,
    Plugin,
    Query,
    Seed,
    Strict,
    TaskName,
    Text,
    Threads,
    emit,
    load,
    make_task,
    say,
    set_threads,
)
from formwright.registry import register


@register("verb", "measure", summary="parameters, bytes, multiply-accumulates, time and, with a task, quality")
def measure(
    model: Model,
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    pair: Pair = None,
    query: Query = None,
    document: Document = None,
    metric: Metric = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="encode:32xnatural, encode:32x128, prefill:1x1024, decode:1x512")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="how often to time")] = 7,
    seed: Seed = 0,
    threads: Threads = None,
    strict: Strict = False,
    adapter: Adapters = None,
    plugin: Plugin = None,
    json: Json = False,
) -> None:
    """Parameters, bytes, multiply-accumulates, time and, with a task, quality."""
    set_threads(threads)
    columns = {"text": text, "label": label, "pair": pair, "query": query, "document": document}
    made = make_task(task, data=data, **columns, metric=metric, strict=strict)
    loaded = load(model, plugin, adapter)
    if made is not None:
        made.bind(loaded)
        for line in made.describe():
            say(f"  {line}")
    from formwright.measure import measure as measured

    found = measured(loaded, task=made, shape=shape, rounds=rounds, seed=seed)
    baselines = {name: score.value for name, score in made.baselines("test").items()} if made is not None else {}
    if json:
        emit({**found.to_dict(), "baselines": baselines})
        return
    if found.quality is not None:
        others = " · ".join(f"{name} {value:.3f}" for name, value in baselines.items())
        typer.echo(f"  {found.metric} {found.quality:.4f}" + (f" · {others}" if others else ""))
    typer.echo(
        f"  {found.ms_item:.3f} ms an item at {found.shape} on {found.threads} threads"
        f" (spread {found.spread:.0%}{', noisy' if found.noisy else ''}) · {found.per_second:,.0f} a second"
    )
    typer.echo(
        f"  {found.parameters:,} parameters · {found.bytes / 1e6:.1f} MB · {found.macs / 1e9:.2f} G multiply-adds"
        + (f" · {found.state_bytes / 1e6:.2f} MB of state" if found.state_bytes else "")
    )
