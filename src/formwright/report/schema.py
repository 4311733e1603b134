"""What a report is made of: plain data with a fixed schema, checked once, here.

``Front.from_json(data)`` takes the dictionary a search writes (``pareto.json``) and says everything that is wrong with
it at once; ``to_json`` gives it back. A number that was not measured is ``None``; NaN and infinities become ``None``
on the way in, so nothing behind this file has to think about them.

Quality ``kept`` is candidate/original on the *test* split (original/candidate where lower is better, above chance
where a chance level exists) and ``bound`` its one-sided 95 % lower bound. ``select`` is the metric on the select
split, which is all that mere candidates have.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError

from formwright.kit.errors import SpecError, unknown


def _finite(value: Any) -> Any:
    """Any real number (NumPy's too) as int or float; NaN and infinities as None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # bool is an int in Python; here it is a mistake
        raise ValueError(f"a number or null is wanted, not {value!r}")
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


Number = Annotated[float | None, BeforeValidator(_finite)]
Count = Annotated[int | None, BeforeValidator(_finite)]
Flag = Annotated[bool, Strict()]
_CLOSED = ConfigDict(extra="forbid")


@dataclass
class Task:
    """What quality was measured on. ``chance`` is the score of guessing, where there is one."""

    __pydantic_config__ = _CLOSED
    name: str
    metric: str
    higher_is_better: Flag = True
    fingerprint: str = ""
    splits: dict[str, Count] = field(default_factory=dict)
    chance: Number = None


@dataclass
class Machine:
    """Where times were taken. ``load`` is the load average during the run."""

    __pydantic_config__ = _CLOSED
    cpu: str = ""
    cores: Count = None
    threads: Count = None
    memory_gb: Number = None
    flags: list[str] | str = field(default_factory=list)
    system: str = ""
    python: str = ""
    torch: str = ""
    formwright: str = ""
    load: Number = None


@dataclass
class Point:
    """One measured model of the printed front."""

    __pydantic_config__ = _CLOSED
    name: str
    quality: Number = None
    kept: Number = None
    bound: Number = None
    select: Number = None
    ms: Number = None
    ms_spread: Number = None  # interquartile range over the median of the repeats
    noisy: Flag = False
    speed: Number = None
    bytes: Count = None
    parameters: Count = None
    macs: Number = None
    cosine: Number = None  # mean cosine to the original's outputs
    history: list[str] = field(default_factory=list)
    history_words: list[str] = field(default_factory=list)
    on_front: Flag = False
    written: Flag = False
    accepted: Flag = True
    reproduce: str | None = None


@dataclass
class Candidate:
    """One model the search tried; ``quality`` is on the select split."""

    __pydantic_config__ = _CLOSED
    quality: Number = None
    ms: Number = None
    bytes: Count = None
    parameters: Count = None
    macs: Number = None
    label: str = ""
    accepted: Flag = False


# What may be made smaller: the field it is read from, the axis title, and the word for "n times ..."
TARGETS: dict[str, tuple[str, str, str]] = {
    "latency": ("ms", "Speed-up over the original", "faster"),
    "throughput": ("ms", "Speed-up over the original", "faster"),
    "size": ("bytes", "Times smaller than the original", "smaller"),
    "bytes": ("bytes", "Times smaller than the original", "smaller"),
    "parameters": ("parameters", "Times fewer parameters than the original", "fewer parameters"),
    "memory": ("bytes", "Times less memory than the original", "less memory"),
    "macs": ("macs", "Times fewer multiply-adds than the original", "fewer multiply-adds"),
}


@dataclass
class Front:
    """A whole result. ``out``, ``resume`` and ``files`` say where it was written and how the run goes on."""

    __pydantic_config__ = _CLOSED
    model: str
    task: Task
    points: list[Point]
    verb: str = "slim"
    keep: Number = None
    target: str = "latency"
    shape: str = ""
    seed: Count = None
    machine: Machine = field(default_factory=Machine)
    certifiable: Number = None  # the smallest relative loss this test split can certify
    baselines: dict[str, Number] = field(default_factory=dict)
    seconds: Number = None
    command: str = ""
    candidates: list[Candidate] = field(default_factory=list)
    bound_method: str = "paired bootstrap over the test items, one-sided 95 %"
    out: str | None = None
    resume: str | None = None
    files: list[str] = field(default_factory=lambda: ["model", "tokenizer", "report.html", "pareto.png"])

    @staticmethod
    def from_json(data: dict[str, Any] | Front) -> Front:
        """Check and build; a :class:`SpecError` lists every problem by its place (``points[2].ms: ...``)."""
        if isinstance(data, Front):
            return data
        try:
            front = _ADAPTER.validate_python(data)
        except ValidationError as error:
            raise SpecError("\n".join(_sentence(problem) for problem in error.errors())) from None
        problems = []
        if front.target not in TARGETS:
            problems.append(unknown("target", front.target, TARGETS))
        if sum(p.name == "original" for p in front.points) != 1:
            problems.append("points: exactly one must be named 'original'; everything is compared with it")
        if sum(p.written for p in front.points) > 1:
            problems.append("points: at most one can be the one that was written")
        if problems:
            raise SpecError("\n".join(problems))
        return front

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def original(self) -> Point:
        return next(p for p in self.points if p.name == "original")

    @property
    def written(self) -> Point | None:
        return next((p for p in self.points if p.written), None)

    def gain(self, point: Point | Candidate) -> float | None:
        """How many times cheaper than the original in what was to be made cheaper."""
        name = TARGETS[self.target][0]
        if name == "ms" and isinstance(point, Point) and point.speed is not None:
            return point.speed  # measured side by side, which the ratio of two separate times is not
        return _ratio(getattr(self.original, name), getattr(point, name))

    def kept(self, candidate: Candidate) -> float | None:
        """The share of quality a mere candidate kept, on the select split."""
        if not self.task.higher_is_better:
            return _ratio(self.original.select, candidate.quality)
        if candidate.quality is None or self.original.select is None:
            return None
        chance = self.task.chance or 0.0
        return _ratio(candidate.quality - chance, self.original.select - chance)

    def ordered(self) -> list[Point]:
        """The original, then the front from the least to the most gain, then what else was measured."""
        rest = [p for p in self.points if p.name != "original"]
        rest.sort(key=lambda p: (not (p.on_front or p.written), self.gain(p) or 0.0))
        return [self.original, *rest]

    def front(self) -> list[Point]:
        """The points of the front in order of gain, the original among them when it is on it."""
        return sorted((p for p in self.points if p.on_front), key=lambda p: self.gain(p) or 0.0)


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under is not None and under > 0 else None


def _sentence(problem: Any) -> str:
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"]).lstrip(".") or "report"
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        kinds = {"points": Point, "task": Task, "machine": Machine, "candidates": Candidate}
        kind: Any = kinds.get(problem["loc"][0], Front) if len(problem["loc"]) > 1 else Front
        known = [f.name for f in dataclasses.fields(kind)]
        return f"{place}: {unknown('key', str(problem['loc'][-1]), known)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message[:1].lower() + message[1:]}"


_ADAPTER = TypeAdapter(Front)
