"""MASFormer: a decoder with full attention in a few layers and attention inside blocks in all others.

Zhang et al., 2023 (2310.12442): GPT-Neo (Black et al., 2021) with 24 layers of width 2048, 1,315,575,808 parameters at
its 2048 positions, taken to sequences of 8192. Every layer has the slots and the names of a plain decoder, so that the
weights of one load as they are. Attention costs full / layers + (1 - full / layers) (1 + lookback) block / n of what it
costs with full attention everywhere, for sequences of n tokens, many times as long as a block; so do the keys and
values of a stream.
"""

from __future__ import annotations

import itertools
from typing import Any

from formwright.kit.errors import SpecError
from formwright.registry import Paper, register


@register(
    "recipe", "masformer", paper=Paper("Zhang et al.", 2023, "2310.12442"), summary="full attention in few layers"
)
def masformer(
    vocab: int = 50257,
    width: int = 2048,
    layers: int = 24,
    heads: int = 16,
    positions: int | None = 8192,
    full: int | list[int] = 4,
    block: int = 1024,
    lookback: int = 0,
) -> dict[str, Any]:
    """``full``: how many layers at the bottom, or which ones, from 0. ``positions=None``: rotary, any length."""
    chosen = set(range(full) if isinstance(full, int) else full)
    beyond = sorted(chosen - set(range(layers)))
    if beyond:
        raise SpecError(f"recipe masformer: full={full} names layer {beyond[0]}, and the layers are 0 to {layers - 1}")
    stem: dict[str, Any] = {"part": "token-embedding", "vocab": vocab, "width": width}
    # GPT-Neo leaves the scores unscaled.
    shared: dict[str, Any] = {"heads": heads, "causal": True, "bias": False, "out_bias": True, "scale": 1.0}
    if positions is None:
        shared |= {"rotary": {}, "scale": None}
    else:
        stem["positions"] = {"kind": "learned", "max": positions}
    everywhere = {"part": "attention", **shared}
    near = {"part": "local", "id": "attention", "block": block, "lookback": lookback, **shared}
    mlp = {"part": "mlp", "hidden": 4 * width, "activation": "gelu_new"}
    runs = itertools.groupby(range(layers), lambda layer: layer in chosen)
    return {
        "stem": stem,
        "defaults": {"norm": {"part": "layernorm", "eps": 1e-5}, "order": "pre"},
        "layers": [
            {"repeat": len(list(run)), "layers": [dict(everywhere if is_full else near), dict(mlp)]}
            for is_full, run in runs
        ],
        "final_norm": {"part": "layernorm", "eps": 1e-5},
        "head": {"part": "lm", "tied": True},
    }
