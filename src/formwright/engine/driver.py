"""The driver: asks every request's generator for calls, runs calls of one model and kind together, tells the results.

Calls that meet are padded to one width and their states joined by rows; a call that comes alone runs as it is. Cost
beside the models': a copy of the states that are joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from formwright.engine.protocols import Call, Event, Generator, Result
from formwright.engine.state import State
from formwright.kit.errors import SpecError, unknown
from formwright.models.batch import Batch
from formwright.models.system import System
from formwright.parts.context import Memory

#: Where a system's state keeps what its decoder reads, so that it is forked, taken and joined with the rest.
MEMORY = "memory"


def drive(models: Mapping[str, Any], works: Sequence[tuple[Generator, Any]]) -> Iterator[tuple[int, Event]]:
    """(index of the request, event) until every request is finished."""
    while True:
        asked = [(index, call) for index, (generator, work) in enumerate(works) for call in generator.ask(work)]
        if not asked:
            return
        told: dict[int, list[Result]] = {index: [] for index, _ in asked}
        results = run_calls(models, [call for _, call in asked])
        for (index, _), result in zip(asked, results):
            told[index].append(result)
        for index, own in told.items():
            generator, work = works[index]
            for event in generator.tell(work, own):
                yield index, event


def run_calls(models: Mapping[str, Any], calls: Sequence[Call]) -> list[Result]:
    """The results of calls, in their order; those that may run together do."""
    groups: dict[tuple, list[int]] = {}
    for index, call in enumerate(calls):
        if call.model not in models:
            raise SpecError(unknown("model of a call", call.model, models))
        fresh = all(state.fresh for state in call.states)
        fields = tuple(sorted(call.inputs.inputs))
        groups.setdefault((call.model, call.kind, call.grad, fresh, fields), []).append(index)
    found: list[Result | None] = [None] * len(calls)
    for (name, kind, grad, _, _), members in groups.items():
        with torch.enable_grad() if grad else torch.inference_mode():
            run = _extend if kind == "extend" else _whole
            for index, result in zip(members, run(models[name], [calls[i] for i in members])):
                found[index] = result
    return [result for result in found if result is not None]


def _extend(model: Any, calls: Sequence[Call]) -> list[Result]:
    # A fork costs nothing and leaves the caller's state as it was.
    states = [call.states[0].fork() for call in calls]
    for state in states:
        state.seen = state.seen.to(model.device)
    batch = _beside([call.inputs for call in calls]).to(model.device)
    joined = states[0]
    for state in states[1:]:
        joined = joined.join(state)
    logits = step(model, batch, joined)
    if len(calls) == 1:
        return [Result(logits, (joined,))]
    sizes = [len(state.seen) for state in states]
    found, first = [], 0
    for size in sizes:
        rows = torch.arange(first, first + size, device=model.device)
        found.append(Result(logits[first : first + size], (joined.take(rows),)))
        first += size
    return found


def _whole(model: Any, calls: Sequence[Call]) -> list[Result]:
    batch = _beside([call.inputs for call in calls]).to(model.device)
    logits = model(batch)
    sizes = [next(iter(call.inputs.inputs.values())).shape[:2] for call in calls]
    found, first = [], 0
    for rows, length in sizes:
        found.append(Result(logits[first : first + rows, :length]))
        first += rows
    return found


def _beside(batches: Sequence[Batch]) -> Batch:
    """Batches of tokens one under another, padded to one width."""
    if len(batches) == 1:
        return batches[0]
    inputs: dict[str, Tensor] = {}
    lengths: dict[str, Tensor] = {}
    for name in batches[0].inputs:
        rows = [batch.inputs[name] for batch in batches]
        width = max(t.shape[1] for t in rows)
        sizes = [
            batch.lengths.get(name, torch.full((len(t),), t.shape[1], dtype=torch.long))
            for batch, t in zip(batches, rows)
        ]
        padded = [torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in rows]
        inputs[name], lengths[name] = torch.cat(padded), torch.cat(sizes)
        if bool((lengths[name] == width).all()):
            del lengths[name]
    return Batch(inputs=inputs, lengths=lengths)


def step(model: Any, batch: Batch, state: State) -> Tensor:
    """Move ``state`` on by a batch of tokens; logits (B, V) of each row's last token. Only those are made, so a long
    prompt costs one row of the vocabulary. A system runs its encoder in the first call and keeps what it said."""
    owner, memory = model, {}
    if isinstance(model, System):
        name = model.spec.output
        owner, memory = model.tower(name), _kept(state) or model.remember(batch, name)
        batch = Batch(
            inputs={"tokens": batch.inputs["tokens"]},
            lengths={key: value for key, value in batch.lengths.items() if key == "tokens"},
        )
    tokens, lengths = batch.inputs["tokens"], batch.lengths.get("tokens")
    x, entered = owner.embed(batch, state=state, memory=memory)
    fed = x.shape[1]  # more than the tokens where a prompt goes before them
    x, ctx = owner.run(x, entered)
    state.advance(entered.lengths, fed)
    _keep(memory, state)
    last = (tokens.shape[1] - 1) if lengths is None else (lengths - 1).clamp(min=0)
    x = x[:, last] if isinstance(last, int) else x[torch.arange(len(x), device=x.device), last]
    flat = ctx.replace(lengths=None, positions=None, state=None)
    return owner.read(x[:, None], flat, language_head(owner))[:, 0]


def language_head(model: Any) -> str | None:
    """Name of the head that gives logits over the vocabulary, or None."""
    for name, head in model.heads.items():
        if getattr(type(head), "registered", None) == ("head", "lm"):
            return name
    return None


def _keep(memory: Mapping[str, Memory], state: State) -> None:
    for name, kept in memory.items():
        full = torch.full((len(kept.x),), kept.x.shape[1], dtype=torch.long, device=kept.x.device)
        state.put(f"{MEMORY}.{name}.x", kept.x)
        state.put(f"{MEMORY}.{name}.lengths", full if kept.lengths is None else kept.lengths)


def _kept(state: State) -> dict[str, Memory]:
    prefix = f"{MEMORY}."
    names = [key[len(prefix) : -2] for key in state.values if key.startswith(prefix) and key.endswith(".x")]
    return {n: Memory(state.values[f"{prefix}{n}.x"], state.values[f"{prefix}{n}.lengths"]) for n in names}
