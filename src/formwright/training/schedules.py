"""Learning-rate schedules as functions of progress, so that a run measured in minutes follows them as well.

``factor = warm(p) * shape(p)`` with progress p from 0 to 1: ``warm`` rises linearly over the first ``warmup`` of the
run; ``constant``: 1; ``linear``: from 1 to ``floor``; ``cosine``: half a cosine from 1 to ``floor`` (Loshchilov and
Hutter, 2017, 1608.03983); ``wsd``: 1, then linear to ``floor`` over the last fifth (Hu et al., 2024, 2404.06395);
``inverse-sqrt``: sqrt(warmup / p) (Vaswani et al., 2017, 1706.03762), which ends above ``floor`` and takes a warmup
below 1 % for 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from formwright.kit.errors import SpecError, unknown

#: Where ``wsd`` begins to fall.
STABLE = 0.8
#: The warmup that ``inverse-sqrt`` takes at least, since its fall is measured in warmups.
SHORTEST = 0.01


def _constant(s: float, warmup: float) -> float:
    return 1.0


def _linear(s: float, warmup: float) -> float:
    return 1.0 - s


def _cosine(s: float, warmup: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * s))


def _wsd(s: float, warmup: float) -> float:
    return min(1.0, (1.0 - s) / (1.0 - STABLE))


def _inverse_sqrt(s: float, warmup: float) -> float:
    start = max(warmup, SHORTEST)
    return math.sqrt(start / (start + s * (1.0 - start)))


#: Name -> shape of (share of the way from the end of the warmup, warmup).
SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse-sqrt": _inverse_sqrt,
}


def check_schedule(name: str, warmup: float, floor: float) -> list[str]:
    """Everything wrong with a schedule, a sentence each."""
    problems = [] if name in SHAPES else [unknown("schedule", name, SHAPES)]
    if not 0.0 <= warmup < 1.0:
        problems.append(f"warmup={warmup} is the share of the run that warms up: at least 0 and below 1")
    if not 0.0 <= floor <= 1.0:
        problems.append(f"floor={floor} is the share of lr that remains at the end: from 0 to 1")
    return problems


def factor(name: str, progress: float, warmup: float = 0.0, floor: float = 0.0) -> float:
    """The factor on lr at ``progress`` (values outside 0 to 1 are clamped). The shape begins where warming up ends."""
    if name not in SHAPES:
        raise SpecError(unknown("schedule", name, SHAPES))
    p = min(1.0, max(0.0, progress))
    if p < warmup:
        return p / warmup
    return floor + (1.0 - floor) * SHAPES[name]((p - warmup) / (1.0 - warmup), warmup)
