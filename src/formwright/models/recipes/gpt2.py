"""GPT-2 (Radford et al., 2019): pre-norm decoder with learned positions and a tied head; small has 124,439,808
parameters."""

from __future__ import annotations

from typing import Any

from formwright.registry import Paper, register


@register("recipe", "gpt2-small", paper=Paper("Radford et al.", 2019), summary="GPT-2 with 124 million parameters")
def gpt2_small(
    vocab: int = 50257, width: int = 768, layers: int = 12, heads: int = 12, positions: int = 1024
) -> dict[str, Any]:
    """GPT-2 at its smallest published size, or any other."""
    return {
        "stem": {
            "part": "token-embedding",
            "vocab": vocab,
            "width": width,
            "positions": {"kind": "learned", "max": positions},
        },
        "defaults": {"norm": {"part": "layernorm", "eps": 1e-5}, "order": "pre"},
        "layers": [
            {
                "repeat": layers,
                "layers": [
                    {"part": "attention", "heads": heads, "causal": True},
                    {"part": "mlp", "hidden": 4 * width, "activation": "gelu_new"},
                ],
            }
        ],
        "final_norm": {"part": "layernorm", "eps": 1e-5},
        "head": {"part": "lm", "tied": True},
    }
