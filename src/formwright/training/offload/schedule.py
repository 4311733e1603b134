"""Which subgroup is updated where, in which order, and how long that takes.

With stride k every k-th subgroup is carried to the device, updated there and carried back while the host updates the
k - 1 before it; k = 1 streams everything through the device, no stride leaves everything to the host. Maurya et al.,
2024 (2410.21316). For subgroups of S numbers a period takes

    S max((k - 1)(1/host + 1/cast), (12 + w (k - 1))/up, 12/down, 1/device)

where 12 bytes are weight, mean and square in float32 and w those of a weight on the device. For each number the first
rises with k and the second falls; the best k is where they meet, found here by counting the whole step on a clock,
first fetch and last flush included (:func:`best_stride`), since the subgroups are few and their sizes differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from formwright.kit.errors import SpecError
from formwright.training.offload.lanes import Cell, Clock, Lanes

Place = Literal["host", "device", "resident"]
#: Bytes of an optimizer's state: weight, mean and square in float32.
STATE = 12
STRIDES = (1, 2, 3, 4, 5, 6, 7, 8, None)


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second. up, down: bytes from host to device and back. host, device: numbers updated
    there. cast: numbers that the host turns into the weights' own precision (infinite where that is float32)."""

    up: float
    down: float
    host: float
    device: float
    cast: float = math.inf

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise SpecError(f"rates: {name}={value} must be above 0")


def places(count: int, stride: int | None, resident: int = 0) -> list[Place]:
    """The place of each of ``count`` subgroups; the last ``resident`` ones live on the device and cover its last
    flush. stride: None for the host alone."""
    if stride is not None and stride < 1:
        raise SpecError(f"stride={stride} must be at least 1, or None to update everything on the host")
    if not 0 <= resident <= count:
        raise SpecError(f"resident={resident} must be from 0 to {count}, the number of subgroups")
    moving = count - resident
    found: list[Place] = ["device" if stride and (i + 1) % stride == 0 else "host" for i in range(moving)]
    found.extend("resident" for _ in range(resident))
    return found


@dataclass(frozen=True)
class Jobs:
    """What a step does, by subgroup; each is carried out on a lane. The cells say what it touches.

    fetch, flush: (subgroup, slot) a streamed one's state to a slot of the device, and back. update: (subgroup, place,
    slot) its new weights. raise_: (subgroup) the host's new weights to the device. gather: (subgroup) its gradient to
    the host.
    """

    fetch: Callable[[int, int], None]
    flush: Callable[[int, int], None]
    update: Callable[[int, Place, int | None], None]
    raise_: Callable[[int], None]
    gather: Callable[[int], None]


def idle(*_: object) -> None:
    """The work of a clock."""


IDLE = Jobs(idle, idle, idle, idle, idle)


class Cells:
    """The buffers of ``count`` subgroups: state and gradient on the host, weights and gradient on the device, and the
    two slots of the device through which streamed states pass."""

    def __init__(self, count: int) -> None:
        def row(name: str, number: int) -> list[Cell]:
            return [Cell(f"{name} of subgroup {i}") for i in range(number)]

        self.state, self.gathered = row("the host's state", count), row("the host's gradient", count)
        self.weights, self.gradients = row("the weights", count), row("the device's gradient", count)
        self.slots = [Cell(f"slot {i} of the device") for i in range(2)]


@dataclass(frozen=True)
class Sizes:
    """numbers: of each subgroup. weight, gradient: bytes of a number of each on the device."""

    numbers: Sequence[int]
    weight: int = 4
    gradient: int = 4


def ask_gather(lanes: Lanes, sizes: Sizes, rates: Rates, cells: Cells, index: int, jobs: Jobs) -> None:
    """Carry a subgroup's gradient down to the host."""
    seconds = sizes.numbers[index] * sizes.gradient / rates.down
    lanes.ask("down", functools.partial(jobs.gather, index), seconds, [cells.gradients[index]], [cells.gathered[index]])


def ask_step(lanes: Lanes, sizes: Sizes, where: Sequence[Place], rates: Rates, cells: Cells, jobs: Jobs = IDLE) -> None:
    """Ask for one step, whose gradients are already where their subgroups are updated."""
    streamed = [i for i, place in enumerate(where) if place == "device"]
    slots = {index: turn % 2 for turn, index in enumerate(streamed)}
    ahead = iter(streamed)

    def fetch() -> None:
        index = next(ahead, None)
        if index is not None:
            seconds = sizes.numbers[index] * STATE / rates.up
            run = functools.partial(jobs.fetch, index, slots[index])
            lanes.ask("up", run, seconds, [cells.state[index]], [cells.slots[slots[index]]])

    fetch()
    for index, place in enumerate(where):
        if place == "host":
            _ask_host(lanes, sizes, rates, cells, index, jobs)
            continue
        if place == "device":
            fetch()  # the next one's, into the other slot, while this one is updated
        _ask_device(lanes, sizes, rates, cells, index, slots.get(index), jobs)


def _ask_host(lanes: Lanes, sizes: Sizes, rates: Rates, cells: Cells, index: int, jobs: Jobs) -> None:
    numbers = sizes.numbers[index]
    update, raise_ = functools.partial(jobs.update, index, "host", None), functools.partial(jobs.raise_, index)
    lanes.ask(
        "host", update, numbers / rates.host + numbers / rates.cast, [cells.gathered[index]], [cells.state[index]]
    )
    lanes.ask("up", raise_, numbers * sizes.weight / rates.up, [cells.state[index]], [cells.weights[index]])


def _ask_device(
    lanes: Lanes, sizes: Sizes, rates: Rates, cells: Cells, index: int, slot: int | None, jobs: Jobs
) -> None:
    """Update a subgroup in a slot and flush it, or a resident one (no slot) where it lives."""
    numbers = sizes.numbers[index]
    place: Place = "resident" if slot is None else "device"
    update = functools.partial(jobs.update, index, place, slot)
    held = [] if slot is None else [cells.slots[slot]]
    lanes.ask("device", update, numbers / rates.device, [cells.gradients[index]], [*held, cells.weights[index]])
    if slot is not None:
        flush = functools.partial(jobs.flush, index, slot)
        lanes.ask("down", flush, numbers * STATE / rates.down, held, [cells.state[index]])


def predicted(sizes: Sizes, stride: int | None, rates: Rates, resident: int = 0) -> float:
    """Seconds of one step by the rates, counted on a clock."""
    clock = Clock()
    count = len(sizes.numbers)
    ask_step(clock, sizes, places(count, stride, resident), rates, Cells(count))
    return clock.seconds


def best_stride(sizes: Sizes, rates: Rates, resident: int = 0) -> int | None:
    """The stride of the least predicted step; of equal ones the largest, which moves least."""
    order = sorted(STRIDES, key=lambda stride: -(stride or math.inf))
    return min(order, key=lambda stride: predicted(sizes, stride, rates, resident))


def balanced_stride(rates: Rates, weight: int = 2) -> int | None:
    """The closed form for many equal subgroups: 1 + ceil((12/up) / (1/host + 1/cast - weight/up)), None where the
    host keeps up with nothing but its own copies."""
    spare = 1 / rates.host + 1 / rates.cast - weight / rates.up
    return None if spare <= 0 else 1 + math.ceil((STATE / rates.up) / spare)
