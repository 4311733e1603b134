"""Mamba language models (Gu and Dao, 2023): one mixer a layer, no channel mixer, no positions, a tied head.

At the published sizes, with the vocabulary of 50,277 rounded up to 50,280, they have 129,135,360, 371,516,416,
793,204,224, 1,372,178,432 and 2,768,345,600 parameters. ``bimamba-s`` is the bidirectional encoder of LC-PLM (Wang et
al., 2024) with 752,788,992; a model of two whole mixers a layer would have 1,432,266,240.
"""

from __future__ import annotations

from typing import Any

from formwright.registry import Paper, register

PAPER = Paper("Gu and Dao", 2023, "2312.00752")


def mamba(vocab: int, width: int, layers: int, state: int, mixer: str, head: dict[str, Any]) -> dict[str, Any]:
    """The spec of a stack of any such mixer."""
    return {
        "stem": {"part": "token-embedding", "vocab": vocab, "width": width},
        "defaults": {"norm": {"part": "rmsnorm", "eps": 1e-5}, "order": "pre"},
        "layers": [{"repeat": layers, "layers": [{"part": mixer, "state": state, "depth": layers}]}],
        "final_norm": {"part": "rmsnorm", "eps": 1e-5},
        "head": head,
    }


def language(vocab: int, width: int, layers: int, state: int) -> dict[str, Any]:
    return mamba(vocab, width, layers, state, "mamba", {"part": "lm", "tied": True})


@register("recipe", "mamba-130m", paper=PAPER, summary="Mamba with 129 million parameters")
def mamba_130m(vocab: int = 50280, width: int = 768, layers: int = 24, state: int = 16) -> dict[str, Any]:
    """Mamba at its smallest published size, or any other."""
    return language(vocab, width, layers, state)


@register("recipe", "mamba-370m", paper=PAPER, summary="Mamba with 372 million parameters")
def mamba_370m(vocab: int = 50280, width: int = 1024, layers: int = 48, state: int = 16) -> dict[str, Any]:
    return language(vocab, width, layers, state)


@register("recipe", "mamba-790m", paper=PAPER, summary="Mamba with 793 million parameters")
def mamba_790m(vocab: int = 50280, width: int = 1536, layers: int = 48, state: int = 16) -> dict[str, Any]:
    return language(vocab, width, layers, state)


@register("recipe", "mamba-1.4b", paper=PAPER, summary="Mamba with 1.4 billion parameters")
def mamba_1b4(vocab: int = 50280, width: int = 2048, layers: int = 48, state: int = 16) -> dict[str, Any]:
    return language(vocab, width, layers, state)


@register("recipe", "mamba-2.8b", paper=PAPER, summary="Mamba with 2.8 billion parameters")
def mamba_2b8(vocab: int = 50280, width: int = 2560, layers: int = 64, state: int = 16) -> dict[str, Any]:
    return language(vocab, width, layers, state)


@register(
    "recipe",
    "bimamba-s",
    paper=Paper("Wang et al.", 2024, "2411.08909"),
    summary="bidirectional Mamba encoder with 753 million parameters",
)
def bimamba_s(vocab: int = 128, width: int = 1536, layers: int = 48, state: int = 16) -> dict[str, Any]:
    """LC-PLM's encoder: logits of masked residues, from 33 symbols padded to ``vocab`` rows; the head is its own."""
    return mamba(vocab, width, layers, state, "bimamba-s", {"part": "lm", "vocab": vocab})
