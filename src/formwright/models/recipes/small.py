"""The two small language models that come with the package: a decoder and an encoder of a million parameters.

Both have the form of Llama (Touvron et al., 2023, 2302.13971), the encoder with attention to both sides, at a size that
a laptop's core trains in minutes. Their tensors have the same names and shapes, so the encoder may begin as the trained
decoder (BehnamGhader et al., 2024, 2404.05961). With a vocabulary of 2048 each has 1,066,112 parameters.
"""

from __future__ import annotations

from typing import Any

from formwright.models.recipes.gpt_tiny import gpt_tiny
from formwright.registry import Paper, register


@register("recipe", "small-causal", paper=Paper("Touvron et al.", 2023, "2302.13971"), summary="a million, causal")
def small_causal(vocab: int = 2048, width: int = 128, layers: int = 4, heads: int = 4) -> dict[str, Any]:
    """A decoder; no limit on length."""
    return gpt_tiny(vocab, width, layers, heads)


@register("recipe", "small-masked", paper=Paper("BehnamGhader et al.", 2024, "2404.05961"), summary="a million, masked")
def small_masked(vocab: int = 2048, width: int = 128, layers: int = 4, heads: int = 4) -> dict[str, Any]:
    """An encoder with a head that guesses hidden tokens; no limit on length."""
    return gpt_tiny(vocab, width, layers, heads, causal=False)
