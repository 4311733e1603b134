"""Mamba on a CPU: Formwright against transformers and mambapy, same weights, same ids, one thread budget.

Shapes: *forward* (4 rows of 1,024 tokens), *train* (forward and backward; transformers at 512 tokens, since its path
keeps a state for every token), *steps* (one row token by token), and *context* (8 rows at a context of 8,192: Mamba
against a Transformer of as many parameters, both Formwright's). Every contender of the first three runs in a process of
its own, whose largest memory is printed. Outputs, and gradients where they are made, must agree before a time is shown.

    python -m benchmarks.mamba [--shape forward|train|steps|context|flat] [--rounds N] [--threads N] [--json]

*flat* times a token behind contexts of 1,024 to 32,768.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import arguments, race, set_bar, show
from benchmarks.worker import Worker
from formwright.measure import alternate

Run = Callable[[], Any]
VOCAB = 256
#: Width, layers of the passes, and of the steps.
PASS, STEPS = (256, 4), (512, 8)
CONTEXT, ROWS, TOKENS = 8192, 8, 16
#: Cosine of outputs and gradients below which a contender is called wrong.
BAR = 0.9999
#: How many times faster than a peer a pass was meant to be, and a token behind a context.
LEAST = {("forward", "transformers"): 20, ("train", "mambapy"): 3, ("train", "transformers"): 10}
LEAST |= {("steps", "transformers"): 3}
AHEAD = 5
#: Seconds of the forward pass of transformers where its bar was set.
SET_AGAINST = 6.8


def main() -> None:
    shapes = {"forward": forward, "train": train, "steps": steps, "context": context, "flat": flat}
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=tuple(shapes), action="append", help="default: all")
    options = parser.parse_args()
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    for name in options.shape or shapes:
        for lines in shapes[name](threads, options.rounds):
            show(lines, options.json)


# ---------------------------------------------------------------------- shapes


def forward(threads: int, rounds: int) -> list[list[dict[str, Any]]]:
    names = ("transformers", "formwright")
    lines = contest("forward", "4 x 1024", names, ids(4, 1024), PASS, threads, rounds)
    peer, mine = lines
    if "ms" in mine:
        operations, least = products(model(*PASS), 4 * 1024)
        mine["note"] = (
            f"The bar of {LEAST['forward', 'transformers']:g}x was set where the forward pass of transformers took "
            f"{SET_AGAINST:g} s; here it takes {peer['ms'] / 1e3:.2f} s, and the float32 products of the projections "
            f"alone, {operations / 1e9:.0f} GFLOP, take {least * 1e3:.0f} ms, so that nothing in float32 could pass "
            f"{peer['ms'] / least / 1e3:.0f}x, and {mine['ratio']:.1f}x is what was measured."
        )
    return [lines]


@torch.inference_mode()
def products(made: Any, tokens: int) -> tuple[float, float]:
    """The operations and the least seconds of the products that all slots of ``made`` make of ``tokens``."""
    weights = [slot.dense_weight() for slot in made.slots().values()]
    given = {width: torch.randn(tokens, width) for width in {weight.shape[1] for weight in weights}}

    def run() -> None:
        for weight in weights:
            given[weight.shape[1]] @ weight.T

    operations = 2 * tokens * sum(weight.numel() for weight in weights)
    return operations, alternate({"products": run}, rounds=9, warmup=2)["products"].best


def train(threads: int, rounds: int) -> list[list[dict[str, Any]]]:
    long = contest("train", "1 x 1024", ("mambapy", "formwright"), ids(1, 1024), PASS, threads, rounds)
    peer, mine = long
    held, most = mine["peak_mib"], peer["peak_mib"]
    set_bar(mine, "less than half the memory", held < most / 2, f"{held:,.0f} against {most:,.0f} MiB")
    return [long, contest("train", "1 x 512", ("transformers", "formwright"), ids(1, 512), PASS, threads, rounds)]


def steps(threads: int, rounds: int) -> list[list[dict[str, Any]]]:
    names = ("transformers", "formwright")
    return [contest("steps", "1 x 64", names, ids(1, 64), STEPS, threads, rounds)]


def contest(
    how: str, shape: str, names: tuple[str, ...], given: Tensor, size: tuple[int, int], threads: int, rounds: int
) -> list[dict[str, Any]]:
    """The first of ``names`` is the peer."""
    from formwright.hub.huggingface import write

    with tempfile.TemporaryDirectory() as directory:
        write(model(*size), f"{directory}/model")
        workers = {
            name: Worker(f"benchmarks.mamba:{name}", threads, {"directory": f"{directory}/model", "how": how})
            for name in names
        }
        for worker in workers.values():
            worker.prepare(given)
        found = {name: worker.vectors() for name, worker in workers.items()}
        wanted = found[names[0]][1:]
        agreement = {name: cosine(vector[1:], wanted) for name, vector in found.items()}
        least = {"formwright": LEAST[how, names[0]]}
        lines = race(f"mamba {how}", f"{how} {shape}", workers, agreement, BAR, names[0], rounds, least=least)
        for line in lines:
            line["peak_mib"] = float(found[line["contender"]][0])
        for worker in workers.values():
            worker.close()
    return lines


@torch.inference_mode()
def context(threads: int, rounds: int) -> list[list[dict[str, Any]]]:
    """What a token costs behind 8,192 others. The keys and values of the Transformer are drawn, not computed.

    Each goes on with its own stream, some 200 tokens in all, so that no copy of a fork falls into a time. What they say
    token by token must be what they say in one pass.
    """
    from formwright.engine.state import State

    width, layers = STEPS
    mamba, other = model(width, layers), transformer(width, layers)
    given = ids(ROWS, 1)
    start = State(ROWS)
    mamba(ids(ROWS, 32), state=start)
    full = State(ROWS)
    full.seen = full.seen + CONTEXT
    for name, slot in other.state_slots().items():
        full.append(name, torch.randn(ROWS, CONTEXT, *slot.shape), None)

    def run(made: Any, state: Any) -> Run:
        def few() -> None:
            for _ in range(TOKENS):
                made(given, state=state)

        return few

    def agrees(made: Any) -> float:
        some, state = ids(ROWS, 32), State(ROWS)
        found = torch.cat([made(token, state=state) for token in some.split(1, 1)], 1)
        return cosine(found.flatten().numpy(), made(some).flatten().numpy())

    peer, name = f"transformer, {size(other)}", f"mamba, {size(mamba)}"
    contenders = {peer: run(other, full), name: run(mamba, start)}
    agreement = {peer: agrees(other), name: agrees(mamba)}
    shape = f"context {ROWS} x {TOKENS}"
    return [race("mamba context", shape, contenders, agreement, BAR, peer, rounds, least={name: AHEAD})]


@torch.inference_mode()
def flat(threads: int, rounds: int) -> list[list[dict[str, Any]]]:
    from formwright.engine.state import State

    made = model(*STEPS)
    contenders: dict[str, Run] = {}
    for length in (1024, 8192, 32768):
        state = State(1)
        for _ in range(length // 1024):
            made(ids(1, 1024), state=state)

        def few(state: Any = state) -> None:
            forked = state.fork()
            for _ in range(TOKENS):
                made(ids(1, 1), state=forked)

        contenders[f"behind {length:,}"] = few
    peer = next(iter(contenders))
    return [race("mamba flat", f"flat 1 x {TOKENS}", contenders, dict.fromkeys(contenders, 1.0), 0.0, peer, rounds)]


# ---------------------------------------------------------------------- models


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def model(width: int, layers: int) -> Any:
    from formwright import build
    from formwright.models.recipes import recipe

    made = build({**recipe("mamba-130m", vocab=VOCAB, width=width, layers=layers), "head": {"part": "states"}}, seed=0)
    with torch.no_grad():
        made.stem.tokens.weight.mul_(50.0)  # values of the size of 1, so that agreement means something
    return made


def transformer(width: int, layers: int) -> Any:
    """As many layers of attention with a gated MLP as fill a Mamba of ``layers``: one stands for two."""
    from formwright import build
    from formwright.models.recipes import recipe

    spec = recipe("gpt-tiny", vocab=VOCAB, width=width, layers=layers // 2, heads=8, hidden=3 * width)
    return build({**spec, "head": {"part": "states"}}, seed=0)


def size(made: Any) -> str:
    return f"{sum(p.numel() for p in made.parameters()) / 1e6:.1f}M"


# ---------------------------------------------------------------------- contenders, each in a process of its own


def formwright(threads: int, directory: str, how: str) -> Callable[[Tensor], Run]:
    from formwright import load
    from formwright.engine.state import State

    made = load(directory)
    rates = [parameter for name, parameter in made.named_parameters() if name.endswith("A_log")]

    def stepped(given: Tensor) -> Tensor:
        state = State(len(given))
        return torch.cat([made(token, state=state) for token in given.split(1, 1)], 1)

    return prepare(made, stepped, [made.stem.tokens.weight, *rates], how)


def transformers(threads: int, directory: str, how: str) -> Callable[[Tensor], Run]:
    from transformers import MambaModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    made = MambaModel.from_pretrained(directory)

    def stepped(given: Tensor) -> Tensor:
        found, cache = [], None
        for token in given.split(1, 1):
            out = made(token, cache_params=cache, use_cache=True)
            cache = out.cache_params
            found.append(out.last_hidden_state)
        return torch.cat(found, 1)

    rates = [parameter for name, parameter in made.named_parameters() if name.endswith("A_log")]
    return prepare(
        lambda given: made(given, use_cache=False).last_hidden_state,
        stepped,
        [made.get_input_embeddings().weight, *rates],
        how,
    )


def mambapy(threads: int, directory: str, how: str) -> Callable[[Tensor], Run]:
    """Its stack without table and last norm, which are added."""
    from mambapy.mamba import Mamba, MambaConfig
    from safetensors.torch import load_file

    tensors = load_file(f"{directory}/model.safetensors")
    layers = {name: value for name, value in tensors.items() if name.startswith("layers.")}
    table, norm = torch.nn.Parameter(tensors["embeddings.weight"]), tensors["norm_f.weight"]
    made = Mamba(MambaConfig(table.shape[1], 1 + max(int(name.split(".")[1]) for name in layers)))
    made.load_state_dict(layers)
    rates = [parameter for name, parameter in made.named_parameters() if name.endswith("A_log")]

    def whole(given: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(made(table[given]), norm.shape, norm, 1e-5)

    return prepare(whole, None, [table, *rates], how)


def prepare(
    whole: Callable[[Tensor], Tensor], stepped: Callable[[Tensor], Tensor] | None, held: list[Tensor], how: str
) -> Callable[[Tensor], Run]:
    """``run()`` gives the process's largest memory in MiB, and then the outputs or the gradients of ``held``."""

    def run(given: Tensor) -> np.ndarray:
        if how == "train":
            out = whole(given)
            # Squares would not do: behind the last norm their mean hardly depends on anything.
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            loss = (out * weights).mean()
            found = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, held)])
        else:
            with torch.inference_mode():
                found = (whole(given) if how == "forward" or stepped is None else stepped(given)).flatten()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return np.concatenate(([peak], found.numpy()))

    return lambda given: lambda: run(given)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


if __name__ == "__main__":
    main()
