"""Small real models that several tests share: a WordPiece-like tokenizer trained here, a classifier, an encoder."""

from __future__ import annotations

import csv
import functools
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

import formwright as fw
from formwright.models.tokenizer import Tokenizer

WORDS = {
    "billing": ["invoice", "refund", "charge", "payment", "card", "receipt", "tax", "price"],
    "bug": ["crash", "error", "freeze", "broken", "exception", "screen", "blank", "slow"],
    "other": ["hello", "thanks", "question", "idea", "feature", "wish", "team", "holiday"],
}


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label) rows whose label is told by a few of their words."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = draw.choice(list(WORDS))
        words = draw.choices(WORDS[label], k=4) + [draw.choice(WORDS[draw.choice(list(WORDS))])]
        rows.append((f"my {' '.join(words)} number {number}", label))
    return rows


@functools.lru_cache(maxsize=1)
def backend() -> str:
    """A word tokenizer with the usual special tokens, as JSON."""
    made = Backend(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    made.train_from_iterator([text for text, _ in sentences(400)], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made.to_str()


def tokenizer() -> Tokenizer:
    settings = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return Tokenizer(Backend.from_str(backend()), settings=settings)


def spec(head: dict[str, Any], blocks: int = 2) -> dict[str, Any]:
    return {
        "stem": {
            "part": "token-embedding",
            "width": 32,
            "vocab": 400,
            "positions": {"kind": "learned", "max": 64},
            "types": 2,
            "norm": "layernorm",
        },
        "defaults": {"order": "post"},
        "layers": [{"repeat": blocks, "layers": [{"part": "attention", "heads": 4}, {"part": "mlp", "hidden": 64}]}],
        "head": head,
    }


def encoder(seed: int = 0) -> Any:
    model = fw.build(spec({"part": "mean-pool", "normalize": True}), seed=seed)
    model.tokenizer, model.name = tokenizer(), "small-encoder"
    return model


def classifier(labels: tuple[str, ...] = tuple(WORDS), steps: int = 60) -> Any:
    """A classifier that has really learned its labels, in a second or two."""
    head = {"part": "sequence-classifier", "classes": len(labels), "labels": list(labels), "pool": "mean"}
    model = fw.build(spec(head), seed=0)
    model.tokenizer, model.name = tokenizer(), "small-classifier"
    if steps:
        rows = sentences(300, seed=1)
        import torch

        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        ids = model.rows([text for text, _ in rows])
        from formwright.models.text import packed

        for step in range(steps):
            chosen = [(step * 32 + i) % len(rows) for i in range(32)]
            logits = model(packed(model, [ids[i] for i in chosen]))
            target = torch.tensor([labels.index(rows[i][1]) for i in chosen])
            loss = torch.nn.functional.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def table(path: Path, count: int = 240, seed: int = 2) -> Path:
    """A CSV with columns id, body, queue."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "body", "queue"])
        writer.writerows([number, text, label] for number, (text, label) in enumerate(sentences(count, seed)))
    return path
