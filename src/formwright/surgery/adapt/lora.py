"""LoRA: train a small product beside frozen weights, and keep one model for many tasks.

Hu et al., 2021 (2106.09685). Each chosen slot becomes ``base(x) + scaling B A x``, made by
:mod:`formwright.parts.linears.lora`, with B = 0, so the model's function is unchanged at the start, to the last bit.
Everything else is frozen. A further plan with another name adds an adapter to slots that have one already; rows of a
batch choose theirs by number (``ctx.adapters``, see :func:`choose`). Cost: rank (in + out) parameters and products a
token in each slot; with r on the q and v of L square layers of width d, 4 r d L parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import Refusal, SpecError, all_of, unknown
from formwright.parts.base import LinearLike
from formwright.parts.linears.lora import Adapter, LoRA
from formwright.parts.make import bad_name
from formwright.registry import Paper, register
from formwright.surgery.adapt._training import put_back, remember, train_only
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

OPTIONS = ("rank", "alpha", "rslora", "dropout", "where", "name", "train", "seed")


@register(
    "surgery", "lora", paper=Paper("Hu et al.", 2021, "2106.09685"), summary="low-rank adapters beside the weights"
)
class Lora(Surgery):
    """Options:

    rank: of A and B, default 8. alpha: scaling is alpha / rank (alpha / sqrt(rank) with ``rslora``), default 2 rank.
    dropout: of the adapter's input while training. where: roles, items or addresses of slots, default q and v.
    name: of the adapter, default "default". train: patterns of parameter names that stay trainable besides, such as
    "heads.*". seed: of A, which is uniform in +-1/sqrt(in), keyed by (seed, slot, name).
    """

    family = "adapt"
    examples = ({"rank": 2}, {"rank": 3, "alpha": 1.0, "rslora": True, "where": ["q", "o"], "name": "other"})

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options("lora", options, OPTIONS)
        rank, alpha = options.get("rank", 8), options.get("alpha")
        rate, name, seed = options.get("dropout", 0.0), options.get("name", "default"), options.get("seed", 0)
        problems = []
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            problems.append(f"lora: rank={rank!r} must be a whole number of at least 1")
        if not isinstance(rate, (int, float)) or not 0.0 <= rate < 1.0:
            problems.append(f"lora: dropout={rate!r} must be at least 0 and below 1")
        if alpha is not None and (not isinstance(alpha, (int, float)) or alpha <= 0):
            problems.append(f"lora: alpha={alpha!r} must be a positive number")
        problems += [f"lora: adapter name {wrong}" for wrong in [bad_name(name, torch.nn.ModuleDict())] if wrong]
        try:
            slots = chosen_slots(model, options.get("where"), ("q", "v"), "lora: where")
        except SpecError as error:
            problems += str(error).split("\n")
            slots = []
        all_of(SpecError, problems)
        if not slots:
            roles = sorted({address.rpartition(":")[2] for address in model.slots()})
            raise Refusal(f"lora: this model has no slot q or v; say where (roles: {', '.join(roles)})")
        alpha = 2.0 * rank if alpha is None else float(alpha)
        decisions = {
            "name": name,
            "number": 1 + max(numbers(model).values(), default=-1),
            "slots": dict.fromkeys(slots, rank),
            "scaling": alpha / (math.sqrt(rank) if options.get("rslora") else rank),
            "dropout": float(rate),
            "seed": seed,
            "train": _patterns(model, options.get("train")),
            "before": remember(model),
        }
        made = self.made(model, dict(options), decisions)
        self.check(model, made)
        return made

    def promises(self, plan: Plan) -> Promises:
        own = f"*.adapters.{plan.decisions['name']}.*"
        return Promises(
            preserves_function=0.0, undo=True, mergeable=True, trains_only=(own, *plan.decisions.get("train", ()))
        )

    def check(self, model: Any, plan: Plan) -> None:
        name, known = plan.decisions["name"], model.slots()
        problems = []
        if name in numbers(model):
            problems.append(f"lora: the model already has an adapter named {name!r}; choose another name, or undo it")
        for address, rank in plan.decisions["slots"].items():
            if address not in known:
                problems.append(f"lora: {unknown('slot', address, known)}")
                continue
            most = min(known[address].in_features, known[address].out_features)
            if not 1 <= rank <= most:
                problems.append(f"lora: rank={rank} does not fit {address}: at least 1 and at most {most}")
        all_of(SpecError, problems)

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        decided = plan.decisions
        displaced: Displaced = {}
        for address, rank in decided["slots"].items():
            slot = model.slot(address)
            with torch.device("meta"):
                adapter = Adapter(
                    slot.in_features,
                    slot.out_features,
                    rank,
                    decided["scaling"],
                    decided["number"],
                    decided["dropout"],
                )
                wrapper = slot if isinstance(slot, LoRA) else LoRA(base=slot)
            adapter.to(_dtype(slot))
            wrapper.adapters[decided["name"]] = on(adapter, slot)
            if wrapper is not slot:
                wrapper.train(slot.training)
                displaced[address] = model.set_slot(address, wrapper)
            adapter.train(slot.training)
        train_only(model, self.promises(plan).trains_only or ())
        return displaced

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        name, seed = plan.decisions["name"], plan.decisions["seed"]
        for address in plan.decisions["slots"]:
            adapter = model.slot(address).adapters[name]
            adapter.reset(slot_generator(seed, f"{address}/{name}"))

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
        ranks = sorted(set(decided["slots"].values()))
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return (
            f"Added the adapter {decided['name']!r} of {rank} to {len(decided['slots'])} linears "
            f"({', '.join(roles)}); only it trains."
        )


def _dtype(slot: LinearLike) -> torch.dtype:
    """An adapter is kept in its base's own precision; beside integers in the default one."""
    return next((p.dtype for p in slot.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _patterns(model: Any, given: Sequence[str] | str | None) -> list[str]:
    import fnmatch

    patterns = [given] if isinstance(given, str) else list(given or ())
    names = [name for name, _ in model.named_parameters()]
    all_of(
        SpecError,
        [
            f"lora: train: {unknown('parameter', pattern, names)}"
            for pattern in patterns
            if not fnmatch.filter(names, pattern)
        ],
    )
    return patterns


def wrapped(model: Any) -> dict[str, LoRA]:
    """Every slot that holds adapters, by address."""
    return {address: slot for address, slot in model.slots().items() if isinstance(slot, LoRA)}


def numbers(model: Any) -> dict[str, int]:
    """Every adapter of a model and its number, oldest first."""
    found = {name: number for slot in wrapped(model).values() for name, number in slot.numbers.items()}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def choose(model: Any, names: Sequence[str | None]) -> Tensor:
    """Adapter names of rows (None: no adapter) -> (B,) int64 for ``model(batch, adapters=...)``."""
    known = numbers(model)
    all_of(SpecError, [unknown("adapter", name, known) for name in names if name is not None and name not in known])
    picked = [-1 if name is None else known[name] for name in names]
    return torch.tensor(picked, dtype=torch.long, device=model.device)


def use(model: Any, name: str | None) -> Any:
    """Make ``name`` the adapter of calls that choose none (None: no adapter); returns the model.

    Adapter 0, the first, is used until then; the choice belongs to this process and is not saved.
    """
    number = int(choose(model, [name])[0])
    for slot in wrapped(model).values():
        slot.active = number
    return model
