"""LoRA-FA: LoRA whose A stays as it was drawn, so that only what A makes of the input is kept for the backward pass.

Zhang et al., 2023 (2308.03303). The gradient of B needs ``A x`` (rank numbers a token) and not x; the gradient that
goes on to x needs neither. Cost: as LoRA, with rank out trained parameters a slot in place of rank (in + out).
"""

from __future__ import annotations

from formwright.registry import Paper, register
from formwright.surgery.adapt.lora import LoRA, LowRank


@register("change", "lora-fa", paper=Paper("Zhang et al.", 2023, "2308.03303"), summary="y + scaling B A x, A fixed")
class LoRAFA(LoRA):
    """``A`` (rank, in), fixed, and ``B`` (out, rank)."""

    trained = ("B",)


@register("surgery", "lora-fa", paper=Paper("Zhang et al.", 2023, "2308.03303"), summary="LoRA with A fixed")
class LoraFA(LowRank):
    __doc__ = LowRank.__doc__

    examples = ({"rank": 2},)
