"""Healing: a model that was cut learns from the original to answer as before, on texts without labels.

The teacher reads every text once (:mod:`formwright.training.lesson`). Up to the first item that differs from the
teacher's the model is left as it is and not run at all: its stream there is the teacher's. Only float parameters that
may train move; the embedding tables stay unless asked, since their gradient is as large as the table and nearly all
zero. Texts run in the packed layout, batches alike in length, so no product is spent on padding, and without dropout,
whose noise the teacher's answers do not have. Cost a step: forward and backward of the changed part over ``batch``
texts, and for texts not met before one forward pass of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formwright.kit.errors import DataError, Refusal, SpecError
from formwright.models.model import Model
from formwright.objectives.distillation import Distillation
from formwright.training.hooks import Hook
from formwright.training.lesson import Lesson, common
from formwright.training.loop import Trained, train
from formwright.training.parameters import addresses


def heal(
    model: Any,
    teacher: Any,
    texts: Sequence[str],
    *,
    steps: int | None = None,
    minutes: float | None = None,
    lr: float = 3e-4,
    batch: int = 16,
    max_length: int = 128,
    seed: int = 0,
    cosine: float = 1.0,
    mse: float = 0.0,
    states: float = 1.0,
    hidden: Sequence[str] = (),
    temperature: float = 1.0,
    whole: bool = False,
    embeddings: bool = False,
    trainable: Sequence[str] | None = None,
    head: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    show: bool | None = None,
    **settings: Any,
) -> Trained:
    """Train ``model`` in place to answer like ``teacher`` on ``texts``; writes a "healed" event into its history.

    Args:
        texts: unlabelled, read by the model's tokenizer and cut to ``max_length`` tokens; empty ones are left out.
        steps, minutes: at least one; lr, batch (texts a step), seed and other fields of a
            :class:`~formwright.training.recipe.Recipe` as in :func:`~formwright.training.loop.train`.
        cosine, mse, states: for models that give vectors, weights of 1 - cosine and of the squared distance of the
            vectors, and of the relative squared error of the last states of every token, which teaches more per text.
        hidden: item ids after which the streams are compared too; the teacher then reads every batch again.
        temperature: for models that give logits.
        whole: also run and train the items before the first that differs from the teacher's: slower steps, and more
            that can adapt. embeddings: train the stem as well, and therefore the whole. trainable: patterns instead
            (see :mod:`formwright.training.parameters`).
        head: the head to match where there are several.
        out, resume, hooks, show: as in ``train``.

    Raises:
        DataError: no tokenizer, no texts, or two models that cannot be compared. Refusal: a system of several towers.
    """
    for name, one in (("model", model), ("teacher", teacher)):
        if not isinstance(one, Model):
            raise Refusal(
                f"heal compares two models of one tower; the {name} is a {type(one).__name__}: train it with "
                "objective='distillation' and padded batches"
            )
    if model is teacher:
        raise SpecError("model and teacher are one object; heal a copy: fw.copy(model) before it is cut")
    weights: dict[str, Any] = {"cosine": cosine, "mse": mse, "states": states, "temperature": temperature}
    objective = Distillation(**weights, hidden=tuple(hidden), head=head)
    objective.bind({"model": model, "teacher": teacher})
    name, found = objective.head_of(teacher)
    limit = min([n for n in (max_length, model.limit, teacher.limit) if n is not None])
    tokenizer = model.tokenizer or teacher.tokenizer
    if tokenizer is None:
        raise DataError("heal reads texts, and neither the model nor the teacher carries a tokenizer")
    rows = [row for row in tokenizer.encode(list(texts), max_length=limit) if row]
    with _evaluating(model, teacher):
        begin = None
        if not (whole or embeddings or hidden or trainable is not None) and rows:
            begin = common(model, teacher, rows)
            objective = Distillation(**weights, begin=begin, head=head)
        wanted = bool(states) and found.kind == "vectors"
        source = Lesson(model, teacher, rows, batch, seed, head=name, states=wanted, begin=begin)
        given: Mapping[str, Any] = {"schedule": "linear", "weight_decay": 0.0, "dropout": False, **settings}
        return train(
            model,
            source,
            objective=objective,
            others={"teacher": teacher},
            steps=steps,
            minutes=minutes,
            lr=lr,
            seed=seed,
            trainable=_default(model, begin, embeddings) if trainable is None else tuple(trainable),
            out=out,
            resume=resume,
            hooks=hooks,
            show=show,
            event="healed",
            **given,
        )


@contextmanager
def _evaluating(*models: Model) -> Iterator[None]:
    """Within, the models run without dropout; afterwards each is in the mode that it was in."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes):
            model.train(mode)


def _default(model: Model, begin: str | None, embeddings: bool) -> tuple[str, ...]:
    """Everything but the stem and the items that are not run."""
    if embeddings:
        return ("*",)
    fixed = []
    if begin is not None:
        for item in model.items():
            if item.id == begin:
                break
            fixed.append(item.id)
    known = {address.partition(":")[0] for address in addresses(model).values()}
    return ("*", *(f"!{owner}:*" for owner in ("stem", *fixed) if owner in known))
