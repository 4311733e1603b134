"""What length costs: memory of one long pass, growth of time for every linear mixer, and training at 4,096 tokens.

    python -m benchmarks.length [--what memory|growth|train] [--mixers NAME ...] [--rounds N] [--threads N] [--json]

*memory*: 262,144 tokens of width 256 through 4 layers in one forward pass, hidden states only, each model in a process
of its own; the last states must be those of a stream in pieces. *growth*: the exponent of time in the length by least
squares over 4,096 to 32,768 tokens, for every mixer that declares its growth linear; what a causal mixer says of the
shortest length must be the beginning of what it says of the longest. *train*: forward and backward of a row of 4,096
tokens, Mamba against a Transformer of as many parameters; gradients must be those of float64 on a shorter row.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import PAUSE, Line, arguments, race, set_bar, show, spread, verdict
from benchmarks.mamba import PASS, cosine, ids, model, size, transformer
from benchmarks.worker import Worker
from formwright import registry
from formwright.measure import Timing, alternate
from formwright.measure.machine import machine

#: Tokens of the one pass, of a piece of the stream that it is compared with, and the most memory in MiB.
LONG, PIECE, MOST = 262_144, 8192, 4096
LENGTHS, WIDTH = (4096, 8192, 16384, 32768), 64
#: The largest exponent that passes for linear.
STEEPEST = 1.1
#: Tokens that are trained on, and those whose gradients are compared.
TRAINED, COMPARED = 4096, 256
BAR = 0.9999
#: Options of a usual size where the mixer's own examples are smaller than any use.
OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"heads": 4, "causal": True, "window": 256},
    "bigbird": {"heads": 4, "block": 64},
    "deltanet": {"heads": 1},
    "linear-attention": {"heads": 4, "causal": True},
    "local": {"heads": 4, "block": 64, "lookback": 1, "causal": True, "rotary": {}},
    "mamba": {},
    "mamba2": {"head_width": 32},
    "reformer": {"heads": 4, "chunk": 64, "buckets": 64, "rounds": 2},
    "spiking-lmu": {},
}


def main() -> None:
    kinds = {"memory": memory, "growth": growth, "train": train}
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--what", choices=tuple(kinds), action="append", help="default: all")
    parser.add_argument("--mixers", nargs="+", help="of memory (mamba, deltanet) and growth; default: all")
    options = parser.parse_args()
    options.threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(options.threads)
    for name in options.what or kinds:
        kinds[name](options)


def say(line: Line, text: str, as_json: bool) -> None:
    print(json.dumps({**line, "machine": machine()}) if as_json else f"  {text}", flush=True)


# ---------------------------------------------------------------------- memory of one long pass


def memory(options: Any) -> None:
    for name in options.mixers or ("mamba", "deltanet"):
        worker = Worker(f"benchmarks.length:{name}_pass", options.threads, {})
        worker.prepare(LONG)
        peak, seconds, agreement = map(float, worker.vectors())
        worker.close()
        line: Line = {"benchmark": "length memory", "contender": name, "tokens": LONG, "agreement": agreement}
        if agreement < BAR:
            say({**line, "wrong": f"agreement below {BAR}"}, f"{name}: wrong, agreement {agreement:.4f}", options.json)
            continue
        line |= {"peak_mib": peak, "seconds": seconds}
        set_bar(line, f"at most {MOST:,} MiB", peak <= MOST, f"{peak:,.0f} MiB")
        text = f"{name:<12} {LONG:,} tokens: peak {peak:,.0f} MiB ({verdict(line)}), {seconds:.1f} s"
        say(line, f"{text}, agreement {agreement:.6f}", options.json)


def mamba_pass(threads: int) -> Callable[[int], Callable[[], np.ndarray]]:
    made = model(*PASS)
    return lambda length: partial(passed, made, length)


def deltanet_pass(threads: int) -> Callable[[int], Callable[[], np.ndarray]]:
    from formwright import build
    from formwright.models.recipes import recipe

    width, layers = PASS
    spec = recipe("deltanet-340m", vocab=256, width=width, layers=layers, heads=2)
    made = build({**spec, "head": {"part": "states"}}, seed=0)
    return lambda length: partial(passed, made, length)


@torch.inference_mode()
def passed(made: Any, length: int) -> np.ndarray:
    """The process's peak in MiB and the seconds of one pass, and its agreement with a stream on the last piece."""
    from formwright.engine.state import State

    given = ids(1, length)
    started = time.perf_counter()
    hidden = made(given)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    state = State(1)
    for piece in given.split(PIECE, 1):
        streamed = made(piece, state=state)
    return np.array([peak, seconds, alike(hidden[:, -PIECE:], streamed)])


# ---------------------------------------------------------------------- growth of time


def growth(options: Any) -> None:
    for name, part in linear_mixers(options.mixers):
        inputs = [torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(0)) for length in LENGTHS]
        exponent, timings, agreement = grown(part, inputs, options.rounds)
        line: Line = {"benchmark": "length growth", "contender": name, "agreement": agreement}
        if agreement < BAR:
            say({**line, "wrong": f"agreement below {BAR}"}, f"{name}: wrong, agreement {agreement:.4f}", options.json)
            continue
        times = {length: timing.best * 1e3 for length, timing in zip(LENGTHS, timings)}
        worst = max(timings, key=lambda timing: timing.spread)
        shown = ", ".join(f"{length:,}: {ms:.1f}" for length, ms in times.items())
        line |= {"exponent": exponent, "ms": times}
        line |= {"rounds": options.rounds, "spread": worst.spread, "noisy": worst.noisy}
        set_bar(line, f"at most {STEEPEST:g}", exponent <= STEEPEST, f"exponent {exponent:.2f}")
        say(
            line,
            f"{name:<18} exponent {exponent:.2f} ({verdict(line)})   ms {shown}   spread {spread(line)}",
            options.json,
        )


def linear_mixers(wanted: list[str] | None) -> Iterator[tuple[str, Any]]:
    """Every registered mixer that is linear with its usual options, or else with one of its examples."""
    from formwright.parts.base import initialise
    from formwright.parts.make import make_part

    for name in wanted or registry.names("mixer"):
        examples = getattr(registry.resolve("mixer", name), "examples", ({},))
        for options in (OPTIONS[name],) if name in OPTIONS else examples:
            part = make_part({"part": f"mixer:{name}", **options}, WIDTH)
            if part.traits.growth == "linear" and part.traits.length == "any" and not part.reads:
                initialise(part, 0)
                yield name, part.eval()
                break


@torch.inference_mode()
def grown(part: Any, inputs: list[Tensor], rounds: int) -> tuple[float, list[Timing], float]:
    """The exponent of the best rounds, the times of each input, and the agreement of the shortest with the longest."""
    from formwright.parts.context import Context

    ctx = Context(path="mixer", seed=0)
    short, long = part(inputs[0], ctx), part(inputs[-1], ctx)
    agreement = alike(long[:, : short.shape[1]], short) if part.traits.causal else float(long.isfinite().all())
    runs = {str(x.shape[1]): partial(part, x, ctx) for x in inputs}
    timings = list(alternate(runs, rounds=rounds, warmup=1, pause=PAUSE).values())
    best = [math.log(timing.best) for timing in timings]
    exponent = np.polyfit([math.log(length) for length in LENGTHS], best, 1)[0]
    return float(exponent), timings, agreement


# ---------------------------------------------------------------------- training


def train(options: Any) -> None:
    made = (transformer(*PASS), model(*PASS))
    names = [f"{kind}, {size(one)}" for kind, one in zip(("transformer", "mamba"), made)]
    agreement = {name: faithful(one) for name, one in zip(names, made)}
    given = ids(1, TRAINED)
    contenders = {name: partial(gradients, one, given) for name, one in zip(names, made)}
    lines = race(
        "length train", f"1 x {TRAINED}", contenders, agreement, BAR, names[0], options.rounds, least={names[1]: 1}
    )
    show(lines, options.json)


def gradients(made: Any, given: Tensor) -> list[Tensor]:
    """Of all weights, from a random weighing of the hidden states."""
    out = made(given)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return list(torch.autograd.grad((out * weights).mean(), list(made.parameters())))


def faithful(made: Any) -> float:
    """The least agreement of any weight's gradient with that of the same model in float64."""
    given = ids(1, COMPARED)
    found = gradients(made, given)
    wanted = gradients(made.double(), given)
    made.float()
    return min(alike(a, b) for a, b in zip(found, wanted))


def alike(a: Tensor, b: Tensor) -> float:
    """The cosine; 1 for equal tensors, which may be zero."""
    return 1.0 if torch.equal(a, b) else cosine(a.double().flatten().numpy(), b.double().flatten().numpy())


if __name__ == "__main__":
    main()
