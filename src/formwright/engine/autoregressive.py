"""Autoregressive generation: a token at a time, each row at its own pace.

A request of B rows keeps one state of B rows. A row that has ended takes 0 tokens in later calls, so the others go on
undisturbed and nothing is copied. Cost: one pass over the prompts, then one token a row and call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from formwright.engine.protocols import Call, Event, Request, Result
from formwright.engine.sampling import choose, row_generators
from formwright.engine.state import State
from formwright.models.batch import Batch, pad


@dataclass(eq=False)
class Work:
    """A request on its way: ``fresh`` are the tokens that each row brings to the next call."""

    request: Request
    generators: list[torch.Generator]
    rows: list[list[int]]
    fresh: list[list[int]]
    new: list[int]
    done: list[bool]
    state: State | None = None
    own: list[dict[str, Any]] = field(default_factory=list)


class Autoregressive:
    """The :class:`~formwright.engine.protocols.Generator` of every causal model that streams."""

    def start(self, request: Request, gen: int) -> Work:
        rows = [list(row) for row in request.rows]
        idle = request.max_new <= 0
        return Work(
            request,
            row_generators(request.rows, gen),
            rows,
            [list(row) for row in rows],
            [0] * len(rows),
            [idle] * len(rows),
            own=[{} for _ in request.controllers],
        )

    def ask(self, work: Work) -> list[Call]:
        if all(work.done):
            return []
        tokens, lengths = pad(work.fresh)
        ragged = bool((lengths != tokens.shape[1]).any())
        batch = Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths} if ragged else {})
        if work.state is None and work.request.inputs is not None:
            extra = work.request.inputs
            batch = batch.replace(inputs={**batch.inputs, **extra.inputs}, lengths={**batch.lengths, **extra.lengths})
        state = State(len(work.rows)) if work.state is None else work.state
        return [Call(work.request.model, "extend", batch, (state,))]

    def tell(self, work: Work, results: list[Result]) -> list[Event]:
        (result,) = results
        work.state = result.states[0]
        request, logits = work.request, result.logits
        for own, controller in zip(work.own, request.controllers):
            logits = controller.logits(own, work.rows, logits, request.aux)
        events = []
        for row, done in enumerate(work.done):
            work.fresh[row] = []
            if done:
                continue
            token = choose(logits[row], work.generators[row], request.temperature, request.top_k, request.top_p)
            work.rows[row].append(token)
            work.fresh[row] = [token]
            work.new[row] += 1
            events.append(Event("token", row, token))
            reason = self._reason(work, row, token)
            if reason:
                self.end(work, row)
                events.append(Event("done", row, reason=reason))
        return events

    @staticmethod
    def _reason(work: Work, row: int, token: int) -> str:
        request = work.request
        if token in request.ends:
            return "end"
        if work.new[row] >= request.max_new:
            return "length"
        if request.limit is not None and len(work.rows[row]) > request.limit:
            return "positions"
        return ""

    @staticmethod
    def end(work: Work, row: int) -> None:
        """Let a row take no more tokens; for whoever watches the text for a stop."""
        work.done[row], work.fresh[row] = True, []
