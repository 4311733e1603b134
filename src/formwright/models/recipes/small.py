"""The two small language models that come with the package: a decoder and an encoder of a million parameters.

Their forms are those of Llama (Touvron et al., 2023, 2302.13971) and of BERT (Devlin et al., 2019, 1810.04805), so that
whatever reads these families reads them; their size is one that a laptop's core trains in minutes. With a vocabulary
of 2048: 1,065,856 parameters in ``small-causal``, 1,120,256 in ``small-masked``.
"""

from __future__ import annotations

from typing import Any

from formwright.models.recipes.bert import bert
from formwright.models.recipes.gpt_tiny import gpt_tiny
from formwright.registry import Paper, register


@register("recipe", "small-causal", paper=Paper("Touvron et al.", 2023, "2302.13971"), summary="a million, causal")
def small_causal(vocab: int = 2048, width: int = 128, layers: int = 4, heads: int = 4) -> dict[str, Any]:
    """A decoder in the form of Llama; no limit on length."""
    return gpt_tiny(vocab, width, layers, heads)


@register("recipe", "small-masked", paper=Paper("Devlin et al.", 2019, "1810.04805"), summary="a million, masked")
def small_masked(
    vocab: int = 2048, width: int = 128, layers: int = 4, heads: int = 4, head: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An encoder in the form of BERT for up to 256 tokens; ``head`` defaults to masked-language modelling."""
    return bert(vocab, width, layers, heads, 4 * width, 256, head)
