"""What every benchmark shares: one thread budget, alternating rounds, honest lines, and how a line is read.

A line is plain data: machine, versions, shape, contender, milliseconds (best and median), spread, the ratio to the
named peer, agreement with the reference, the bars that were set for it, and whether the machine was noisy. ``--json``
prints a line per contender; ``python -m benchmarks.page`` makes a page of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from formwright.measure import Timing, alternate
from formwright.measure.machine import machine

Line = dict[str, Any]
#: Seconds before each time, in which the last contender's threads go to sleep.
PAUSE = 0.02
#: Rounds below which there is no spread to speak of.
FEW = 4


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds")
    parser.add_argument("--threads", type=int, default=None, help="threads of every contender")
    return parser


def race(
    name: str,
    shape: str,
    contenders: dict[str, Callable[[], Any]],
    agreement: dict[str, float],
    bar: float | dict[str, float],
    peer: str,
    rounds: int,
    turn: int = 1,
    least: Mapping[str, float] = MappingProxyType({}),
) -> list[Line]:
    """Time the contenders that agree (``agreement`` at least ``bar``, one for all or one each) in one alternating run,
    ``turn`` calls in a row each; lines of plain data. ``least``: how many times faster than ``peer`` a contender was
    meant to be."""
    bars = bar if isinstance(bar, dict) else dict.fromkeys(contenders, bar)
    sound = {key: run for key, run in contenders.items() if agreement[key] >= bars[key]}
    times: dict[str, Timing] = alternate(sound, rounds=rounds, warmup=2, pause=PAUSE, turn=turn)
    where = machine()
    lines = []
    for key in contenders:
        line: Line = {"benchmark": name, "shape": shape, "contender": key, "agreement": agreement[key]}
        if key in times:
            timing = times[key]
            line |= {
                "ms": timing.median * 1e3,
                "best_ms": timing.best * 1e3,
                "spread": timing.spread,
                "noisy": timing.noisy,
                "rounds": rounds,
                "ratio": timing.over(times[peer]),
                "ratio_of_best": times[peer].best / timing.best,
                "peer": peer,
            }
            if key in least:
                found = f"{fold(line['ratio'])} {peer}"
                set_bar(line, f"at least {least[key]:g}x", line["ratio"] >= least[key], found)
        else:
            line |= {"wrong": f"agreement {agreement[key]:.4f} is below {bars[key]}"}
        lines.append({**line, "machine": where})
    return lines


def set_bar(line: Line, bar: str, held: bool, found: str) -> None:
    """Add what was asked of a line before it was measured, what was found, both in words, and whether it is so."""
    line["bars"] = [*line.get("bars", ()), {"bar": bar, "held": held, "found": found}]


# ---------------------------------------------------------------------- how a line is read


def fold(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}x"


def spread(line: Line) -> str:
    """The rounds' interquartile range over their median; nothing where they were too few."""
    if line.get("rounds", FEW) < FEW:
        return "–"
    return f"{line['spread']:.0%}" + (" (noisy)" if line["noisy"] else "")


def verdict(line: Line) -> str:
    """The bars of a line, and whether they hold."""
    return "; ".join(f"{each['bar']}: {'held' if each['held'] else 'not held'}" for each in line.get("bars", ()))


def given(key: str, text: str) -> Callable[[Line], str]:
    """The cells of what only some lines say, empty for the others."""
    return lambda line: text.format(**line) if line.get(key) is not None else ""


#: What some lines say besides a time.
EXTRAS: dict[str, Callable[[Line], str]] = {
    "same neighbour": given("neighbours", "{neighbours:.1%}"),
    "metric kept": given("kept", "{kept:.4f} ± {kept_error:.4f}"),
    "ready in": given("ready", "{ready:.1f} s"),
    "memory": given("peak_mib", "{peak_mib:,.0f} MiB"),
    "bar": verdict,
}


def used(lines: list[Line], *titles: str) -> dict[str, Callable[[Line], str]]:
    """Those extras (of ``titles``, or of all) that any of the lines has."""
    return {t: EXTRAS[t] for t in titles or EXTRAS if any(EXTRAS[t](line) for line in lines)}


def show(lines: list[Line], as_json: bool) -> None:
    """Print the lines as a table, or one JSON object each."""
    if as_json:
        for line in lines:
            print(json.dumps(line), flush=True)
        return
    where, extras = lines[0]["machine"], used(lines)
    print(f"{where['cpu']} · {where['threads']} threads · torch {where['torch']} · load {where['load']}")
    titles = f"{'ratio':>8} {'of best':>8} {'spread':>12}  cosine" + "".join(f"  {title:<18}" for title in extras)
    print(f"  {'shape':<10} {'contender':<34} {'median ms':>10} {titles}")
    for line in lines:
        if "wrong" in line:
            print(f"  {line['shape']:<10} {line['contender']:<34} wrong: {line['wrong']}")
            continue
        figures = f"{line['ms']:>10.1f} {fold(line['ratio']):>8} {fold(line['ratio_of_best']):>8} {spread(line):>12}"
        more = "".join(f"  {cells(line):<18}" for cells in extras.values())
        print(f"  {line['shape']:<10} {line['contender']:<34} {figures}  {line['agreement']:.4f}{more}".rstrip())
    print(f"  ratios against {lines[0].get('peer', lines[-1].get('peer'))}")
