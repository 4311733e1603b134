"""Items: what the flat list of layers is made of.

An item is ``forward(x, ctx) -> (x, ctx)``. ``Residual`` adds a part's output to the stream (norm before, after, or on
both sides); ``Bare`` does not; ``Reshape`` may change length, width or grid; ``Loop`` runs a list several times;
``Tap`` and ``Join`` carry a skip; ``Use`` runs a shared list. Removing a part leaves the item in place: a pre-norm
residual becomes the identity, a post-norm one keeps its norm, and no other name changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.parts.base import Cost, Part, Shape, Step, Tail, cost_sum, hooked
from formwright.parts.beside import Adapters
from formwright.parts.context import Context

Order = Literal["pre", "post", "sandwich"]


class Item(nn.Module):
    """``id`` is permanent and unique in a model; ``local`` is its path inside the list that holds it. ``inside``: the
    id of the item of the same list that runs this one in its own way; the list then leaves it to that item."""

    id: str = ""
    inside: str = ""
    local: str = ""
    block: int = 0
    width: int = 0
    out_width: int = 0

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        raise NotImplementedError

    def step(self, ctx: Context) -> Step | None:
        """This item as one step that can run together with its neighbours; None where it has no such form now."""
        return None

    def held(self) -> Iterator[Item]:
        """Items inside this one."""
        return iter(())

    def paths_inside(self, path: str) -> Iterator[str]:
        """Where this item, at ``path``, runs what it holds: beginnings of paths, with their point, once a round."""
        yield f"{path}."

    def parts(self) -> Iterator[tuple[str, Part]]:
        """(path below the item's own, part) of what it runs directly."""
        return iter(())

    def cost(self, shape: Shape) -> Cost:
        return Cost()

    def shape_after(self, shape: Shape) -> Shape:
        return shape


def unpacked(value: Tensor, offsets: Tensor) -> Tensor:
    """(1, T, ...) -> (documents, longest, ...), zeros in the padding."""
    sizes = offsets.diff()
    longest = int(sizes.max()) if len(sizes) else 0
    valid = torch.arange(longest, device=value.device)[None] < sizes[:, None]
    rows = value.new_zeros(len(sizes), longest, *value.shape[2:])
    return rows.masked_scatter(valid.reshape(*valid.shape, *[1] * (value.dim() - 2)), value[0])


def repacked(part: nn.Module, x: Tensor, ctx: Context) -> Tensor:
    """Run a part that does not take the packed layout: unpack, run padded, pack again."""
    assert ctx.offsets is not None
    offsets, sizes = ctx.offsets, ctx.offsets.diff()

    def also(value: Tensor | None) -> Tensor | None:
        return None if value is None else unpacked(value, offsets)

    inner = ctx.replace(
        offsets=None,
        borders=None,
        lengths=sizes,
        positions=also(ctx.positions),
        origin=also(ctx.origin),
        coords=also(ctx.coords),
        marks={name: unpacked(mark, offsets) for name, mark in ctx.marks.items()},
    )
    rows = unpacked(x, offsets)
    return part(rows, inner)[inner.valid(rows)][None]


def adapted(part: Part, adapters: Adapters | None, x: Tensor, ctx: Context) -> Tensor:
    """What ``part`` makes of x, as its adapters change it."""
    if adapters is not None:
        ctx = adapters.enter(x, ctx)
    # In the packed layout a recurrence begins anew inside its kernel, where no learned state can stand.
    alone = not part.traits.packed or (bool(ctx.start) and not part.prefixes)
    y = repacked(part, x, ctx) if ctx.offsets is not None and alone else part(x, ctx)
    return y if adapters is None else adapters.leave(x, y, ctx)


class Residual(Item):
    """x + part(norm(x)), norm(x + part(x)), or x + norm_out(part(norm(x))), joined by ``combine``.

    ``adapters`` stand around the part, where there are any: what they change is changed before anything is joined.
    """

    def __init__(
        self, part: Part | None, order: Order, norm: nn.Module | None, norm_out: nn.Module | None, combine: nn.Module
    ) -> None:
        super().__init__()
        self.order = order
        self.part = part
        self.norm = norm
        self.norm_out = norm_out
        self.combine = combine
        self.adapters: Adapters | None = None

    @property
    def dropped(self) -> bool:
        return self.part is None

    def drop(self) -> dict[str, nn.Module | None]:
        """Remove the part (and norms that only served it); returns what was removed, for :meth:`restore`."""
        if self.part is None:
            raise SpecError(f"{self.id} is already dropped")
        removed: dict[str, nn.Module | None] = {"part": self.part, "combine": self.combine, "norm_out": self.norm_out}
        if self.adapters is not None:
            removed["adapters"] = self.adapters
        self.part, self.norm_out, self.adapters = None, None, None
        self.combine = nn.Identity()
        if self.order != "post":
            removed["norm"] = self.norm
            self.norm = None
        return removed

    def restore(self, removed: dict[str, nn.Module | None]) -> None:
        for name, module in removed.items():
            setattr(self, name, module)

    def parts(self) -> Iterator[tuple[str, Part]]:
        if self.part is not None:
            yield "", self.part

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        # Looked up once: attributes of a module cost more than anything else here.
        part, norm, combine, norm_out = self.part, self.norm, self.combine, self.norm_out
        post = self.order == "post"
        if part is None:
            return (x if norm is None else norm(x)), ctx
        inner, beside = ctx.at(self.local), self.adapters
        if beside is not None and not beside.awake(inner):
            beside = None
        plain = getattr(combine, "plain", False)
        direct = plain and norm_out is None and beside is None and not inner.wants("output")
        direct = direct and (inner.offsets is None or part.traits.packed) and not hooked(part)
        if direct:
            step = part.step(inner, norm, not post)
            if step is not None and step.takes(x):
                return step.run((step,), x, inner.spans()), ctx
        seen = x if norm is None or post else norm(x)
        if direct and part.finishes(tail := Tail(x, norm if post else None)):
            return part(seen, inner, tail), ctx
        if not plain and hasattr(combine, "before"):
            seen = combine.before(seen, inner)  # type: ignore[operator]
        y = adapted(part, beside, seen, inner)
        inner.note("output", y)
        if norm_out is not None:
            y = norm_out(y)
        x = combine(x, y, inner)
        if post and norm is not None:
            x = norm(x)
        return x, ctx

    def step(self, ctx: Context) -> Step | None:
        held = self._modules  # where a look-up takes a fifth of the time of an attribute
        part, norm, combine = held.get("part"), held.get("norm"), held.get("combine")
        if part is None or held.get("norm_out") is not None or ctx.notes is not None:
            return None
        beside: Any = held.get("adapters")
        if beside is not None and beside.awake(ctx):
            return None
        if not getattr(combine, "plain", False) or hooked(self) or hooked(part):
            return None
        inner = ctx if ctx.state is None else ctx.at(self.local)  # what a stream remembers is kept by its path
        return part.step(inner, norm, self.order != "post")  # type: ignore[operator]

    def cost(self, shape: Shape) -> Cost:
        modules = (self.part, self.norm, self.norm_out, self.combine, self.adapters)
        held = [m for m in modules if m is not None and hasattr(m, "cost")]
        return cost_sum([module.cost(shape) for module in held])  # type: ignore[operator]


class Bare(Item):
    """part(x), as its ``adapters`` change it, takes the place of x."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.adapters: Adapters | None = None

    def parts(self) -> Iterator[tuple[str, Part]]:
        if isinstance(self.part, Part):
            yield "", self.part

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        if not isinstance(self.part, Part):
            return self.part(x), ctx
        return adapted(self.part, self.adapters, x, ctx.at(self.local)), ctx

    def cost(self, shape: Shape) -> Cost:
        held = [self.part] if self.adapters is None else [self.part, self.adapters]
        return cost_sum([module.cost(shape) for module in held])  # type: ignore[operator]


class Reshape(Item):
    """A run's border where length, width or grid changes."""

    def __init__(self, reshape: nn.Module) -> None:
        super().__init__()
        self.reshape = reshape

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        x, inner = self.reshape(x, ctx.at(self.local))
        return x, inner.replace(path=ctx.path)

    def cost(self, shape: Shape) -> Cost:
        return self.reshape.cost(shape)  # type: ignore[operator]

    def shape_after(self, shape: Shape) -> Shape:
        return self.reshape.shape_after(shape)  # type: ignore[operator]


class ItemList(nn.Module):
    """An ordered list of items held in blocks, so that a tensor's name begins with its item's id."""

    def add(self, local: str, item: Item) -> None:
        """Hold ``item`` under ``local`` (``b3.attention``: block ``b3``, name ``attention``)."""
        block, _, name = local.partition(".")
        if block not in self._modules:
            self.add_module(block, Block())
        holder = self._modules[block]
        assert holder is not None
        holder.add_module(name, item)

    def insert(self, item: Item, before: Item) -> None:
        """Hold ``item`` in the block of ``before`` and in its place."""
        block: Any = self._modules[before.local.partition(".")[0]]
        order = list(block._modules.items())
        block._modules.clear()
        for name, held in order:
            if held is before:
                block.add_module(item.local.partition(".")[2], item)
            block.add_module(name, held)

    def remove(self, item: Item) -> None:
        """Hold ``item`` no longer."""
        block, _, name = item.local.partition(".")
        delattr(self._modules[block], name)

    def items(self) -> Iterator[Item]:
        """The items of this list in order, not those inside them."""
        for block in self._modules.values():
            if isinstance(block, Block):
                held: Any = block._modules.values()
                yield from (item for item in held if not item.inside)


class Block(nn.Module):
    """The items that share a block number; only a holder of names."""


class Loop(Item, ItemList):
    """The same items ``times`` times; the run-time knob ``loops`` overrides. State and noise are kept per round."""

    knobs = {"loops": "how many times every loop runs"}

    def __init__(self, times: int) -> None:
        super().__init__()
        if times < 1:
            raise SpecError(f"a loop runs at least once, not {times} times")
        self.times = times

    def held(self) -> Iterator[Item]:
        return self.items()

    def paths_inside(self, path: str) -> Iterator[str]:
        yield from (f"{path}@{index}." for index in range(self.times))

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        rounds = ctx.knobs.get("loops", self.times)
        if not isinstance(rounds, int) or rounds < 1:
            raise SpecError(f"{self.id}: knob loops is a whole number of at least 1, not {rounds!r}")
        for index in range(rounds):
            inner = ctx.at(f"{self.local}@{index}")
            x, inner = run(self.items(), x, inner)
            ctx = inner.replace(path=ctx.path)
        return x, ctx

    def cost(self, shape: Shape) -> Cost:
        total = Cost()
        for index in range(self.times):
            each, shape = run_cost(self.items(), shape)
            total = total + (each if index == 0 else Cost(0, each.macs, each.state_bytes))
        return total

    def shape_after(self, shape: Shape) -> Shape:
        for _ in range(self.times):
            shape = run_cost(self.items(), shape)[1]
        return shape


class Use(Item):
    """A shared list run here: its tensors live under ``shared.NAME``, its state under this item's own id."""

    def __init__(self, name: str, shared: ItemList) -> None:
        super().__init__()
        self.name = name
        self._shared = [shared]

    @property
    def shared(self) -> ItemList:
        return self._shared[0]

    def held(self) -> Iterator[Item]:
        return self.shared.items()

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        x, inner = run(self.shared.items(), x, ctx.at(self.local))
        return x, inner.replace(path=ctx.path)

    def cost(self, shape: Shape) -> Cost:
        each = run_cost(self.shared.items(), shape)[0]
        return Cost(0, each.macs, each.state_bytes)

    def shape_after(self, shape: Shape) -> Shape:
        return run_cost(self.shared.items(), shape)[1]


class Tap(Item):
    """Keeps the stream under a name for a later :class:`Join`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        return x, ctx.replace(streams={**ctx.streams, self.name: x})


class Join(Item):
    """combine(x, the tapped stream)."""

    def __init__(self, name: str, combine: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.combine = combine

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        if self.name not in ctx.streams:
            raise SpecError(f"{self.id} joins {self.name!r}, which no tap before it keeps")
        if ctx.streams[self.name].shape != x.shape:
            raise SpecError(f"{self.id} joins {tuple(ctx.streams[self.name].shape)} to a stream of {tuple(x.shape)}")
        return self.combine(x, ctx.streams[self.name], ctx.at(self.local)), ctx

    def cost(self, shape: Shape) -> Cost:
        return self.combine.cost(shape)  # type: ignore[operator]


def run(items: Iterable[Item], x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
    """``x`` and ``ctx`` through ``items``; neighbours that have the form of steps run together."""
    together: list[Step] = []
    for item in items:
        step = item.step(ctx) if ctx.offsets is not None or ctx.state is not None else None
        if step is not None and (type(step) is type(together[0]) if together else step.takes(x)):
            together.append(step)
            continue
        if together:
            x, together = together[0].run(together, x, ctx.spans()), []
        x, ctx = item(x, ctx)
    return (together[0].run(together, x, ctx.spans()) if together else x), ctx


def run_cost(items: Iterator[Item], shape: Shape) -> tuple[Cost, Shape]:
    """The cost of ``items`` one after another, and the shape behind them."""
    total = Cost()
    for item in items:
        total = total + item.cost(shape)
        shape = item.shape_after(shape)
    return total, shape


def walk(items: Iterator[Item], seen: set[int] | None = None) -> Iterator[Item]:
    """Every item in depth order, nested ones included, shared ones once."""
    seen = set() if seen is None else seen
    for item in items:
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        yield from walk(item.held(), seen)


def describe(item: Item) -> str:
    """One word for what an item is, for layouts and reports."""
    if isinstance(item, Residual):
        return "nothing" if item.part is None else part_name(item.part)
    if isinstance(item, Bare):
        return part_name(item.part)
    return type(item).__name__.lower()


def part_name(module: Any) -> str:
    return getattr(type(module), "registered", ("", type(module).__name__.lower()))[1]
