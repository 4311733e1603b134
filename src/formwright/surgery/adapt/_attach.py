"""What all methods that put adapters around whole sublayers share: options, places, counts, undo, what trains.

A method says which adapter (kind and options, as plain data) goes to which item; laying it out, filling it and taking
it away are the same for all. What adapters of one name share is held by the model under that name.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from formwright.kit.errors import FormwrightError, Refusal, SpecError, all_of, nearest, unknown
from formwright.models.items import Bare, Residual, part_name
from formwright.parts.base import Part, initialise
from formwright.parts.beside import Adapter, Adapters
from formwright.parts.make import bad_name, make
from formwright.surgery.adapt._changes import count, patterns
from formwright.surgery.adapt._training import put_back, remember, train_only
from formwright.surgery.adapt.switch import numbers
from formwright.surgery.base import Displaced, Plan, Promises, Surgery, check_options, on

#: Options of every method.
COMMON = ("where", "name", "train", "seed")
Node = dict[str, Any]


class Attaches(Surgery):
    """A surgery that puts adapters around sublayers. Options that all share:

    where: items, kinds of part (mixer, channel) or their names (attention), shell-style. name: of the adapter. train:
    patterns of parameter names that stay trainable besides, such as "heads.*". seed: of its start, keyed by (seed,
    item, name).
    """

    family = "adapt"
    tunes = True
    #: Options of this method with their defaults.
    own: ClassVar[Mapping[str, Any]] = {}

    # ------------------------------------------------------------------ what a method gives

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        """A sentence for every value that makes no sense."""
        return []

    def nodes(self, model: Any, where: Any, options: Mapping[str, Any]) -> dict[str, Node]:
        """Item id -> the adapter that goes there, as ``{"part": NAME, options}``."""
        raise NotImplementedError

    def exact(self, plan: Plan) -> bool:
        """Whether the model's function is unchanged at the start."""
        return True

    # ------------------------------------------------------------------ what the suite asks of a surgery

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options(self.name, options, (*self.own, *COMMON))
        if hasattr(model, "towers"):
            raise Refusal(f"{self.name}: a system's sublayers belong to its towers: plan for model.tower(NAME)")
        given = {**self.own, **{key: value for key, value in options.items() if key in self.own}}
        name, problems = options.get("name", "default"), self.wrong(given)
        problems += [f"{self.name}: adapter name {bad}" for bad in [bad_name(name, Adapters())] if bad]
        all_of(SpecError, problems)
        decisions = {
            "name": name,
            "number": 1 + max(numbers(model).values(), default=-1),
            "items": self.nodes(model, options.get("where"), given),
            "seed": options.get("seed", 0),
            "train": patterns(model, options.get("train"), self.name),
            "before": remember(model),
        }
        made = self.made(model, dict(options), decisions)
        self.check(model, made)
        return made

    def promises(self, plan: Plan) -> Promises:
        name = plan.decisions["name"]
        own = (f"*.adapters.{name}.*", f"adapters.{name}.*")
        return Promises(
            preserves_function=1e-6 if self.exact(plan) else None,
            undo=True,
            trains_only=(*own, *plan.decisions.get("train", ())),
        )

    def check(self, model: Any, plan: Plan) -> None:
        name, held = plan.decisions["name"], sublayers(model)
        problems = []
        if name in numbers(model):
            problems.append(
                f"{self.name}: the model already has an adapter named {name!r}; choose another name, or undo it"
            )
        for id, node in plan.decisions["items"].items():
            if id not in held:
                problems.append(f"{self.name}: {unknown('item', id, held)}")
                continue
            try:
                laid_out(held[id], node, plan)
            except FormwrightError as error:
                problems += [f"{self.name}: {id}: {line}" for line in str(error).split("\n")]
        all_of(SpecError, problems)

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        name, held = plan.decisions["name"], sublayers(model)
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        for id, node in plan.decisions["items"].items():
            item = held[id]
            adapter = laid_out(item, node, plan).to(like.dtype)
            with torch.device("meta"):
                common = None if name in model.adapters else adapter.common()
            if common is not None:
                model.adapters[name] = on(common.to(like.dtype), model).train(model.training)
            if name in model.adapters:
                adapter.share(model.adapters[name])
            if item.adapters is None:
                item.adapters = Adapters()
            item.adapters[name] = on(adapter, model).train(item.training)
        train_only(model, self.promises(plan).trains_only or ())
        return {}

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        name, seed, held = plan.decisions["name"], plan.decisions["seed"], sublayers(model)
        for id in plan.decisions["items"]:
            initialise(held[id].adapters[name], seed, f"{id}/{name}")
        if name in model.adapters:
            initialise(model.adapters[name], seed, f"/{name}")

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        name, held = plan.decisions["name"], sublayers(model)
        for id in plan.decisions["items"]:
            release(held[id], name)
        if name in model.adapters:
            del model.adapters[name]
        put_back(model, plan.decisions["before"])

    def words(self, plan: Plan) -> str:
        decided = plan.decisions
        kinds = ", ".join(dict.fromkeys(node["part"] for node in decided["items"].values()))
        return f"Added the adapter {decided['name']!r} ({kinds}) to {len(decided['items'])} sublayers; only it trains."


def sublayers(model: Any) -> dict[str, Any]:
    """Every item that holds a part, by id."""
    items = [item for item in model.walk() if isinstance(item, (Residual, Bare))]
    return {item.id: item for item in items if isinstance(item.part, Part)}


def laid_out(item: Any, node: Node, plan: Plan) -> Adapter:
    """An adapter for ``item`` on meta."""
    with torch.device("meta"):
        adapter = make("adapter", node, item.width)
    adapter.number = plan.decisions["number"]
    return adapter


def release(item: Any, name: str) -> None:
    """Take the adapter ``name`` from an item; one that holds no other is as it was before the first."""
    del item.adapters[name]
    if not item.adapters:
        del item.adapters
        item.adapters = None


def chosen_items(model: Any, where: Sequence[str] | str | None, default: Sequence[str], what: str) -> dict[str, Any]:
    """The items that match patterns of ids, kinds of part or names of parts, in depth order.

    SpecError for a pattern that matches nothing, naming the nearest; Refusal where the default matches nothing.
    """
    asked = list(default) if where is None else [where] if isinstance(where, str) else list(where)
    held = sublayers(model)
    names = {id: (id, part_name(item.part), _kind(item.part), "all") for id, item in held.items()}
    known = dict.fromkeys(name for own in names.values() for name in own)
    missing = [p for p in asked if not any(fnmatch.fnmatchcase(name, p) for name in known)]
    if where is not None:
        all_of(SpecError, [f"{what}: where: {p!r} matches no sublayer{nearest(p, known)}" for p in missing])
    elif len(missing) == len(asked):
        parts = ", ".join(dict.fromkeys(part_name(item.part) for item in held.values()))
        raise Refusal(f"{what}: this model has no {' or '.join(asked)} to stand beside; say where (parts: {parts})")
    return {id: held[id] for id, own in names.items() if any(fnmatch.fnmatchcase(n, p) for n in own for p in asked)}


def _kind(part: Part) -> str:
    return getattr(type(part), "registered", ("part", ""))[0]


def without_lowest(items: Mapping[str, Any], skip: int) -> dict[str, Any]:
    """The items without those of the lowest ``skip`` layers (blocks) among them."""
    layers = list(dict.fromkeys(id.rpartition(".")[0] for id in items))
    left = set(layers[skip:])
    return {id: item for id, item in items.items() if id.rpartition(".")[0] in left}


def narrow(what: str, width: int, reduction: float) -> int:
    """Features of a bottleneck: the width divided by ``reduction``; SpecError where nothing would be left."""
    hidden = int(width / reduction)
    if hidden < 1:
        raise SpecError(f"{what}: reduction={reduction:g} leaves nothing of a width of {width}; give at most {width}")
    return hidden


def sizes(what: str, options: Mapping[str, Any]) -> list[str]:
    """Sentences for wrong values of the options that bottlenecks share."""
    problems = [] if options.get("hidden") is None else count(f"{what}: hidden", options["hidden"])
    reduction, skip = options.get("reduction", 1), options.get("skip", 0)
    if isinstance(reduction, bool) or not isinstance(reduction, (int, float)) or reduction < 1:
        problems.append(f"{what}: reduction={reduction!r} must be a number of at least 1")
    return problems + count(f"{what}: skip", skip, 0)


def narrowed(
    what: str, items: Mapping[str, Any], options: Mapping[str, Any], node: Mapping[str, Any]
) -> dict[str, Node]:
    """``node`` for every item above the skipped layers, with the bottleneck that ``hidden`` or ``reduction`` say."""
    left = without_lowest(items, options.get("skip", 0))
    if not left:
        raise SpecError(f"{what}: skip={options['skip']} leaves no layer; this model has fewer")
    hidden = options.get("hidden")
    return {
        id: {**node, "hidden": narrow(what, item.width, options["reduction"]) if hidden is None else hidden}
        for id, item in left.items()
    }
