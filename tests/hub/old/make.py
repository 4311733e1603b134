"""Writes the old directories of one format version, with what they must answer: ``python tests/hub/old/make.py v1``.

Run once for each version of the format, before its release; what was released is never written again, since these
directories stand for the models that people keep. ``test_old.py`` loads every version there is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import formwright as fw
from formwright.hub import save_adapter
from formwright.models.batch import Batch, pad
from formwright.models.model import Entry
from formwright.models.tokenizer import Tokenizer

HERE = Path(__file__).parent
ROWS = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [10], [3, 1, 4, 1, 5, 9, 2]]
WORDS = ["[UNK]", "[PAD]", *(f"w{index}" for index in range(2, 40))]


def spec(causal: bool, head: dict[str, Any], blocks: int = 2) -> dict[str, Any]:
    if causal:
        attention = {"part": "attention", "heads": 4, "kv_heads": 2, "causal": True, "rotary": {}, "bias": False}
        channel: dict[str, Any] = {"part": "gated-mlp", "hidden": 40}
        stem: dict[str, Any] = {"part": "token-embedding", "vocab": 40, "width": 32}
        rest: dict[str, Any] = {"defaults": {"norm": {"part": "rmsnorm"}}, "final_norm": "rmsnorm"}
    else:
        attention = {"part": "attention", "heads": 4}
        channel = {"part": "mlp", "hidden": 48}
        places = {"kind": "learned", "max": 32}
        norm = {"part": "layernorm"}
        stem = {"part": "token-embedding", "vocab": 40, "width": 32, "positions": places, "types": 2, "norm": norm}
        rest = {"defaults": {"norm": norm, "order": "post"}}
    return {"stem": stem, "layers": [{"repeat": blocks, "layers": [attention, channel]}], "head": head, **rest}


def drawn(model: Any, seed: int) -> Any:
    """Everything that trains gets values of its own, adapters too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    backend = Backend(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return Tokenizer(backend, settings={"pad_token": "[PAD]"})


def asked(model: Any) -> Any:
    """What a model answers to ROWS, which each tower of a system reads; of one answer a token, the last real one."""
    tokens, lengths = pad(ROWS)
    names = [f"{tower}.tokens" for tower in getattr(model, "towers", ())] or ["tokens"]
    batch = Batch(inputs=dict.fromkeys(names, tokens), lengths=dict.fromkeys(names, lengths))
    with torch.no_grad():
        answer = model(batch)
    return answer if answer.dim() == 2 else answer[torch.arange(len(ROWS)), lengths - 1]


def models() -> dict[str, tuple[Any, float]]:
    """name -> the model, and how near a later library must come: integer products may round the other way."""
    encoder = drawn(fw.build(spec(False, {"part": "mean-pool", "normalize": True}, 3)), 1)
    encoder.tokenizer, encoder.max_length, encoder.prompts = tokenizer(), 24, {"query": "w2 "}
    fw.apply(encoder, "finercut", evidence=ROWS, drop=1)
    fw.apply(encoder, "low-rank", rank=0.5, solver="svd", multiple_of=1, where=["up", "down"])
    encoder.history.append(Entry("event", "healed", {"objective": "distillation", "steps": 300, "loss": 0.5}))
    fw.apply(encoder, "llm-int8", evidence=ROWS, threshold=2.5, embeddings="int8")
    drawn(fw.apply(encoder, "lora", rank=2, where=["q", "up"]), 2)

    decoder = drawn(fw.build(spec(True, {"part": "lm", "tied": True, "bias": True})), 3)
    decoder.tokenizer = tokenizer()
    fw.apply(decoder, "finercut", evidence=ROWS, drop=2)
    fw.apply(decoder, "low-rank", parameters=0.7, evidence=ROWS, multiple_of=1)
    drawn(fw.apply(decoder, "lora", rank=3, name="one"), 4)
    drawn(fw.apply(decoder, "lora", rank=2, rslora=True, where=["o"], name="two"), 5)

    labels = ["spam", "ham", "other"]
    classifier = drawn(fw.build(spec(False, {"part": "states"})), 6)
    fw.apply(classifier, "head", kind="sequence-classifier", labels=labels, transform={"activation": "tanh"})
    drawn(fw.apply(classifier, "lora", rank=2, train=["heads.*"]), 7)
    fw.apply(classifier, "merge")

    encoder_tower = spec(False, {"part": "states"}, 1)
    reader = spec(True, {"part": "lm", "vocab": 40}, 1)
    reader["stem"] = {"use": "encoder.stem", "width": 32}
    reader["layers"] = [{"part": "attention", "heads": 4, "memory": "encoder"}, *reader["layers"]]
    reader["memory"] = ["encoder"]
    system = drawn(fw.build({"towers": {"encoder": encoder_tower, "again": "encoder", "decoder": reader}}), 8)
    return {
        "encoder": (encoder, 2e-2),
        "decoder": (decoder, 1e-4),
        "classifier": (classifier, 1e-4),
        "system": (system, 1e-4),
    }


def main(version: str) -> None:
    """Write ``version`` beside this file, where it is not there yet."""
    target = HERE / version
    if target.exists():
        sys.exit(f"{target} exists: what was released is never written again")
    expected = {}
    for name, (model, tolerance) in models().items():
        model.name = name
        fw.save(model, target / name, task="none", scores={"accuracy": 0.5, "fingerprint": "0" * 16})
        answer = asked(fw.load(target / name))
        expected[name] = {
            "tolerance": tolerance,
            "shape": list(answer.shape),
            "answer": [round(value, 6) for value in answer.flatten().tolist()],
            "history": [entry.name for entry in model.history],
            "trains": [key for key, parameter in model.named_parameters() if parameter.requires_grad],
        }
        if name == "decoder":
            save_adapter(model, "two", target / name / "adapters" / "two")
    (target / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
