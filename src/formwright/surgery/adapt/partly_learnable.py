"""Partly learnable projections: two low-rank adapters that can be joined, since half of each is fixed and the same.

    W' = W + up down,   up = [A; B] (out, rank),  down = [C, D] (rank, in):   up down = [[A C, A D], [B C, B D]]

Xu et al., 2024 (2403.19456), Break-for-Make. A and C are fixed; one adapter learns a content in D, another a style in
B, and :mod:`formwright.surgery.adapt.fuse` takes B of the one and D of the other. A and C are rows of one matrix with
orthonormal columns (``prior="orthogonal"``, square linears; others start as plain LoRA does), which leaves
``|A C| / |A| |C|`` near ``1 / sqrt(rank)``; ``"exact"`` gives each half of the rank, so that A C = 0. They depend on
(seed, slot) alone, so adapters of one seed share them. B starts at zero; A D does not, so only ``"plain"`` starts as
nothing. Cost: rank (in + out) products a token, half as many trained parameters for both roles together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import Refusal, SpecError, nearest
from formwright.parts.base import Cost, LinearLike, Shape
from formwright.parts.context import Context
from formwright.parts.linears.adapted import Change, whole
from formwright.registry import Paper, register
from formwright.surgery.adapt._changes import Adapts, count, held, number, present
from formwright.surgery.adapt.precondition import Preconditioner
from formwright.surgery.base import Companion, Displaced, Plan, Promises, slot_generator

PRIORS = ("orthogonal", "exact", "plain")
#: What each role trains.
ROLES = {"content": ("D",), "style": ("B",), "both": ("B", "D")}


@register("change", "partly-learnable", paper=Paper("Xu et al.", 2024, "2403.19456"), summary="y + [A; B] [C, D] x")
class PartlyLearnable(Change):
    """``A`` (out/2, rank) and ``C`` (rank, in/2) fixed, ``B`` (out/2, rank) and ``D`` (rank, in/2) learned."""

    trained = ("B", "D")
    identity = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"rank": 4}, {"rank": 4, "prior": "exact"})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        prior: str = "orthogonal",
        number: int = 0,
        rate: float = 0.0,
    ) -> None:
        super().__init__(number, rate)
        whole("rank", rank, 1, min(in_features, out_features))
        if in_features % 2 or out_features % 2:
            raise SpecError(f"a {out_features} x {in_features} weight has no halves: both sides must be even")
        if prior not in PRIORS:
            raise SpecError(f"prior={prior!r} must be one of {', '.join(PRIORS)}{nearest(str(prior), PRIORS)}")
        if prior == "exact" and rank % 2:
            raise SpecError(f"rank={rank} must be even, since each fixed half gets half of it")
        self.prior = prior
        self.A, self.B = (nn.Parameter(torch.empty(out_features // 2, rank)) for _ in range(2))
        self.C, self.D = (nn.Parameter(torch.empty(rank, in_features // 2)) for _ in range(2))

    def reset(self, generator: torch.Generator) -> None:
        (out, rank), inn = self.A.shape, self.C.shape[1]
        self.D.copy_(torch.randn(self.D.shape, generator=generator) / rank)
        self.B.zero_()
        if self.prior == "plain" or (self.prior == "orthogonal" and out != inn):
            self.C.copy_(torch.randn(self.C.shape, generator=generator) / rank)
            self.A.zero_()
            return
        side = 2 * max(out, inn)
        basis, _ = torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=torch.float64))
        rows = torch.randperm(side, generator=generator)
        self.C.copy_(basis[rows[:inn]].t())
        self.A.copy_(basis[rows[side - out :]])
        if self.prior == "exact":
            self.A[:, rank // 2 :] = 0.0
            self.C[: rank // 2] = 0.0

    def up(self) -> Tensor:
        return torch.cat((self.A, self.B))

    def down(self) -> Tensor:
        return torch.cat((self.C, self.D), 1)

    def forward(self, x: Tensor, y: Tensor, base: LinearLike, ctx: Context | None, mask: Tensor | None) -> Tensor:
        inner = F.linear(self.dropped(x, ctx).to(self.A.dtype), self.down())
        if mask is not None:
            inner = torch.where(mask, inner, 0.0)
        return y + F.linear(inner, self.up()).to(y.dtype)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + (self.up() @ self.down()).to(weight.dtype), bias

    def take(self, base: LinearLike, out: Tensor | None, inn: Tensor | None) -> Change:
        raise Refusal("single rows and columns have no halves to be fixed and learned; merge the adapter first")

    def scale_in(self, s: float) -> None:
        self.C.mul_(s)
        self.D.mul_(s)

    def cost(self, shape: Shape) -> Cost:
        own = super().cost(shape)
        return Cost(own.parameters, own.parameters * shape.tokens)

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[1]}, prior={self.prior}, number={self.number}"


@register(
    "surgery", "partly-learnable", paper=Paper("Xu et al.", 2024, "2403.19456"), summary="low-rank halves that fuse"
)
class PartlyLearnableSurgery(Adapts):
    """Options: rank: default 64. role: content (D trains), style (B) or both, the default. prior: of the fixed halves,
    orthogonal (default), exact or plain. precondition: each factor's gradient is divided by the other's Gram matrix
    plus ``precondition`` times one; None, the default, leaves gradients as they are. dropout. And those of
    :class:`Adapts`; default q, k, v and o."""

    own: ClassVar[Mapping[str, Any]] = {
        "rank": 64,
        "role": "both",
        "prior": "orthogonal",
        "precondition": None,
        "dropout": 0.0,
    }
    places = ("q", "k", "v", "o")
    examples = ({"rank": 4, "role": "content"}, {"rank": 2, "prior": "plain", "where": ["up"], "name": "other"})

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        what, role = self.name, options["role"]
        found = count(f"{what}: rank", options["rank"])
        found += number(f"{what}: dropout", options["dropout"], 0.0, 1.0)
        if role not in ROLES:
            found.append(f"{what}: role={role!r} must be one of {', '.join(ROLES)}{nearest(str(role), ROLES)}")
        if options["precondition"] is not None:
            found += number(f"{what}: precondition", options["precondition"], 0.0)
        return found

    def shared(self, options: Mapping[str, Any], slots: Sequence[str]) -> dict[str, Any]:
        own = {key: options[key] for key in ("rank", "prior", "role", "precondition")}
        return {**own, "dropout": float(options["dropout"])}

    def arguments(self, decisions: Mapping[str, Any], address: str) -> dict[str, Any]:
        return {"rank": decisions["rank"], "prior": decisions["prior"], "rate": decisions["dropout"]}

    def promises(self, plan: Plan) -> Promises:
        decided = plan.decisions
        own = tuple(f"*.adapters.{decided['name']}.{half}" for half in ROLES[decided["role"]])
        start = 0.0 if decided["prior"] == "plain" else None
        return Promises(
            preserves_function=start, undo=True, mergeable=True, trains_only=(*own, *decided.get("train", ()))
        )

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        """Keyed by (seed, slot) and not by the name, so that adapters of one seed share their fixed halves."""
        for address, change in held(model, plan).items():
            change.reset(slot_generator(plan.decisions["seed"], address))

    def companion(self, model: Any, plan: Plan) -> Companion | None:
        delta = plan.decisions["precondition"]
        if delta is None or not present(model, plan):
            return None
        return Preconditioner(list(held(model, plan).values()), delta)

    def told(self, decisions: Mapping[str, Any]) -> str:
        return f"{self.name}, rank {decisions['rank']}, {decisions['role']}"
