"""Timing that can be believed on a shared machine: contenders alternate in one run, round by round.

Each round times every contender once, in an order that turns; drift of the machine then falls on all alike. The
figure of merit is the ratio, of minima and of medians, with the spread beside it; above 10 % it is marked noisy.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

#: Relative spread (interquartile range over median) above which a figure is marked noisy.
NOISY = 0.10


@dataclass(frozen=True)
class Timing:
    """Seconds of every round of one contender."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median; 0 for fewer than four rounds."""
        if len(self.seconds) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY

    def over(self, other: Timing) -> float:
        """How many times faster this contender is than ``other``, by medians."""
        return other.median / self.median


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    seconds: float | None = None,
    pause: float = 0.0,
    turn: int = 1,
) -> dict[str, Timing]:
    """Time every contender ``rounds`` times in one alternating run; ``seconds`` ends it early, after at least 3 rounds.

    Every other round runs in the opposite order, so that none always follows the same neighbour. ``pause`` seconds
    before each time, threads of the last contender that still wait for work go to sleep. A ``turn`` of several calls
    gives the mean of them: what a call costs that finds its weights and code where the last one left them.
    """
    for _ in range(warmup):
        for run in contenders.values():
            run()
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    started = time.perf_counter()
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            time.sleep(pause)
            begin = time.perf_counter()
            for _ in range(turn):
                contenders[name]()
            found[name].append((time.perf_counter() - begin) / turn)
        if seconds is not None and index >= 2 and time.perf_counter() - started > seconds:
            break
    return {name: Timing(tuple(times)) for name, times in found.items()}


def load_average() -> float:
    """The one-minute load of the machine, 0.0 where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0
