"""What every benchmark shares: one thread budget, alternating rounds, honest lines.

A line is plain data: machine, versions, shape, contender, milliseconds (best and median), spread, the ratio to the
named peer, agreement with the reference, and whether the machine was noisy. ``--json`` prints a line per contender.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from formwright.measure import Timing, alternate
from formwright.measure.machine import machine

#: Seconds before each time, in which the last contender's threads go to sleep.
PAUSE = 0.02


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
) -> list[dict[str, Any]]:
    """Time the contenders that agree (``agreement`` at least ``bar``, one for all or one each) in one alternating run,
    ``turn`` calls in a row each; lines of plain data."""
    bars = bar if isinstance(bar, dict) else dict.fromkeys(contenders, bar)
    sound = {key: run for key, run in contenders.items() if agreement[key] >= bars[key]}
    times: dict[str, Timing] = alternate(sound, rounds=rounds, warmup=2, pause=PAUSE, turn=turn)
    where = machine()
    lines = []
    for key in contenders:
        line: dict[str, Any] = {"benchmark": name, "shape": shape, "contender": key, "agreement": agreement[key]}
        if key in times:
            timing = times[key]
            line |= {
                "ms": timing.median * 1e3,
                "best_ms": timing.best * 1e3,
                "spread": timing.spread,
                "noisy": timing.noisy,
                "ratio": timing.over(times[peer]),
                "ratio_of_best": times[peer].best / timing.best,
                "peer": peer,
            }
        else:
            line |= {"wrong": f"agreement {agreement[key]:.4f} is below {bars[key]}"}
        lines.append({**line, "machine": where})
    return lines


def show(lines: list[dict[str, Any]], as_json: bool) -> None:
    """Print the lines as a table, or one JSON object each."""
    if as_json:
        for line in lines:
            print(json.dumps(line))
        return
    where = lines[0]["machine"]
    print(f"{where['cpu']} · {where['threads']} threads · torch {where['torch']} · load {where['load']}")
    titles = f"{'median ms':>10} {'ratio':>7} {'of best':>8} {'spread':>7}  cosine  neighbour  kept"
    print(f"  {'shape':<10} {'contender':<34} {titles}")
    for line in lines:
        if "wrong" in line:
            print(f"  {line['shape']:<10} {line['contender']:<34} wrong: {line['wrong']}")
            continue
        print(
            f"  {line['shape']:<10} {line['contender']:<34} {line['ms']:>10.1f} {line['ratio']:>6.2f}x"
            f" {line['ratio_of_best']:>7.2f}x {line['spread']:>6.0%}{'!' if line['noisy'] else ' '}"
            f" {line['agreement']:.4f}  {share(line.get('neighbours')):>9}  {kept(line)}".rstrip()
        )
    print(f"  ratios against {lines[0].get('peer', lines[-1].get('peer'))}; ! marks a spread above 10 %")


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def kept(line: dict[str, Any]) -> str:
    """The share of the peer's metric, with its standard error."""
    return f"{line['kept']:.4f} ± {line['kept_error']:.4f}" if "kept" in line else ""
