"""Sequential adapters: a bottleneck behind sublayers, y + up(f(down(y))).

Houlsby et al., 2019 (1902.00751): behind attention and feed-forward; Pfeiffer et al., 2021 (2005.00247): behind the
feed-forward alone, which is the default. ``skip`` leaves the lowest layers without (AdapterDrop, Rücklé et al., 2021,
2010.11918), so that several tasks share what they compute. The model's function is unchanged at the start unless
``start`` is "bert". Cost: 2 d m + m + d parameters a sublayer of width d and m features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formwright.kit.errors import unknown
from formwright.registry import Paper, register
from formwright.surgery.adapt._attach import Attaches, Node, chosen_items, narrowed, sizes
from formwright.surgery.base import Plan

#: Where adapters stand, by whose they are.
STYLES = {"pfeiffer": ("channel",), "houlsby": ("mixer", "channel")}


@register(
    "surgery",
    "sequential-adapter",
    paper=Paper("Houlsby et al.", 2019, "1902.00751"),
    summary="a bottleneck behind sublayers",
)
class SequentialAdapter(Attaches):
    """Options, beside those of every adapter (where, name, train, seed):

    style: "pfeiffer" (behind channel mixers) or "houlsby" (behind token mixers too); ``where`` overrides it.
    reduction: width / features, default 16; or hidden: the features themselves. activation: default relu. start:
    "zero" or "bert". skip: so many of the lowest layers get none.
    """

    own = {"style": "pfeiffer", "reduction": 16, "hidden": None, "activation": "relu", "start": "zero", "skip": 0}
    examples = (
        {"reduction": 8, "name": "behind"},
        {"style": "houlsby", "hidden": 3, "start": "bert", "skip": 1, "name": "other"},
    )

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        style = options["style"]
        strange = [] if style in STYLES else [f"{self.name}: {unknown('style', str(style), STYLES)}"]
        return strange + sizes(self.name, options)

    def nodes(self, model: Any, where: Any, options: Mapping[str, Any]) -> dict[str, Node]:
        items = chosen_items(model, where, STYLES[options["style"]], self.name)
        node = {"part": "bottleneck", "activation": options["activation"], "start": options["start"]}
        return narrowed(self.name, items, options, node)

    def exact(self, plan: Plan) -> bool:
        return plan.options.get("start", "zero") == "zero"
