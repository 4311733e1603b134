"""A training recipe as plain data: what is minimised, for how long, how fast, and what may move.

It is written into the run directory and into the model's history, and a resumed run must have the same one. As a file
it is TOML, see :mod:`formwright.training.configs`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from formwright import registry
from formwright.kit.errors import SpecError, all_of, unknown
from formwright.objectives.base import Objective
from formwright.training.schedules import check_schedule

PRECISIONS = ("float32", "bfloat16", "float16")
#: Settings that change no bit of what a run makes, so a resumed run may have others. (Offloading rounds the last bits
#: of a parameter of more than a hundred million numbers otherwise, in a fused kernel of several threads.)
FREE = ("gradient_checkpointing", "offload")


@dataclass(frozen=True)
class Recipe:
    """Everything that fixes a run besides the model and the data.

    objective: ``{"name": ..., options}``. steps and minutes: whichever is reached first ends the run; the schedule
    follows the further of the two. batch: rows a step at least (batches of the data are taken until they have as
    many); accumulation: batches of the data a step, where batch is not given; N processes take N at once, so a step's
    batches are then a multiple of N. lr, schedule, warmup, floor: see :mod:`formwright.training.schedules`.
    weight_decay: of matrices and tables, never of norms, biases and scalars. betas, eps: of AdamW. clip: largest norm
    of the gradient, None for none. ema: decay of averaged other models. dropout: run the model in training mode.
    trainable: patterns of addresses, see :mod:`formwright.training.parameters`. precision: of products, float32,
    bfloat16 or float16 (parameters stay as they are). gradient_checkpointing: items of a span whose activations are
    computed again in the backward pass instead of kept, 0 for none. offload: AdamW's state in the host's memory, see
    :mod:`formwright.training.offload`.
    """

    objective: dict[str, Any] = field(default_factory=lambda: {"name": "causal-lm"})
    steps: int | None = None
    minutes: float | None = None
    batch: int | None = None
    accumulation: int = 1
    lr: float = 3e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    floor: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    clip: float | None = 1.0
    ema: float = 0.999
    seed: int = 0
    dropout: bool = True
    trainable: tuple[str, ...] = ("*",)
    precision: str = "float32"
    gradient_checkpointing: int = 0
    offload: bool = False

    def __post_init__(self) -> None:
        all_of(SpecError, problems_of({entry.name: getattr(self, entry.name) for entry in fields(self)}))
        for entry in fields(self):
            object.__setattr__(self, entry.name, _fitted(str(entry.type), getattr(self, entry.name)))
        problems = check_schedule(self.schedule, self.warmup, self.floor)
        if self.steps is None and self.minutes is None:
            problems.append("a run needs an end: say steps=N, minutes=M, or both")
        if self.steps is not None and self.steps < 0:
            problems.append(f"steps={self.steps} must not be negative")
        if self.minutes is not None and self.minutes <= 0:
            problems.append(f"minutes={self.minutes} must be above 0")
        if self.batch is not None and (self.batch < 1 or self.accumulation != 1):
            problems.append(f"batch={self.batch} must be at least 1, and accumulation is then left at 1")
        if self.accumulation < 1:
            problems.append(f"accumulation={self.accumulation} must be at least 1")
        if self.lr < 0 or self.weight_decay < 0 or (self.clip is not None and self.clip <= 0):
            problems.append("lr and weight_decay must not be negative, and clip must be above 0 (or None)")
        if not all(0.0 <= beta < 1.0 for beta in self.betas) or len(self.betas) != 2:
            problems.append(f"betas={self.betas} must be two numbers, at least 0 and below 1")
        if self.seed < 0:
            problems.append(f"seed={self.seed} must not be negative")
        if not 0.0 <= self.ema < 1.0:
            problems.append(f"ema={self.ema} must be at least 0 and below 1")
        if self.precision not in PRECISIONS:
            problems.append(unknown("precision", self.precision, PRECISIONS))
        if self.gradient_checkpointing < 0:
            problems.append(f"gradient_checkpointing={self.gradient_checkpointing} must not be negative")
        all_of(SpecError, problems)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        all_of(SpecError, problems_of(data))
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, equal after the round trip."""
        data = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    def replace(self, **changes: Any) -> Recipe:
        return replace(self, **changes)


def problems_of(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names and kinds of settings, a sentence each."""
    known = {entry.name: str(entry.type) for entry in fields(Recipe)}
    problems = []
    for name, value in settings.items():
        if name not in known:
            problems.append(unknown("setting of a recipe", name, known))
            continue
        try:
            _fitted(known[name], value)
        except (TypeError, ValueError):
            words, optional = _KINDS[known[name].removesuffix(NONE)][0], known[name].endswith(NONE)
            problems.append(f"{name}={value!r} must be {words}{', or none' if optional else ''}")
    return problems


NONE = " | None"


def _fitted(kind: str, value: Any) -> Any:
    """A value as a field of that type holds it; TypeError or ValueError where it is of another kind."""
    if value is None and kind.endswith(NONE):
        return None
    return _KINDS[kind.removesuffix(NONE)][1](value)


def _only(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return check


def _number(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, (bool, str)):
            raise TypeError
        return make(value)

    return check


def _patterns(value: Any) -> tuple[str, ...]:
    return tuple(map(_only(str), (value,) if isinstance(value, str) else value))


def _table(value: Any) -> dict[str, Any]:
    return {"name": value} if isinstance(value, str) else dict(_only(Mapping)(value))  # type: ignore[type-abstract]


#: Type of a field -> how to say it, and what makes a value of it.
_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bool": ("true or false", _only(bool)),
    "int": ("a whole number", _number(operator.index)),
    "float": ("a number", _number(float)),
    "str": ("a name", _only(str)),
    "tuple[float, float]": ("a list of two numbers", lambda value: tuple(map(_number(float), value))),
    "tuple[str, ...]": ("a pattern or a list of patterns", _patterns),
    "dict[str, Any]": ("a name, or a table with a name", _table),
}


def make_objective(what: Any) -> tuple[Objective, dict[str, Any]]:
    """An objective from a name, ``{"name": ..., options}`` or an objective, and what a recipe says of it."""
    if isinstance(what, Objective):
        name = getattr(type(what), "registered", ("", type(what).__name__))[1]
        plain = {key: value for key, value in vars(what).items() if _plain(value)}
        return what, {"name": name, **{key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}}
    if isinstance(what, str):
        what = {"name": what}
    if not isinstance(what, Mapping) or "name" not in what:
        raise SpecError(f"an objective is a name or {{'name': NAME, options}}, not {what!r}")
    options = {key: value for key, value in what.items() if key != "name"}
    target = registry.resolve("objective", what["name"])
    known = list(inspect.signature(target).parameters)
    all_of(SpecError, [f"{what['name']}: " + unknown("option", key, known) for key in options if key not in known])
    return target(**options), {"name": what["name"], **options}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(inner) for inner in value)
    return value is None or isinstance(value, (bool, int, float, str))
