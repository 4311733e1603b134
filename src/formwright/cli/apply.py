"""``formwright apply``: carry out a plan, or a surgery by name, and write the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from formwright.cli.common import Data, Model, Plugin, Seed, TaskName, Text, Threads, load, say, set_threads
from formwright.cli.plan import Texts, evidence, options_from
from formwright.kit.errors import DataError, SpecError
from formwright.registry import register


@register("verb", "apply", summary="carry out a plan, or a surgery by name, and write the model")
def apply(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="the directory to write")],
    surgery: Annotated[str | None, typer.Argument(help="a surgery by name, where no --plan is given")] = None,
    options: Annotated[list[str] | None, typer.Argument(help="the surgery's options: drop=2, rank=8, ...")] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="a plan printed by formwright plan, perhaps edited")
    ] = None,
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    heal: Annotated[
        int | None, typer.Option("--heal", help="then train so many steps to answer as before, on the same texts")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the directory if it holds a model")] = False,
    seed: Seed = 0,
    threads: Threads = None,
    plugin: Plugin = None,
) -> None:
    """Carry out a plan, or a surgery by name, and write the model."""
    set_threads(threads)
    if (plan is None) == (surgery is None):
        raise SpecError("give either --plan FILE or the name of a surgery")
    if heal is not None and heal < 1:
        raise SpecError(f"--heal {heal}: give at least 1 step, or leave it out")
    from formwright.hub import save
    from formwright.surgery import Plan
    from formwright.surgery import apply as carry_out
    from formwright.surgery import plan as decide
    from formwright.surgery import surgery as named

    if plan is not None:
        if not plan.is_file():
            raise DataError(f"{plan} does not exist")
        decided = Plan.from_json(plan.read_text(encoding="utf-8"))
        beside = plan.with_suffix(".safetensors")
        if beside.is_file():
            from safetensors.torch import load_file

            decided.tensors.update(load_file(str(beside)))
        loaded = load(model, plugin)
    else:
        assert surgery is not None
        named(surgery)
        loaded = load(model, plugin)
        decided = decide(loaded, surgery, evidence(loaded, task, data, text, seed), **options_from(options or []))
    original = None if heal is None else _original(loaded)
    carry_out(loaded, decided)
    say(f"  {named(decided.surgery).words(decided)}")
    if original is not None:
        from formwright.training import heal as train_back

        done = train_back(loaded, original, Texts(task, data, text, seed).all(), steps=heal, seed=seed)
        say(f"  healed {done.steps} steps")
    save(loaded, out, overwrite=overwrite)
    say(f"  wrote {out}/")


def _original(model: Any) -> Any:
    """What ``model`` is healed against, kept before it changes; a DataError where there is nothing to read."""
    from formwright.surgery import copy

    if getattr(model, "tokenizer", None) is None:
        raise DataError("--heal reads texts, and this model carries no tokenizer")
    return copy(model)
