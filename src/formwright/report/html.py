"""``report.html``: the whole result in one file that needs no network, to open, mail, print and keep.

With the extra ``report`` the front is interactive (plotly's script is inlined, 4.8 MB); without it the still picture
is embedded and a sentence says so. A content policy in the page forbids it to load anything. Every word that comes
from a user (model, task, labels, commands) is escaped, in the page, in its data and in plotly's hover texts.
"""

from __future__ import annotations

import base64
import html
import json
import math
import textwrap
from typing import Any

from formwright.report import assets, words
from formwright.report.plot import picture
from formwright.report.schema import TARGETS, Candidate, Front, Point

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)


def page(front: Front, png: bytes | None = None) -> str:
    """The document. ``png`` is the still picture if it has been drawn already."""
    script = plotly_script()
    still = base64.b64encode(png if png is not None else picture(front)).decode()
    title = f"{words.headline(front)} · {front.model}"
    body = "\n".join(
        [_header(front), _figure(front, still, script is not None), _points(front), _pair(front), _commands(front)]
    )
    scripts = [_scoped(assets.COPY)]
    if script is not None:
        scripts = [f"<script>{script}</script>", *scripts, _scoped(assets.DRAW)]
        body += f'\n<script type="application/json" id="front-data">{_json(_data(front))}</script>'
    tail = "\n".join(scripts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_e(title)}</title>
<style>{assets.STYLE}</style>
</head>
<body>
<main>
{body}
<footer>{_footer(front)}</footer>
</main>
{tail}
</body>
</html>
"""


def plotly_script() -> str | None:
    """Plotly's own script, or None when the extra is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    return str(get_plotlyjs())


def _scoped(script: str) -> str:
    """A script of ours, in braces so that its names meet no others."""
    return f"<script>{{{script}}}</script>"


def _e(text: object) -> str:
    return html.escape(str(text)).replace(" %", "\u00a0%")


def _json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _header(front: Front) -> str:
    task = f"<strong>{_e(front.model)}</strong> on <strong>{_e(front.task.name)}</strong>, {_e(front.task.metric)}"
    goal = f", keep {_e(words.percent(front.keep))}" if front.keep is not None else ""
    better = "" if front.task.higher_is_better else " (lower is better)"
    return f"""<header>
<p class="eyebrow">Formwright {_e(front.verb)}</p>
<h1>{_e(words.headline(front))}</h1>
<p class="sub">{task}{better}{goal}</p>
{_figures(front)}
</header>"""


def _figures(front: Front) -> str:
    """The four numbers of the written model beside the original's."""
    p, o = front.written or front.original, front.original
    per = words.unit(front).partition("/")[2]
    ratio = words.percent(p.bytes / o.bytes, 0) if p.bytes is not None and o.bytes else words.NONE
    bound = f", at least {words.percent(p.bound, down=True)}" if p.bound is not None and p is not o else ""
    cosine = words.share(p.cosine)
    cells = [
        ("Speed", words.times(p.speed), f"{words.digits(p.ms)} ms per {per}, was {words.digits(o.ms)}"),
        ("Quality kept", words.percent(p.kept), f"{words.quality(p.quality)} of {words.quality(o.quality)}{bound}"),
        ("Size", ratio, f"{words.megabytes(p.bytes)} MB of {words.megabytes(o.bytes)}"),
        ("Agreement", cosine, "mean cosine to the original's outputs")
        if p.cosine is not None
        else ("Parameters", words.big(p.parameters), f"of {words.big(o.parameters)}"),
    ]
    return '<dl class="kpis">' + "".join(
        f'<div><dt>{_e(name)}</dt><dd class="value">{_e(value)}</dd><dd class="note">{_e(note)}</dd></div>'
        for name, value, note in cells
    ) + "</dl>"  # fmt: skip


def _alt(front: Front) -> str:
    points = "; ".join(
        f"{words.title(p)} {words.times(front.gain(p))} at {words.percent(p.kept)}" for p in front.ordered()
    )
    return f"Quality kept against {TARGETS[front.target][1].lower()}: {points}."


def _figure(front: Front, still: str, interactive: bool) -> str:
    image = f'<img class="still" src="data:image/png;base64,{still}" alt="{_e(_alt(front))}">'
    hint = "Each bar reaches down to the 95 % bound. Faint: candidates, as they stood on the select split."
    if interactive:
        drawing = f'<div id="front" role="img" aria-label="{_e(_alt(front))}"></div><noscript>{image}</noscript>'
        hint += " Numbers are the rows of the table; point at one to read what was done."
    else:
        drawing = image
        hint += ' For a picture to point into: <code>pip install "formwright[report]"</code>, then run again.'
    hint = hint.replace(" %", "\u00a0%")
    return f'<section class="card"><h2>The front</h2><p class="hint">{hint}</p>{drawing}</section>'


def _points(front: Front) -> str:
    columns = [
        ("#", "left"), ("Model", "left"), (words.metric(front), ""), ("kept [95 % bound]", ""),
        (f"{words.unit(front)} (spread)", ""), ("speed", ""), ("MB", ""), ("parameters", ""), ("MACs", ""),
        ("cosine", ""), ("verdict", "left"),
    ]  # fmt: skip
    head = "".join(f'<th scope="col" role="columnheader" class="{c}">{_e(name)}</th>' for name, c in columns)
    rows = "".join(_row(front, n, p, len(columns)) for n, p in enumerate(front.ordered()))
    legend = " ".join(
        f"<strong>{name}</strong>: {_e(words.VERDICTS[name][:1].lower() + words.VERDICTS[name][1:])}"
        for name in dict.fromkeys(words.verdict(front, p) for p in front.ordered())
        if name != "original"
    )
    return f"""<section class="card"><h2>Every measured model</h2><p class="hint">{legend}</p>
<table class="points" role="table">
<caption class="out">Measured models with their quality, speed and size, and what was done to each</caption>
<thead role="rowgroup"><tr role="row">{head}</tr></thead>
<tbody role="rowgroup">{rows}</tbody>
</table></section>"""


def _row(front: Front, n: int, p: Point, columns: int) -> str:
    kind = _kind(p)
    spread = f' <span class="dim">({_e(words.percent(p.ms_spread))})</span>' if p.ms_spread is not None else ""
    verdict = words.verdict(front, p)
    badges = f'<span class="badge {verdict.partition(" ")[0]}">{_e(verdict)}</span>'
    badges += '<span class="badge noisy">noisy</span>' if p.noisy else ""
    bound = (
        ""
        if p.bound is None or p is front.original
        else f' <span class="dim">[{_e(words.share(p.bound, True))}]</span>'
    )
    cells = [
        (words.metric(front), _e(words.quality(p.quality))),
        ("kept [95 % bound]", f"<span>{_e(words.share(p.kept))}{bound}</span>"),
        (f"{words.unit(front)} (spread)", f"<span>{_e(words.digits(p.ms))}{spread}</span>"),
        ("speed", _e(words.times(p.speed))),
        ("MB", _e(words.megabytes(p.bytes))),
        ("parameters", _e(words.big(p.parameters))),
        ("MACs", _e(words.big(p.macs))),
        ("cosine", _e(words.share(p.cosine))),
    ]
    mark = {"written": "written", "original": "original", "other": "off"}.get(kind, "")
    row = f'<td role="cell" class="left mark"><span class="number {mark}">{n}</span></td>'
    row += f'<th scope="row" role="rowheader">{_e(words.title(p))}</th>'
    row += "".join(f'<td role="cell" data-label="{_e(name)}">{value}</td>' for name, value in cells)
    row += f'<td role="cell" class="left state">{badges}</td>'
    chosen = " chosen" if p.written else ""
    return (
        f'<tr role="row" class="point{chosen}">{row}</tr>'
        f'<tr role="row" class="words{chosen}"><td role="cell" colspan="{columns}">{_words(n, p)}</td></tr>'
    )


def _words(n: int, p: Point) -> str:
    """What was done, short; opened: each step in words and the command that repeats it."""
    short = _e(words.history(p)) if p.history else "As it was loaded." if p.name == "original" else ""
    if not p.history_words and not p.reproduce:
        return f'<span class="steps">{short}</span>'
    steps = "".join(f"<li>{_e(word)}</li>" for word in p.history_words)
    command = _command(f"point-{n}", p.reproduce) if p.reproduce else ""
    opened = " open" if p.written else ""
    return f"<details{opened}><summary>{short or 'What was done'}</summary><ol>{steps}</ol>{command}</details>"


def _pair(front: Front) -> str:
    return f'<div class="pair">{_baselines(front)}{_evidence(front)}</div>' if front.baselines else _evidence(front)


def _baselines(front: Front) -> str:
    """How the models stand to something simple: bars from zero, where that makes sense."""
    rows: list[tuple[str, float | None, str]] = [(name, value, "") for name, value in front.baselines.items()]
    rows.append((f"{front.model} (original)", front.original.quality, "model"))
    if front.written is not None and front.written is not front.original:
        rows.append((words.title(front.written), front.written.quality, "written"))
    rows.sort(key=lambda row: -(row[1] or 0.0) if front.task.higher_is_better else (row[1] or 0.0))
    most = max([abs(value) for _, value, _ in rows if value is not None], default=0.0) or 1.0
    lines = "".join(
        f'<tr><th scope="row">{_e(name)}</th><td><div class="bar {kind}" style="width:'
        f'{max(value or 0.0, 0.0) / most * 100:.1f}%"></div></td><td>{_e(words.quality(value))}</td></tr>'
        for name, value, kind in rows
    )
    better = "higher" if front.task.higher_is_better else "lower"
    return f"""<section class="card"><h2>Against something simple</h2>
<p class="hint">{_e(front.task.metric)} on the test split; {better} is better.</p>
<table class="bars"><thead><tr><th scope="col">Model</th><th scope="col"><span class="out">Bar</span></th>
<th scope="col">{_e(front.task.metric)}</th></tr></thead><tbody>{lines}</tbody></table></section>"""


def _evidence(front: Front) -> str:
    task = front.task
    chance = f"; kept is counted above chance ({words.quality(task.chance)})" if task.chance is not None else ""
    facts = [
        ("Task", f"{_e(task.name)}, {_e(task.metric)}{_e(chance)}"),
        ("Fingerprint", f"<code>{_e(task.fingerprint or words.NONE)}</code>"),
        ("Splits", f"{_e(words.splits(front))}. Candidates are ranked and healed on <em>calibrate</em> and chosen on "
                   "<em>select</em>; <em>test</em> is touched once, for the numbers above."),
        ("Certifiable", _e(words.certificate(front))),
        ("Bound", _e(front.bound_method)),
        ("Timing", _e(f"{front.shape or front.target}; {words.noise(front)}")),
        ("Machine", _e(" · ".join(words.machine(front)) or words.NONE)),
        ("Search", _e(f"{len(front.candidates)} candidates in {words.duration(front.seconds)}, "
                      f"seed {front.seed if front.seed is not None else words.NONE}")),
    ]  # fmt: skip
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    return f"""<section class="card"><h2>Evidence</h2>
<p class="hint">What these numbers rest on. They compare only with results of the same fingerprint.</p>
<dl class="facts">{rows}</dl></section>"""


def _command(name: str, command: str) -> str:
    return (
        f'<div class="command"><pre id="{name}">{html.escape(command)}</pre>'
        f'<button type="button" data-copy="{name}" hidden aria-label="Copy this command">Copy</button></div>'
    )


def _commands(front: Front) -> str:
    given = [("Run it again", front.command), ("Go on searching", front.resume or "")]
    parts = [
        f'<p class="hint" style="margin:14px 0 0">{label}</p>{_command(f"command-{n}", command)}'
        for n, (label, command) in enumerate(given)
        if command
    ]
    return f'<section class="card"><h2>Reproduce</h2>{"".join(parts)}</section>' if parts else ""


def _footer(front: Front) -> str:
    version = f" {front.machine.formwright}" if front.machine.formwright else ""
    return _e(f"Written by Formwright{version}. This page is one file and loads nothing.")


def _kind(p: Point) -> str:
    return "original" if p.name == "original" else "written" if p.written else "front" if p.on_front else "other"


def _lines(text: str, width: int = 52) -> str:
    """Wrapped and escaped for plotly, which reads a little HTML in its texts."""
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(text, width)[:12])


def _data(front: Front) -> dict[str, Any]:
    """What the script draws, in numbers and ready texts; nothing in it is null but ``keep``."""
    points: list[dict[str, Any]] = []
    for n, p in enumerate(front.ordered()):
        x, y = front.gain(p), p.kept
        if x is None or y is None:
            continue
        hover = f"<b>{_lines(words.title(p))}</b><br>{_lines(words.history(p))}<br>"
        hover += f"{words.percent(y)} kept [{words.percent(p.bound, down=True)}], {words.times(x)}<br>"
        hover += f"{words.digits(p.ms)} ms, {words.megabytes(p.bytes)} MB"
        down = max(y - p.bound, 0.0) if p.bound is not None and p is not front.original else 0.0
        points.append({"x": x, "y": y, "number": str(n), "hover": hover, "down": down, "kind": _kind(p)})
    ys = [p["y"] - p["down"] for p in points] + [p["y"] for p in points] + [1.0, front.keep or 1.0]
    span = max(max(ys) - min(ys), 0.004)
    low, high = min(ys) - 0.14 * span, max(ys) + 0.14 * span
    candidates = [c for c in (_candidate(front, c, low, high) for c in front.candidates) if c is not None]
    xs = [p["x"] for p in points] + [c["x"] for c in candidates] + [1.0]
    left, right = min(xs), max(xs)
    logarithmic = right / max(left, 1e-9) > 12
    wide = max(right - left, 0.3)
    ends = (
        [math.log10(left / 1.15), math.log10(right * 1.2)] if logarithmic else [left - 0.05 * wide, right + 0.06 * wide]
    )
    line = sorted((p["x"], p["y"]) for p in points if p["kind"] != "other" and _on_line(front, p["number"]))
    return {
        "x": TARGETS[front.target][1],
        "points": points,
        "candidates": candidates,
        "line": {"x": [x for x, _ in line], "y": [y for _, y in line]},
        "rangeX": ends,
        "typeX": "log" if logarithmic else "linear",
        "rangeY": [low, high],
        "formatY": ".2%" if span < 0.01 else ".1%" if span < 0.1 else ".0%",
        "keep": front.keep,
        "keepText": f"keep {words.percent(front.keep)}",
    }


def _on_line(front: Front, number: str) -> bool:
    return front.ordered()[int(number)].on_front


def _candidate(front: Front, c: Candidate, low: float, high: float) -> dict[str, Any] | None:
    """A dot, or an arrow at the edge for what lies beyond the picture."""
    x, y = front.gain(c), front.kept(c)
    if x is None or y is None:
        return None
    state = "accepted" if c.accepted else "rejected"
    hover = f"{_lines(c.label or 'candidate')}<br>{words.percent(y)} kept on select, {words.times(x)}<br>{state}"
    edge = 0.012 * (high - low)
    symbol = "triangle-down" if y < low else "triangle-up" if y > high else "circle"
    return {
        "x": x,
        "y": min(max(y, low + edge), high - edge) if symbol != "circle" else y,
        "hover": hover,
        "symbol": symbol,
    }
