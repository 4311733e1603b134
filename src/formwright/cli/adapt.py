"""``formwright adapt``: fine-tune a model on a task by any method, and see what it costs before it starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from formwright.cli.common import (
    Data,
    Json,
    Label,
    Metric,
    Model,
    Pair,
    Plugin,
    Seed,
    TaskName,
    Text,
    Threads,
    emit,
    load,
    make_task,
    say,
    set_threads,
)
from formwright.cli.plan import options_from
from formwright.kit.errors import SpecError
from formwright.registry import register


@register("verb", "adapt", summary="fine-tune a model on a task by any method, and see its cost before")
def adapt(
    model: Model,
    options: Annotated[list[str] | None, typer.Argument(help="the method's options: rank=8, where=q,v ...")] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="lora, dora, bitfit, full, head ...; none prints what each would cost"),
    ] = None,
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    pair: Pair = None,
    metric: Metric = None,
    steps: Annotated[int | None, typer.Option("--steps", help="how many steps (or --minutes)")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="how long (or --steps)")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="peak learning rate (default: by the method)")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="rows a step")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="fold the adapter into plain weights at the end")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="the directory to write; the run lies in OUT.run")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in OUT.run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it holds a model or adapter")] = False,
    json: Json = False,
    seed: Seed = 0,
    threads: Threads = None,
    plugin: Plugin = None,
) -> None:
    """Fine-tune a model on a task. Without --method it prints what every method would cost and trains nothing. What is
    written is the adapter alone, for that very model, or the whole model where the method or a new head changed it."""
    if task is None:
        raise SpecError("say what to adapt to with --task: classification --data FILE, lm --data DIR, lm/stdlib ...")
    if method is None and (out is not None or options):
        raise SpecError("say how with --method; without it adapt only prints what each method would cost")
    if method is not None and out is None:
        raise SpecError("say where to write with --out DIR")
    if method is not None and steps is None and minutes is None:
        raise SpecError("say how long with --steps N or --minutes M")
    set_threads(threads)
    from formwright.training import adapt as tuning

    made = make_task(task, data=data, text=text, label=label, pair=pair, metric=metric)
    loaded = load(model, plugin)
    if method is None:
        found = tuning.prices(loaded, made, seed=seed)
        if json:
            emit([asdict(price) for price in found])
        else:
            _print(found)
            say("  train one: formwright adapt MODEL --method NAME --task ... --minutes 5 --out DIR")
        return
    given, chosen = options_from(options or []), {"steps": steps, "minutes": minutes, "batch": batch}
    cost = tuning.price(loaded, made, method, seed=seed, **given)
    _print([tuning.price(loaded, made, "full", seed=seed), cost])
    done = tuning.adapt(
        loaded,
        made,
        method,
        out=out,
        resume=resume,
        overwrite=overwrite,
        merge=merge,
        lr=lr,
        seed=seed,
        options=given,
        cost=cost,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    _said(done, made, json)


def _print(prices: list[Any]) -> None:
    """The table of costs of one step, and why a method does not fit."""
    say(f"  {'one step of':<20}{'trains':>11}{'':>8}{'weights and optimizer':>23}{'activations':>14}{'seconds':>9}")
    for price in prices:
        if price.refused:
            say(f"  {price.method:<20}{price.refused}")
            continue
        memory = price.memory
        held = (memory.weights + memory.gradients + memory.optimizer) / 2**20
        seconds = "" if price.seconds is None else f"{price.seconds:9.3f}"
        say(
            f"  {price.method:<20}{price.trainable:>11,}{100 * price.share:8.2f} %{held:>17,.0f} MiB"
            f"{memory.saved / 2**20:>10,.1f} MiB{seconds}"
        )


def _said(done: Any, task: Any, json: bool) -> None:
    before = None if done.before is None else done.before.value
    if json:
        emit({
            "price": asdict(done.price), "metric": task.metric, "before": before, "select": done.select.value,
            "test": done.test.value, "steps": done.trained.steps, "seconds": done.trained.seconds,
            "out": str(done.out), "whole": done.whole,
        })  # fmt: skip
        return
    from_value = "no head before" if before is None else f"{before:.4f} before"
    say(f"  {done.trained.why} after {done.trained.steps:,} steps, {done.trained.seconds:.0f} s")
    say(f"  {task.metric} on select: {done.select.value:.4f} ({from_value}); on test: {done.test.value:.4f}")
    size = sum(path.stat().st_size for path in done.out.rglob("*") if path.is_file()) / 2**20
    what = "the whole model" if done.whole else "the adapter alone: load it onto the model it was made from, --adapter"
    say(f"  wrote {done.out}/ ({size:.1f} MiB, {what}; the run: {done.out}.run/)")
