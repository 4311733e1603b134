"""Parts: what stands in the list of layers, and what each promises.

A part maps ``x`` (B, L, W), padded with ``ctx.lengths`` or packed as (1, T, W) with ``ctx.offsets``, to a tensor of
the same shape: what a residual adds. It declares its traits, which are tested for every registered part, and holds
its projections as slots named by role, which surgeries address. Constructors create empty parameters only (so that a
model can be laid out without memory) and compute no buffers; ``reset`` fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from formwright.ops.attention.native import Heads
from formwright.ops.embedding import Source
from formwright.parts.context import EMPTY, Context, keyed_generator


@dataclass(frozen=True)
class Traits:
    """What a part promises; the conformance suite tests each and the catalogue prints them.

    causal: no output depends on a later input. streams: any split into calls with a state equals one pass.
    lookahead: how many later tokens an output waits for. gradient: ``exact`` (double-precision check), ``piecewise``,
    ``surrogate`` or ``none``. statistics: keeps running statistics while training. selects: may drop tokens. packed:
    takes the packed layout itself (others are unpacked around). length: "any", or the longest length it can take.
    growth: how multiply-accumulates grow with the length, from a few blocks of the method on.
    """

    causal: bool = False
    streams: bool = False
    lookahead: int = 0
    gradient: Literal["exact", "piecewise", "surrogate", "none"] = "exact"
    statistics: bool = False
    selects: bool = False
    packed: bool = True
    length: int | Literal["any"] = "any"
    growth: Literal["linear", "n log n", "n sqrt n", "quadratic"] = "linear"


@dataclass(frozen=True)
class Slot:
    """One remembered tensor of a stream: its shape per row and its dtype (None: the model's).

    The shape is per token of the stream for ``window`` and ``grow``, and per token of the memory read for ``memory``,
    whose values are made by the first call and stay. With ``every`` above 1 a ``grow`` slot holds one entry for each
    finished run of that many tokens.
    """

    kind: Literal["fixed", "window", "grow", "memory"]
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    window: int | None = None
    every: int = 1


@dataclass(frozen=True)
class Shape:
    """The shape of a call for costs: ``lengths`` of its rows, ``past`` tokens already seen by each, memory length."""

    lengths: tuple[int, ...]
    past: int = 0
    memory: int = 0

    @classmethod
    def full(cls, batch: int, length: int, past: int = 0, memory: int = 0) -> Shape:
        return cls((length,) * batch, past, memory)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Cost:
    """Closed-form cost: parameters, multiply-accumulates of one call, and bytes of state after it."""

    parameters: int = 0
    macs: int = 0
    state_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs, self.state_bytes + other.state_bytes)


def cost_sum(costs: Iterator[Cost] | list[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        total = total + cost
    return total


class Tail(NamedTuple):
    """The rest of a residual sublayer, ``norm(x + y)`` or ``x + y``, for a part that can finish it in one pass."""

    x: Tensor
    norm: nn.Module | None = None

    def after(self, y: Tensor) -> Tensor:
        """The stream after the sublayer, step by step."""
        return self.x + y if self.norm is None else self.norm(self.x + y)


class Step(Protocol):
    """A whole residual sublayer that runs at once, alone or with those that follow it (see :meth:`Part.step`)."""

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether steps of this kind run on this tensor now."""
        ...

    @staticmethod
    def run(steps: Any, x: Tensor, spans: list[tuple[int, int]]) -> Tensor:
        """x through ``steps`` one after another."""
        ...


class LinearLike(nn.Module):
    """What a slot holds: a map of the last axis, (..., in_features) -> (..., out_features), named by its role.

    Dense, int8, low-rank, adapted ones and all later kinds are these. Surgeries address slots and never a concrete
    class; wrappers keep what they wrap as ``base``.
    """

    in_features: int
    out_features: int
    role: str
    #: Whether what a token becomes depends on that token alone, and not on others of the same call.
    by_token: bool = True

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The equivalent (out, in) weight, or a Refusal with the reason."""
        raise NotImplementedError

    def dense_bias(self) -> Tensor | None:
        """The equivalent (out,) bias, or None."""
        return None

    def take(self, out: Tensor | None = None, inn: Tensor | None = None) -> LinearLike:
        """A new module with the chosen output rows and input columns; indices may repeat. Runs on meta."""
        raise NotImplementedError

    def scale_in(self, s: float) -> None:
        """Multiply the input side by ``s`` in place."""
        raise NotImplementedError

    def cost(self, shape: Shape) -> Cost:
        raise NotImplementedError

    @classmethod
    def project(cls, slots: list[LinearLike], x: Tensor, ctx: Context | None) -> list[Tensor]:
        """Several slots of this class applied to one input; kinds that prepare their input do it once here."""
        return [slot(x, ctx) for slot in slots]

    def finishes(self, tail: Tail) -> bool:
        """Whether :meth:`joined` takes this tail now; no, unless a kind has such a form."""
        return False

    def joined(self, x: Tensor, tail: Tail) -> Tensor:
        """``tail`` over the map of x. Only where :meth:`finishes` says so."""
        raise NotImplementedError

    @classmethod
    def perceptron(
        cls, slots: list[LinearLike], activation: str, norm: nn.Module | None, before: bool = False, joins: bool = True
    ) -> Step | None:
        """``down(activation(up(x)))`` as one step for slots up and down of this class, with the residual added where it
        ``joins``, normalised afterwards or ``before``; None where it has no such form for them."""
        return None

    @classmethod
    def attention(
        cls, slots: list[LinearLike], heads: Heads, norm: nn.Module | None, before: bool = False
    ) -> Step | None:
        """A whole attention sublayer of packed documents as one step, for slots q, k, v and o of this class; None where
        it has no such form for them."""
        return None


class TableLike(nn.Module):
    """A lookup table (rows, width): token, type and position embeddings. ``weight_rows`` undoes any compression."""

    rows: int
    width: int

    def forward(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        raise NotImplementedError

    def source(self, ids: Tensor | None, factor: float = 1.0) -> Source | None:
        """``factor`` times the rows of ``ids`` (the first where None) as a term of a sum of tables; None where this is
        no table that can be read that way."""
        return None

    def logits(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., rows): the product with every row, for a tied head."""
        return torch.nn.functional.linear(x, self.dense_weight().to(x.dtype))

    def cost(self, shape: Shape) -> Cost:
        return Cost(parameters=sum(p.numel() for p in self.parameters()) + sum(b.numel() for b in self.buffers()))


def project(slots: list[LinearLike], x: Tensor, ctx: Context | None) -> list[Tensor]:
    """Apply several slots to one input, letting slots of one kind share what they can (see ``LinearLike.project``)."""
    kind = type(slots[0])
    if all(type(slot) is kind for slot in slots):
        return kind.project(slots, x, ctx)
    return [slot(x, ctx) for slot in slots]


class Part(nn.Module):
    """See the module. ``options`` is what the part was built with, as plain data."""

    traits: Traits = Traits()
    #: role -> (name of the output axis, name of the input axis), e.g. {"q": ("heads*head", "stream")}
    axes: Mapping[str, tuple[str, str]] = EMPTY
    #: Names this part reads from and writes to the context (conditions, streams, memories).
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    #: Whether learned keys and values may stand before its own (``ctx.ahead``).
    prefixes: bool = False
    #: Run-time choices it understands, with their meaning.
    knobs: ClassVar[Mapping[str, str]] = EMPTY
    #: Options that the conformance suite builds it with, at width 32.
    examples: ClassVar[tuple[dict, ...]] = ({},)

    def slots(self) -> dict[str, Slot]:
        """The state it keeps when streaming; empty for a part without memory."""
        return {}

    def step(self, ctx: Context, norm: nn.Module | None, before: bool = False) -> Step | None:
        """``norm(x + self(x))``, or ``x + self(norm(x))`` with the norm ``before``, as one step over the packed layout
        or of a stream; None where it has no such form now."""
        return None

    def finishes(self, tail: Tail) -> bool:
        """Whether ``forward`` may be given ``tail=`` now, and then returns the stream after the sublayer."""
        return False

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        raise NotImplementedError

    def furnish(self, ctx: Context, x: Tensor, generator: torch.Generator) -> Context:
        """``ctx`` with random values for all that this part reads beside padded ``x``: for tests and tracing."""
        return ctx

    def cost(self, shape: Shape, knobs: Mapping[str, Any] = EMPTY) -> Cost:
        """Default: its linears, tables and other parts, each token once."""
        return cost_sum([child.cost(shape) for _, child in costed(self)]) + own_parameters(self)


def hooked(module: nn.Module) -> bool:
    """Whether somebody hooks into ``module`` and so wants it to be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def costed(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Direct descendants that state their own cost, each once, not looking inside them."""
    for name, child in module.named_children():
        if hasattr(child, "cost"):
            yield name, child
        else:
            for inner, found in costed(child):
                yield f"{name}.{inner}", found


def own_parameters(module: nn.Module) -> Cost:
    """Parameters held directly by ``module`` or by descendants that state no cost."""
    count = sum(p.numel() for p in module.parameters(recurse=False))
    for child in module.children():
        if not hasattr(child, "cost"):
            count += own_parameters(child).parameters
    return Cost(parameters=count)


def element_bytes(module: nn.Module) -> int:
    """Bytes of one activation or remembered value of ``module``, by its first floating-point tensor."""
    held = (*module.parameters(), *module.buffers())
    return next((t.element_size() for t in held if t.is_floating_point()), 4)


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, LinearLike]]:
    """(name, slot) for every linear slot below ``module``, outermost wrapper first and never what it wraps."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, LinearLike):
            yield path, child
        else:
            yield from linears(child, path)


def kind_of(slot: nn.Module) -> str:
    """What a slot holds, wrappers from the outside in: ``dense``, ``lora(int8)``."""
    name = getattr(slot, "kind", "") or getattr(type(slot), "registered", ("", type(slot).__name__.lower()))[1]
    base = getattr(slot, "base", None)
    return f"{name}({kind_of(base)})" if isinstance(base, LinearLike) else name


def tables(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, TableLike]]:
    """(name, table) for every lookup table below ``module``."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, TableLike):
            yield path, child
        else:
            yield from tables(child, path)


def drops(rate: float, training: bool) -> bool:
    """Whether dropout does anything."""
    return training and rate > 0.0


def dropout(x: Tensor, rate: float, ctx: Context, training: bool, name: str) -> Tensor:
    """Inverted dropout from keyed noise, so that a recomputed span drops the same entries."""
    if not drops(rate, training):
        return x
    keep = ctx.noise(tuple(x.shape), x, "uniform", name) >= rate
    return x * keep / (1.0 - rate)


def with_memory(module: nn.Module, device: torch.device) -> nn.Module:
    """``module``, laid out on meta, with memory on ``device`` that nothing has filled yet.

    What ``nn.Module.to_empty`` does; from meta that imports half a second's worth of symbolic algebra.
    """

    def room(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=device)

    return module._apply(room)


def initialise(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill every parameter below ``module``: each module's ``reset(generator)``, keyed by (seed, its path).

    A module may then set its children in ``settle()``, such as a projection that has to start at zero.
    """
    with torch.no_grad():
        for name, child in module.named_modules():
            reset: Callable[[torch.Generator], None] | None = getattr(child, "reset", None)
            if reset is not None:
                reset(keyed_generator(seed, f"{prefix}.{name}" if prefix else name))
        for child in module.modules():
            settle: Callable[[], None] | None = getattr(child, "settle", None)
            if settle is not None:
                settle()
