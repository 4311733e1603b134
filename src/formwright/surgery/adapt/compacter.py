"""Compacter: bottleneck adapters of Kronecker sums behind sublayers, whose small matrices all layers share.

Karimi Mahabadi et al., 2021 (2106.04647); Compacter++ stands behind the feed-forward alone and is the default. The
model's function is unchanged at the start. Cost: with terms n, width d and m features 2 (d + m) + m + d parameters a
sublayer, and n^3 for the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formwright.kit.errors import SpecError
from formwright.registry import Paper, register
from formwright.surgery.adapt._attach import Attaches, Node, chosen_items, narrowed, sizes
from formwright.surgery.adapt._changes import count
from formwright.surgery.base import Plan


@register(
    "surgery",
    "compacter",
    paper=Paper("Karimi Mahabadi et al.", 2021, "2106.04647"),
    summary="bottlenecks of Kronecker sums behind sublayers",
)
class Compacter(Attaches):
    """Options, beside those of every adapter (where, name, train, seed):

    plus: Compacter++, behind channel mixers alone (default); False: behind token mixers too. n: terms, which divide
    the width and the features, default 4. reduction: width / features, default 32; or hidden: the features. activation:
    default gelu. start: "zero" or "glorot". skip: so many of the lowest layers get none.
    """

    own = {
        "plus": True,
        "n": 4,
        "reduction": 32,
        "hidden": None,
        "activation": "gelu",
        "start": "zero",
        "skip": 0,
    }
    examples = (
        {"n": 2, "hidden": 4, "name": "sums"},
        {"n": 4, "hidden": 8, "plus": False, "start": "glorot", "name": "other"},
    )

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        return sizes(self.name, options) + count(f"{self.name}: n", options["n"])

    def nodes(self, model: Any, where: Any, options: Mapping[str, Any]) -> dict[str, Node]:
        items = chosen_items(model, where, ("channel",) if options["plus"] else ("mixer", "channel"), self.name)
        if len({item.width for item in items.values()}) > 1:
            raise SpecError(f"{self.name}: the chosen sublayers differ in width, and one shared rule needs one width")
        node = {
            "part": "compacter",
            "n": options["n"],
            "activation": options["activation"],
            "start": options["start"],
        }
        return narrowed(self.name, items, options, node)

    def exact(self, plan: Plan) -> bool:
        return plan.options.get("start", "zero") == "zero"
