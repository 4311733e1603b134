"""A small decoder of the present kind: pre-norm with RMSNorm, rotary positions, gated MLP, tied head.

The form of Llama (Touvron et al., 2023, 2302.13971) without biases, at a size that learns on a laptop. Parameters:
vocab x width + layers x (4 width^2 + 3 width x hidden + 2 width) + width.
"""

from __future__ import annotations

from typing import Any

from formwright.kit.errors import SpecError
from formwright.registry import Paper, register


@register("recipe", "gpt-tiny", paper=Paper("Touvron et al.", 2023, "2302.13971"), summary="a small causal decoder")
def gpt_tiny(
    vocab: int = 4096,
    width: int = 256,
    layers: int = 6,
    heads: int = 8,
    kv_heads: int | None = None,
    hidden: int | None = None,
    theta: float = 10_000.0,
    dropout: float = 0.0,
    causal: bool = True,
) -> dict[str, Any]:
    """A causal decoder, or an encoder of the same form; ``hidden`` defaults to 8/3 width rounded up to a multiple of
    32. No limit on length."""
    if width < 1 or heads < 1 or width % heads:
        raise SpecError(f"recipe gpt-tiny: heads={heads} must divide width={width}")
    hidden = hidden or -(-8 * width // (3 * 32)) * 32
    rate = {"dropout": dropout} if dropout else {}
    rotary = {"theta": theta}
    attention = {"part": "attention", "heads": heads, "causal": causal, "bias": False, "rotary": rotary, **rate}
    if kv_heads is not None:
        attention["kv_heads"] = kv_heads
    return {
        "stem": {"part": "token-embedding", "vocab": vocab, "width": width},
        "defaults": {"norm": {"part": "rmsnorm"}, "order": "pre"},
        "layers": [{"repeat": layers, "layers": [attention, {"part": "gated-mlp", "hidden": hidden, **rate}]}],
        "final_norm": {"part": "rmsnorm"},
        "head": {"part": "lm", "tied": True},
    }
