"""``formwright generate``: continue texts with a causal model."""

from __future__ import annotations

from typing import Annotated

import typer

from formwright.cli.common import Adapters, Json, Model, Plugin, Seed, Threads, emit, load, set_threads
from formwright.registry import register


@register("verb", "generate", summary="continue texts with a causal model")
def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="texts to continue")],
    max_new: Annotated[int, typer.Option("--max-new", help="most tokens to add")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", help="sample among the best k")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="sample among the best that hold this probability")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="end at this text (may be given again)")] = None,
    seed: Seed = 0,
    threads: Threads = None,
    adapter: Adapters = None,
    plugin: Plugin = None,
    json: Json = False,
) -> None:
    """Continue texts with a causal model, through its streaming state."""
    set_threads(threads)
    loaded = load(model, plugin, adapter)
    from formwright.engine import generate as run

    found = run(
        loaded, prompts, max_new=max_new, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop, seed=seed
    )
    if json:
        emit([{"prompt": prompt, "text": text} for prompt, text in zip(prompts, found)])
        return
    for prompt, text in zip(prompts, found):
        typer.echo(prompt + text)
