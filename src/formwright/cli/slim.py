"""``formwright slim``: the main job."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from formwright.cli.common import (
    Data,
    Document,
    Json,
    Label,
    Metric,
    Pair,
    Plugin,
    Query,
    Seed,
    Strict,
    TaskName,
    Text,
    Threads,
    Yes,
    emit,
    load,
    make_task,
    say,
    set_threads,
)
from formwright.kit.errors import SpecError
from formwright.registry import register

#: Options of the command line that describe the task, as they are repeated in the command to reproduce.
TASK_OPTIONS = ("task", "data", "text", "label", "pair", "query", "document", "metric")


class Status:
    """One live line on a terminal: candidates, the best so far, time gone and left. Nothing where there is none."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.state: dict[str, Any] = {"tried": 0, "best": 1.0, "elapsed": 0.0, "total": 0.0, "now": ""}

    def __call__(self, **state: Any) -> None:
        self.state.update(state)
        if not self.live:
            return
        s = self.state
        left = max(s["total"] - s["elapsed"], 0.0)
        line = (
            f"  [candidates {s['tried']}  best {s['best']:.1f}x  elapsed {clock(s['elapsed'])}  left {clock(left)}"
            f"  {s['now']}  Ctrl-C keeps everything]"
        )
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write("\r\x1b[2K" + line[:width])
        sys.stderr.flush()

    def clear(self) -> None:
        if self.live:
            sys.stderr.write("\r\x1b[2K")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


@register("verb", "slim", summary="the cheapest model that keeps the quality, with the evidence")
def slim(
    model: Annotated[
        str | None, typer.Argument(help="a directory, an installed package with weights, or a cached hub id")
    ] = None,
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    pair: Pair = None,
    query: Query = None,
    document: Document = None,
    metric: Metric = None,
    keep: Annotated[float, typer.Option("--keep", help="share of the quality to keep, 0.99 is 99 %")] = 0.99,
    target: Annotated[
        str, typer.Option("--target", help="what to make smaller: latency, size, macs or memory")
    ] = "latency",
    shape: Annotated[
        str | None, typer.Option("--shape", help="which latency: encode:32xnatural, encode:32x128, decode:1x512 ...")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", help="of search, everything included")] = 12.0,
    out: Annotated[Path | None, typer.Option("--out", help="directory to write; the search lies in OUT.run")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="go on with a search: its OUT.run")] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Ray cluster to share the work: local, auto, HOST:PORT, ray://HOST:PORT")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    strict: Strict = False,
    yes: Yes = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it holds a model")] = False,
    labels_by_index: Annotated[bool, typer.Option("--labels-by-index", help="match labels by their number")] = False,
    plugin: Plugin = None,
    json: Json = False,
) -> None:
    """Find the cheapest form of a model that keeps its quality on a task, and prove it.

    Ctrl-C keeps everything; formwright slim --resume OUT.run goes on.
    """
    import json as jsonlib

    from formwright.search.slim import slim as run

    given = {
        "task": task,
        "data": data,
        "text": text,
        "label": label,
        "pair": pair,
        "query": query,
        "document": document,
        "metric": metric,
    }
    if resume is not None:
        place = Path(str(resume).rstrip("/"))
        recipe_file = place / "recipe.json"
        if not recipe_file.is_file():
            raise SpecError(f"--resume {resume}: there is no search (no recipe.json); it is the directory OUT.run")
        recipe = jsonlib.loads(recipe_file.read_text(encoding="utf-8"))
        model, given = recipe["model"], {**given, **recipe.get("task_options", {})}
        keep, target, shape, minutes = recipe["keep"], recipe["target"], recipe["shape"], recipe["minutes"]
        seed, strict = recipe["seed"], recipe["strict"]
        out = place.with_name(place.name.removesuffix(".run"))
    if model is None:
        raise SpecError("name a model, or go on with --resume OUT.run")
    if given["task"] is None:
        raise SpecError(
            "say what quality means with --task: retrieval/stdlib, classification --data FILE, lm/stdlib ..."
        )
    set_threads(threads)
    from formwright.search.slim import check

    check(keep, target, minutes)
    made = make_task(
        given["task"],
        **{k: v for k, v in given.items() if k != "task"},
        strict=strict or None,
        labels_by_index=labels_by_index or None,
    )
    loaded = load(model, plugin)
    words = [word for name in TASK_OPTIONS if given.get(name) for word in (f"--{name}", str(given[name]))]
    status = Status()

    def confirm(question: str) -> bool:
        return yes or not sys.stdin.isatty() or typer.confirm(question, err=True)

    def tell(line: str) -> None:
        status.clear()
        say(line)

    try:
        found = run(
            loaded,
            task=made,
            keep=keep,
            target=target,
            shape=shape,
            minutes=minutes,
            seed=seed,
            strict=strict,
            out=out,
            resume=resume is not None,
            overwrite=overwrite,
            ray=ray,
            say=tell,
            status=status,
            confirm=confirm,
            task_words=words,
            task_options={k: v for k, v in given.items() if v is not None},
            model_name=model,
        )
    except KeyboardInterrupt:
        status.clear()
        if out is not None:
            say(f"stopped; everything so far is kept: formwright slim --resume {out}.run")
        raise
    status.clear()
    if json:
        emit(found.data)
    else:
        typer.echo(found.table(width=shutil.get_terminal_size((110, 24)).columns, color=sys.stdout.isatty()))
    if not found.found:
        say(f"nothing cheaper keeps {keep:.1%} here; more --minutes or a lower --keep may find something")
        raise typer.Exit(1)
