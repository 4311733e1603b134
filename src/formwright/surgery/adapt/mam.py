"""MAM adapter: a prefix before attention and a scaled parallel adapter beside the feed-forward, under one name.

He et al., 2022 (2110.04366): 16 keys and m = 16, s = 2 for classification (the default), 30 keys and m = 512, s = 4 for
generation. The prefix's network has 800 features and is folded away after training
(:func:`~formwright.surgery.adapt.prefix_tuning.fold`). Not the identity at the start, because of the prefix. Cost: the
sum of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formwright.registry import Paper, register
from formwright.surgery.adapt._attach import Node, chosen_items, narrowed, sizes
from formwright.surgery.adapt._changes import number
from formwright.surgery.adapt.parallel_adapter import beside
from formwright.surgery.adapt.prefix_tuning import PrefixTuning, prefixes


@register(
    "surgery", "mam", paper=Paper("He et al.", 2022, "2110.04366"), summary="a prefix and a scaled parallel adapter"
)
class MAM(PrefixTuning):
    """Options, beside those of every adapter (where, name, train, seed):

    length, network: keys a layer, default 16, and features of the network that makes them, default 800 (0: none).
    hidden, scale, activation: of the parallel adapter, default 16, 2 and relu. ``where`` chooses among mixers and
    channel mixers: the former get the prefix, the latter the adapter.
    """

    own = {"length": 16, "network": 800, "hidden": 16, "scale": 2.0, "activation": "relu"}
    examples = (
        {"length": 2, "network": 3, "hidden": 3, "name": "both"},
        {"length": 3, "network": 0, "hidden": 2, "name": "other"},
    )

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        prefix = {"length": options["length"], "hidden": options["network"]}
        scale = number(f"{self.name}: scale", options["scale"], 0.0, above=True)
        return super().wrong(prefix) + sizes(self.name, options) + scale

    def nodes(self, model: Any, where: Any, options: Mapping[str, Any]) -> dict[str, Node]:
        mixers, channels = halves(model, where, self.name)
        found = prefixes(model, mixers, self.name, length=options["length"], hidden=options["network"])
        found |= narrowed(self.name, channels, options, beside(options))
        return found


def halves(model: Any, where: Any, what: str) -> tuple[list[str], dict[str, Any]]:
    """Ids of the chosen mixers, and the chosen channel mixers."""
    chosen = chosen_items(model, where, ("mixer", "channel"), what)
    kinds = {id: type(item.part).registered[0] for id, item in chosen.items()}
    mixers = [id for id, kind in kinds.items() if kind == "mixer"]
    return mixers, {id: item for id, item in chosen.items() if kinds[id] == "channel"}
