"""Embeddings of several tables summed and normalised: what stands before the first layer of an encoder.

``LayerNorm(sum_i factor_i table_i[ids_i])``, as in BERT (Devlin et al., 2018, 1810.04805). ``native`` writes the result
once; elsewhere the definition runs, a pass for every table. Cost: a row read a table and token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from formwright.ops.embedding.native import embedding_native
from formwright.ops.embedding.reference import Source, embedding_reference
from formwright.registry import Paper, register

__all__ = ["Source", "embedding", "embedding_reference"]


@register("op", "embedding", paper=Paper("Devlin et al.", 2018, "1810.04805"), summary="tables summed and normalised")
def embedding(
    sources: Sequence[Source], gain: Tensor | None = None, shift: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """The rows of ``sources`` (the first has ids (B, L)) summed, and normalised where there is a gain (W): (B, L, W).

    Gradients flow to float tables, gain and shift. IndexError for an id outside its table.
    """
    made = embedding_native(sources, gain, shift, eps)
    return embedding_reference(sources, gain, shift, eps) if made is None else made
