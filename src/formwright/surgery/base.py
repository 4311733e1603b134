"""Surgery: deciding and doing are two things.

``plan`` decides (it may run data and be slow) and returns plain, readable, editable data. ``reshape`` changes structure
only: it runs on the meta device, and it alone is replayed when a model is loaded. ``fill`` gives values, from what was
displaced. ``apply`` is both, in place; the plan becomes a line of ``model.history``, which is saved with the weights.
"""

from __future__ import annotations

import copy as copying
import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from formwright import registry
from formwright.kit.errors import Refusal, SpecError, nearest
from formwright.models.model import Entry
from formwright.parts.base import LinearLike, with_memory
from formwright.parts.context import keyed_generator

#: {id or slot address: the old module}, what a surgery took out.
Displaced = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a surgery will do.

    decisions: plain JSON, everything that fixes a shape. tensors: what only ``fill`` needs (covariances, masks).
    fingerprint: of the layout it was made for; a model laid out otherwise is refused. An edited plan keeps it.
    """

    surgery: str
    version: int
    options: dict[str, Any] = field(default_factory=dict)
    decisions: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    fingerprint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the tensors."""
        return {
            "surgery": self.surgery,
            "version": self.version,
            "options": self.options,
            "decisions": self.decisions,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tensors: dict[str, Tensor] | None = None) -> Plan:
        known = ("surgery", "version", "options", "decisions", "fingerprint")
        problems = [f"plan: unknown key {key!r}{nearest(key, known)}" for key in data if key not in known]
        problems += [f"plan: key {key!r} is missing" for key in known[:2] if key not in data]
        problems += [
            f"plan: {key!r} must be an object, not {data[key]!r}"
            for key in ("options", "decisions")
            if not isinstance(data.get(key, {}), Mapping)
        ]
        if problems:
            raise SpecError("\n".join(problems))
        return cls(**data, tensors=tensors or {})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise SpecError(f"a plan must be JSON: {error}") from None
        if not isinstance(data, dict):
            raise SpecError("a plan must be a JSON object")
        return cls.from_dict(data)


@dataclass(frozen=True)
class Promises:
    """What a plan promises, tested for every surgery.

    preserves_function: greatest relative change of the outputs when applied, or None for no promise. undo: may be
    undone after loading too (additive), without kept modules. mergeable: can be folded into plain weights.
    trains_only: shell-style patterns of the parameter names that stay trainable, or None for unchanged. needs: what
    ``plan`` must be given (``"evidence"``).
    """

    preserves_function: float | None = None
    undo: bool = False
    mergeable: bool = False
    trains_only: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Phase:
    """Training between a surgery's open and closed form, as plain data that ``training`` carries out."""

    objective: str
    trainable: tuple[str, ...]
    steps: int
    options: dict[str, Any] = field(default_factory=dict)


class Companion:
    """What a surgery does beside a training run (budgets, schedules); ``run`` is training's own account of the run.

    ``run.progress`` is 0 to 1, ``run.step`` counts finished steps, ``run.last`` says that none follows.
    """

    def gradients(self, run: Any) -> None:
        """The mean gradients are there, and the parameters have not moved yet."""

    def stepped(self, run: Any) -> None:
        """The parameters have moved."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The opposite of :meth:`state_dict`."""


class Surgery:
    """One registered surgery. Subclasses give ``plan``, ``reshape`` and ``fill``; the rest has defaults.

    ``version`` rises when decisions change their meaning; every released ``reshape`` must replay its old plans.
    ``examples`` are option sets (with tiny sizes) for the conformance tests and the composition matrix; ``after``
    names a surgery without which there is nothing for this one to do, so the tests carry that one out first.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    family: ClassVar[str] = ""
    #: Whether it is a way of fine-tuning: what it adds, or says, is all that trains afterwards.
    tunes: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    after: ClassVar[str] = ""

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        """Decide. Checks names, shapes, order and memory first and raises all refusals at once."""
        raise NotImplementedError

    def promises(self, plan: Plan) -> Promises:
        return Promises()

    def check(self, model: Any, plan: Plan) -> None:
        """Everything that would make ``reshape`` or ``fill`` stumble, said before any work; plans may be edited."""

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        """Change the structure by ``plan.decisions`` alone; must run on the meta device. Returns what was taken out."""
        raise NotImplementedError

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        """Give the new modules their values. Entries of ``displaced`` may be popped once used."""

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        """Undo ``reshape``. ``displaced`` is empty after loading; only surgeries that promise undo manage then."""
        for address, module in displaced.items():
            model.set_slot(address, module)

    def phases(self, plan: Plan) -> list[Phase]:
        return []

    def companion(self, model: Any, plan: Plan) -> Companion | None:
        """What this surgery does beside a training run; None for nothing. Training asks for it by itself."""
        return None

    def close(self, model: Any, plan: Plan) -> Plan | None:
        """From the training form to the final form, as a further plan; None where there is nothing to close."""
        return None

    def words(self, plan: Plan) -> str:
        """The plan in one sentence, for reports and model cards."""
        return f"{plan.surgery} {json.dumps(plan.options)}" if plan.options else plan.surgery

    def short(self, plan: Plan) -> str:
        """The plan in a word or two, for tables."""
        return plan.surgery

    def precision_moves(self, model: Any, target: str) -> list[dict[str, Any]]:
        """Option sets that a search may try last, without training, to make ``target`` (latency, size, macs, memory)
        cheaper; empty for surgeries that need healing or do something else."""
        return []

    def sparing(self, options: dict[str, Any], items: list[str]) -> dict[str, Any] | None:
        """The options of such a move that leave ``items`` as they are; None for a surgery without that knob."""
        return None

    def made(self, model: Any, options: dict[str, Any], decisions: dict[str, Any], **tensors: Tensor) -> Plan:
        """A plan for ``model`` with this surgery's name and version."""
        return Plan(self.name, self.version, options, decisions, tensors, layout_fingerprint(model))


def layout_fingerprint(model: Any) -> str:
    """A short hash of what the model's layers are now: ids, kinds and sizes. Heads do not count: they come and go."""
    items = {item.id for item in model.walk()}
    sizes = {
        address: (slot.out_features, slot.in_features)
        for address, slot in model.slots().items()
        if address.rpartition("/")[2].partition(":")[0] in items
    }
    return hashlib.sha256(json.dumps([model.layout(), sizes], sort_keys=True).encode()).hexdigest()[:16]


def surgery(name: str) -> Surgery:
    """The registered surgery of that name."""
    made = registry.resolve("surgery", name)()
    made.name = name
    return made


def plan(model: Any, name: str, /, evidence: Any = None, **options: Any) -> Plan:
    """Decide what ``name`` would do to ``model``; nothing is changed. ``evidence``: texts, batches, ids."""
    return surgery(name).plan(model, evidence, **options)


def apply(
    model: Any,
    plan_or_name: Plan | str,
    /,
    evidence: Any = None,
    *,
    keep_undo: bool = False,
    **options: Any,
) -> Any:
    """Carry a plan out in place and return the model; a name with options is planned first.

    ``keep_undo`` keeps the displaced modules so that :func:`undo` works for any surgery in this process.
    """
    decided = plan(model, plan_or_name, evidence, **options) if isinstance(plan_or_name, str) else plan_or_name
    if isinstance(plan_or_name, Plan) and options:
        raise SpecError("a plan already holds its options; edit the plan instead")
    by = surgery(decided.surgery)
    if decided.version > by.version:
        raise Refusal(
            f"the plan is of {decided.surgery} version {decided.version}, this library knows version {by.version}: "
            "upgrade"
        )
    if decided.fingerprint and decided.fingerprint != layout_fingerprint(model):
        raise Refusal(
            f"this plan of {decided.surgery} was made for a model laid out otherwise; make a new plan for this one"
        )
    by.check(model, decided)
    displaced = by.reshape(model, decided)
    kept = dict(displaced) if keep_undo else None
    with torch.no_grad():
        by.fill(model, decided, displaced)
    model.history.append(Entry("surgery", decided.surgery, decided.to_dict()))
    undo_stack(model).append(kept)
    return model


def undo_stack(model: Any) -> list[Displaced | None]:
    """What the surgeries of this process displaced, in step with the surgery lines of the history."""
    if not hasattr(model, "_displaced"):
        model._displaced = []
    surgeries = sum(1 for entry in model.history if entry.kind == "surgery")
    stack = model._displaced
    while len(stack) < surgeries:
        stack.insert(0, None)
    return stack


def undo(model: Any) -> Any:
    """Take back the last surgery, in place. Additive ones always; others while their displaced modules are kept."""
    last = next((entry for entry in reversed(model.history) if entry.kind == "surgery"), None)
    if last is None:
        raise Refusal("there is no surgery to undo")
    decided = Plan.from_dict(last.data)
    by = surgery(decided.surgery)
    displaced = undo_stack(model)[-1]
    if displaced is None and not by.promises(decided).undo:
        raise Refusal(
            f"{decided.surgery} cannot be undone: its displaced modules were not kept; "
            f"load {model.name or 'the original directory'} again"
        )
    by.restore(model, decided, displaced or {})
    undo_stack(model).pop()
    position = max(index for index, entry in enumerate(model.history) if entry is last)
    del model.history[position]
    return model


def replay(model: Any, entry: Entry) -> None:
    """Change the structure of a model (on meta) as its history says; values come from the file."""
    decided = Plan.from_dict(entry.data)
    by = surgery(decided.surgery)
    if decided.version > by.version:
        raise Refusal(
            f"this model was made by {decided.surgery} version {decided.version}; this library knows {by.version}: "
            "upgrade"
        )
    by.reshape(model, decided)
    model.history.append(entry)


def copy(model: Any, share: bool = False) -> Any:
    """An independent model. With ``share`` the structure is copied but the values are the same memory, which is cheap
    and right for trying structural surgeries; what may train is each copy's own."""
    memo: dict[int, Any] = {}
    for kept in (getattr(model, "tokenizer", None), *model.history):
        memo[id(kept)] = kept
    if share:
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = buffer
    return copying.deepcopy(model, memo)


def words(entry: Entry) -> str:
    """One line of a history in words."""
    if entry.kind == "surgery":
        return surgery(entry.name).words(Plan.from_dict(entry.data))
    data = ", ".join(f"{key} {value}" for key, value in entry.data.items() if isinstance(value, (int, float, str)))
    return f"{entry.name} ({data})" if data else entry.name


#: Roles under the names that people use; the short ones stand in the parts.
ROLES = {"query": "q", "key": "k", "value": "v", "output": "o"}
#: What stands beside the layer list, and so is no part of ``all``.
BESIDE = ("stem", "head", "conditioner")


def chosen_slots(model: Any, where: Sequence[str] | str | None, default: Sequence[str], what: str) -> list[str]:
    """Slot addresses that match patterns: a role (``q`` or ``query``), an item (``b3.*``), an address
    (``b3.attention:q``), or ``all`` for every linear of the layer list.

    Patterns are shell-style. One that matches nothing is a SpecError with the nearest address or role.
    """
    return chosen_addresses(list(model.slots()), where, default, what)


def chosen_addresses(
    known: Sequence[str], where: Sequence[str] | str | None, default: Sequence[str], what: str
) -> list[str]:
    """The same among addresses of any kind, in their order."""
    patterns = [where] if isinstance(where, str) else list(default if where is None else where)
    roles = sorted({address.rpartition(":")[2] for address in known})
    found: set[str] = set()
    problems = []
    for pattern in patterns:
        matched = {address for address in known if _matches(address, pattern)}
        if not matched and where is not None:
            near = nearest(pattern, [*known, *roles, *(name for name, role in ROLES.items() if role in roles), "all"])
            problems.append(f"{what}: {pattern!r} matches no slot{near} (roles: {', '.join(roles)})")
        found |= matched
    if problems:
        raise SpecError("\n".join(problems))
    return [address for address in known if address in found]


def _matches(address: str, pattern: str) -> bool:
    owner, _, role = address.rpartition(":")
    if pattern == "all" and owner.rpartition("/")[2].partition(".")[0] not in BESIDE:
        return True
    names = (address, role, address.partition(":")[0])
    return any(fnmatch.fnmatchcase(name, pattern) for name in names) or ROLES.get(pattern) == role


def core(slot: LinearLike) -> LinearLike:
    """What a slot holds below its wrappers."""
    while isinstance(getattr(slot, "base", None), LinearLike):
        slot = slot.base  # type: ignore[assignment]
    return slot


def set_core(model: Any, address: str, module: LinearLike) -> LinearLike:
    """Put ``module`` below the wrappers of a slot (into the slot where there are none); returns what it replaces."""
    slot = model.slot(address)
    below = core(slot)
    if below is slot:
        return model.set_slot(address, module)
    while slot.base is not below:
        slot = slot.base
    slot.base = module
    return below


def check_options(name: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """SpecError naming every unknown option and the nearest known one."""
    problems = [f"{name}: unknown option {key!r}{nearest(key, known)}" for key in options if key not in known]
    if problems:
        raise SpecError("\n".join(problems))


def slot_generator(seed: int, address: str) -> torch.Generator:
    """Random starts of new modules are keyed by (seed, slot)."""
    return keyed_generator(seed, address)


def on(module: nn.Module, like: nn.Module) -> nn.Module:
    """``module`` (just laid out on meta) with empty tensors where ``like`` lives; on meta it stays there."""
    device = next((t.device for t in (*like.parameters(), *like.buffers())), torch.device("cpu"))
    return module if device.type == "meta" else with_memory(module, device)
