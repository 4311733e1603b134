"""The context: everything a part may know besides its input, frozen, handed down the list of layers.

A new context comes only from :meth:`Context.replace`. Two members are mutable by reference, ``state`` (what a stream
remembers) and ``notes`` (what was asked to be recorded), and both are silent while a span is being recomputed.
Noise is keyed by (seed, path), so a second run draws the same and the caller's own generator is untouched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops.attention import Ahead

if TYPE_CHECKING:
    from collections.abc import Callable

EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Visible:
    """Who may see whom, as a rule; never a length x length tensor.

    causal: a token sees itself and earlier ones. window: at most ``window`` positions back (itself included), and as
    far ahead unless causal. prefix: (B,) or int, the first tokens are seen by all whatever ``causal`` says.
    segments: (B, L) ids; only equal ids see each other. context: the first ``context`` tokens are seen by all, later
    tokens otherwise see only themselves. Rules add up with ``&``.
    """

    causal: bool = False
    window: int | None = None
    prefix: int | Tensor | None = None
    segments: Tensor | None = None
    context: int | None = None

    def __and__(self, other: Visible) -> Visible:
        if other is EVERYONE:
            return self
        windows = [w for w in (self.window, other.window) if w is not None]
        return Visible(
            causal=self.causal or other.causal,
            window=min(windows) if windows else None,
            prefix=self.prefix if other.prefix is None else other.prefix,
            segments=self.segments if other.segments is None else other.segments,
            context=self.context if other.context is None else other.context,
        )

    @property
    def simple(self) -> bool:
        """Nothing but, perhaps, ``causal``."""
        return self.window is None and self.prefix is None and self.segments is None and self.context is None

    def mask(
        self, queries: Tensor, keys: Tensor, q_segments: Tensor | None = None, k_segments: Tensor | None = None
    ) -> Tensor:
        """(B, Lq, Lk) bool for absolute positions (B, Lq) and (B, Lk); a key at a negative position is never seen."""
        q, k = queries[:, :, None], keys[:, None, :]
        seen = torch.ones_like(q + k, dtype=torch.bool)
        if self.causal:
            seen = k <= q
        if self.window is not None:
            seen = seen & (k > q - self.window) & (k < q + self.window)
        if self.context is not None:
            seen = seen & ((k < self.context) | (k == q))
        if self.prefix is not None:
            prefix = self.prefix[:, None, None] if isinstance(self.prefix, Tensor) else self.prefix
            seen = seen | (k < prefix)
        if q_segments is not None and k_segments is not None:
            seen = seen & (q_segments[:, :, None] == k_segments[:, None, :])
        return seen & (k >= 0)


EVERYONE = Visible()


@dataclass(frozen=True, eq=False)
class Memory:
    """What another tower offers to cross-attend: ``x`` (B, S, W) with ``lengths`` (B,) valid rows of it."""

    x: Tensor
    lengths: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Led:
    """Prompts put before the rows (documents, when packed) of a call: how many tokens each got, ``counts`` (B,), and
    the context's fields as they were before."""

    counts: Tensor
    fields: Mapping[str, Any]


@dataclass
class Notes:
    """What to record and what was: ``want`` holds (path, name) pairs, ``got`` their tensors, ``losses`` more losses."""

    want: set[tuple[str, str]] = field(default_factory=set)
    got: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)


class StateLike(Protocol):
    """What the context needs of a stream's state; the engine's ``State`` is one."""

    seen: Tensor
    even: bool

    @property
    def fresh(self) -> bool: ...
    def fork(self) -> StateLike: ...
    def get(self, key: str) -> Tensor | None: ...
    def put(self, key: str, value: Tensor) -> None: ...
    def append(
        self, key: str, tokens: Tensor, lengths: Tensor | None, window: int | None, every: int = 1
    ) -> tuple[Tensor, Tensor]: ...
    def leaves(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Context:
    """See the module. Shapes: B rows, L tokens of this call, S documents, W width.

    lengths (B,): valid tokens of each row in this call, 0 allowed; None means all. offsets (S+1,): packed layout,
    where x is (1, T, W). positions (B, L): absolute, set by the stem. origin (B, L): index in the stem's output, so
    that outputs of pruned tokens can be put back. grid: shape of a picture or volume whose tokens follow ``prefix``
    special ones; coords (B, L, n): real coordinates. adapters (B,): the adapter of each row, -1 for none. start: what a
    part has learned to stand before the first token, as path.name -> (B or 1, ...): a state, or keys and values. led:
    the prompts put before the rows of this call. knobs: run-time choices declared by parts. progress: 0 to 1 through
    training.
    """

    lengths: Tensor | None = None
    offsets: Tensor | None = None
    positions: Tensor | None = None
    origin: Tensor | None = None
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    coords: Tensor | None = None
    visible: Visible = EVERYONE
    marks: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)
    memory: Mapping[str, Memory] = field(default_factory=lambda: EMPTY)
    condition: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)
    streams: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)
    adapters: Tensor | None = None
    start: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)
    led: Led | None = None
    knobs: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    state: StateLike | None = None
    notes: Notes | None = None
    progress: float = 1.0
    seed: int | None = None
    recompute: bool = False
    path: str = ""
    #: Number of documents' longest length in the packed layout, known to the stem; saves a device read per layer.
    borders: tuple[int, ...] | None = None

    def replace(self, **changes: Any) -> Context:
        return replace(self, **changes)

    def at(self, name: str) -> Context:
        """The same context one level further in: state, notes and noise are keyed by the path."""
        inner = object.__new__(Context)  # once a sublayer and call, where ``replace`` takes seven times as long
        inner.__dict__.update(self.__dict__, path=f"{self.path}.{name}" if self.path else name)
        return inner

    def valid(self, x: Tensor) -> Tensor:
        """(B, L) bool: which tokens of ``x`` are real."""
        if self.offsets is not None or self.lengths is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return torch.arange(x.shape[1], device=x.device)[None] < self.lengths[:, None]

    def clear(self, x: Tensor) -> Tensor:
        """``x`` (B, L, ...) with zeros in the padding, so that nothing a mixer sums can come from there."""
        if self.offsets is not None or self.lengths is None:
            return x
        return x.masked_fill(~self.valid(x).reshape(*x.shape[:2], *[1] * (x.dim() - 2)), 0.0)

    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of every document of the packed layout; none in another."""
        if self.offsets is None:
            return []
        return list(pairwise(self.borders if self.borders is not None else self.offsets.tolist()))

    @property
    def single(self) -> bool:
        """Whether the packed layout holds a single document, as is known without reading the device."""
        return self.offsets is not None and self.borders is not None and len(self.borders) == 2

    def place(self, x: Tensor) -> Tensor:
        """Absolute positions (B, L) of the tokens of ``x``: the stem's, or counted from what the state has seen."""
        if self.positions is not None:
            return self.positions
        steps = torch.arange(x.shape[1], device=x.device)[None]
        if self.single:
            return steps
        if self.offsets is not None:
            starts = torch.repeat_interleave(self.offsets[:-1], self.offsets.diff())
            return steps - starts[None]
        if self.state is not None:
            return self.state.seen[:, None] + steps
        return steps.expand(x.shape[0], -1)

    def slot(self, name: str, empty: Tensor | Callable[[], Tensor]) -> Tensor:
        """This part's own remembered tensor, or ``empty`` where there is none."""
        found = self.remembered(name)
        if found is not None:
            return found
        return empty if isinstance(empty, Tensor) else empty()

    def remembered(self, name: str) -> Tensor | None:
        """What the stream keeps under this part's ``name``; before its first token what the part learned to begin with,
        or None."""
        key = f"{self.path}.{name}"
        found = None if self.state is None else self.state.get(key)
        return self.start.get(key) if found is None and self.start else found

    @property
    def begins(self) -> bool:
        """Whether anything but nothing may stand before this call's first token, so that a part must ask its slots."""
        return self.state is not None or bool(self.start)

    def ahead(self) -> Ahead | None:
        """Learned keys and values that stand before this part's own, where there are any."""
        k = self.start.get(f"{self.path}.k") if self.start else None
        if k is None:
            return None
        return Ahead(k, self.start[f"{self.path}.v"], self.start.get(f"{self.path}.seen"))

    def keep(self, name: str, value: Tensor) -> None:
        """Remember ``value`` under this part's name. Values are replaced, never written in place."""
        if self.state is not None and not self.recompute:
            self.state.put(f"{self.path}.{name}", value)

    def append(self, name: str, tokens: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Add this call's tokens (B, L, ...) to a growing slot -> all so far (B, S, ...), positions (B, S).

        A negative position marks a place that holds no token. With ``window`` only the last that many are kept for
        later calls. Without a state the tokens themselves come back.
        """
        if self.state is None:
            places = self.place(tokens)
            return tokens, torch.where(self.valid(tokens), places, -1)
        if self.recompute:
            raise SpecError(f"{self.path}: a span that streams cannot be recomputed; run it without recompute")
        return self.state.append(f"{self.path}.{name}", tokens, self.lengths, window)

    def append_runs(self, name: str, runs: Tensor, counts: Tensor, every: int) -> None:
        """Add (B, R, ...), one entry for each run of ``every`` tokens that this call finishes, to a growing slot.

        counts (B,): how many of each row's entries are real; the others stand behind them. Silent without a state.
        """
        if self.state is not None and not self.recompute:
            self.state.append(f"{self.path}.{name}", runs, counts, None, every)

    def note(self, name: str, value: Tensor | Callable[[], Tensor]) -> None:
        """Record ``value`` if it was asked for under (path, name); a callable is only run then."""
        if self.notes is not None and not self.recompute and (self.path, name) in self.notes.want:
            self.notes.got[(self.path, name)] = value if isinstance(value, Tensor) else value()

    def wants(self, name: str) -> bool:
        return self.notes is not None and not self.recompute and (self.path, name) in self.notes.want

    def loss(self, value: Tensor) -> None:
        """Add an auxiliary loss (a scalar) to the notes; silent when nobody listens or while recomputing."""
        if self.notes is not None and not self.recompute:
            self.notes.losses.append(value)

    def generator(self, name: str = "") -> torch.Generator:
        """A CPU generator keyed by (seed, path, name)."""
        if self.seed is None:
            raise SpecError(f"{self.path or 'the model'} draws noise, so this call needs a seed: pass seed=0")
        return keyed_generator(self.seed, f"{self.path}.{name}")

    def noise(self, shape: tuple[int, ...], like: Tensor, kind: str = "normal", name: str = "") -> Tensor:
        """``normal`` or ``uniform`` noise of ``shape`` with the dtype and device of ``like``, keyed by (seed, path)."""
        draw = torch.randn if kind == "normal" else torch.rand
        return draw(shape, generator=self.generator(name)).to(dtype=like.dtype, device=like.device)

    def leaves(self) -> list[Tensor | None]:
        """Tensors that may carry gradient. Any span that recomputes must take them as arguments: a gradient that
        travels only inside the context would be lost silently."""
        found: list[Tensor | None] = [memory.x for memory in self.memory.values()]
        found += list(self.condition.values())
        found += list(self.streams.values())
        found += list(self.start.values())
        if self.state is not None:
            found += list(self.state.leaves().values())
        return found

    def with_leaves(self, tensors: list[Tensor | None]) -> Context:
        """This context with :meth:`leaves` exchanged for ``tensors``, in the same order.

        A recomputing context gets a fork of the state, since the stream itself must not move twice.
        """
        rest = iter(tensors)
        memory = {name: replace(kept, x=next(rest)) for name, kept in self.memory.items()}  # type: ignore[arg-type]
        condition = {name: next(rest) for name in self.condition}
        streams = {name: next(rest) for name in self.streams}
        start = {name: next(rest) for name in self.start}
        state = self.state.fork() if self.state is not None and self.recompute else self.state
        if state is not None:
            for name in list(state.leaves()):
                value = next(rest)
                if value is not None:
                    state.put(name, value)
        return replace(
            self,
            memory=memory,
            condition=condition,  # type: ignore[arg-type]
            streams=streams,  # type: ignore[arg-type]
            start=start,  # type: ignore[arg-type]
            state=state,
        )


def keyed_generator(seed: int, key: str) -> torch.Generator:
    """A CPU generator whose stream depends on nothing but ``seed`` and ``key``."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & 0x7FFF_FFFF_FFFF_FFFF)
