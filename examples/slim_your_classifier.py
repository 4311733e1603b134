"""Slim a classifier on its own table: train a small one on a CSV, then find a cheaper form that answers as well.

A real search takes minutes and heals for hundreds of steps; the seconds given here are enough to see one.

python examples/slim_your_classifier.py
"""

import csv
import random
import tempfile
from pathlib import Path

import torch

import formwright as fw
from formwright.training.tokenizer import train_tokenizer

TOPICS = {
    "billing": ("invoice", "refund", "charged twice", "credit card", "payment failed"),
    "bug": ("crashes", "error message", "does not start", "freezes", "wrong result"),
    "other": ("opening hours", "new feature", "thank you", "a question", "feedback"),
}
FRAMES = ("hello, {}", "{} since yesterday", "please help: {}", "again {}!", "it is about {}", "{}, what now?")


def write_table(path: Path, rows: int) -> None:
    rng = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "body", "queue"])
        for number in range(rows):
            queue = rng.choice(list(TOPICS))
            table.writerow([number, f"#{number} " + rng.choice(FRAMES).format(rng.choice(TOPICS[queue])), queue])


def small_classifier(texts: list[str], labels: list[str]):
    """A tiny encoder with a classifier head; yours would come from ``fw.load``."""
    tokenizer = train_tokenizer(texts, vocab=400)
    model = fw.build(
        {
            "stem": {
                "part": "token-embedding",
                "vocab": tokenizer.size,
                "width": 64,
                "positions": {"kind": "learned", "max": 64},
            },
            "layers": [{"repeat": 2, "layers": [{"part": "attention", "heads": 4}, {"part": "mlp", "hidden": 128}]}],
            "head": {"part": "sequence-classifier", "classes": len(labels), "labels": labels, "pool": "mean"},
        },
        seed=0,
    )
    model.tokenizer = tokenizer
    model.name = "tickets"
    return model


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder, "tickets.csv"), rows=200)
        task = fw.task("classification", data=f"{folder}/tickets.csv", text="body", label="queue")
        model = small_classifier(task.texts("calibrate"), sorted(TOPICS))
        task.bind(model)
        fw.train(model, task, objective="classification", steps=30, lr=3e-3)
        print(f"trained: {task.metric} {task.score(model, 'test').value:.3f}")

        best = fw.slim(model, task=task, keep=0.95, target="size", minutes=0.05, out=f"{folder}/tickets-slim")
        print(best.table(width=100))
        loaded = fw.load(f"{folder}/tickets-slim") if best.found else best.model
        print(loaded.predict(["please help: charged twice"]))


if __name__ == "__main__":
    main()
