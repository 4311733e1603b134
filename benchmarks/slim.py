"""The main job on a classifier, end to end: fine-tune, slim, race what was written against ``transformers``.

The classifier has DistilBERT's layout and MiniLM's weights. It is fine-tuned on a CSV that says which of the eight
largest packages of Python's standard library a function belongs to, slimmed on functions it has not seen, and raced on
the documents of the task, sorted by length, 32 a batch. Agreement is the share of texts with the same label.

    python -m benchmarks.slim DIRECTORY [--tune MINUTES] [--minutes MINUTES] [--rounds N] [--json]

DIRECTORY keeps every step, so a run that was stopped goes on.
"""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.encode import MODEL
from benchmarks.harness import arguments, race, show
from benchmarks.peers import Prepare, batchwise, place
from benchmarks.worker import Worker

PACKAGES = 8
PEER = "transformers float32"
#: Share of equal labels below which a contender is called wrong rather than fast.
BAR = {PEER: 1.0, "formwright float32": 0.999, "formwright int8": 0.97, "formwright slim": 0.90}


def tables(directory: Path) -> None:
    """``train.csv`` and ``tickets.csv``: halves of the functions, ``body`` and ``queue``."""
    from formwright.tasks._stdlib import definitions

    rows = sorted({(path.split("/")[0].removesuffix(".py"), body) for path, _, body in definitions()})
    largest = {name for name, _ in Counter(package for package, _ in rows).most_common(PACKAGES)}
    rows = [row for row in rows if row[0] in largest]
    random.Random(0).shuffle(rows)
    for name, part in (("train.csv", rows[::2]), ("tickets.csv", rows[1::2])):
        with open(directory / name, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["queue", "body"])
            writer.writerows(part)


def distilled_layout(directory: Path, labels: list[str]) -> None:
    """MiniLM's weights in DistilBERT's layout, whose positions take the first segment's vector along."""
    from transformers import AutoModel, AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    bert = AutoModel.from_pretrained(place(MODEL))
    shape = bert.config
    config = DistilBertConfig(
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        dim=shape.hidden_size,
        n_layers=shape.num_hidden_layers,
        n_heads=shape.num_attention_heads,
        hidden_dim=shape.intermediate_size,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    torch.manual_seed(0)
    made = DistilBertForSequenceClassification(config)
    names = {
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
    }
    weights = bert.state_dict()
    wanted = dict(made.state_dict())
    for number in range(shape.num_hidden_layers):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                found = weights[f"encoder.layer.{number}.{theirs}.{kind}"]
                wanted[f"distilbert.transformer.layer.{number}.{ours}.{kind}"] = found
    for kind in ("weight", "bias"):
        wanted[f"distilbert.embeddings.LayerNorm.{kind}"] = weights[f"embeddings.LayerNorm.{kind}"]
    wanted["distilbert.embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"]
    positions = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
    wanted["distilbert.embeddings.position_embeddings.weight"] = positions
    made.load_state_dict(wanted)
    made.save_pretrained(directory)
    AutoTokenizer.from_pretrained(place(MODEL)).save_pretrained(directory)


def formwright(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "formwright", *words], check=True, stdout=sys.stderr)


def contender(model: str, threads: int, library: str, int8: bool = False) -> Prepare:
    """Logits of a classifier, by ``transformers`` or by this package."""
    if library == "transformers":
        from transformers import AutoModelForSequenceClassification

        made = AutoModelForSequenceClassification.from_pretrained(model).eval()
        return batchwise(lambda ids, mask: made(input_ids=ids, attention_mask=mask).logits)
    import formwright as fw
    from formwright.models.text import packed

    ours = fw.load(model)
    if int8:
        ours = fw.apply(ours, "llm-int8", evidence=task(Path(model).parent).texts("calibrate")[:64])

    def prepare(rows: list[list[list[int]]]) -> Any:
        batches = [packed(ours, batch) for batch in rows]

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return torch.cat([next(iter(ours.outputs(batch).values())) for batch in batches])

        return run

    return prepare


def task(directory: Path) -> Any:
    import formwright as fw

    return fw.task("classification", data=directory / "tickets.csv", text="body", label="queue")


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tune", type=float, default=6.0, help="minutes of fine-tuning")
    parser.add_argument("--minutes", type=float, default=12.0, help="minutes of search")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    home: Path = options.directory
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "tickets.csv").exists():
        tables(home)
    with open(home / "train.csv", encoding="utf-8", newline="") as stream:
        labels = sorted({row["queue"] for row in csv.DictReader(stream)})
    if not (home / "start").exists():
        distilled_layout(home / "start", labels)
    columns = ["--task", "classification", "--text", "body", "--label", "queue"]
    if not (home / "tuned").exists():
        data = ["--data", str(home / "train.csv")]
        resume = ["--resume"] if (home / "tuned.run").exists() else []
        tuned = ["train", str(home / "start"), *columns, *data, "--minutes", f"{options.tune:g}", *resume]
        formwright(*tuned, "--out", str(home / "tuned"))
        formwright("export", str(home / "tuned"), "--format", "huggingface", "--out", str(home / "classifier"))
    model, slimmed = str(home / "classifier"), str(home / "slim")
    if not Path(slimmed).exists():
        data = ["--data", str(home / "tickets.csv"), "--keep", "0.99", "--minutes", f"{options.minutes:g}"]
        fresh = ["slim", model, *columns, *data, "--yes", "--out", slimmed]
        formwright(*(["slim", "--resume", f"{slimmed}.run"] if Path(f"{slimmed}.run").exists() else fresh))
    threads = options.threads or torch.get_num_threads()
    plan: dict[str, dict[str, Any]] = {
        PEER: {"model": model, "library": "transformers"},
        "formwright float32": {"model": model, "library": "formwright"},
        "formwright int8": {"model": model, "library": "formwright", "int8": True},
        "formwright slim": {"model": slimmed, "library": "formwright"},
    }
    import formwright as fw

    texts = task(home).texts("test")
    ids = sorted(fw.load(model).tokenizer.encode(texts, max_length=256), key=len)
    rows = [ids[first : first + 32] for first in range(0, len(ids), 32)]
    workers = {name: Worker("benchmarks.slim:contender", threads, given) for name, given in plan.items()}
    for worker in workers.values():
        worker.prepare(rows)
    named = {name: worker.vectors().argmax(1) for name, worker in workers.items()}
    agreement = {name: float((found == named[PEER]).mean()) for name, found in named.items()}
    show(race("slim", "classifier", workers, agreement, BAR, PEER, options.rounds), options.json)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
