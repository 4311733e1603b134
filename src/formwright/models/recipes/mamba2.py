"""Mamba-2 (Dao and Gu, 2024): a stack of state-space duals and nothing else, RMS norms, tied head.

With the vocabulary of 50,277 padded to 50,288 the published sizes have 128,989,632, 368,346,624, 780,161,280,
1,343,757,312 and 2,702,599,680 parameters.
"""

from __future__ import annotations

from typing import Any

from formwright.registry import Paper, register


def mamba2(
    vocab: int, width: int, layers: int, state: int, head_width: int, groups: int, tied: bool = True
) -> dict[str, Any]:
    """The spec of a Mamba-2 of any size."""
    norm = {"part": "rmsnorm", "eps": 1e-5}
    mixer = {
        "part": "mamba2",
        "state": state,
        "head_width": head_width,
        "groups": groups,
        "residual": max(layers, 1) ** -0.5,
    }
    return {
        "stem": {"part": "token-embedding", "vocab": vocab, "width": width},
        "defaults": {"norm": norm, "order": "pre"},
        "layers": [{"repeat": layers, "layers": [mixer]}],
        "final_norm": norm,
        "head": {"part": "lm", "tied": True} if tied else {"part": "lm", "vocab": vocab},
    }


@register("recipe", "mamba2-130m", paper=Paper("Dao and Gu", 2024, "2405.21060"), summary="Mamba-2 with 129 million")
def mamba2_130m(
    vocab: int = 50288, width: int = 768, layers: int = 24, state: int = 128, head_width: int = 64, groups: int = 1
) -> dict[str, Any]:
    """Mamba-2 at its smallest published size, or any other."""
    return mamba2(vocab, width, layers, state, head_width, groups)


@register("recipe", "mamba2-370m", paper=Paper("Dao and Gu", 2024, "2405.21060"), summary="Mamba-2 with 368 million")
def mamba2_370m(
    vocab: int = 50288, width: int = 1024, layers: int = 48, state: int = 128, head_width: int = 64, groups: int = 1
) -> dict[str, Any]:
    """Mamba-2 with 368 million parameters."""
    return mamba2(vocab, width, layers, state, head_width, groups)


@register("recipe", "mamba2-780m", paper=Paper("Dao and Gu", 2024, "2405.21060"), summary="Mamba-2 with 780 million")
def mamba2_780m(
    vocab: int = 50288, width: int = 1536, layers: int = 48, state: int = 128, head_width: int = 64, groups: int = 1
) -> dict[str, Any]:
    """Mamba-2 with 780 million parameters."""
    return mamba2(vocab, width, layers, state, head_width, groups)


@register("recipe", "mamba2-1.3b", paper=Paper("Dao and Gu", 2024, "2405.21060"), summary="Mamba-2 with 1.3 billion")
def mamba2_1b3(
    vocab: int = 50288, width: int = 2048, layers: int = 48, state: int = 128, head_width: int = 64, groups: int = 1
) -> dict[str, Any]:
    """Mamba-2 with 1.3 billion parameters."""
    return mamba2(vocab, width, layers, state, head_width, groups)


@register("recipe", "mamba2-2.7b", paper=Paper("Dao and Gu", 2024, "2405.21060"), summary="Mamba-2 with 2.7 billion")
def mamba2_2b7(
    vocab: int = 50288, width: int = 2560, layers: int = 64, state: int = 128, head_width: int = 64, groups: int = 1
) -> dict[str, Any]:
    """Mamba-2 with 2.7 billion parameters."""
    return mamba2(vocab, width, layers, state, head_width, groups)
