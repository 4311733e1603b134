"""A reversible run: layers whose inputs are computed back from their outputs, so that training keeps none of them.

Two streams, both the run's input at first. A layer with the functions F and G makes

    y1 = lam x1 + F(x2),   y2 = beta x2 + G(y1)      and back:   x2 = (y2 - G(y1)) / beta,   x1 = (y1 - F(x2)) / lam

(Gomez et al., 2017, 1707.04585; with scales: Liao et al., 2023, 2306.00477.) What F and G are is the ``kind``:

    1   F: a whole layer, G: a bare adapter, streams exchanged afterwards;  x2 is the fresh one
    2   F: a bare adapter, G: a whole layer, streams exchanged afterwards;  x1 is the fresh one
    3   F: the mixer's sublayer, G: the channel's, no exchange;             x2 is the fresh one

Going back multiplies an error by 1/lam a layer, so nothing may be rounded. In the exact form, what F and G give is
rounded to multiples of 2^-24 and added to float64 streams, and lam and beta are powers of two. A stream of multiples of
2^-p below 2^8 is then scaled by 2^-a without error, and the sum, a multiple of 2^-(p+a), is without error while
p + a + 8 <= 53. So is the difference going back, and the quotient. Once the bits are used up, after 7 to 14 layers at
1/8, both streams are kept whole (an anchor) and rounded to 2^-24 again. F and G must give the same bits when they are
computed again: they run with gradients wanted both times, as other kernels would round otherwise.

Kept for the backward pass: 16 bytes for each number of the stream, the same again at each anchor. Cost: one more
forward pass in the backward one. Without gradients, with a state, or where notes are wanted from inside, nothing is
computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import Refusal, SpecError
from formwright.models.items import Item, run, run_cost
from formwright.parts.base import Cost, Shape
from formwright.parts.beside import Adapter
from formwright.parts.context import Context, Notes

#: Bits after the point that a function's output keeps in the exact form, before it for the streams, and of a float64.
GRID, ROOM, WIDE = 24, 8, 53
#: Added and taken away again, it rounds a float64 to multiples of 2^-GRID.
ROUNDER = 1.5 * 2.0 ** (WIDE - 1 - GRID)
#: How the two streams become one again: the weight of the stale stream beside the fresh one, and of both.
READOUTS = {"fresh": (0.0, 1.0), "paper": (0.1, 1.0), "mean": (1.0, 0.5)}

#: (stream, context) -> what a layer adds to the other stream
Side = Callable[[Tensor, Context], Tensor]


def bits(scale: float) -> int | None:
    """n of a scale 2^-n, n at least 0; None for another number."""
    mantissa, exponent = torch.frexp(torch.tensor(scale, dtype=torch.float64))
    return 1 - int(exponent) if float(mantissa) == 0.5 and exponent <= 1 else None


def reach(kind: int, lam: float, beta: float) -> int | None:
    """Layers that can be gone back without any rounding; None for scales of 1, which use no bits."""
    a, b = bits(lam) or 0, bits(beta) or 0
    if a == b == 0:
        return None
    one, two, layers = GRID, GRID, 0
    while True:
        one, two = one + a, two + b
        if max(one, two) > WIDE - ROOM:
            return layers
        layers += 1
        if kind != 3:
            one, two = two, one


class Reversible(Item):
    """``layers``: the items of each layer, which stay in the blocks where they are, under their own ids and paths; of
    kind 3 the last of each is its channel sublayer. ``bare``: the bare adapter of each layer, of kinds 1 and 2.

    ``anchors``: layers between anchors, None where none is needed. ``exact`` is explained in the module; without it
    the streams have the run's own precision and lam and beta any value above 0.
    """

    knobs = {"reversible": "False: reversible runs keep what autograd saves and recompute nothing"}

    def __init__(
        self,
        kind: int,
        lam: float,
        beta: float,
        *,
        readout: str = "fresh",
        exact: bool = True,
        anchors: int | None = None,
        bare: list[Adapter] | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.lam, self.beta = kind, lam, beta
        self.readout, self.exact, self.anchors = readout, exact, anchors
        self.bare = nn.ModuleList(bare or [])
        self.layers: list[tuple[Item, ...]] = []

    def held(self) -> Iterator[Item]:
        for layer in self.layers:
            yield from layer

    def paths_inside(self, path: str) -> Iterator[str]:
        yield path.removesuffix(self.local)

    def take(self, layers: list[tuple[Item, ...]]) -> None:
        """Run ``layers`` from now on."""
        self.layers = layers
        for item in self.held():
            item.inside = self.id

    def release(self) -> None:
        """Leave its layers to the list that holds them."""
        for item in self.held():
            item.inside = ""
        self.layers = []

    def anchored(self, index: int) -> bool:
        """Whether the streams are kept before layer ``index``; layers are spread evenly over the anchors' spans."""
        count = len(self.layers)
        if index == 0 or self.anchors is None:
            return False
        spans = -(-count // self.anchors)
        return index in {count * span // spans for span in range(1, spans)}

    def sides(self, index: int) -> tuple[Side, Side]:
        """F and G of a layer."""
        layer = self.layers[index]
        if self.kind == 3:
            return _running(layer[:-1]), _running(layer[-1:])
        whole = _running(layer)

        def bare(x: Tensor, ctx: Context) -> Tensor:
            return self.bare[index](x, x, ctx.at(f"{self.local}.{index}"))

        return (whole, bare) if self.kind == 1 else (bare, whole)

    def trainable(self, index: int) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of F and of G that want a gradient."""
        layer = self.layers[index]
        if self.kind == 3:
            return _wanting(*layer[:-1]), _wanting(layer[-1])
        whole, bare = _wanting(*layer), _wanting(self.bare[index])
        return (whole, bare) if self.kind == 1 else (bare, whole)

    def read(self, one: Tensor, two: Tensor) -> Tensor:
        """One stream of the two."""
        fresh, stale = (one, two) if self.kind == 2 else (two, one)
        beside, both = READOUTS[self.readout]
        joined = fresh if beside == 0.0 else fresh + beside * stale
        return joined if both == 1.0 else joined * both

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        call = Call(self, ctx, x.dtype)
        one = two = call.rounded(x.to(torch.float64) if self.exact else x)
        leaves = ctx.leaves()
        sides = [side for index in range(len(self.layers)) for side in self.trainable(index)]
        wanting = list(dict.fromkeys(parameter for side in sides for parameter in side))
        if self._recomputes(x, [*leaves, *wanting], ctx):
            one, two, losses = Recomputed.apply(call, one, two, len(leaves), *leaves, *wanting)  # type: ignore[no-untyped-call]
            if call.lost:
                ctx.loss(losses)
        else:
            for index in range(len(self.layers)):
                if self.anchored(index):
                    one, two = call.rounded(one), call.rounded(two)
                one, two = call.layer(index, one, two)
        return self.read(one, two).to(x.dtype), ctx

    def _recomputes(self, x: Tensor, tensors: list[Tensor | None], ctx: Context) -> bool:
        allowed = ctx.knobs.get("reversible", True)
        if not isinstance(allowed, bool):
            raise SpecError(f"{self.id}: knob reversible is True or False, not {allowed!r}")
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
        if not (wanted and allowed) or ctx.state is not None or torch.compiler.is_compiling():
            return False
        inside = [f"{ctx.path}.{item.local}".lstrip(".") for item in self.held()]
        asked = {path for path, _ in ctx.notes.want} if ctx.notes is not None else set()
        return not any(path == own or path.startswith(f"{own}.") for path in asked for own in inside)

    def cost(self, shape: Shape) -> Cost:
        total = run_cost(self.held(), shape)[0]
        for adapter in self.bare:
            total = total + adapter.cost(shape)  # type: ignore[operator]
        return total


def _running(items: tuple[Item, ...]) -> Side:
    return lambda x, ctx: run(items, x, ctx)[0]


def _wanting(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


@dataclass
class Call:
    """One call of a run: its context, the precision that F and G compute in, and what they lost beside their output."""

    run: Reversible
    ctx: Context
    dtype: torch.dtype
    lost: int = 0
    mode: Callable[[], AbstractContextManager] = field(default=contextlib.nullcontext)

    def __post_init__(self) -> None:
        device = next((p.device.type for item in self.run.held() for p in item.parameters()), "cpu")
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            self.mode = lambda: torch.autocast(device, dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """Multiples of 2^-GRID, in the exact form."""
        return (x + ROUNDER) - ROUNDER if self.run.exact else x

    def added(self, side: Side, x: Tensor, ctx: Context) -> Tensor:
        """What ``side`` adds, in the precision of the streams."""
        y = side(x.to(self.dtype), ctx)
        return self.rounded(y.to(x.dtype))

    def layer(self, index: int, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        """The streams behind a layer; differentiated by autograd as it stands."""
        f, g = self.run.sides(index)
        one = self.run.lam * one + self.added(f, two, self.ctx)
        two = self.run.beta * two + self.added(g, one, self.ctx)
        return (one, two) if self.run.kind == 3 else (two, one)

    def alone(self, side: Side, x: Tensor, leaves: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
        """(input, output, sum of losses) of a side with a graph of its own; the same in both passes."""
        notes = None if self.ctx.notes is None else Notes()
        ctx = self.ctx.replace(notes=notes).with_leaves(leaves)
        seen = x.detach().requires_grad_()
        with torch.enable_grad(), self.mode():
            y = self.added(side, seen, ctx)
            losses = [] if notes is None else [loss.double() for loss in notes.losses]
            self.lost += len(losses)
            return seen, y, torch.stack(losses).sum() if losses else seen.new_zeros(())


class Recomputed(torch.autograd.Function):
    """All layers of a run: (call, x1, x2, number of leaves, leaves..., parameters...) -> (y1, y2, sum of losses)."""

    @staticmethod
    def forward(ctx: Any, call: Call, one: Tensor, two: Tensor, leaves: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        total = one.new_zeros((), dtype=torch.float64)
        given: list[Tensor | None] = list(tensors[:leaves])
        for index in range(len(call.run.layers)):
            if call.run.anchored(index):
                kept += [one, two]
                one, two = call.rounded(one), call.rounded(two)
            f, g = call.run.sides(index)
            _, added, lost = call.alone(f, two, given)
            one, total = torch.add(added.detach(), one, alpha=call.run.lam), total + lost.detach()
            _, added, lost = call.alone(g, one, given)
            two, total = torch.add(added.detach(), two, alpha=call.run.beta), total + lost.detach()
            if call.run.kind != 3:
                one, two = two, one
        ctx.call, ctx.leaves, ctx.anchors = call, leaves, len(kept)
        ctx.save_for_backward(one, two, *kept, *tensors)
        return one, two, total

    @staticmethod
    def backward(ctx: Any, d_one: Tensor, d_two: Tensor, d_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise Refusal(
                f"{ctx.call.run.id}: a reversible run gives first derivatives only; for second ones call the model "
                "with knobs={'reversible': False}"
            )
        one, two, *rest = ctx.saved_tensors
        kept, tensors = list(rest[: ctx.anchors]), rest[ctx.anchors :]
        back = Back(ctx.call, tensors[: ctx.leaves], ctx.needs_input_grad[4 : 4 + ctx.leaves], d_loss)
        for index in reversed(range(len(ctx.call.run.layers))):
            one, two, d_one, d_two = back.layer(index, one, two, d_one, d_two)
            if ctx.call.run.anchored(index):
                two, one = kept.pop(), kept.pop()
        found = [back.grads.get(id(t)) for t in (*back.leaves, *tensors[ctx.leaves :])]
        return None, d_one, d_two, None, *found


class Back:
    """The backward pass of one call. ``grads``: by id of a leaf's own copy or a parameter."""

    def __init__(self, call: Call, leaves: tuple[Tensor | None, ...], wanted: tuple[bool, ...], d_loss: Tensor) -> None:
        self.call, self.d_loss = call, d_loss
        self.leaves = [t if t is None else t.detach().requires_grad_(want) for t, want in zip(leaves, wanted)]
        self.wanted = [t for t in self.leaves if t is not None and t.requires_grad]
        self.grads: dict[int, Tensor] = {}

    def layer(self, index: int, one: Tensor, two: Tensor, d_one: Tensor, d_two: Tensor) -> tuple[Tensor, ...]:
        """The streams before a layer and their gradients, from those behind it."""
        made = self.call.run
        (f, g), (in_f, in_g) = made.sides(index), made.trainable(index)
        if made.kind != 3:
            one, two, d_one, d_two = two, one, d_two, d_one
        added, d = self.side(g, one, in_g, d_two)
        two, d_one = (two - added).div_(made.beta), d_one + d
        added, d = self.side(f, two, in_f, d_one)
        one, d_two = (one - added).div_(made.lam), torch.add(d, d_two, alpha=made.beta)
        return one, two, d_one * made.lam, d_two

    def side(self, side: Side, x: Tensor, parameters: list[nn.Parameter], d: Tensor) -> tuple[Tensor, Tensor]:
        """(what the side added, the gradient of its input); those of parameters and leaves are summed up."""
        seen, y, lost = self.call.alone(side, x, self.leaves)
        ends = [(y, d), (lost, self.d_loss)] if lost.requires_grad else [(y, d)]
        wanted = [seen, *parameters, *self.wanted]
        first, *others = torch.autograd.grad(
            [end for end, _ in ends], wanted, [grad for _, grad in ends], allow_unused=True
        )
        for tensor, grad in zip(wanted[1:], others):
            if grad is not None:
                before = self.grads.get(id(tensor))
                self.grads[id(tensor)] = grad if before is None else before + grad
        return y.detach(), torch.zeros_like(x) if first is None else first
