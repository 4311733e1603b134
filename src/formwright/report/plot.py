"""The front as a picture: quality kept against how many times cheaper, with everything that was tried behind it.

Measured points carry their one-sided 95 % bound as a bar downwards; candidates (select split) are faint; the line to
keep is drawn. Labels are laid out by trying places around each point and keeping the first that covers nothing, so no
two overlap. The colours are Okabe and Ito's, told apart by every kind of colour vision, and no meaning hangs on colour
alone. Drawn on a figure of its own (Agg), without pyplot or any global setting. Cost: about half a second.
"""

from __future__ import annotations

import io
import itertools
import textwrap
import warnings
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from formwright.report import words
from formwright.report.schema import TARGETS, Front, Point

INK, SOFT, FAINT, GRID = "#1c2128", "#5b6470", "#a9b1bb", "#e8ebef"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#00795a"
DPI = 200
_Place = tuple[float, float, str, str]  # offset in points, horizontal and vertical alignment
_NEAR: list[_Place] = [
    (9, 9, "left", "bottom"), (-9, -9, "right", "top"), (0, 13, "center", "bottom"), (-9, 9, "right", "bottom"),
    (9, -9, "left", "top"), (14, 0, "left", "center"), (-14, 0, "right", "center"), (0, -13, "center", "top"),
]  # fmt: skip


def picture(front: Front) -> bytes:
    """The PNG, 1,800 x 1,080 pixels."""
    figure = Figure(figsize=(9.0, 5.4), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.082, 0.118, 0.895, 0.705))
    points = [(p, front.gain(p)) for p in front.ordered()]
    known = [(p, x, p.kept) for p, x in points if x is not None and p.kept is not None]
    tried = [(front.gain(c), front.kept(c), c.accepted) for c in front.candidates]
    cloud = [(x, y, accepted) for x, y, accepted in tried if x is not None and y is not None]
    _frame(axes, front, known, cloud)
    _title(figure, front, len(cloud))
    _cloud(axes, cloud)
    if front.keep is not None:
        axes.axhline(front.keep, color=GREEN, linewidth=1.3, dashes=(5, 3), zorder=3)
    _points(axes, front, known)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script the font lacks
        _labels(axes, front, known, cloud)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def _text(target: Any, x: float, y: float, text: str, **style: Any) -> Any:
    """Text as it stands: a ``$`` in somebody's name is no formula."""
    made = target.text(x, y, text, **{"family": ["DejaVu Sans"], "color": INK, **style})
    made.set_parse_math(False)
    return made


def _frame(axes: Any, front: Front, known: list[tuple[Point, float, float]], cloud: list[Any]) -> None:
    """Limits that show what matters: all measured points and bounds; a candidate far below is moved to the edge."""
    xs = [x for _, x, _ in known] + [x for x, _, _ in cloud] or [1.0]
    ys = [y for _, _, y in known] + [p.bound for p, _, _ in known if p.bound is not None] or [1.0]
    low, high = min([*ys, front.keep or 1.0]), max([*ys, 1.0])
    span = max(high - low, 0.004)
    axes.set_ylim(low - 0.16 * span, high + 0.16 * span)
    left, right = min([*xs, 1.0]), max([*xs, 1.0])
    if right / max(left, 1e-9) > 12:
        axes.set_xscale("log", base=2)
        axes.set_xlim(left / 1.15, right * 1.3)
    else:
        wide = max(right - left, 0.3)
        axes.set_xlim(left - 0.05 * wide, right + 0.09 * wide)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    decimals = 2 if span < 0.01 else 1 if span < 0.1 else 0
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.{decimals}f} %"))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))  # 2.5 would need a digit more than is shown
    axes.grid(color=GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6, labelsize=9.5, labelcolor=SOFT, labelfontfamily="DejaVu Sans")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
    axes.set_xlabel(TARGETS[front.target][1], fontsize=10.5, color=INK, labelpad=8, family=["DejaVu Sans"])


def _title(figure: Any, front: Front, tried: int) -> None:
    _text(figure, 0.022, 0.945, _short(words.headline(front), 82), size=14.5, weight="bold", va="center")
    parts = [front.model, front.task.name, words.metric(front)]
    parts += [front.shape] if front.shape else []
    parts += [front.machine.cpu] if front.machine.cpu else []
    _text(figure, 0.022, 0.895, _short(" · ".join(parts), 122), size=9.5, color=SOFT, va="center")
    _text(figure, 0.022, 0.848, "Quality kept", size=10.5, va="center")
    legend = [("●", BLUE, "front, bar to its 95 % bound")]
    legend += [("★", ORANGE, "written")] if front.written else []
    legend += [("●", FAINT, f"{tried} candidates, on the select split")] if tried else []
    x = 0.977
    renderer = figure.canvas.get_renderer()
    for mark, color, meaning in reversed(legend):
        for text, ink in ((meaning, SOFT), (mark + "  ", color)):
            made = _text(figure, x, 0.848, text, size=9, color=ink, ha="right", va="center")
            x -= made.get_window_extent(renderer).width / figure.bbox.width
        x -= 0.018


def _cloud(axes: Any, cloud: list[tuple[float, float, bool]]) -> None:
    low, high = axes.get_ylim()
    inside = [(x, y) for x, y, _ in cloud if low <= y <= high]
    below = [x for x, y, _ in cloud if y < low]
    above = [x for x, y, _ in cloud if y > high]
    style = {"color": FAINT, "linewidths": 0, "zorder": 2, "clip_on": False}
    if inside:
        axes.scatter(*zip(*inside), s=20, alpha=0.55, **style)
    for xs, marker, y in ((below, "v", low), (above, "^", high)):
        if xs:  # beyond the picture: an arrow at the edge, so that none is silently missing
            axes.scatter(xs, [y + (0.012 if marker == "v" else -0.012) * (high - low)] * len(xs), s=22,
                         marker=marker, alpha=0.8, **style)  # fmt: skip


def _points(axes: Any, front: Front, known: list[tuple[Point, float, float]]) -> None:
    line = [(x, y) for p, x, y in sorted(known, key=lambda k: k[1]) if p.on_front]
    if len(line) > 1:
        axes.plot(*zip(*line), color=BLUE, linewidth=2.2, solid_joinstyle="round", zorder=4)
    for p, x, y in known:
        color = INK if p.name == "original" else ORANGE if p.written else BLUE if p.on_front else SOFT
        if p.bound is not None and p.name != "original":
            axes.plot([x, x], [p.bound, y], color=color, linewidth=1.5, alpha=0.75, zorder=4.5)
            axes.plot(
                [x], [p.bound], marker="_", markersize=9, markeredgewidth=1.5, color=color, alpha=0.75, zorder=4.5
            )
        marker, size = ("*", 330) if p.written else ("D", 62) if p.name == "original" else ("o", 72)
        face = color if p.on_front or p.written or p.name == "original" else "white"
        axes.scatter([x], [y], s=size, marker=marker, color=face, edgecolors="white" if face != "white" else color,
                     linewidths=1.4, zorder=6 if p.written else 5, clip_on=False)  # fmt: skip


def _labels(axes: Any, front: Front, known: list[tuple[Point, float, float]], cloud: list[Any]) -> None:
    """Written first, then the front, then the rest; a label with no free place is tried shorter, then left out."""
    axes.figure.draw_without_rendering()
    taken = _obstacles(axes, known)
    _keep_label(axes, front, taken)
    px = [axes.transData.transform((x, y)) for x, y, _ in cloud]
    dots = [Bbox([[x - 6, y - 6], [x + 6, y + 6]]) for x, y in px]
    order = sorted(known, key=lambda k: (not k[0].written, k[0].name != "original", not k[0].on_front))
    for p, x, y in order:
        color = ORANGE if p.written else INK if p.on_front else SOFT
        weight, size = ("bold", 9.5) if p.written else ("normal", 8.8)
        made = _text(axes, x, y, "", size=size, weight=weight, color=color, linespacing=1.25, zorder=8)
        made.set_path_effects([withStroke(linewidth=3, foreground="white")])
        # beside its point and off the candidates; then over candidates; then farther away; then a shorter text
        tries = [
            (text, reach, off)
            for text in _texts(p)
            for reach, off in ((1, 1), (2.2, 1), (1, 0), (2.2, 0), (3.6, 0), (5.2, 0))
        ]
        for text, reach, off in tries:
            boxes = _settle(axes, made, text, (x, y), reach, [*taken, *dots] if off else taken)
            if boxes:
                taken += boxes
                break
        else:
            made.remove()


def _keep_label(axes: Any, front: Front, taken: list[Any]) -> None:
    """At the end of its line where it covers nothing; the line itself is then taken."""
    renderer = axes.figure.canvas.get_renderer()
    if front.keep is None:
        return
    for x, ha, va in (
        (0.997, "right", "bottom"),
        (0.997, "right", "top"),
        (0.004, "left", "bottom"),
        (0.004, "left", "top"),
    ):
        made = _text(axes, x, front.keep, f"keep {words.percent(front.keep)}", size=9, color=GREEN, ha=ha, va=va,
                     transform=axes.get_yaxis_transform(), zorder=7)  # fmt: skip
        box = made.get_window_extent(renderer)
        if not any(box.overlaps(other) for other in taken):
            taken.append(box)
            break
        made.remove()
    y, half = axes.transData.transform((1, front.keep))[1], 1 * DPI / 72
    taken.append(Bbox([[axes.bbox.x0, y - half], [axes.bbox.x1, y + half]]))


def _texts(p: Point) -> list[str]:
    """The history in one to four lines, broken between steps where that can be; the bare name as the last resort."""
    if p.name == "original":
        return ["original"]
    texts = []
    for width in (46, 32):
        lines: list[str] = []
        for step in p.history:
            if lines and len(lines[-1]) + 3 + len(step) <= width:
                lines[-1] += f" · {step}"
            else:
                lines.append(step)
        wrapped = [part for line in lines for part in textwrap.wrap(line, width)]
        if 0 < len(wrapped) <= 4:
            texts.append("\n".join(wrapped))
    return [*texts, p.name]


def _settle(axes: Any, made: Any, text: str, at: tuple[float, float], reach: float, taken: list[Any]) -> list[Any]:
    """Put a text at the first free place that far from its point; what it then occupies, with the leader to it."""
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer).padded(4 * DPI / 72)
    origin = axes.transData.transform(at)
    made.set_text(text)
    for dx, dy, ha, va in _NEAR:
        moved = origin + [dx * reach * DPI / 72, dy * reach * DPI / 72]
        made.set(position=axes.transData.inverted().transform(moved), ha=ha, va=va)
        box = made.get_window_extent(renderer).padded(3 * DPI / 72)
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        # the leader begins outside the marker and what is drawn around it
        leader = [origin + (moved - origin) * f for f in (0.5, 0.6, 0.7, 0.8, 0.9)] if reach > 1 else []
        boxes = [box, *(Bbox([[x - 2, y - 2], [x + 2, y + 2]]) for x, y in leader)]
        if inside and not any(one.overlaps(other) for one in boxes for other in taken):
            if leader:
                x, y = axes.transData.inverted().transform(moved)
                axes.plot([at[0], x], [at[1], y], color=FAINT, linewidth=0.9, zorder=3.5)
            return boxes
    return []


def _obstacles(axes: Any, known: list[tuple[Point, float, float]]) -> list[Any]:
    """What a label must not cover: markers, bars and the front, as small boxes in pixels."""
    to_pixels, unit = axes.transData.transform, DPI / 72
    boxes = []
    for p, x, y in known:
        px, py = to_pixels((x, y))
        reach = (8 if p.written else 5) * unit
        foot = to_pixels((x, p.bound))[1] if p.bound is not None and p.name != "original" else py
        boxes += [Bbox([[px - reach, py - reach], [px + reach, py + reach]])]
        boxes += [Bbox([[px - 5 * unit, foot - 2 * unit], [px + 5 * unit, py]])]
    line = [to_pixels((x, y)) for p, x, y in sorted(known, key=lambda k: k[1]) if p.on_front]
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        for i in range(41):
            x, y = x0 + (x1 - x0) * i / 40, y0 + (y1 - y0) * i / 40
            boxes.append(Bbox([[x - unit, y - unit], [x + unit, y + unit]]))
    return boxes


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
