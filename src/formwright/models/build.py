"""From a spec to modules: names, blocks and ids, defaults, sharing; every complaint at once and by its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from formwright.kit.errors import FormwrightError, SpecError, unknown
from formwright.models.items import Bare, Block, Item, ItemList, Join, Loop, Reshape, Residual, Tap, Use, part_name
from formwright.parts.base import initialise, with_memory
from formwright.parts.make import bad_name, make, make_part
from formwright.spec import ModelSpec, SystemSpec, spec_from

ORDERS = ("pre", "post", "sandwich")
#: Keys of a residual node that are not options of its part.
RESIDUAL_KEYS = ("norm", "order", "combine", "id")
FORMS = ("part", "repeat", "loop", "bare", "reshape", "tap", "join", "use")


class Builder:
    """Lays a list of nodes out as items; problems are collected and raised together."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.problems: list[str] = []
        self.shared = nn.ModuleDict()
        #: Names tapped so far, with the width of the stream there; shared lists now being laid out.
        self.taps: dict[str, int] = {}
        self.open: list[str] = []
        self.shared_width: dict[str, tuple[int, int]] = {}

    def fill(self, holder: ItemList, nodes: list[Any], width: int, prefix: str, where: str) -> int:
        """Add ``nodes`` to ``holder``; returns the width after them."""
        block = 0
        taken: set[str] = set()
        for index, node in enumerate(nodes):
            place = f"{where}[{index}]"
            if not isinstance(node, Mapping):
                self.problems.append(f"{place} must be an object, not {node!r}")
                continue
            rounds = self._rounds(node, place) if "repeat" in node else [[(place, node)]]
            for children in rounds:
                for child_place, child in children:
                    width = self._add(holder, child, width, prefix, block, taken, child_place)
                block += 1
        return width

    def _rounds(self, node: Mapping[str, Any], place: str) -> list[list[tuple[str, Any]]]:
        """(place, node) of every layer of each repetition; a repeat inside belongs to the block of the one outside."""
        times, inner = node.get("repeat"), node.get("layers")
        spare = set(node) - {"repeat", "layers"}
        whole = isinstance(times, int) and not isinstance(times, bool) and times >= 0
        if not whole or not isinstance(inner, list) or spare:
            self.problems.append(f"{place} must be {{'repeat': N, 'layers': [...]}}")
            return []
        once: list[tuple[str, Any]] = []
        for index, child in enumerate(inner):
            below = f"{place}.layers[{index}]"
            if isinstance(child, Mapping) and "repeat" in child:
                once += [layer for block in self._rounds(child, below) for layer in block]
            else:
                once.append((below, child))
        return [once] * times  # type: ignore[operator]

    def _add(
        self, holder: ItemList, node: Any, width: int, prefix: str, block: int, taken: set[str], where: str
    ) -> int:
        try:
            item, name = self._item(node, width, prefix, block, where)
        except FormwrightError as error:
            self.problems += [f"{where}: {line}" for line in str(error).split("\n")]
            return width
        name = node.get("id", name)
        complaint = bad_name(name, Block())
        if complaint:
            self.problems.append(f"{where}: id {complaint}")
            return width
        local, count = f"b{block}.{name}", 2
        while local in taken:
            local, count = f"b{block}.{name}_{count}", count + 1
        taken.add(local)
        item.local, item.block, item.id = local, block, f"{prefix}{local}"
        item.width = width
        item.out_width = item.out_width or width
        if isinstance(item, Loop):
            after = self.fill(item, node["layers"], width, f"{item.id}.", f"{where}.layers")
            if after != width:
                self.problems.append(f"{where}: a loop must end at the width it begins with ({width}, not {after})")
        holder.add(local, item)
        return item.out_width

    def _item(self, node: Any, width: int, prefix: str, block: int, where: str) -> tuple[Item, str]:
        forms = [form for form in FORMS if isinstance(node, Mapping) and form in node]
        if len(forms) != 1:
            raise SpecError(f"a layer is one of {', '.join(FORMS)}, not {node!r}")
        form = forms[0]
        if form == "part":
            return self._residual(node, width)
        allowed = {"loop": {"loop", "layers"}, "join": {"join", "combine"}}.get(form, {form}) | {"id"}
        spare = set(node) - allowed
        if spare:
            raise SpecError(unknown(f"key of a {form}", sorted(spare)[0], allowed))
        if form == "bare":
            part = self._bare(node["bare"], width)
            return Bare(part), part_name(part)
        if form == "reshape":
            made = make("reshape", node["reshape"], width)
            item = Reshape(made)
            item.out_width = made.out_width
            return item, part_name(made)
        if form == "tap":
            self.taps[str(node["tap"])] = width
            return Tap(str(node["tap"])), "tap"
        if form == "join":
            tapped = self.taps.get(str(node["join"]))
            if tapped is None:
                raise SpecError(unknown("tap", str(node["join"]), self.taps) + "; a tap stands before its join")
            if tapped != width:
                raise SpecError(f"join {node['join']!r} was tapped at width {tapped}, and the stream has {width} here")
            return Join(str(node["join"]), make("combine", node.get("combine", "add"), width)), "join"
        if form == "loop":
            if not isinstance(node["loop"], int) or not isinstance(node.get("layers"), list):
                raise SpecError("a loop is {'loop': N, 'layers': [...]}")
            return Loop(node["loop"]), "loop"
        return self._use(str(node["use"]), width), str(node["use"])

    def _residual(self, node: Mapping[str, Any], width: int) -> tuple[Item, str]:
        settings = {**self.spec.defaults, **{key: node[key] for key in RESIDUAL_KEYS if key in node}}
        order = settings.get("order", "pre")
        if order not in ORDERS:
            raise SpecError(unknown("order", str(order), ORDERS))
        norm = settings.get("norm", {"part": "layernorm"})
        part = make_part({key: value for key, value in node.items() if key not in RESIDUAL_KEYS}, width)
        before = None if norm is None else make("norm", norm, width)
        after = make("norm", norm, width) if norm is not None and order == "sandwich" else None
        return Residual(part, order, before, after, make("combine", settings.get("combine", "add"), width)), part_name(
            part
        )

    def _bare(self, node: Any, width: int) -> nn.Module:
        from formwright import registry

        name = node if isinstance(node, str) else node.get("part") if isinstance(node, Mapping) else None
        if isinstance(name, str) and name in registry.names("norm"):
            return make("norm", node, width)
        return make_part(node, width)

    def _use(self, name: str, width: int) -> Use:
        if name not in self.spec.shared:
            raise SpecError(unknown("shared list", name, self.spec.shared))
        if name not in self.shared:
            if name in self.open:
                raise SpecError(f"shared list {name!r} uses itself: {' > '.join([*self.open, name])}")
            complaint = bad_name(name, self.shared)
            if complaint:
                raise SpecError(f"shared list {complaint}")
            nodes = self.spec.shared[name]
            nodes = nodes if isinstance(nodes, list) else [nodes]
            holder = ItemList()
            self.open.append(name)
            after = self.fill(holder, nodes, width, f"shared.{name}.", f"shared.{name}")
            self.open.pop()
            self.shared[name] = holder
            self.shared_width[name] = (width, after)
        before, after = self.shared_width[name]
        if before != width:
            raise SpecError(f"shared list {name!r} was built at width {before}, not {width}")
        item = Use(name, self.shared[name])  # type: ignore[arg-type]
        item.out_width = after
        return item

    def check(self) -> None:
        if self.problems:
            raise SpecError("\n".join(dict.fromkeys(self.problems)))


def build(spec: Any, seed: int | None = 0, device: str | torch.device = "cpu", stem: nn.Module | None = None) -> Any:
    """A model (or system) from a spec, its parameters drawn from ``seed``, keyed by their names.

    ``device="meta"`` (or ``seed=None``) lays it out without drawing. Everything wrong with the spec is said at once.
    """
    from formwright.models.model import Model
    from formwright.models.system import System

    spec = spec_from(spec)
    target = torch.device(device)
    with torch.device("meta"):
        model = System(spec) if isinstance(spec, SystemSpec) else Model(spec)
    if target.type != "meta":
        with_memory(model, target)
        if seed is not None:
            initialise(model, seed)
    return model.eval()
