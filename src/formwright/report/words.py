"""Numbers as people read them, and the sentences of a report. One home, so that every form of it says the same.

What was not measured is ``–``. Rounding never flatters: a share below one is never printed as one, and a bound is
cut off rather than rounded up.
"""

from __future__ import annotations

import math

from formwright.report.schema import TARGETS, Front, Point

NONE = "–"


def digits(value: float | None, significant: int = 3) -> str:
    """Plain decimal notation with that many significant digits: ``0.742``, ``38.1``, ``1,340``."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    decimals = significant - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"


def quality(value: float | None) -> str:
    """A metric: four decimals below 10, where differences of a per mille matter."""
    return NONE if value is None else f"{value:.4f}" if abs(value) < 10 else digits(value, 4)


def share(value: float | None, down: bool = False) -> str:
    if value is None:
        return NONE
    if value == 1:
        return "1"
    return f"{_below_one(value, 3, down):.3f}"


def percent(value: float | None, decimals: int = 1, down: bool = False) -> str:
    if value is None:
        return NONE
    return f"{_below_one(value, decimals + 2, down) * 100:.{decimals}f} %".replace(".0 %", " %")


def _below_one(value: float, decimals: int, down: bool) -> float:
    if down:
        return math.floor(value * 10**decimals + 1e-7) / 10**decimals
    return min(value, 1 - 10**-decimals) if value < 1 else value


def times(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}x" if value < 99.5 else f"{value:,.0f}x"


def megabytes(value: float | None) -> str:
    return NONE if value is None else digits(value / 1e6) if value < 1e8 else f"{value / 1e6:,.0f}"


def big(value: float | None) -> str:
    """Counts: ``22.7M``, ``1.41G``."""
    if value is None:
        return NONE
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{digits(value / size)}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def unit(front: Front) -> str:
    """What one time is for: ``ms/text``, or ``ms/token`` for decoding."""
    kind = front.shape.partition(":")[0]
    return {"decode": "ms/token", "prefill": "ms/prompt"}.get(kind, "ms/text")


def metric(front: Front) -> str:
    return front.task.metric if front.task.higher_is_better else f"{front.task.metric} ↓"


def history(point: Point) -> str:
    return " · ".join(point.history) or NONE


def kept(point: Point) -> str:
    """``0.991 [0.985]``; the original is 1 by definition and has no bound."""
    if point.name == "original":
        return share(point.kept)
    return f"{share(point.kept)} [{share(point.bound, down=True)}]"


def title(point: Point) -> str:
    return f"{point.name} (written)" if point.written else point.name


def headline(front: Front) -> str:
    """The result in one line: ``3.1x faster, 99.4 % of the quality kept, 41 % of the bytes``."""
    point = front.written
    if point is None or point.name == "original":
        return "Nothing cheaper " + (f"kept {percent(front.keep)} of the quality" if front.keep else "was found")
    parts = []
    if point.speed is not None:
        slower = 0 < point.speed < 0.95
        parts.append(
            f"{times(1 / point.speed)} slower" if slower else f"{times(point.speed)} faster"
            if point.speed >= 1.05 else "as fast"
        )  # fmt: skip
    gain, (name, _, word) = front.gain(point), TARGETS[front.target]
    if name in ("macs", "parameters") and gain is not None:
        parts.append(f"{times(gain)} {word}")
    if point.kept is not None:
        parts.append(f"{percent(point.kept)} of the quality kept")
    if point.bytes is not None and front.original.bytes:
        parts.append(f"{percent(point.bytes / front.original.bytes, 0)} of the bytes")
    text = ", ".join(parts) or title(point)
    return text[:1].upper() + text[1:]


def certificate(front: Front) -> str:
    """What the test split can prove, and whether that is enough for the loss that was allowed."""
    if front.certifiable is None:
        return "The smallest loss this data can certify was not determined."
    text = f"The smallest loss this data can certify is {percent(front.certifiable)}"
    allowed = None if front.keep is None else 1 - front.keep
    if allowed is None:
        return text + "."
    if front.certifiable > allowed:
        return f"{text}: more than the {percent(allowed)} allowed, so the estimate decides and the bound cannot."
    return f"{text}, within the {percent(allowed)} allowed."


def verdict(front: Front, point: Point) -> str:
    """How a point stands to ``keep``: original, certified (the bound reaches it), accepted, below, or measured."""
    if point.name == "original":
        return "original"
    if front.keep is None or point.kept is None:
        return "measured"
    if not point.accepted or point.kept < front.keep:
        return "below keep"
    return "certified" if point.bound is not None and point.bound >= front.keep else "accepted"


VERDICTS = {
    "original": "The model the others are compared with.",
    "certified": "Even the 95 % bound reaches the quality to keep.",
    "accepted": "The estimate reaches the quality to keep; its 95 % bound does not.",
    "below keep": "Loses more than was allowed.",
    "measured": "Measured; nothing was asked to be kept.",
}


def splits(front: Front) -> str:
    return (
        ", ".join(f"{name} {count:,}" if count is not None else name for name, count in front.task.splits.items())
        or NONE
    )


def machine(front: Front) -> list[str]:
    """The machine in short phrases, only what is known."""
    m = front.machine
    phrases = [
        m.cpu,
        f"{m.cores} cores" if m.cores else "",
        f"{m.threads} threads" if m.threads else "",
        f"{digits(m.memory_gb)} GB" if m.memory_gb else "",
        m.flags if isinstance(m.flags, str) else " ".join(m.flags),
        f"Python {m.python}" if m.python else "",
        f"PyTorch {m.torch}" if m.torch else "",
        f"Formwright {m.formwright}" if m.formwright else "",
        f"load {digits(m.load, 2)}" if m.load is not None else "",
    ]
    return [phrase for phrase in phrases if phrase]


def noise(front: Front) -> str:
    """How far the timings can be trusted."""
    spreads = [p.ms_spread for p in front.points if p.ms_spread is not None]
    noisy = [p.name for p in front.points if p.noisy]
    text = "the spread was not recorded"
    if spreads:
        text = f"the middle half of a timing's repeats spans at most {percent(max(spreads))}"
    return f"{text}; noisy (above 10 %): {', '.join(noisy)}" if noisy else f"{text}; none marked noisy"
