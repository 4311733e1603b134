"""``formwright train``: a model from a recipe, or a loaded one further, on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from formwright.cli.common import (
    Data,
    Label,
    Metric,
    Plugin,
    Seed,
    TaskName,
    Text,
    Threads,
    load,
    make_task,
    say,
    set_threads,
)
from formwright.kit.errors import SpecError
from formwright.registry import register


@register("verb", "train", summary="a model from a recipe, or a loaded one further, on a task")
def train(
    model: Annotated[str | None, typer.Argument(help="a model to train further; or --recipe")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="a recipe of the catalogue: a fresh model")] = None,
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    metric: Metric = None,
    steps: Annotated[int | None, typer.Option("--steps", help="how many steps (or --minutes)")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="how long (or --steps)")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="peak learning rate")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="rows a step")] = None,
    vocab: Annotated[int, typer.Option("--vocab", help="entries of a fresh recipe's tokenizer")] = 4096,
    out: Annotated[Path | None, typer.Option("--out", help="the directory to write; the run lies in OUT.run")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in OUT.run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it holds a model")] = False,
    seed: Seed = 0,
    threads: Threads = None,
    plugin: Plugin = None,
) -> None:
    """Train a fresh model from a recipe, or a loaded one further, and write it. A classification task gives a model
    without a classifier a fresh head for its labels."""
    if (model is None) == (recipe is None):
        raise SpecError("give either a model to train further or --recipe NAME for a fresh one")
    if out is None:
        raise SpecError("say where to write with --out DIR")
    set_threads(threads)
    made = make_task(task, data=data, text=text, label=label, metric=metric)
    if made is None:
        raise SpecError("say what to train on with --task: lm/stdlib, classification --data FILE, lm --data DIR ...")
    from formwright.hub import save
    from formwright.training import train as run
    from formwright.training.start import fresh, with_head

    if recipe is not None:
        loaded = fresh(recipe, made, vocab=vocab, seed=seed)
    else:
        assert model is not None
        loaded = load(model, plugin)
    loaded = with_head(loaded, made, seed)
    made.bind(loaded)
    for line in made.describe():
        say(f"  {line}")
    options: dict[str, Any] = {"lr": lr, "batch": batch, "steps": steps, "minutes": minutes}
    objective = "causal-lm" if any(head.kind == "tokens" for head in loaded.heads.values()) else "classification"
    run(
        loaded,
        made,
        out=Path(f"{out}.run"),
        objective=objective,
        resume=resume,
        seed=seed,
        **{name: value for name, value in options.items() if value is not None},
    )
    score = made.score(loaded, "select")
    say(f"  {made.metric} on select: {score.value:.4f}")
    save(loaded, out, overwrite=overwrite or resume)
    say(f"  wrote {out}/")
