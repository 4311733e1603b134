"""Mamba-2-Hybrid (Waleffe et al., 2024) and the pure models it is measured against, all 8 billion parameters wide.

The hybrid spells 24 Mamba-2 layers, 4 of grouped attention without any positions, and 28 MLPs (43, 7 and 50 %), each
behind a norm of its own: 8,654,517,248 parameters, and a cache of keys and values 32 times smaller than the
Transformer's. The pure stacks: Mamba-2 8,236,999,680; Mamba 7,994,642,432 with a state of 16 and 8,148,783,104 with
128; Transformer 8,540,135,424.
"""

from __future__ import annotations

from typing import Any

from formwright.models.recipes._pattern import allocated, stacked
from formwright.models.recipes.mamba import mamba
from formwright.models.recipes.mamba2 import mamba2
from formwright.registry import Paper, register


@register(
    "recipe",
    "mamba2-hybrid-8b",
    paper=Paper("Waleffe et al.", 2024, "2406.07887"),
    summary="Mamba-2, attention and MLP layers, 8.7 billion",
)
def mamba2_hybrid_8b(
    vocab: int = 256_000,
    width: int = 4096,
    layers: int = 56,
    attention: float = 0.08,
    mlp: float = 0.5,
    pattern: str | None = None,
    heads: int = 32,
    kv_heads: int = 8,
    attention_width: int = 128,
    hidden: int | None = None,
    state: int = 128,
    head_width: int = 64,
    groups: int = 8,
) -> dict[str, Any]:
    """The published hybrid or any other: ``pattern`` in letters, or ``layers`` with shares of attention and MLPs.

    ``attention_width`` is the width of an attention head, ``head_width`` that of a recurrent one; ``hidden`` defaults
    to 4 width.
    """
    pattern = allocated(layers, attention, mlp) if pattern is None else pattern
    mixer = {"part": "mamba2", "state": state, "head_width": head_width, "groups": groups}
    nodes = {
        "M": {**mixer, "residual": (2 * max(len(pattern), 1)) ** -0.5},
        "*": {
            "part": "attention",
            "heads": heads,
            "kv_heads": kv_heads,
            "head_width": attention_width,
            "causal": True,
            "bias": False,
        },
        "-": {"part": "mlp", "hidden": 4 * width if hidden is None else hidden, "activation": "gelu", "bias": False},
    }
    norm = {"part": "rmsnorm", "eps": 1e-5}
    return {
        "stem": {"part": "token-embedding", "vocab": vocab, "width": width},
        "defaults": {"norm": norm, "order": "pre"},
        "layers": stacked(pattern, nodes),
        "final_norm": norm,
        "head": {"part": "lm", "vocab": vocab},
    }


@register("recipe", "mamba2-8b", paper=Paper("Waleffe et al.", 2024, "2406.07887"), summary="pure Mamba-2, 8.2 billion")
def mamba2_8b(
    vocab: int = 256_000, width: int = 4096, layers: int = 56, state: int = 128, head_width: int = 64, groups: int = 8
) -> dict[str, Any]:
    """The pure Mamba-2 of the comparison, or any other with an untied head."""
    return mamba2(vocab, width, layers, state, head_width, groups, tied=False)


@register("recipe", "mamba-8b", paper=Paper("Waleffe et al.", 2024, "2406.07887"), summary="pure Mamba, 8.1 billion")
def mamba_8b(vocab: int = 256_000, width: int = 4096, layers: int = 56, state: int = 128) -> dict[str, Any]:
    """The pure Mamba of the comparison, which may have had a state of 16 instead."""
    return mamba(vocab, width, layers, state, "mamba", {"part": "lm", "vocab": vocab})


@register(
    "recipe",
    "transformer-8b",
    paper=Paper("Waleffe et al.", 2024, "2406.07887"),
    summary="the Transformer beside Mamba-2-Hybrid, 8.5 billion",
)
def transformer_8b(
    vocab: int = 256_000, width: int = 4096, layers: int = 32, heads: int = 32, hidden: int | None = None
) -> dict[str, Any]:
    """The Transformer of the comparison: rotary positions on half of each head, squared ReLU, no biases but the
    norms'; ``hidden`` defaults to 4 width."""
    norm = {"part": "layernorm", "eps": 1e-5}
    rotary = {"width": width // heads // 2}
    attention = {"part": "attention", "heads": heads, "causal": True, "bias": False, "rotary": rotary}
    mlp = {"part": "mlp", "hidden": 4 * width if hidden is None else hidden, "activation": "relu2", "bias": False}
    return {
        "stem": {"part": "token-embedding", "vocab": vocab, "width": width},
        "defaults": {"norm": norm, "order": "pre"},
        "layers": [{"repeat": layers, "layers": [attention, mlp]}],
        "final_norm": norm,
        "head": {"part": "lm", "vocab": vocab},
    }
