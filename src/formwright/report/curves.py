"""A run as a picture: loss, learning rate, tokens a second and scores over the steps, from the lines of its journals.

Up to four panels: what the journals do not know is left out. What jumps from step to step is drawn as it was and, over
that, as a running mean. Style and colours are those of :mod:`formwright.report.plot`. Cost: about half a second.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from formwright.report.plot import BLUE, DPI, FAINT, GREEN, GRID, INK, ORANGE, SOFT, _short, _text

Line = Sequence[tuple[float, float]]


def picture(events: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """The PNG. ``events``: {"step", "loss", "lr", "tokens", "seconds"}; ``results``: {"step", "task", "value"}."""
    loss = [(line["step"], line["loss"]) for line in events if "loss" in line]
    panels: list[tuple[str, dict[str, Line]]] = [("loss", {"": loss})]
    panels.append(("learning rate", {"": [(line["step"], line["lr"]) for line in events if "lr" in line]}))
    if speed := speeds(events):
        panels.append(("tokens a second", {"": speed}))
    if results:
        panels.append(("score", scores(results)))
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9.0, 0.9 + 2.6 * rows), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, (name, lines) in zip(grid, panels):
        _panel(axes, name, lines)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, 0, 1, 1 - 0.55 / figure.get_figheight()), w_pad=0.12, h_pad=0.08)
    _text(figure, 0.02, 1 - 0.3 / figure.get_figheight(), _short(_headline(loss, title), 100), size=13, weight="bold")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def speeds(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(step, tokens a second) between successive lines of a journal."""
    known = [(line["step"], line["seconds"], line["tokens"]) for line in events if "tokens" in line]
    return [(b[0], (b[2] - a[2]) / (b[1] - a[1])) for a, b in pairwise(known) if b[1] > a[1]]


def scores(results: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    """Task -> (step, score)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in results:
        found.setdefault(str(line.get("task", "score")), []).append((line["step"], line["value"]))
    return dict(found)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Means over ``width`` values around each, fewer at both ends."""
    near = [values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in near]


def _headline(loss: Line, title: str) -> str:
    last = f"step {loss[-1][0]:,.0f}, loss {loss[-1][1]:.4g}" if loss else ""
    return " · ".join(part for part in (title, last) if part)


def _panel(axes: Any, name: str, lines: Mapping[str, Line]) -> None:
    for (label, line), color in zip(lines.items(), (BLUE, ORANGE, GREEN, INK, SOFT) * len(lines)):
        xs, ys = [x for x, _ in line], [y for _, y in line]
        few = len(line) < 12 or name == "score"
        if name in ("loss", "tokens a second") and len(line) >= 30:
            axes.plot(xs, ys, color=color, linewidth=0.8, alpha=0.35)
            ys = smooth(ys, max(2, len(ys) // 20))
        axes.plot(xs, ys, color=color, linewidth=1.8, marker="o" if few else "", markersize=3.5, label=label)
    if any(lines):
        legend = axes.legend(frameon=False, labelcolor=SOFT, prop={"family": ["DejaVu Sans"], "size": 8.5})
        for text in legend.get_texts():
            text.set_parse_math(False)  # a ``$`` in somebody's name is no formula
    axes.set_title(name, loc="left", fontsize=10.5, color=INK, family=["DejaVu Sans"])
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4, labelsize=8.5, labelcolor=SOFT, labelfontfamily="DejaVu Sans")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    plain = FuncFormatter(lambda v, _: f"{v:g}")
    axes.yaxis.set_major_formatter(EngFormatter(sep="") if name == "tokens a second" else plain)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
