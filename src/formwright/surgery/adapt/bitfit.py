"""BitFit: train the biases alone, those of linears and of norms.

Zaken et al., 2021 (2106.10199). Nothing is added, so the model costs what it did. In a BERT layer of width d and hidden
width f these are 4 d (q, k, v, o), f + d (feed-forward) and 2 d (norms): 7 d + f. Cost: no weight needs a gradient, so
no linear keeps its input.
"""

from __future__ import annotations

from typing import Any

from formwright.registry import Paper, register
from formwright.surgery.adapt._partial import Tunes, norms


@register("surgery", "bitfit", paper=Paper("Zaken et al.", 2021, "2106.10199"), summary="train the biases alone")
class BitFit(Tunes):
    __doc__ = Tunes.__doc__

    examples = ({"where": "*"}, {"where": ["query", "output"]})
    what = "biases"

    def found(self, model: Any) -> dict[str, str]:
        linears = {id(p): address for address, slot in model.slots().items() for p in slot.parameters()}
        of_norms = norms(model)
        found = {}
        for name, parameter in model.named_parameters():
            address = of_norms.get(name) or linears.get(id(parameter))
            inner = name.startswith("heads.") or ".adapters." in name
            if name.endswith("bias") and address is not None and not inner:
                found[name] = address
        return found
