"""A directory of ``peft`` as an adapter of a model: one function a method reads its tensors and decides the surgery."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formwright.hub.families._files import read_json
from formwright.hub.peft.names import CONFIG, ROOT, VALUES, Names, Place
from formwright.hub.peft.names import sizes as sizes_of
from formwright.kit.errors import DataError, unknown
from formwright.parts.make import bad_name
from formwright.surgery.adapt._changes import held
from formwright.surgery.adapt._training import plain_name, remember
from formwright.surgery.adapt.switch import numbers
from formwright.surgery.base import Plan, apply, layout_fingerprint, surgery


def read(model: Any, path: Path) -> Any:
    """Add the adapter of a ``peft`` directory to ``model``, in place; returns the model.

    Raises DataError for a method, a setting or a tensor that has no equivalent here, before anything is changed.
    """
    config = read_json(path / CONFIG)
    kind = config.get("peft_type")
    if kind not in READERS:
        raise DataError(f"{path / CONFIG}: {unknown('peft_type', str(kind), READERS)}")
    names = Names.of(model)
    given = _Given(path, _stored(path / VALUES))
    made = READERS[kind](model, config, given, names)
    beside = _beside(model, given, names)
    given.check()
    decisions = {**made.decisions, "train": sorted(beside), "before": remember(model)}
    if made.plan != "layernorm-tuning":
        decisions |= {
            "name": _free_name(model, path),
            "number": 1 + max(numbers(model).values(), default=-1),
            "seed": 0,
        }
    plan = Plan(made.plan, surgery(made.plan).version, {}, decisions, fingerprint=layout_fingerprint(model))
    apply(model, plan)
    with torch.no_grad():
        made.fill(model, plan)
        own = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        for name, value in beside.items():
            own[plain_name(name)].copy_(value)
    return model


@dataclass
class Made:
    """What a directory says: the surgery, its decisions, and what puts the values into what it made."""

    plan: str
    decisions: dict[str, Any]
    fill: Callable[[Any, Plan], None]


class _Given:
    """The tensors of a directory, each to be taken once."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.path, self.tensors = path, tensors

    def modules(self, ending: str) -> list[str]:
        """The modules that have a tensor of that ending, in order."""
        return [key.removesuffix(ending) for key in self.tensors if key.endswith(ending)]

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise DataError(f"{self.path / VALUES}: tensor {name} is missing")
        return self.tensors.pop(name)

    def check(self) -> None:
        if self.tensors:
            rest = ", ".join(list(self.tensors)[:6])
            raise DataError(f"{self.path / VALUES}: {len(self.tensors)} tensors have no use here: {rest}")


def _stored(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    return {key.removeprefix(ROOT): value for key, value in found.items()}


def _free_name(model: Any, path: Path) -> str:
    name = path.resolve().name
    return "default" if bad_name(name, torch.nn.ModuleDict()) or name in numbers(model) else name


def _beside(model: Any, given: _Given, names: Names) -> dict[str, Tensor]:
    """Our name -> value of whole modules that were trained with the adapter."""
    present = {plain_name(name): name for name, _ in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for row in names.rows:
        if all(name in given.tensors for name in row.theirs):
            values = row.change.to_ours([given.take(name) for name in row.theirs])
            found.update(zip([present[name] for name in row.ours], values))
    return found


def _placed(names: Names, given: _Given, module: str) -> Place:
    place = names.place(module)
    if place is None:
        known = [one.module for one in names.places]
        raise DataError(f"{given.path / VALUES}: {unknown('linear', module, known)}")
    return place


def _read_lora(model: Any, config: Mapping[str, Any], given: _Given, names: Names) -> Made:
    kind = "dora" if config.get("use_dora") else "lora"
    values: dict[str, tuple[Tensor, ...]] = {}
    scalings: dict[str, float] = {}
    for module in given.modules(".lora_A.weight"):
        a, b = (given.take(f"{module}.lora_{letter}.weight") for letter in "AB")
        place = _placed(names, given, module)
        sizes = sizes_of(model, place)
        parts = [b.split(sizes)] + (
            [given.take(f"{module}.lora_magnitude_vector").split(sizes)] if kind == "dora" else []
        )
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        for address, own in zip(place.addresses, zip(*parts)):
            values[address] = (a, *own)
            scalings[address] = alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
    if not values:
        raise DataError(f"{given.path / VALUES} holds no lora_A, so nothing to add")
    common = Counter(scalings.values()).most_common(1)[0][0]
    decisions = {
        "slots": {address: len(own[0]) for address, own in values.items()},
        "scaling": common,
        "dropout": float(config.get("lora_dropout") or 0.0),
        "scalings": {address: own for address, own in scalings.items() if own != common},
    }
    return Made(kind, decisions, _filler(values, ("A", "B", "m")))


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The entry whose pattern is the end of a module's name, as ``peft`` looks it up."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _filler(values: Mapping[str, tuple[Tensor, ...]], names: tuple[str, ...]) -> Callable[[Any, Plan], None]:
    def fill(model: Any, plan: Plan) -> None:
        for address, change in held(model, plan).items():
            for name, value in zip(names, values[address]):
                getattr(change, name).copy_(value)

    return fill


def _read_ia3(model: Any, config: Mapping[str, Any], given: _Given, names: Names) -> Made:
    slots: dict[str, dict[str, str]] = {}
    values: dict[str, tuple[Tensor, ...]] = {}
    for module in given.modules(".ia3_l"):
        factor, place = given.take(f"{module}.ia3_l"), _placed(names, given, module)
        inputs = factor.shape[0] == 1
        sizes = sizes_of(model, place)
        parts = [factor.flatten()] * len(sizes) if inputs else factor.flatten().split(sizes)
        for address, own in zip(place.addresses, parts):
            slots[address], values[address] = {"side": "in" if inputs else "out"}, (own,)
    return Made("ia3", {"slots": slots}, _filler(values, ("l",)))


def _read_vera(model: Any, config: Mapping[str, Any], given: _Given, names: Names) -> Made:
    slots: dict[str, list[int]] = {}
    values: dict[str, tuple[Tensor, ...]] = {}
    for module in given.modules(".vera_lambda_d"):
        place = _placed(names, given, module)
        if len(place.addresses) > 1:
            raise DataError(f"{given.path}: {module} is several linears here, which cannot share its rows of B")
        slot = model.slot(place.addresses[0])
        slots[place.addresses[0]] = [slot.in_features, slot.out_features]
        values[place.addresses[0]] = tuple(given.take(f"{module}.vera_lambda_{letter}") for letter in "db")
    shared = {letter: given.take(f"base_model.vera_{letter}") for letter in "AB"}

    def fill(model: Any, plan: Plan) -> None:
        _filler(values, ("d", "b"))(model, plan)
        first: Any = next(iter(held(model, plan).values()))
        for letter, value in shared.items():
            getattr(first.shared, letter).copy_(value)

    dropout = float(config.get("vera_dropout") or 0.0)
    return Made("vera", {"slots": slots, "rank": len(shared["A"]), "dropout": dropout}, fill)


def _read_norms(model: Any, config: Mapping[str, Any], given: _Given, names: Names) -> Made:
    values: dict[str, Tensor] = {}
    for ending in (".ln_tuning_layers.weight", ".ln_tuning_layers.bias"):
        for module in given.modules(ending):
            last = ending.rpartition(".")[2]
            theirs = [f"{names.neutral(module)}.{last}", f"{module}.{last}", f"{names.prefix}{module}.{last}"]
            row = next((row for row in names.rows if row.theirs[0] in theirs), None)
            if row is None:
                raise DataError(f"{given.path / VALUES}: this model has no norm {module}")
            values[row.ours[0]] = given.take(f"{module}{ending}")

    def fill(model: Any, plan: Plan) -> None:
        own = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        for name, value in values.items():
            own[name].copy_(value)

    return Made("layernorm-tuning", {"tuned": list(values)}, fill)


Reader = Callable[[Any, Mapping[str, Any], _Given, Names], Made]
READERS: dict[str, Reader] = {"LORA": _read_lora, "IA3": _read_ia3, "VERA": _read_vera, "LN_TUNING": _read_norms}
