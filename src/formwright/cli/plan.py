"""``formwright plan``: decide a surgery and print the plan as JSON, to read, edit and apply."""

from __future__ import annotations

import json as jsonlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from formwright.cli.common import (
    Data,
    Model,
    Out,
    Plugin,
    Seed,
    TaskName,
    Text,
    Threads,
    load,
    make_task,
    read_texts,
    say,
    set_threads,
)
from formwright.kit.errors import Refusal, SpecError
from formwright.registry import register

#: Texts a surgery may run while deciding.
EVIDENCE = 128


def options_from(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` and ``--name value`` words to options; values are JSON where they parse, text otherwise."""
    options: dict[str, Any] = {}
    words = list(pairs)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            if not _:
                if not words or words[0].startswith("--"):
                    value = "true"
                else:
                    value = words.pop(0)
        elif "=" in word:
            name, _, value = word.partition("=")
        else:
            raise SpecError(f"option {word!r} must be --name value or name=value")
        try:
            options[name.replace("-", "_")] = jsonlib.loads(value)
        except ValueError:
            options[name.replace("-", "_")] = [v.strip() for v in value.split(",")] if "," in value else value
    return options


class Texts:
    """Texts that a surgery may run while deciding, read only when it asks: from ``--data``, the task's calibrate
    split, or the standard library's."""

    def __init__(self, task: str | None, data: str | None, text: str | None, seed: int) -> None:
        self.task, self.data, self.text, self.seed = task, data, text, seed

    def all(self) -> list[str]:
        if self.data is not None and self.task is None:
            return read_texts(Path(self.data), self.text)
        return make_task(self.task or "retrieval/stdlib", data=self.data, text=self.text).texts("calibrate")

    def __iter__(self) -> Iterator[str]:
        texts = self.all()
        return iter(random.Random(self.seed).sample(texts, min(EVIDENCE, len(texts))))


def evidence(model: Any, task: str | None, data: str | None, text: str | None, seed: int) -> Texts | None:
    """:class:`Texts` for a model that reads texts, None for others."""
    return None if getattr(model, "tokenizer", None) is None else Texts(task, data, text, seed)


@register("verb", "plan", summary="decide a surgery and print the plan, to read, edit and apply")
def plan(
    ctx: typer.Context,
    surgery: Annotated[str, typer.Argument(help="finercut, llm-int8, low-rank, lora, head, ...")],
    model: Model,
    options: Annotated[list[str] | None, typer.Argument(help="the surgery's options: drop=2, rank=8, ...")] = None,
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    drop: Annotated[int | None, typer.Option("--drop", help="finercut: how many sublayers")] = None,
    rank: Annotated[str | None, typer.Option("--rank", help="low-rank and lora: the rank")] = None,
    out: Out = None,
    seed: Seed = 0,
    threads: Threads = None,
    plugin: Plugin = None,
) -> None:
    """Decide a surgery and print the plan as JSON; nothing is changed."""
    set_threads(threads)
    given = options_from(options or [])
    for name, value in (("drop", drop), ("rank", rank)):
        if value is not None:
            given[name] = options_from([f"{name}={value}"])[name]
    loaded = load(model, plugin)
    from formwright.surgery import plan as decide
    from formwright.surgery import surgery as named

    named(surgery)
    decided = decide(loaded, surgery, evidence(loaded, task, data, text, seed), **given)
    if decided.tensors and out is None:
        raise Refusal(f"this plan of {surgery} carries tensors; write it with --out plan.json (they go beside it)")
    if out is None:
        typer.echo(decided.to_json())
    else:
        from formwright.kit.files import write_atomic

        if decided.tensors:
            from safetensors.torch import save

            write_atomic(out.with_suffix(".safetensors"), save(dict(decided.tensors)))
        write_atomic(out, decided.to_json() + "\n")
    say(f"  {named(surgery).words(decided)}")
