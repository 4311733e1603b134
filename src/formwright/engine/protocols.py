"""How generation is divided: a generator asks for calls, the driver runs them, a controller bends one request.

A *generator* (autoregressive, beam, speculative, canvas, diffusion ...) never runs a model. It says which calls it
needs next; the driver batches calls of one model and kind over all requests, runs them, and tells each generator its
results. So any mixture of generators and requests shares one loop, and a new kind of generation is one file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from formwright.engine.state import State
from formwright.models.batch import EMPTY, Batch


@dataclass(frozen=True, eq=False)
class Call:
    """One run of a model. ``extend`` moves ``states`` on by the batch's tokens and gives the logits of each row's last
    one; ``whole`` gives the logits of every token and has no state. ``grad``: keep the graph."""

    model: str
    kind: Literal["extend", "whole"]
    inputs: Batch
    states: tuple[State, ...] = ()
    grad: bool = False


@dataclass(frozen=True, eq=False)
class Result:
    """What a call gave: logits (B, V) and the state after it, or logits (B, L, V). A row that brought no token has
    logits without meaning. The call's own state stays as it was, so a draft can be thrown away."""

    logits: Tensor
    states: tuple[State, ...] = ()


@dataclass(frozen=True)
class Event:
    """``token``: row ``row`` goes on by id ``token``. ``done``: it ended, ``reason`` is end, stop, length or positions.
    ``preview``: what a non-autoregressive generator has so far, in ``ids``."""

    kind: Literal["token", "preview", "done"]
    row: int
    token: int = -1
    reason: str = ""
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked: ``rows`` of prompt ids, how many new tokens at most, how to choose, and when to stop.

    inputs: fields of an encoder, for a system whose decoder then starts from ``rows``. ends: ids that end a row.
    stops: sequences of ids that end a row and are cut off. limit: positions that the model has, or None.
    """

    rows: Sequence[Sequence[int]]
    max_new: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    ends: frozenset[int] = frozenset()
    limit: int | None = None
    inputs: Batch | None = None
    model: str = "model"
    controllers: Sequence[Controller] = ()
    aux: Mapping[str, Any] = field(default_factory=lambda: EMPTY)


class Generator(Protocol):
    """See the module. ``gen`` is the seed of the request: all randomness is keyed by it."""

    def start(self, request: Request, gen: int) -> Any:
        """The request's work: whatever this generator remembers of it."""

    def ask(self, work: Any) -> list[Call]:
        """The calls that must be run next; none when the request is finished."""

    def tell(self, work: Any, results: list[Result]) -> list[Event]:
        """Take the results, in the order of the calls, and say what happened."""


class Controller(Protocol):
    """Steers one request; several add up in list order. ``needs``: auxiliary models, billed to the request."""

    level: Literal["logits", "state"]
    needs: tuple[str, ...]

    def logits(self, own: Any, ids: Sequence[Sequence[int]], logits: Tensor, aux: Mapping[str, Any]) -> Tensor:
        """Logits (B, V) changed; ``ids`` are the rows so far, ``own`` a dict that is this request's alone."""

    def state(self, own: Any, state: State, probe: Any) -> State:
        """The state to go on from."""
