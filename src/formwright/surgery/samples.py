"""Small models on which every surgery is tried: by the conformance tests and for the composition matrix.

A post-norm encoder with a mean pool, a pre-norm decoder whose head is tied to its token table, and a classifier that
also holds a shared list and a loop. All are drawn from a seed and take milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from formwright.models.build import build
from formwright.surgery.base import replay

WIDTH, VOCAB = 32, 40


def encoder() -> Any:
    return build(
        {
            "stem": {
                "part": "token-embedding",
                "vocab": VOCAB,
                "width": WIDTH,
                "positions": {"kind": "learned", "max": 32},
                "types": 2,
                "norm": "layernorm",
            },
            "defaults": {"norm": "layernorm", "order": "post"},
            "layers": [
                {"repeat": 3, "layers": [{"part": "attention", "heads": 4}, {"part": "mlp", "hidden": 64}]},
            ],
            "head": {"part": "mean-pool", "normalize": True},
        },
        seed=1,
    )


def decoder() -> Any:
    return build(
        {
            "stem": {"part": "token-embedding", "vocab": VOCAB, "width": WIDTH},
            "defaults": {"norm": "rmsnorm", "order": "pre"},
            "layers": [
                {
                    "repeat": 3,
                    "layers": [
                        {"part": "attention", "heads": 4, "kv_heads": 2, "causal": True, "rotary": {}, "bias": False},
                        {"part": "gated-mlp", "hidden": 48},
                    ],
                },
            ],
            "final_norm": "rmsnorm",
            "head": {"part": "lm", "tied": True},
        },
        seed=2,
    )


def classifier() -> Any:
    return build(
        {
            "stem": {"part": "token-embedding", "vocab": VOCAB, "width": WIDTH, "positions": {"kind": "sinusoidal"}},
            "defaults": {"norm": "layernorm", "order": "pre"},
            "shared": {"pair": [{"part": "attention", "heads": 2}, {"part": "mlp", "hidden": 48}]},
            "layers": [
                {"part": "attention", "heads": 4, "order": "sandwich"},
                {"use": "pair"},
                {"loop": 2, "layers": [{"part": "mlp", "hidden": 64}]},
                {"use": "pair"},
            ],
            "head": {"part": "sequence-classifier", "classes": 3, "transform": {"activation": "tanh"}},
        },
        seed=3,
    )


MODELS: dict[str, Callable[[], Any]] = {"encoder": encoder, "decoder": decoder, "classifier": classifier}


def tokens(rows: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def outputs(model: Any, ids: Tensor | None = None) -> dict[str, Tensor]:
    """What every head says, by its name."""
    said = model(tokens(seed=5) if ids is None else ids, seed=0)
    return said if isinstance(said, dict) else {next(iter(model.heads)): said}


def said(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return outputs(model)


def reloaded(model: Any) -> Any:
    """What loading does: lay out on meta, replay the history, take the values strictly."""
    made = build(model.spec, device="meta")
    for entry in model.history:
        replay(made, entry)
    made.load_state_dict(model.state_dict(), strict=True, assign=True)
    return made.eval()


def state(model: Any) -> dict[str, Tensor]:
    """A copy of all values."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names and, bit for bit, the same values."""
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
