"""The result as it is printed: one row per model, what was done to it, and how to go on.

The width is given, not asked of a terminal, so that a log, a test and a screen show the same. Where the history does
not fit beside the numbers it goes on a line below its row. Cost: nothing to speak of.
"""

from __future__ import annotations

import io

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from formwright.report import words
from formwright.report.schema import Front

_GAP = 3
_MARGIN = "  "
_STYLES = {"certified": "green", "accepted": "green", "below keep": "yellow", "measured": "", "original": ""}


def table(front: Front, width: int = 100, color: bool = False) -> str:
    """The lines of a finished search, each at most ``width`` (60 or more) cells wide; ``color`` adds ANSI codes."""
    width = max(width, 60)
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=color, color_system="standard" if color else None, no_color=not color,
        highlight=False, markup=False, emoji=False, legacy_windows=False, _environ={},
    )  # fmt: skip
    for line in (*_head(front, width), *_rows(front, width), *_foot(front, width)):
        line.rstrip()
        console.print(line, soft_wrap=True)
    return out.getvalue()


def _head(front: Front, width: int) -> list[Text]:
    facts = [front.task.name]
    if front.task.fingerprint:
        facts[0] += f" (fingerprint {_clip(front.task.fingerprint, 12)})"
    facts += [f"keep {front.keep:g}"] if front.keep is not None else []
    facts += [f"{front.target} at {front.shape}"] if front.shape else [front.target]
    facts += [f"seed {front.seed}"] if front.seed is not None else []
    lines = _flow([f"{front.verb} {front.model}", *facts], width, "", "bold")
    certifiable = f"smallest loss this data can certify: {words.percent(front.certifiable)}"
    lines += _flow([f"splits: {words.splits(front)}", certifiable], width)
    if front.baselines:
        named = [f"{name} {words.quality(value)}" for name, value in front.baselines.items()]
        lines += _flow([f"baselines: {named[0]}", *named[1:]], width)
    return lines


def _columns(front: Front) -> tuple[list[str], list[list[str]]]:
    headers = ["model", words.metric(front), "kept [95 % bound]", words.unit(front), "speed", "MB"]
    rows = []
    for p in front.ordered():
        noisy = "~" if p.noisy else ""
        cells = [words.title(p), words.quality(p.quality), words.kept(p), noisy + words.digits(p.ms)]
        rows.append([*cells, words.times(p.speed), words.megabytes(p.bytes)])
    return headers, rows


def _rows(front: Front, width: int) -> list[Text]:
    headers, rows = _columns(front)
    sizes = [max(cell_len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    room = width - len(_MARGIN)
    gap = _GAP if sum(sizes) + _GAP * len(sizes) <= room else 1
    # A long name or metric gives way to the numbers
    over = sum(sizes) + gap * (len(sizes) - 1) - room
    for i in (0, 1):
        given = min(max(over, 0), max(sizes[i] - 8, 0))
        sizes[i] -= given
        over -= given
    beside = room - sum(sizes) - gap * len(sizes)
    longest = max([cell_len(words.history(p)) for p in front.points], default=0)
    wide = beside >= max(24, min(longest, 30))
    lines = [_line([*headers, "history"] if wide else headers, sizes, gap, width, "dim")]
    for point, cells in zip(front.ordered(), rows, strict=True):
        style = "bold " + _STYLES[words.verdict(front, point)] if point.written else ""
        pieces = _wrap(point.history, beside if wide else room - 4) or [words.NONE]
        lines.append(_line([*cells, pieces[0]] if wide else cells, sizes, gap, width, style.strip()))
        indent = len(_MARGIN) + sum(sizes) + gap * len(sizes) if wide else len(_MARGIN) + 4
        for piece in pieces[1:] if wide else pieces if point.history else []:
            lines.append(Text(" " * indent + _clip(piece, width - indent), style="" if wide else "dim"))
    if any(p.noisy for p in front.points):
        lines.append(Text(_MARGIN + _clip("~ noisy: its timings differ by more than 10 %", room), style="dim"))
    return lines


def _line(cells: list[str], sizes: list[int], gap: int, width: int, style: str) -> Text:
    texts = []
    for i, cell in enumerate(cells):
        if i >= len(sizes):
            texts.append(cell)
            continue
        cell = _clip(cell, sizes[i])
        left = i in (0, 2)  # names and "kept [bound]" line up at their start, numbers at their end
        texts.append(set_cell_size(cell, sizes[i]) if left else " " * (sizes[i] - cell_len(cell)) + cell)
    return Text(_clip(_MARGIN + (" " * gap).join(texts), width), style=style)


def _foot(front: Front, width: int) -> list[Text]:
    lines = []
    if front.written is None:
        lines += _flow([words.headline(front) + "; nothing was written"], width, style="yellow")
    elif front.out:
        files = f" ({', '.join(front.files)})" if front.files else ""
        lines += _flow([f"wrote {front.out.rstrip('/')}/{files}"], width, style="bold")
    if front.resume:
        again = f"again: {front.resume}"
        last = lines[-1] if lines else None
        if last is not None and last.cell_len + 4 + cell_len(again) <= width:
            last.append("    " + again, style="not bold")
        else:
            lines.append(Text(_MARGIN + again))  # whole, even when long: it is there to be copied
    return lines


def _flow(pieces: list[str], width: int, margin: str = _MARGIN, style: str = "") -> list[Text]:
    """Phrases joined by `` · ``, broken between phrases where they can be and between words where they must be."""
    lines = _wrap([piece.replace("\n", " ") for piece in pieces], width - len(margin) - 2)
    return [Text((margin if i == 0 else margin + "  ") + line, style=style) for i, line in enumerate(lines)]


def _wrap(pieces: list[str], width: int) -> list[str]:
    lines: list[str] = []
    room = width - 2  # for the dot that says that more follows
    for piece in pieces:
        for n, word in enumerate([piece] if cell_len(piece) <= room else piece.split(" ")):
            joint = " " if n else " · "
            if lines and cell_len(lines[-1] + joint + word) <= room:
                lines[-1] += joint + word
                continue
            if lines and not n:
                lines[-1] += " ·"
            lines.append(_clip(word, room))
    return lines


def _clip(text: str, width: int) -> str:
    text = " ".join(text.split("\n"))
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)) + "…"
