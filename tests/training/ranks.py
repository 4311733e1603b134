"""Training runs for several processes of ``torch.distributed.run``; the main one writes what came out.

Argument: a directory, in which ``resumed`` is a run of one process that is to go on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from formwright.kit.errors import DataError
from formwright.training import train
from formwright.training.hooks import EMA, Evaluate
from training.resumable import Counting, model

STEPS = 6
SETTINGS = {"lr": 1e-2, "accumulation": 4, "seed": 3, "show": False, "plot": False, "save_every": 3}


def go(out: Path | None, made=None, **settings):
    task = Counting()
    hooks = [EMA(0.9, final=False), Evaluate(task, every=2)]
    return train(made or model(), task, steps=STEPS, out=out, hooks=hooks, **{**SETTINGS, **settings})


def complaint(*given, **settings) -> str:
    try:
        go(*given, **settings)
    except DataError as error:
        return str(error)
    return ""


def main(out: Path, rank: int) -> None:
    torch.set_num_threads(1)
    found = {}
    for kind in ("replicas", "shards"):
        shard = kind == "shards"
        done = go(out / f"{kind}.run", shard=shard)
        spans = go(None, shard=shard, gradient_checkpointing=2)
        found[kind] = {"losses": done.losses, "scores": dict(done.scores), "spans": spans.losses}
        if rank == 0:
            torch.save(dict(done.model.state_dict()), out / f"{kind}.pt")
    found["resumed"] = go(out / "resumed", shard=True, resume=True).losses
    found["complaint"] = complaint(out / "resumed")
    other = model()
    other.final_norm.weight.data += rank
    found["different"] = complaint(None, other)
    (out / f"found{rank or ''}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]))
