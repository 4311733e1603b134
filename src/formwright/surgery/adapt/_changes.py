"""What all methods that put a change beside linears share: options, places, counts, undo, what trains.

A method is one file with two registered classes of one name: a ``change`` (what happens to one linear, a
:class:`~formwright.parts.linears.adapted.Change`) and a surgery derived from :class:`Adapts`, which names its options
and says how large the change of each slot is. Nothing else is edited.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from formwright import registry
from formwright.kit.errors import FormwrightError, Refusal, SpecError, all_of, unknown
from formwright.parts.base import LinearLike
from formwright.parts.linears.adapted import Adapted, Change
from formwright.parts.make import bad_name
from formwright.surgery.adapt._training import put_back, remember, train_only
from formwright.surgery.adapt.switch import numbers
from formwright.surgery.base import (
    Displaced,
    Plan,
    Promises,
    Surgery,
    check_options,
    chosen_slots,
    on,
    slot_generator,
)

#: Options of every method.
COMMON = ("where", "name", "train", "seed")


class Adapts(Surgery):
    """A surgery that adds the change of its own name. Options that all share:

    where: roles, items or addresses of slots (see :func:`~formwright.surgery.base.chosen_slots`). name: of the
    adapter. train: patterns of parameter names that stay trainable besides, such as "heads.*". seed: of its start,
    keyed by (seed, slot, name).
    """

    family = "adapt"
    tunes = True
    #: Options of this method with their defaults.
    own: ClassVar[Mapping[str, Any]] = {}
    #: Where it goes by default.
    places: ClassVar[tuple[str, ...]] = ("q", "v")
    mergeable: ClassVar[bool] = True

    # ------------------------------------------------------------------ what a method gives

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        """A sentence for every value that makes no sense."""
        return []

    def size(self, slot: LinearLike, address: str, options: Mapping[str, Any]) -> Any:
        """Plain data that fix the change of one slot: its line in ``decisions["slots"]``."""
        return {}

    def shared(self, options: Mapping[str, Any], slots: Sequence[str]) -> dict[str, Any]:
        """Decisions that hold for all slots."""
        return {}

    def arguments(self, decisions: Mapping[str, Any], address: str) -> dict[str, Any]:
        """What the change is made with, beside the sizes of the linear and its number."""
        return dict(decisions["slots"][address])

    def change(self) -> type[Change]:
        return registry.resolve("change", self.name)

    # ------------------------------------------------------------------ what the suite asks of a surgery

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        name = self.name
        check_options(name, options, (*self.own, *COMMON))
        given = {**self.own, **{key: value for key, value in options.items() if key in self.own}}
        adapter = options.get("name", "default")
        problems = self.wrong(given)
        problems += [f"{name}: adapter name {bad}" for bad in [bad_name(adapter, nn.ModuleDict())] if bad]
        slots: list[str] = []
        try:
            slots = chosen_slots(model, options.get("where"), self.places, f"{name}: where")
        except SpecError as error:
            problems += str(error).split("\n")
        all_of(SpecError, problems)
        if not slots:
            roles = sorted({address.rpartition(":")[2] for address in model.slots()})
            raise Refusal(
                f"{name}: this model has no slot {' or '.join(self.places)}; say where (roles: {', '.join(roles)})"
            )
        decisions = {
            "name": adapter,
            "number": 1 + max(numbers(model).values(), default=-1),
            "slots": {address: self.size(model.slot(address), address, given) for address in slots},
            **self.shared(given, slots),
            "seed": options.get("seed", 0),
            "train": patterns(model, options.get("train"), name),
            "before": remember(model),
        }
        made = self.made(model, dict(options), decisions)
        self.check(model, made)
        return made

    def promises(self, plan: Plan) -> Promises:
        kind, name = self.change(), plan.decisions["name"]
        own = tuple(f"*.adapters.{name}.{trained}" for trained in kind.trained)
        return Promises(
            preserves_function=0.0 if kind.identity else None,
            undo=True,
            mergeable=self.mergeable,
            trains_only=(*own, *plan.decisions.get("train", ())),
        )

    def check(self, model: Any, plan: Plan) -> None:
        name, known = plan.decisions["name"], model.slots()
        problems = []
        if name in numbers(model):
            problems.append(
                f"{self.name}: the model already has an adapter named {name!r}; choose another name, or undo it"
            )
        for address in plan.decisions["slots"]:
            if address not in known:
                problems.append(f"{self.name}: {unknown('slot', address, known)}")
                continue
            try:
                self.laid_out(known[address], address, plan)
            except (FormwrightError, TypeError) as error:
                problems.append(f"{self.name}: {address}: {error}")
        all_of(SpecError, problems)

    def laid_out(self, slot: LinearLike, address: str, plan: Plan) -> Change:
        """The change of one slot, on meta, in its base's own precision; beside integers in the default one."""
        own = self.arguments(plan.decisions, address)
        with torch.device("meta"):
            make: Any = self.change()  # sizes, its number and what is its own
            made = make(slot.in_features, slot.out_features, number=plan.decisions["number"], **own)
        floats = (p.dtype for p in slot.parameters() if p.is_floating_point())
        return made.to(next(floats, torch.get_default_dtype()))

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        displaced: Displaced = {}
        for address in plan.decisions["slots"]:
            slot = model.slot(address)
            change = on(self.laid_out(slot, address, plan), slot).train(model.training)
            wrapper = slot if isinstance(slot, Adapted) else Adapted(base=slot)
            wrapper.add(plan.decisions["name"], change)  # type: ignore[arg-type]
            if wrapper is not slot:
                wrapper.training = model.training
                displaced[address] = model.set_slot(address, wrapper)
        train_only(model, self.promises(plan).trains_only or ())
        return displaced

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        name, seed = plan.decisions["name"], plan.decisions["seed"]
        for address in plan.decisions["slots"]:
            slot = model.slot(address)
            change = slot.adapters[name]
            change.reset(slot_generator(seed, f"{address}/{name}"))
            change.start(slot.base)

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        for address in plan.decisions["slots"]:
            slot = model.slot(address)
            del slot.adapters[plan.decisions["name"]]
            if not slot.adapters:
                model.set_slot(address, slot.base)
        put_back(model, plan.decisions["before"])

    def words(self, plan: Plan) -> str:
        decided = plan.decisions
        roles = list(dict.fromkeys(address.rpartition(":")[2] for address in decided["slots"]))
        return (
            f"Added the adapter {decided['name']!r} ({self.told(decided)}) to {len(decided['slots'])} linears "
            f"({', '.join(roles)}); only it trains."
        )

    def told(self, decisions: Mapping[str, Any]) -> str:
        """The method and its size in a word or two."""
        return self.name


def present(model: Any, plan: Plan) -> bool:
    """Whether the changes that a plan added are all still there, neither merged nor dropped."""
    slots, name = model.slots(), plan.decisions["name"]
    return all(name in getattr(slots.get(address), "adapters", ()) for address in plan.decisions["slots"])


def held(model: Any, plan: Plan) -> dict[str, Change]:
    """The changes that a plan added, by slot."""
    name = plan.decisions["name"]
    return {address: model.slot(address).adapters[name] for address in plan.decisions["slots"]}


def patterns(model: Any, given: Sequence[str] | str | None, what: str) -> list[str]:
    """Patterns of parameter names; SpecError for one that matches nothing."""
    wanted = [given] if isinstance(given, str) else list(given or ())
    names = [name for name, _ in model.named_parameters()]
    spare = [pattern for pattern in wanted if not fnmatch.filter(names, pattern)]
    all_of(SpecError, [f"{what}: train: {unknown('parameter', pattern, names)}" for pattern in spare])
    return wanted


def number(what: str, value: Any, least: float, below: float | None = None, *, above: bool = False) -> list[str]:
    """A sentence where ``value`` is no number from ``least`` on (``above``: above it) and below ``below``."""
    is_number = not isinstance(value, bool) and isinstance(value, (int, float))
    if is_number and (value > least if above else value >= least) and (below is None or value < below):
        return []
    bound = f"above {least:g}" if above else f"at least {least:g}"
    return [f"{what}={value!r} must be a number {bound}" + ("" if below is None else f" and below {below:g}")]


def count(what: str, value: Any, least: int = 1) -> list[str]:
    """A sentence where ``value`` is no whole number of at least ``least``."""
    right = not isinstance(value, bool) and isinstance(value, int) and value >= least
    return [] if right else [f"{what}={value!r} must be a whole number of at least {least}"]
