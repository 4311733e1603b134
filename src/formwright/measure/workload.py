"""Workloads: what a latency is the latency of, said in one word.

``encode:32xnatural``: texts of the task at their natural lengths, sorted, 32 a batch. ``encode:32x128``: 32 rows of 128
tokens. ``prefill:1x1024``: one prompt. ``decode:1x512``: one further token for 1 row after 512, averaged over a few.
"""

from __future__ import annotations

import random
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from formwright.kit.errors import Refusal, SpecError
from formwright.models.batch import Batch
from formwright.models.text import packed
from formwright.parts.base import Shape

PATTERN = re.compile(r"(encode|prefill|decode):(\d+)x(\d+|natural)")
#: Texts of a natural workload: enough that no single length decides, few enough to time often.
NATURAL = 128
#: Further tokens that a decode workload averages over.
STEPS = 8


@dataclass(frozen=True)
class Workload:
    """``run(model)`` does the work once on ``items`` items; ``shape`` is what closed-form costs are asked for."""

    name: str
    run: Callable[[Any], object]
    items: int
    shape: Shape
    unit: str


def default_shape(model: Any) -> str:
    """Encoders: texts at their natural lengths; causal models with a language-model head: one token after 512."""
    head = next(iter(model.heads.values())) if hasattr(model, "heads") else None
    decoder = head is not None and head.kind == "tokens" and model.causal
    if decoder:
        past = 512 if model.limit is None else min(512, model.limit - STEPS - 1)
        return f"decode:1x{past}"
    return "encode:32xnatural"


def workload(model: Any, shape: str | None = None, *, task: Any = None, seed: int = 0) -> Workload:
    """The workload named ``shape`` for this model; natural lengths come from the task's texts."""
    shape = default_shape(model) if shape is None else shape
    found = PATTERN.fullmatch(shape)
    if not found:
        raise SpecError(
            f"shape {shape!r} is none of encode:ROWSxLENGTH, encode:ROWSxnatural, prefill:ROWSxLENGTH, "
            "decode:ROWSxLENGTH"
        )
    kind, rows, length = found[1], int(found[2]), found[3]
    if rows < 1:
        raise SpecError(f"shape {shape!r}: a batch has at least one row")
    if length == "natural":
        if kind != "encode":
            raise SpecError(f"shape {shape!r}: natural lengths go with encode")
        return _natural(model, shape, rows, task, seed)
    if int(length) < 1:
        raise SpecError(f"shape {shape!r}: a row has at least one token")
    if model.limit is not None and int(length) > model.limit:
        raise SpecError(f"shape {shape!r}: this model reads at most {model.limit} tokens")
    inputs = model.stem.sample(rows, int(length), torch.Generator().manual_seed(seed))
    batch = Batch(inputs=inputs)
    full = Shape.full(rows, int(length))
    if kind == "decode":
        return _decode(model, shape, batch, rows, int(length))

    def run(model: Any) -> object:
        with torch.inference_mode():
            return model(batch)

    return Workload(shape, run, rows, full, "text" if kind == "encode" else "prompt")


def _natural(model: Any, shape: str, rows: int, task: Any, seed: int) -> Workload:
    if model.tokenizer is None:
        raise Refusal(f"shape {shape!r} needs texts and a tokenizer; give encode:{rows}x128 instead")
    if task is None:
        from formwright.tasks import task as make_task

        task = make_task("retrieval/stdlib")
    texts = task.texts("calibrate")
    if not texts:
        raise Refusal(f"shape {shape!r}: the task has no texts to time; give encode:{rows}x128 instead")
    chosen = random.Random(seed).sample(texts, min(NATURAL, len(texts)))
    ids = sorted(model.tokenizer.encode(chosen, max_length=model.limit), key=len)
    batches = [packed(model, ids[first : first + rows]) for first in range(0, len(ids), rows)]
    pooled = any(head.kind == "vectors" for head in model.heads.values())

    def run(model: Any) -> object:
        if pooled:
            return [model.vectors(batch) for batch in batches]
        with torch.inference_mode():
            return [model(batch) for batch in batches]

    return Workload(shape, run, len(ids), Shape(tuple(len(row) for row in ids)), "text")


def _decode(model: Any, shape: str, batch: Batch, rows: int, past: int) -> Workload:
    from formwright.engine.state import State

    if not model.streams:
        raise Refusal(f"shape {shape!r} needs a model that streams; this one does not")
    tokens = batch.inputs["tokens"]
    states: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()

    def run(model: Any) -> object:
        # Each contender has its own state, since a dropped layer remembers nothing.
        with torch.inference_mode():
            own = states.get(model)
            if own is None:
                own = states[model] = State(rows, model.device)
                model(batch, state=own)
            stream = own.fork()
            for _ in range(STEPS):
                out = model(tokens[:, -1:], state=stream)
        return out

    return Workload(shape, run, rows * STEPS, Shape.full(rows, 1, past), "token")
