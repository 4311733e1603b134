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
    config: Annotated[Path | None, typer.Option("--config", help="settings of training as a TOML file")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="one more setting, such as objective.smoothing=0.1"),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="how many steps (or --minutes)")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="how long (or --steps)")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="peak learning rate")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="rows a step")] = None,
    vocab: Annotated[int, typer.Option("--vocab", help="entries of a fresh recipe's tokenizer")] = 4096,
    evaluate: Annotated[int | None, typer.Option("--evaluate-every", help="steps between scores on select")] = None,
    patience: Annotated[
        int | None, typer.Option("--patience", help="end after so many scores that are no better; write the best model")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda ... (default: a GPU if any)")] = None,
    shard: Annotated[bool, typer.Option("--shard", help="under torchrun: cut the model over the processes")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write TensorBoard's files as well")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="the directory to write; the run lies in OUT.run")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in OUT.run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it holds a model")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="of every random choice (default 0)")] = None,
    threads: Threads = None,
    plugin: Plugin = None,
) -> None:
    """Train a fresh model from a recipe, or a loaded one further, and write it. A classification task gives a model
    without a classifier a fresh head for its labels. Settings come from --config, then --set, then the other options.
    On several devices or machines: torchrun --nproc-per-node N -m formwright train ..."""
    if (model is None) == (recipe is None):
        raise SpecError("give either a model to train further or --recipe NAME for a fresh one")
    if out is None:
        raise SpecError("say where to write with --out DIR")
    if task is None:
        raise SpecError("say what to train on with --task: lm/stdlib, classification --data FILE, lm --data DIR ...")
    if patience is not None and evaluate is None:
        raise SpecError(f"--patience {patience} counts scores: say how often to score with --evaluate-every")
    set_threads(threads)
    options = {"lr": lr, "batch": batch, "steps": steps, "minutes": minutes, "seed": seed}
    plan = _settings(config, settings or [], {key: value for key, value in options.items() if value is not None})
    from formwright.hub import save
    from formwright.training import train as run
    from formwright.training.place import here
    from formwright.training.start import fresh, objective_of, with_head

    main, place = here(shard).main, _device(device)
    made = make_task(task, data=data, text=text, label=label, metric=metric)
    if recipe is not None:
        loaded = fresh(recipe, made, vocab=vocab, seed=plan.get("seed", 0))
    else:
        assert model is not None
        loaded = load(model, plugin)
    loaded = with_head(loaded, made, plan.get("seed", 0))
    made.bind(loaded)
    for line in made.describe() if main else ():
        say(f"  {line}")
    done = run(
        loaded.to(place),
        made,
        out=Path(f"{out}.run"),
        resume=resume,
        evaluate_every=evaluate,
        patience=patience,
        shard=shard,
        tensorboard=tensorboard,
        **{"objective": objective_of(made), **plan},
    )
    loaded.to("cpu")
    if main:
        score = made.score(loaded, "select")
        say(f"  {done.why} after {done.steps:,} steps")
        say(f"  {made.metric} on select: {score.value:.4f}")
        save(loaded, out, overwrite=overwrite or resume)
        say(f"  wrote {out}/ (the run: {out}.run/)")


def _settings(config: Path | None, words: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Settings of the file, then of ``--set``, then of the options: whole and checked before any work."""
    from formwright.training import Recipe, configs

    plan = {**configs.overridden({} if config is None else configs.read(config), words), **options}
    Recipe.from_dict(plan)
    return plan


def _device(name: str | None) -> Any:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name or found).device
    except (RuntimeError, AssertionError):
        raise SpecError(f"--device {name}: this machine has none; it has {found} and cpu") from None
