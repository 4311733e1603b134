"""A model as plain data: a stem, conditioners, a flat list of layers, a final norm, and a head.

``ModelSpec`` and ``SystemSpec`` are JSON in and JSON out, equal after the round trip, with unknown keys refused by
name. What a node of the layer list may look like::

    {"part": "attention", "heads": 12, "norm": ..., "order": "pre|post|sandwich", "combine": ..., "id": ...}
    {"repeat": 6, "layers": [...]}          each repetition is one block
    {"loop": 4, "layers": [...]}            the same layers run four times
    {"bare": {"part": ...}}                 no residual around it
    {"reshape": {"part": ...}}              may change length, width or grid
    {"tap": "name"}, {"join": "name", "combine": ...}      a skip past the layers between
    {"use": "A"}                            the layers of "shared": {"A": [...]}, one set of tensors
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from formwright.kit.errors import SpecError, unknown

Data = dict[str, Any]


def _plain(value: Any, where: str) -> Any:
    """A deep copy made of dicts, lists, strings, numbers, booleans and None only."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"{where} is {value}, which JSON cannot say")
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise SpecError(f"{where} is a {type(value).__name__}; a spec holds plain data only")


@dataclass(frozen=True)
class ModelSpec:
    """One backbone. ``defaults`` hold the norm, order and combine of layers that state none.

    stem and head: ``{"part": NAME, ...}`` (head: or a dict of named heads). final_norm stands before the heads.
    memory: names of towers that cross-attention reads. width: of the stream; may stand in the stem instead.
    """

    stem: Data
    layers: list[Data]
    head: Data = field(default_factory=lambda: {"part": "states"})
    defaults: Data = field(default_factory=dict)
    conditioners: Data = field(default_factory=dict)
    shared: Data = field(default_factory=dict)
    final_norm: Data | str | None = None
    memory: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, _plain(getattr(self, entry.name), entry.name))
        problems: list[str] = []
        wanted = {"head": dict, "defaults": dict, "conditioners": dict, "shared": dict, "memory": list}
        for name, kind in wanted.items():
            if not isinstance(getattr(self, name), kind):
                what = "an object" if kind is dict else "a list of names"
                problems.append(f"{name} must be {what}, not {getattr(self, name)!r}")
        if not isinstance(self.stem, dict) or not ("part" in self.stem or "use" in self.stem):
            problems.append("stem must be {'part': NAME, 'width': N, ...}")
        if not isinstance(self.layers, list):
            problems.append("layers must be a list")
        for key in self.defaults if isinstance(self.defaults, dict) else ():
            if key not in ("norm", "order", "combine"):
                problems.append("defaults: " + unknown("key", key, ("norm", "order", "combine")))
        if problems:
            raise SpecError("\n".join(problems))

    @property
    def width(self) -> int:
        """Width of the stream where the layers begin."""
        width = self.stem.get("width")
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise SpecError(f"stem: width must be a positive whole number, not {width!r}")
        return width

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        if not isinstance(data, Mapping):
            raise SpecError(f"a model spec must be an object, not {data!r}")
        known = [entry.name for entry in fields(cls)]
        problems = [unknown("key of a model spec", key, known) for key in data if key not in known]
        problems += [f"a model spec needs {key!r}" for key in ("stem", "layers") if key not in data]
        if problems:
            raise SpecError("\n".join(problems))
        return cls(**data)

    def to_dict(self) -> Data:
        """Plain data, without keys that stand at their default."""
        out: Data = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in ("stem", "layers", "head") or value != _default(entry):
                out[entry.name] = copy.deepcopy(value)
        return out

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        return cls.from_dict(_load(text))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)


@dataclass(frozen=True)
class SystemSpec:
    """Several named towers and who reads whom: ``{"towers": {"query": spec, "document": "query", ...}}``.

    A tower that is a string is the tower of that name again (one set of tensors). A tower's ``memory`` lists towers
    that run before it and that its cross-attention reads. ``output`` names the tower whose head answers.
    """

    towers: dict[str, Any]
    output: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.towers, Mapping) or not self.towers:
            raise SpecError("a system needs at least one tower: {'towers': {NAME: model spec}}")
        problems: list[str] = []
        towers: dict[str, Any] = {}
        for name, tower in self.towers.items():
            try:
                towers[name] = tower if isinstance(tower, (str, ModelSpec)) else ModelSpec.from_dict(tower)
            except SpecError as error:
                problems += [f"tower {name!r}: {line}" for line in str(error).split("\n")]
        if problems:
            raise SpecError("\n".join(problems))
        object.__setattr__(self, "towers", towers)
        object.__setattr__(self, "output", self.output or list(towers)[-1])
        before: list[str] = []
        for name, tower in towers.items():
            if isinstance(tower, str):
                if tower not in before:
                    problems.append(f"tower {name!r}: " + unknown("tower", tower, before))
            else:
                problems += [
                    f"tower {name!r} reads memory {m!r}, which is no tower before it"
                    for m in tower.memory
                    if m not in before
                ]
            before.append(name)
        if self.output not in towers:
            problems.append("output: " + unknown("tower", self.output, towers))
        if problems:
            raise SpecError("\n".join(problems))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SystemSpec:
        if "towers" not in data:
            raise SpecError("a system spec needs 'towers'")
        spare = [
            unknown("key of a system spec", key, ("towers", "output"))
            for key in data
            if key not in ("towers", "output")
        ]
        if spare:
            raise SpecError("\n".join(spare))
        return cls(**data)

    def to_dict(self) -> Data:
        towers = {name: t if isinstance(t, str) else t.to_dict() for name, t in self.towers.items()}
        return {"towers": towers, "output": self.output}

    @classmethod
    def from_json(cls, text: str) -> SystemSpec:
        return cls.from_dict(_load(text))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)


def _default(entry: Field) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _load(text: str) -> Data:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"a spec must be JSON: {error}") from None
    if not isinstance(data, dict):
        raise SpecError(f"a spec must be a JSON object, not a {type(data).__name__}")
    return data


def spec_from(data: Any) -> ModelSpec | SystemSpec:
    """A spec from a spec, plain data, or JSON text."""
    if isinstance(data, (ModelSpec, SystemSpec)):
        return data
    if isinstance(data, str):
        data = _load(data)
    if not isinstance(data, Mapping):
        raise SpecError(f"a spec is plain data, not a {type(data).__name__}")
    return SystemSpec.from_dict(data) if "towers" in data else ModelSpec.from_dict(data)
