"""P-tuning v2: learned keys and values in every layer, trained as they are.

Liu et al., 2022 (2110.07602): prefix tuning without a network that makes the prefix. Cost: 2 length width parameters a
layer.
"""

from __future__ import annotations

from formwright.registry import Paper, register
from formwright.surgery.adapt.prefix_tuning import PrefixTuning


@register(
    "surgery", "p-tuning-v2", paper=Paper("Liu et al.", 2022, "2110.07602"), summary="prefix tuning without a network"
)
class PTuningV2(PrefixTuning):
    """Options as in ``prefix-tuning``, with ``hidden`` 0 unless given."""

    own = {"length": 30, "hidden": 0}
    examples = ({"length": 3, "name": "deep"}, {"length": 2, "name": "other"})
