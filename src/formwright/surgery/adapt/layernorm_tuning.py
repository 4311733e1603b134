"""LayerNorm tuning: train the gains and biases of the norms alone.

Zhao et al., 2023 (2312.11420). Nothing is added, so the model costs what it did: 4 d parameters a layer of two norms of
width d.
"""

from __future__ import annotations

from typing import Any

from formwright.registry import Paper, register
from formwright.surgery.adapt._partial import Tunes, norms


@register(
    "surgery", "layernorm-tuning", paper=Paper("Zhao et al.", 2023, "2312.11420"), summary="train the norms alone"
)
class LayerNormTuning(Tunes):
    __doc__ = Tunes.__doc__

    examples = ({"where": "norm"},)
    what = "parameters of norms"

    def found(self, model: Any) -> dict[str, str]:
        return norms(model)
