"""Parallel adapters: a bottleneck beside feed-forward sublayers, y + s up(f(down(x))) of the sublayer's input.

He et al., 2022 (2110.04366), who scale by s = 4 for generation (m = 512) and s = 2 for classification (m = 16), which
is the default; s = 1 is the plain parallel adapter. The model's function is unchanged at the start. Cost: 2 d m + m + d
parameters a sublayer of width d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formwright.registry import Paper, register
from formwright.surgery.adapt._attach import Attaches, Node, chosen_items, narrowed, sizes
from formwright.surgery.adapt._changes import number


@register(
    "surgery",
    "parallel-adapter",
    paper=Paper("He et al.", 2022, "2110.04366"),
    summary="a scaled bottleneck beside sublayers",
)
class ParallelAdapter(Attaches):
    """Options, beside those of every adapter (where, name, train, seed):

    hidden: features, default 16. scale: s, default 2. activation: default relu. skip: so many of the lowest layers get
    none. It stands beside channel mixers unless ``where`` says otherwise.
    """

    own = {"hidden": 16, "scale": 2.0, "activation": "relu", "skip": 0}
    examples = ({"hidden": 3, "name": "beside"}, {"hidden": 2, "scale": 1.0, "where": ["all"], "name": "other"})

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        return sizes(self.name, options) + number(f"{self.name}: scale", options["scale"], 0.0, above=True)

    def nodes(self, model: Any, where: Any, options: Mapping[str, Any]) -> dict[str, Node]:
        return narrowed(self.name, chosen_items(model, where, ("channel",), self.name), options, beside(options))


def beside(options: Mapping[str, Any]) -> Node:
    """A bottleneck of the sublayer's input."""
    return {
        "part": "bottleneck",
        "side": "beside",
        "scale": float(options["scale"]),
        "activation": options["activation"],
    }
