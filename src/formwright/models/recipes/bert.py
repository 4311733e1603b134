"""BERT (Devlin et al., 2019): post-norm encoder with learned positions, types, and a head for masked tokens.

Base has 108,891,648 parameters in its body; the published 109,482,240 count a pooler of 768 x 768 + 768 with it, and
the masked-language model has 109,514,298. Mini is one of the small sizes of Turc et al., 2019.
"""

from __future__ import annotations

from typing import Any

from formwright.registry import Paper, register


def bert(
    vocab: int, width: int, layers: int, heads: int, hidden: int, positions: int, head: dict[str, Any] | None
) -> dict[str, Any]:
    """The spec of a BERT of any size; ``head`` defaults to masked-language modelling."""
    norm = {"part": "layernorm", "eps": 1e-12}
    masked = {"part": "lm", "tied": True, "bias": True, "transform": {"activation": "gelu", "norm": norm}}
    return {
        "stem": {
            "part": "token-embedding",
            "vocab": vocab,
            "width": width,
            "positions": {"kind": "learned", "max": positions},
            "types": 2,
            "norm": norm,
        },
        "defaults": {"norm": norm, "order": "post"},
        "layers": [
            {
                "repeat": layers,
                "layers": [
                    {"part": "attention", "heads": heads},
                    {"part": "mlp", "hidden": hidden, "activation": "gelu"},
                ],
            }
        ],
        "head": masked if head is None else head,
    }


@register("recipe", "bert-base", paper=Paper("Devlin et al.", 2019, "1810.04805"), summary="BERT with 110 million")
def bert_base(
    vocab: int = 30522, width: int = 768, layers: int = 12, heads: int = 12, head: dict[str, Any] | None = None
) -> dict[str, Any]:
    """BERT at its published base size, or any other; ``head`` defaults to masked-language modelling."""
    return bert(vocab, width, layers, heads, 4 * width, 512, head)


@register("recipe", "bert-mini", paper=Paper("Turc et al.", 2019, "1908.08962"), summary="BERT with 11 million")
def bert_mini(
    vocab: int = 30522, width: int = 256, layers: int = 4, heads: int = 4, head: dict[str, Any] | None = None
) -> dict[str, Any]:
    """BERT small enough to train on a laptop; ``head`` defaults to masked-language modelling."""
    return bert(vocab, width, layers, heads, 4 * width, 512, head)
