"""A training run for several processes of ``torch.distributed.run``; the main one writes what came out.

Arguments: a directory, and ``replicas`` or ``shards``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from formwright.training import train
from formwright.training.hooks import EMA, Evaluate
from training.resumable import Counting, model

STEPS = 6
SETTINGS = {"lr": 1e-2, "accumulation": 4, "seed": 3, "show": False, "plot": False, "save_every": 3}


def go(out: Path | None, steps: int = STEPS, resume: bool = False, **settings):
    task = Counting()
    made = model()
    hooks = [EMA(0.9, final=False), Evaluate(task, every=2)]
    return train(made, task, steps=steps, out=out, resume=resume, hooks=hooks, **{**SETTINGS, **settings})


def main(out: Path, shard: bool) -> None:
    torch.set_num_threads(1)
    done = go(out / "run", shard=shard)
    spans = go(None, shard=shard, gradient_checkpointing=1)
    if os.environ["RANK"] == "0":
        torch.save(dict(done.model.state_dict()), out / "model.pt")
        found = {"losses": done.losses, "scores": dict(done.scores), "spans": spans.losses}
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "shards")
