"""Markdown: the one table writer of all generated pages, and the card that a saved slim model carries.

Cells are escaped, so that a name with a ``|`` or a ``<`` in it stays a name. The card is read where the model is
stored: it says what the model is, how good and how fast it was measured to be, on what, and how to make it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from formwright.report import words
from formwright.report.schema import Front, Point


def escape(text: object) -> str:
    """Text that Markdown shows as it stands, on one line."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def table(rows: Iterable[Sequence[object]], headers: Sequence[str], raw: bool = False) -> str:
    """A table with aligned columns; numbers stand to the right. ``raw`` cells are Markdown already."""
    clean = (lambda cell: str(cell).replace("\n", " ")) if raw else escape
    body = [[clean(cell) for cell in row] for row in rows]
    head = [clean(name) for name in headers]
    for row in body:
        if len(row) != len(head):
            raise ValueError(f"a row has {len(row)} cells, the table {len(head)} columns: {row}")
    right = [bool(body) and all(re.match(r"[-+~]?[\d.,]|–$|$", row[i]) for row in body) for i in range(len(head))]
    sizes = [max([3, *(len(row[i]) for row in [head, *body])]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(n) if r else c.ljust(n) for c, n, r in zip(cells, sizes, right, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (n - 1) + ":" if r else "-" * n for n, r in zip(sizes, right, strict=True)]
    return "\n".join([line(head), line(rule), *map(line, body)]) + "\n"


def _fence(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max([len(run) for run in re.findall(r"`+", text)], default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str) -> str:
    """An inline code span, whatever backticks the text has."""
    text = " ".join(text.split())
    ticks = "`" * (max([len(run) for run in re.findall(r"`+", text)], default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def model_card(data: dict[str, Any] | Front) -> str:
    """The ``README.md`` of a saved model, with the header that model hubs read."""
    front = Front.from_json(data)
    point = front.written or front.original
    place = front.out or "this-directory"
    name = place.rstrip("/").rpartition("/")[2]
    parts = [
        _header(front),
        f"# {escape(name)}",
        f"{words.headline(front)}. Made from {_code(front.model)} by Formwright, which measured it on "
        f"{_code(front.task.name)} ({escape(front.task.metric)}).",
        "## Use",
        _fence(f"import formwright as fw\n\nmodel = fw.load({json.dumps(place)})\nprint(model.history)", "python"),
        "## What was done",
        _steps(point),
        "## How it compares",
        _comparison(front),
        "`kept` is the share of the original's quality on the test split; in brackets its one-sided 95 % bound.",
        "## Evidence",
        _evidence(front),
    ]
    commands = [command for command in (front.command, point.reproduce) if command]
    if commands:
        parts += ["## Make it again", _fence("\n".join(commands), "sh")]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _header(front: Front) -> str:
    """YAML; JSON strings are YAML strings, so no name can break out of it."""
    lines = ["library_name: formwright", f"base_model: {json.dumps(front.model, ensure_ascii=False)}", "tags:"]
    lines += [f"- {tag}" for tag in ("formwright", "compressed")]
    return "---\n" + "\n".join(lines) + "\n---"


def _steps(point: Point) -> str:
    steps = point.history_words or point.history
    return "\n".join(f"{n}. {escape(step)}" for n, step in enumerate(steps, 1)) or "Nothing: this is the original."


def _comparison(front: Front) -> str:
    headers = ["model", words.metric(front), "kept", words.unit(front), "speed", "MB", "history"]
    rows = [
        [
            words.title(p), words.quality(p.quality), words.kept(p), ("~" if p.noisy else "") + words.digits(p.ms),
            words.times(p.speed), words.megabytes(p.bytes), words.history(p),
        ]
        for p in front.ordered()
    ]  # fmt: skip
    text = table(rows, headers)
    return (
        text + "\nA `~` marks a time whose repeats differ by more than 10 %.\n"
        if any(p.noisy for p in front.points)
        else text
    )


def _evidence(front: Front) -> str:
    baselines = ", ".join(f"{name} {words.quality(value)}" for name, value in front.baselines.items())
    facts = [
        ("splits", escape(words.splits(front))),
        ("fingerprint", _code(front.task.fingerprint) if front.task.fingerprint else words.NONE),
        ("certifiable loss", escape(words.certificate(front))),
        ("bound", escape(front.bound_method)),
        ("baselines", escape(baselines or words.NONE)),
        ("timing", escape(f"{front.shape or front.target}; {words.noise(front)}")),
        ("machine", escape(" · ".join(words.machine(front)) or words.NONE)),
    ]
    return "\n".join(f"- {name}: {text}" for name, text in facts)
