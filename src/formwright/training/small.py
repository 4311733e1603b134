"""The two small language models that come with the package, made again: ``python -m formwright.training.small OUT``.

A byte-level BPE of 2048 pieces is trained on the standard library's text and code (split *calibrate* of ``lm/stdlib``),
then ``small-causal`` from random numbers, then ``small-masked`` from it. Each is scored on modules it has not seen,
beside what counting tokens and pairs of tokens gives, and written in half precision with a card that says all this.
One thread, one Python and one PyTorch give the same bits again. Cost: about 25 minutes on one core of a small server.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formwright.hub import save
from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.tasks import task
from formwright.tasks._lm import windows
from formwright.tasks._ngrams import Bigram
from formwright.training.loop import train
from formwright.training.tokenizer import train_tokenizer

VOCAB, LENGTH, ROWS = 2048, 256, 8


@dataclass(frozen=True)
class Plan:
    """How one of the models is trained; ``begin`` names the model whose tensors it starts from."""

    task: str
    objective: Mapping[str, Any]
    steps: int
    lr: float
    begin: str | None = None


PLANS = {
    "small-causal": Plan("lm/stdlib", {"name": "causal-lm"}, 3000, 3e-3),
    "small-masked": Plan("mlm/stdlib", {"name": "masked-lm", "rate": 0.2}, 1000, 2e-3, "small-causal"),
}


def make(name: str, out: Path, made: Mapping[str, Any], show: bool | None = None) -> Any:
    """Train the model called ``name``, or go on with its run, and write it to ``out``/``name``."""
    plan = PLANS[name]
    data: Any = task(plan.task, length=LENGTH, rows=ROWS)
    tokenizer = train_tokenizer(data.texts("calibrate"), VOCAB, mask=True)
    model = build(recipe(name, vocab=tokenizer.size), seed=0)
    model.tokenizer, model.name = tokenizer, name
    if plan.begin is not None:
        model.load_state_dict(made[plan.begin].state_dict())
    run = out / f"{name}.run"
    settings: dict[str, Any] = {"steps": plan.steps, "lr": plan.lr, "warmup": 0.05, "weight_decay": 0.05, "seed": 0}
    train(model, data, objective=dict(plan.objective), out=run, resume=run.exists(), show=show, **settings)
    model.eval()
    figures = SCORED[plan.task](model, data)
    card = _card(name, plan, model, data, figures)

    def beside(folder: Path) -> None:
        (folder / "README.md").write_text(card, encoding="utf-8")

    save(
        model,
        out / name,
        overwrite=True,
        store="float16",
        beside=beside,
        task=plan.task,
        metric=data.metric,
        scores=figures,
    )
    return model


def causal_figures(model: Any, data: Any) -> dict[str, float]:
    """Bits per byte on the test split, and what counting gives on the same tokens."""
    found = {"bits/byte": data.score(model, "test").value}
    counts = Bigram(model.tokenizer.encode(data.texts("calibrate"), special=False), model.tokenizer.size)
    cut = [window for text in data.texts("test") for window in windows(model.tokenizer, text, LENGTH)]
    before, token = (np.concatenate([np.asarray(getattr(w, side)) for w in cut]) for side in ("tokens", "targets"))
    size = sum(window.bytes for window in cut)
    for name, left in (("unigram", np.full_like(before, -1)), ("bigram", before)):
        found[f"{name} bits/byte"] = float(counts.nats(left, token).sum()) / log(2) / size
    return found


def masked_figures(model: Any, data: Any) -> dict[str, float]:
    """Accuracy and bits of hidden tokens of the test split, and what counting gives on the same."""
    found = {}
    for name, score in {"": data.score(model, "test"), **data.baselines("test")}.items():
        found[f"{name} bits/masked token".strip()] = score.value
        found[f"{name} masked accuracy".strip()] = score.extra["accuracy"]
    return found


SCORED: dict[str, Callable[[Any, Any], dict[str, float]]] = {
    "lm/stdlib": causal_figures,
    "mlm/stdlib": masked_figures,
}


def _card(name: str, plan: Plan, model: Any, data: Any, figures: Mapping[str, float]) -> str:
    """The model's card."""
    count = sum(p.numel() for p in model.parameters())
    begun = f"from {plan.begin}" if plan.begin else "from random numbers"
    python = ".".join(map(str, sys.version_info[:3]))
    table = "\n".join(f"| {what} | {value:.4f} |" for what, value in figures.items())
    return f"""# {name}

A language model of {count:,} parameters for tests, examples and proofs. It knows Python's standard library a little,
and nothing else; it is no assistant.

- Form: recipe `{name}` with a vocabulary of {VOCAB}; weights are stored in float16 and used in float32.
- Data: source and `help()` topics of the standard library of Python {python}, split by module (80 % for training).
- Training: {plan.steps} steps of {ROWS} windows of {LENGTH} tokens {begun}, objective `{plan.objective["name"]}`.
- Made by: `python -m formwright.training.small OUT`, PyTorch {torch.__version__}, one thread.
- Licence: the weights are under Formwright's, Apache-2.0; the text they were trained on is under the PSF License
  Agreement of Python (https://docs.python.org/3/license.html), copyright Python Software Foundation.

On the test split of `{plan.task}`, modules that training has not seen:

| measured | value |
| --- | --- |
{table}

`unigram` and `bigram` count tokens and pairs of tokens of the training split.
"""


def main() -> None:
    """Make both models."""
    reader = argparse.ArgumentParser(description=main.__doc__)
    reader.add_argument("out", type=Path, help="directory to write to; a run that lies there is gone on with")
    out = reader.parse_args().out
    torch.set_num_threads(1)
    made: dict[str, Any] = {}
    for name in PLANS:
        made[name] = make(name, out, made)


if __name__ == "__main__":
    main()
