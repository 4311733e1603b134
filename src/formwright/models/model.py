"""The one backbone: stem, conditioners, a flat list of items, a final norm, heads.

There is no class per paper; a model is its spec plus its history of surgeries. ``embed``, ``run`` and ``read`` are
public, so any pass can be cut at an item's id: search, probes, checkpointing and pipelines all use that.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import DataError, FormwrightError, Refusal, SpecError, unknown
from formwright.models import prompts
from formwright.models.batch import EMPTY, Batch
from formwright.models.build import Builder
from formwright.models.items import Item, ItemList, Reshape, Residual, describe, run_cost, walk
from formwright.models.recompute import run_spans
from formwright.models.text import TextFace
from formwright.parts.adapters.prompt import Prompted
from formwright.parts.base import (
    Cost,
    LinearLike,
    Part,
    Shape,
    Slot,
    TableLike,
    Traits,
    cost_sum,
    kind_of,
    linears,
    tables,
)
from formwright.parts.context import Context
from formwright.parts.heads.pooling import Head
from formwright.parts.make import make, module_dict
from formwright.spec import ModelSpec


@dataclass(frozen=True, repr=False)
class Entry:
    """One line of a model's history: a ``surgery`` (its plan replays at load) or an ``event`` (trained, healed)."""

    kind: str
    name: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "data": dict(self.data)}

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}: {reprlib.repr(dict(self.data))}>"  # a plan can list hundreds of sites


class Model(TextFace, ItemList):
    """See the module. Made by :func:`formwright.models.build.build`; ``spec`` is the model as first written and never
    changes, what it is now is read from its modules (:meth:`walk`, :meth:`layout`)."""

    #: Items of a span whose activations are computed again in a backward pass; 0 keeps them.
    recompute: int = 0

    def __init__(self, spec: ModelSpec, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.history: list[Entry] = []
        self.name = ""
        builder = Builder(spec)
        width: int = spec.width if stem is None else stem.width  # type: ignore[assignment]
        self.stem = self._try(builder, "stem", lambda: stem or make("stem", self._stem_node(spec), width))
        self.conditioners = self._named(builder, "conditioner", "conditioners", spec.conditioners, width)
        width = builder.fill(self, spec.layers, width, "", "layers")
        self.shared = builder.shared
        self.final_norm = None
        if spec.final_norm is not None:
            self.final_norm = self._try(builder, "final_norm", lambda: make("norm", spec.final_norm, width))
        if "part" in spec.head:
            only = self._try(builder, "head", lambda: make("head", spec.head, width))
            self.heads = nn.ModuleDict({} if only is None else {"out": only})
        else:
            self.heads = self._named(builder, "head", "head", spec.head, width)
        #: What an adapter's modules in several sublayers share, by the adapter's name.
        self.adapters = nn.ModuleDict()
        self.width = width
        if not builder.problems:
            self._try(builder, "head", self._tie_checked)
        builder.check()

    def _named(self, builder: Builder, kind: str, where: str, nodes: Mapping[str, Any], width: int) -> nn.ModuleDict:
        made = {
            name: self._try(builder, f"{where}.{name}", lambda node=node: make(kind, node, width))
            for name, node in nodes.items()
        }
        held = {name: module for name, module in made.items() if module is not None}
        return self._try(builder, where, lambda: module_dict(kind, held)) or nn.ModuleDict()

    @staticmethod
    def _stem_node(spec: ModelSpec) -> dict[str, Any]:
        return {key: value for key, value in spec.stem.items() if key != "width"}

    @staticmethod
    def _try(builder: Builder, where: str, make_it: Any) -> Any:
        try:
            return make_it()
        except FormwrightError as error:
            builder.problems += [f"{where}: {line}" for line in str(error).split("\n")]
            return None

    def _tie_checked(self) -> None:
        self.tie()
        for head in self.heads.values():
            if getattr(head, "tied", False):
                head.check_width(self.width)  # type: ignore[operator]

    def tie(self) -> None:
        """Point tied heads at the stem's token table; after anything that replaces either."""
        for head in self.heads.values():
            if getattr(head, "tied", False):
                table = getattr(self.stem, "tokens", None)
                if table is None:
                    raise SpecError("a tied head needs a stem with a token table")
                head.tie(table)  # type: ignore[operator]

    # ------------------------------------------------------------------ structure

    def walk(self) -> Iterator[Item]:
        """Every item in depth order, nested ones included, shared ones once."""
        return walk(self.items())

    def item(self, id: str) -> Item:
        """The item of that id; SpecError with the nearest id otherwise."""
        known = {item.id: item for item in self.walk()}
        if id not in known:
            raise SpecError(unknown("item", id, known))
        return known[id]

    def layout(self) -> list[dict[str, Any]]:
        """What the model is now: id, block, kind and slots of every item."""
        found = []
        for item in self.walk():
            held = () if isinstance(item, ItemList) else linears(_Flat.of(item))
            kinds = {name: kind_of(slot) for name, slot in held}
            found.append({"id": item.id, "block": item.block, "is": describe(item), "slots": kinds})
        return found

    def slots(self) -> dict[str, LinearLike]:
        """Every linear by its address: ``b3.attention:q``, ``stem:project``, ``head:out`` (``head.NAME:out``)."""
        return {f"{owner}:{name}": slot for owner, module in self._owners() for name, slot in linears(module)}

    def tables(self) -> dict[str, TableLike]:
        """Every lookup table by its address: ``stem:tokens`` ..."""
        return {f"{owner}:{name}": table for owner, module in self._owners() for name, table in tables(module)}

    def _owners(self) -> Iterator[tuple[str, nn.Module]]:
        if self.stem is not None:
            yield "stem", self.stem
        for name, module in self.conditioners.items():
            yield f"conditioner.{name}", module
        for item in self.walk():
            if not isinstance(item, ItemList):
                yield item.id, _Flat.of(item)
        for name, head in self.heads.items():
            yield ("head" if name == "out" else f"head.{name}"), head

    def slot(self, address: str) -> LinearLike:
        """The linear at an address; SpecError with the nearest address otherwise."""
        known = self.slots()
        if address not in known:
            raise SpecError(unknown("slot", address, known))
        return known[address]

    def set_slot(self, address: str, module: nn.Module) -> nn.Module:
        """Put ``module`` into a slot or table; returns what stood there."""
        owner, _, path = address.partition(":")
        holder = dict(self._owners()).get(owner)
        if holder is None:
            raise SpecError(unknown("slot", address, [*self.slots(), *self.tables()]))
        *way, last = path.split(".")
        try:
            if isinstance(holder, _Flat):
                holder = holder.holder(path)
            for name in way:
                holder = getattr(holder, name)
            displaced = getattr(holder, last)
        except AttributeError:
            raise SpecError(unknown("slot", address, [*self.slots(), *self.tables()])) from None
        setattr(holder, last, module)
        self.tie()
        return displaced

    def state_slots(self) -> dict[str, Slot]:
        """path.name -> what a stream of this model remembers."""
        found = {}

        def visit(items: Iterator[Item], prefix: str) -> None:
            for item in items:
                path = f"{prefix}{item.local}"
                for below, part in item.parts():
                    for name, slot in part.slots().items():
                        found[f"{path}{below}.{name}"] = slot
                for inner in item.paths_inside(path):
                    visit(item.held(), inner)

        visit(self.items(), "")
        return found

    def parts(self) -> Iterator[tuple[str, Part]]:
        """(item id, part) of every part of the layer list."""
        for item in self.walk():
            for _, part in item.parts():
                yield item.id, part

    @property
    def causal(self) -> bool:
        """Whether no output depends on a later input, from the declared traits."""
        return all(traits.causal for traits in self._traits())

    @property
    def streams(self) -> bool:
        """Whether it may be run call by call with a state."""
        return all(traits.streams for traits in self._traits())

    @property
    def reach(self) -> int | None:
        """The longest sequence that its tables of positions take, the stem's and those of parts; None for any."""
        held = [part.traits.length for _, part in self.parts()]
        known = [length for length in (self.stem.limit, *held) if length is not None and length != "any"]
        prompted = self.prompted
        return min(known) - (0 if prompted is None else prompted.longest) if known else None

    @property
    def prompted(self) -> Prompted | None:
        """The stem's token table where prompts stand before its rows."""
        table = getattr(self.stem, "tokens", None)
        return table if isinstance(table, Prompted) else None

    def _traits(self) -> Iterator[Traits]:
        for item in self.walk():
            yield from (part.traits for _, part in item.parts())
            if isinstance(item, Reshape):
                yield item.reshape.traits  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        return next((t.device for t in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    def knobs(self) -> dict[str, str]:
        """Run-time choices its parts and items understand, with their meaning."""
        found: dict[str, str] = {}
        for module in self.modules():
            if isinstance(module, (Part, Item)):
                found.update(getattr(module, "knobs", EMPTY))
        return found

    # ------------------------------------------------------------------ running

    def embed(self, batch: Batch | Tensor, **context: Any) -> tuple[Tensor, Context]:
        """Run the stem and the conditioners: x (B, L, W) and the context. Keywords are fields of the context."""
        batch = self._batch(batch, context)
        field = self.stem.field()
        known = self.knobs() if context.get("knobs") else {}
        for knob in context.get("knobs") or ():
            if knob not in known:
                raise SpecError(unknown("knob", knob, known))
        given = dict(context)
        given.setdefault("lengths", _of_field(batch.lengths, field, "lengths"))
        given.setdefault("offsets", _of_field(batch.offsets, field, "offsets"))
        for name in ("marks", "condition"):
            given[name] = {**getattr(batch, name), **given.get(name, EMPTY)}
        if given.get("state") is not None:
            self._check_stream(given)
        if given["offsets"] is not None:
            given["lengths"] = None
            given.setdefault("borders", tuple(given["offsets"].tolist()))
        ctx, inputs = Context(**given), dict(batch.inputs)
        if field in inputs and (prompted := self.prompted) is not None:
            inputs, ctx = prompts.lead(prompted, inputs, ctx)
        if ctx.positions is None and field in inputs and inputs[field].dim() >= 2:
            steps = inputs[field]
            if ctx.state is not None or ctx.offsets is not None:
                ctx = ctx.replace(positions=ctx.place(steps))
        x, ctx = self.stem(inputs, ctx)
        if ctx.positions is None and self._rotary():
            ctx = ctx.replace(positions=ctx.place(x))  # made once, shared by all layers
        for name, conditioner in self.conditioners.items():
            ctx = conditioner(x, ctx, name)
        return x, ctx

    def _check_stream(self, given: Mapping[str, Any]) -> None:
        """A state changes nothing in a part that keeps none, so a model that does not stream refuses one."""
        if given["offsets"] is not None:
            raise SpecError("a stream takes the padded layout: give lengths instead of offsets")
        if given["state"].fresh and not self.streams:
            held = [id for id, part in self.parts() if not part.traits.streams]
            held += [item.id for item in self.walk() if isinstance(item, Reshape) and not item.reshape.traits.streams]  # type: ignore[union-attr]
            raise Refusal(
                f"this model does not stream: {', '.join(held)} need whole sequences; call it without a state"
            )

    def _rotary(self) -> bool:
        return any(getattr(part, "rotary", None) is not None for _, part in self.parts())

    def _batch(self, batch: Batch | Tensor, context: dict[str, Any]) -> Batch:
        if isinstance(batch, Batch):
            return batch
        if isinstance(batch, Tensor):
            return Batch(inputs={self.stem.field(): batch})
        if isinstance(batch, Mapping):
            return Batch(inputs=batch)
        raise SpecError(f"a model reads a Batch or a tensor of its stem's field, not a {type(batch).__name__}")

    def run(self, x: Tensor, ctx: Context, start: str | None = None, stop: str | None = None) -> tuple[Tensor, Context]:
        """The items from ``start`` (default the first) up to, not including, ``stop`` (default past the last)."""
        items = list(self.items())
        if start is not None or stop is not None:
            places = {item.id: index for index, item in enumerate(items)}
            for id in (start, stop):
                if id is not None and id not in places:
                    inside = any(item.id == id for item in self.walk())
                    raise (
                        Refusal(
                            f"{id} lies inside a loop, a shared list or a reversible run; "
                            f"a pass can be cut at {', '.join(places)}"
                        )
                        if inside
                        else SpecError(unknown("item", id, places))
                    )
            items = items[places.get(start, 0) if start else 0 : places[stop] if stop else len(items)]
        x, ctx = run_spans(items, x, ctx, self.recompute)
        return (x, ctx) if stop is not None else prompts.follow(x, ctx)

    def read(self, x: Tensor, ctx: Context, head: str | None = None) -> Any:
        """The final norm and a head: its tensor, or a dict of all when there are several and none is named."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        if head is not None:
            if head not in self.heads:
                raise SpecError(unknown("head", head, self.heads))
            return self.heads[head](x, ctx)
        if len(self.heads) == 1:
            return next(iter(self.heads.values()))(x, ctx)
        return {name: made(x, ctx) for name, made in self.heads.items()}

    def forward(self, batch: Batch | Tensor, *, head: str | None = None, **context: Any) -> Any:
        """embed, run, read. With ``state=`` the stream moves on by this call's tokens."""
        x, entered = self.embed(batch, **context)
        fed = x.shape[1]
        x, ctx = self.run(x, entered)
        out = self.read(x, ctx, head)
        if ctx.state is not None and not ctx.recompute:
            ctx.state.advance(entered.lengths, fed)  # type: ignore[attr-defined]
        return out

    def head(self, name: str | None = None) -> Head:
        """The named head, or the only one."""
        if name is None:
            if len(self.heads) != 1:
                raise SpecError(f"this model has heads {', '.join(self.heads)}: name one")
            return next(iter(self.heads.values()))  # type: ignore[return-value]
        if name not in self.heads:
            raise SpecError(unknown("head", name, self.heads))
        return self.heads[name]  # type: ignore[return-value]

    def cost(self, shape: Shape) -> Cost:
        """Parameters, multiply-accumulates and state bytes of a call of ``shape``, in closed form."""
        held = (*self.conditioners.values(), *self.adapters.values())
        total = self.stem.cost(shape) + cost_sum([made.cost(shape) for made in held])  # type: ignore[operator]
        layers, shape = run_cost(self.items(), self.stem.shape_after(shape))
        total = total + layers
        for holder in self.shared.values():
            total = total + Cost(sum(item.cost(shape).parameters for item in holder.items()))  # type: ignore[operator]
        if self.final_norm is not None:
            total = total + self.final_norm.cost(shape)  # type: ignore[operator]
        return total + cost_sum([head.cost(shape) for head in self.heads.values()])  # type: ignore[operator]

    def residuals(self) -> list[Residual]:
        """The residual items that still hold a part, in depth order: the sublayers that may be dropped."""
        return [item for item in self.walk() if isinstance(item, Residual) and not item.dropped]


def _of_field(given: Mapping[str, Tensor], field: str, what: str) -> Tensor | None:
    """The lengths or offsets of the stem's field, which may leave out the stem's name; unread ones are an error."""
    for name in (field, field.rpartition(".")[2]):
        if name in given:
            return given[name]
    if given:
        raise DataError(f"{what} are given for {', '.join(given)}, and this model reads {field!r}")
    return None


class _Flat(nn.Module):
    """An item seen with its part's members at the top, so that ``b3.attention:q`` names the part's ``q``."""

    _item: list[Item]  # in a list, so that it is no child

    @classmethod
    def of(cls, item: Item) -> _Flat:
        flat = cls()
        flat._item = [item]
        return flat

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:  # type: ignore[override]
        item = self._item[0]
        for name, child in item.named_children():
            if name in ("part", "reshape") and child is not None:
                yield from child.named_children()
        for name, child in item.named_children():
            if name in ("combine", "norm", "norm_out"):
                yield name, child

    def holder(self, path: str) -> nn.Module:
        item = self._item[0]
        first = path.split(".")[0]
        if first in ("combine", "norm", "norm_out"):
            return item
        return item.part if getattr(item, "part", None) is not None else item.reshape  # type: ignore[return-value]
