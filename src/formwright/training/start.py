"""Where training starts: a fresh model of a recipe with its own tokenizer, or a loaded one with a fitting head."""

from __future__ import annotations

from typing import Any

from formwright import registry
from formwright.kit.errors import DataError
from formwright.models.build import build
from formwright.surgery import apply
from formwright.training.tokenizer import train_tokenizer


def fresh(recipe: str, task: Any, *, vocab: int = 4096, seed: int = 0) -> Any:
    """The recipe's model, drawn from ``seed``, with a byte-level BPE trained on the task's calibrate texts."""
    make = registry.resolve("recipe", recipe)
    texts = task.texts("calibrate")
    if not texts:
        raise DataError(f"task {task.name} has no texts to train a tokenizer on")
    tokenizer = train_tokenizer(texts, vocab, mask=getattr(task, "masked", False))
    model = build(make(vocab=tokenizer.size), seed=seed)
    model.tokenizer, model.name = tokenizer, recipe
    return model


def with_head(model: Any, task: Any, seed: int = 0) -> Any:
    """``model`` with a fresh classifier for the task's labels where the task classifies and the model does not: of
    rows, or of tokens where the task says so by ``head_kind``."""
    labels, kind = getattr(task, "labels", None), getattr(task, "head_kind", "sequence-classifier")
    if not labels or any(_classifies(head, kind) for head in model.heads.values()):
        return model
    return apply(model, "head", kind=kind, labels=list(labels), seed=seed)


def _classifies(head: Any, kind: str) -> bool:
    """Whether a head does what ``kind`` would; a language model's speaks of tokens too, but has no labels."""
    if kind == "sequence-classifier":
        return head.kind == "sequence"
    return head.kind == "tokens" and bool(getattr(head, "labels", None))
