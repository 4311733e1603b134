"""UniPELT: prefixes, sequential adapters and LoRA at once, each behind a gate that a sequence opens or shuts.

Mao et al., 2022 (2110.07577). A gate is the mean over a sequence's tokens of a sigmoid of a linear of the sublayer's
input: one number for each sequence, sublayer and method, so nothing here streams. Gates start at one half. Cost: that
of the three, and width + 1 parameters a gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from formwright.kit.errors import Refusal
from formwright.parts.adapters._gate import Gate
from formwright.parts.base import Cost, LinearLike, Shape
from formwright.parts.context import Context
from formwright.parts.linears.adapted import Change
from formwright.registry import Paper, register
from formwright.surgery.adapt._attach import Attaches, Node, narrowed, sizes
from formwright.surgery.adapt._changes import Adapts, count, number
from formwright.surgery.adapt.lora import LoRA
from formwright.surgery.adapt.mam import halves
from formwright.surgery.adapt.prefix_tuning import prefixes
from formwright.surgery.base import Displaced, Plan, chosen_slots


class GatedLoRA(LoRA):
    """y + gate(x) scaling B A x: ``A``, ``B`` and ``gate``."""

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, scaling: float = 2.0, number: int = 0
    ) -> None:
        super().__init__(in_features, out_features, rank=rank, scaling=scaling, number=number)
        self.gate = Gate(in_features)

    def reset(self, generator: torch.Generator) -> None:
        super().reset(generator)
        self.gate.reset(generator)

    def forward(self, x: Tensor, y: Tensor, base: LinearLike, ctx: Context | None, mask: Tensor | None) -> Tensor:
        opened = self.gate.spread(x, Context() if ctx is None else ctx)
        return y + (opened * self.product(x, mask)).to(y.dtype)

    def alone(self, x: Tensor, base: LinearLike, ctx: Context | None) -> Tensor:
        return self(x, base(x, ctx), base, ctx, None)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise Refusal("a gate depends on the sequence, so no one weight says what unipelt does; keep it beside")

    def take(self, base: LinearLike, out: Tensor | None, inn: Tensor | None) -> LoRA:
        raise Refusal("a gated adapter reads the whole input of its linear, so its linear cannot be cut; undo it first")

    def cost(self, shape: Shape) -> Cost:
        return super().cost(shape) + Cost(0, self.gate.cost(shape).macs)


class _Gated(Adapts):
    """The part of the plan that stands beside linears."""

    def change(self) -> type[Change]:
        return GatedLoRA

    def arguments(self, decisions: Mapping[str, Any], address: str) -> dict[str, Any]:
        return {"rank": decisions["slots"][address], "scaling": decisions["scaling"]}


@register(
    "surgery", "unipelt", paper=Paper("Mao et al.", 2022, "2110.07577"), summary="prefixes, adapters and LoRA, gated"
)
class UniPELT(Attaches):
    """Options, beside those of every adapter (where, name, train, seed):

    length: keys a layer, default 10. reduction, activation: of the sequential adapters behind channel mixers, default
    16 and relu. rank, alpha: of LoRA on the q and v of the mixers, default 8 and 16.
    """

    own: ClassVar[Mapping[str, Any]] = {
        "length": 10, "reduction": 16, "activation": "relu", "rank": 8, "alpha": 16.0,
    }  # fmt: skip
    examples = ({"length": 2, "reduction": 8, "rank": 2},)

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        counted = [line for name in ("length", "rank") for line in count(f"unipelt: {name}", options[name])]
        return counted + sizes("unipelt", options) + number("unipelt: alpha", options["alpha"], 0.0, above=True)

    def nodes(self, model: Any, where: Any, options: Mapping[str, Any]) -> dict[str, Node]:
        mixers, channels = halves(model, where, self.name)
        found = prefixes(model, mixers, self.name, length=options["length"])
        found = {id: {**node, "gate": True} if node["part"] == "prefix" else node for id, node in found.items()}
        bottleneck = {"part": "bottleneck", "activation": options["activation"], "gate": True}
        return found | narrowed(self.name, channels, options, bottleneck)

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        made = super().plan(model, evidence, **options)
        given = {**self.own, **{key: value for key, value in options.items() if key in self.own}}
        inside = tuple(f"{id}:" for id in made.decisions["items"])
        slots = [address for address in chosen_slots(model, None, ("q", "v"), "unipelt") if address.startswith(inside)]
        beside = {"slots": dict.fromkeys(slots, given["rank"]), "scaling": given["alpha"] / given["rank"]}
        made = self.made(model, made.options, {**made.decisions, **beside})
        _gated().check(model, made)
        return made

    def exact(self, plan: Plan) -> bool:
        return all(node["part"] != "prefix" for node in plan.decisions["items"].values())

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        return {**super().reshape(model, plan), **_gated().reshape(model, plan)}

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        super().fill(model, plan, displaced)
        _gated().fill(model, plan, displaced)

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        _gated().restore(model, plan, displaced)
        super().restore(model, plan, displaced)


def _gated() -> _Gated:
    made = _Gated()
    made.name = "unipelt"  # type: ignore[misc]
    return made
