"""The proof of Deep Optimizer States: plain AdamW to the bit under any schedule, and a schedule that pays.

Maurya et al., 2024 (2410.21316) report iterations up to 2.5 times faster than blocking offload on GPUs. Here the
device is a thread whose link and arithmetic are throttled to given speeds (a step of some tenths of a second, nearly
all of it held back), so the times are those of the schedule; the prediction is counted on a clock. ``quick``: values
only, seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.proofs._bytes import one_thread
from formwright.proofs.base import Claim
from formwright.registry import Paper, register
from formwright.training.offload import (
    Interleaved,
    Race,
    Rates,
    Sizes,
    Threads,
    balanced_stride,
    best_stride,
    predicted,
)

#: Numbers of a subgroup on the throttled machine, and how many there are.
SUBGROUP, COUNT = 4096, 24
#: Numbers a second that the throttled host updates; a subgroup then takes about five milliseconds.
HOST = 8e5


@register(
    "proof", "deep-optimizer-states", paper=Paper("Maurya et al.", 2024, "2410.21316"), summary="AdamW, interleaved"
)
def prove(quick: bool, seed: int) -> list[Claim]:
    """Equality first, speed second."""
    with one_thread():
        claims = [same_bits(seed, quick), same_losses(seed, 6 if quick else 30), goes_on(seed), waits(seed)]
        claims.append(closed_form())
        return claims if quick else [*claims, clock_is_right(), best_is_best(), *pays()]


def machine(link: float, ratio: float = 8.0, host: float = HOST) -> Rates:
    """A host of ``host`` numbers a second, a device ``ratio`` times as fast; ``link``: 12 / up in units of 1 / host."""
    return Rates(up=12 * host / link, down=12 * host / link, host=host, device=ratio * host)


def weights(seed: int, shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=gen)) for shape in shapes]


def steps_of(optimizer: torch.optim.Optimizer, held: list[nn.Parameter], steps: range) -> None:
    """Steps with gradients keyed by the step, one of them missing and one step left out, as an overflow would."""
    for step in steps:
        gen = torch.Generator().manual_seed(step)
        for p in held:
            p.grad = torch.randn(p.shape, generator=gen)
        if step == 3:
            held[0].grad = None
        if step != 5:
            optimizer.step()


SHAPES: list[tuple[int, ...]] = [(7,), (33, 5), (1001,), (64, 40), (130,)]


def same_bits(seed: int, quick: bool) -> Claim:
    plain = weights(seed, SHAPES)
    steps_of(torch.optim.AdamW(plain, foreach=False), plain, range(20))
    equal = total = 0
    for stride in (1, 3, None) if quick else (1, 2, 3, 4, 7, None):
        for subgroup in (64, 1000) if quick else (1, 64, 300, 1000, 10**9):
            mine = weights(seed, SHAPES)
            optimizer = Interleaved(mine, stride=stride, subgroup=subgroup, rates=machine(0.5), fused=False)
            steps_of(optimizer, mine, range(20))
            optimizer.close()
            total += 1
            equal += all(torch.equal(a, b) for a, b in zip(mine, plain))
    return Claim(
        "any stride and any subgroup gives the weights of AdamW after 20 steps", "equal", "every bit",
        f"{equal} of {total} schedules equal", equal == total,
    )  # fmt: skip


def same_losses(seed: int, steps: int) -> Claim:
    """A small decoder on random bytes: losses move, and are those of AdamW."""

    def curve(make: Callable[[Any], torch.optim.Optimizer]) -> list[float]:
        model = build(recipe("gpt-tiny", vocab=64, width=32, layers=2), seed=seed)
        optimizer = make(model.parameters())
        ids = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(seed))
        found = []
        for _ in range(steps):
            logits = model(ids[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    plain = curve(lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False))
    mine = curve(lambda p: Interleaved(p, lr=1e-2, stride=2, subgroup=3000, rates=machine(0.5, host=1e9), fused=False))
    fell = mine[0] - mine[-1]
    return Claim(
        "the losses of a small language model are those of AdamW, and fall",
        "overlap (in the published log the loss stood still from step 2 on)",
        "equal in every step, falling",
        f"{'equal' if mine == plain else 'not equal'}, fell by {fell:.2f} nats in {steps} steps",
        mine == plain and fell > 0,
    )


def goes_on(seed: int) -> Claim:
    whole = weights(seed, SHAPES)
    steps_of(torch.optim.AdamW(whole, foreach=False), whole, range(12))
    held = weights(seed, SHAPES)
    first = Interleaved(held, stride=3, subgroup=300, rates=machine(0.5), fused=False)
    steps_of(first, held, range(7))
    again = [nn.Parameter(p.detach().clone()) for p in held]
    second = Interleaved(again, stride=1, subgroup=900, rates=machine(0.5), fused=False)
    second.load_state_dict(first.state_dict())
    steps_of(second, again, range(7, 12))
    equal = all(torch.equal(a, b) for a, b in zip(again, whole))
    return Claim(
        "saved at step 7 and resumed with another stride, a run takes the same course", "the same", "every bit",
        "equal" if equal else "not equal", equal,
    )  # fmt: skip


def waits(seed: int) -> Claim:
    """Every derived wait dropped in turn; most are slack on this machine, those that bind must be noticed."""
    noticed = changed = 0
    wanted: list[torch.Tensor] | None = None
    for forget in (None, *range(24)):
        held = weights(seed, [(SUBGROUP,)] * 6)
        lanes = Threads(throttled=True, forget=forget)
        optimizer = Interleaved(
            held, stride=2, subgroup=SUBGROUP, rates=machine(0.5, host=4e6), lanes=lanes, fused=False
        )
        try:
            steps_of(optimizer, held, range(1))
            values = [p.detach() for p in held]
            wanted = values if wanted is None else wanted
            changed += not all(torch.equal(a, b) for a, b in zip(values, wanted))
        except Race:
            noticed += 1
        finally:
            lanes.close()
    return Claim(
        "a forgotten wait is noticed before it can change a weight", "no such check (copies without events)",
        "some noticed, none changes the weights unnoticed",
        f"{noticed} of 24 noticed, {changed} unnoticed with other weights", noticed > 0 and changed == 0,
    )  # fmt: skip


def closed_form() -> Claim:
    rates = Rates(up=55e9, down=55e9, host=2e9, device=1e11, cast=8.7e9)
    sizes = Sizes([10**8] * 60, weight=2, gradient=2)
    found = balanced_stride(rates)
    best = best_stride(sizes, rates)
    gain = predicted(sizes, found, rates) / predicted(sizes, best, rates)
    return Claim(
        "on the paper's rates the balance of host and link is a stride of 2", "2", "2",
        f"{found}; a link busy both ways makes streaming everything (stride {best}) {gain:.2f}x as fast",
        found == 2,
    )  # fmt: skip


def timed(rates: Rates, stride: int | None, resident: int = 0) -> float:
    """Seconds of a step on the throttled machine, median of three; gradients are at home already."""
    held = weights(0, [(SUBGROUP,)] * COUNT)
    lanes = Threads(throttled=True)
    optimizer = Interleaved(held, stride=stride, subgroup=SUBGROUP, resident=resident, rates=rates, lanes=lanes)
    taken = []
    for _ in range(4):
        for p in held:
            p.grad = torch.ones_like(p)
        with optimizer.during_backward():
            for p in held:
                p.grad = None
                p.sum().backward()
        lanes.finish()
        started = time.perf_counter()
        optimizer.step()
        taken.append(time.perf_counter() - started)
    lanes.close()
    return statistics.median(taken[1:])


SIZES = Sizes([SUBGROUP] * COUNT)


def clock_is_right() -> Claim:
    worst = 0.0
    for link in (0.5, 1.5):
        for stride in (2, 3, 4, None):
            rates = machine(link)
            worst = max(worst, abs(timed(rates, stride) / predicted(SIZES, stride, rates) - 1))
    return Claim(
        "a step takes as long as the clock says, strides 2, 3, 4 and none at two speeds of the link", "-",
        "within 15 %", f"{100 * worst:.1f} % at worst", worst <= 0.15, needs="time",
    )  # fmt: skip


def best_is_best() -> Claim:
    strides = (1, 2, 3, 4, None)
    points = [(link, ratio) for link in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0) for ratio in (2.0, 16.0)]
    right = 0
    for link, ratio in points:
        rates = machine(link, ratio)
        chosen = min(strides, key=lambda stride: predicted(SIZES, stride, rates))
        found = {stride: timed(rates, stride) for stride in strides}
        right += found[chosen] <= 1.02 * min(found.values())
    return Claim(
        "the predicted best stride is the measured best (within 2 %)", "-", "at least 80 % of 12 machines",
        f"{right} of {len(points)}", right >= 0.8 * len(points), needs="time",
    )  # fmt: skip


def pays() -> list[Claim]:
    """Against the host alone, and against half of the state on the device with one update after the other."""
    rates = machine(0.5)
    stride = best_stride(SIZES, rates)
    mine, alone = timed(rates, stride), timed(rates, None)
    half = SUBGROUP * (COUNT / 2) * (1 / rates.host + 1 / rates.device)
    beside = timed(rates, stride, resident=COUNT // 2)
    counted = predicted(SIZES, None, rates) / predicted(SIZES, stride, rates)
    return [
        Claim(
            "interleaved against an update on the host alone, device 8 times as fast, 12/link = 0.5/host",
            "up to 2.5x of an iteration", "at least 1.4x", f"{alone / mine:.2f}x ({counted:.2f}x on the clock)",
            alone / mine >= 1.4, needs="time",
        ),
        Claim(
            "half of the state on the device: the rest interleaved, against host and device in turn", "-",
            "at least 1.1x",
            f"{half / beside:.2f}x; {half / mine:.2f}x with no more on the device than two subgroups of {COUNT}",
            half / beside >= 1.1, needs="time",
        ),
    ]  # fmt: skip
