"""A process that forks a trainer for every line it reads, so that tests can kill trainers without importing torch anew.

Input: a run directory and, after a space, the name of a variant. Output:
``pid N``, then ``step N`` after every step, then ``ended STATUS`` (of waitpid).
"""

from __future__ import annotations

import os
import sys

import torch

from formwright.models.batch import Batch, Score
from formwright.models.build import build
from formwright.tasks.base import Task
from formwright.training import train
from formwright.training.checkpoint import RunDirectory
from formwright.training.hooks import EMA, EarlyStopping, Evaluate, Hook

VOCAB = 32
STEPS = 24


def model():
    rate = {"dropout": 0.2}
    return build(
        {
            "stem": {"part": "token-embedding", "vocab": VOCAB, "width": 16, **rate},
            "layers": [
                {"part": "attention", "heads": 2, "causal": True, "rotary": {}, **rate},
                {"part": "mlp", "hidden": 24, **rate},
            ],
            "final_norm": "layernorm",
            "head": {"part": "lm", "tied": True},
        },
        seed=0,
    )


def batch(seed: int, index: int) -> Batch:
    draw = torch.Generator().manual_seed(1000 * seed + index)
    first = torch.randint(0, VOCAB, (4, 1), generator=draw)
    tokens = (first + 3 * torch.arange(9)) % VOCAB
    return Batch(inputs={"tokens": tokens[:, :-1]}, targets={"tokens": tokens[:, 1:]})


class Counting(Task):
    """Next tokens of a sequence that counts in threes; the metric is the mean loss."""

    name, metric, higher_is_better = "counting", "nats", False

    def batches(self, split, *, seed, budget, policy=None):
        for index in range(budget):
            yield batch(seed, index)

    def score(self, view, split):
        held = batch(9, 9)
        logits = view.outputs(held)["logits"]
        return Score(float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), held.targets["tokens"])))

    def fingerprint(self):
        return "counting-1"


class Tell(Hook):
    """Says each step, and carries a generator of its own in the checkpoint, as a hook with noise would."""

    def __init__(self, quiet: bool = False) -> None:
        self.draw, self.quiet, self.sum = torch.Generator().manual_seed(5), quiet, 0.0

    def stepped(self, run) -> None:
        self.sum += float(torch.rand((), generator=self.draw))
        if not self.quiet:
            print(f"step {run.step}", flush=True)

    def state_dict(self):
        return {"draw": self.draw.get_state(), "sum": self.sum}

    def load_state_dict(self, state) -> None:
        self.draw.set_state(state["draw"])
        self.sum = state["sum"]


def go(out: str, resume: bool, quiet: bool = False, hooks=(), **settings):
    task = Counting()
    return train(
        model(),
        task,
        **{"steps": STEPS, "lr": 1e-2, "accumulation": 2, "seed": 3, "save_every": 3, **settings},
        out=out,
        resume=resume,
        hooks=[EMA(0.9), Tell(quiet), Evaluate(task, "select", every=5), *hooks],
        show=False,
        plot=False,
    )


def variant(name: str) -> dict:
    """Settings of a run: as it is, or with everything that carries more from step to step."""
    if name == "plain":
        return {}
    stopping = EarlyStopping(patience=3, least=9.0, higher_is_better=False)  # ends the run after step 20
    return {"precision": name, "gradient_checkpointing": 1, "batch": 6, "accumulation": 1, "hooks": [stopping]}


def serve() -> None:
    torch.set_num_threads(1)
    # What PyTorch imports at the first step is imported here once; no gradient runs, which a fork would not survive.
    warm = next(model().parameters())
    warm.grad = torch.zeros_like(warm)
    torch.optim.AdamW([warm], fused=True).step()
    for line in sys.stdin:
        out, name = line.split()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                go(out, resume=RunDirectory(out).begun, **variant(name))
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(f"pid {pid}", flush=True)
        print(f"ended {os.waitpid(pid, 0)[1]}", flush=True)


if __name__ == "__main__":
    serve()
