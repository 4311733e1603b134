"""Diff pruning: a sparse difference to every weight, whose places are learned.

    W' = W + z * w,   z = clip(s (r - l) + l, 0, 1),   s = sigmoid(logit(u) + a)

Guo et al., 2020 (2012.07463): gates of Louizos et al., 2017 (1712.01312), one an entry times one a matrix, with
l = -1.5, r = 1.5 and a = 5 at the start; u is uniform in training and 1/2 afterwards. The penalty is the expected
number of open gates. After ``project`` of the run the ``keep`` largest entries of z w in the whole model stay and the
other gates close for good; w goes on training. w starts at zero, so nothing changes at the start, to the last bit.
Cost: two tensors of the weight's size while it trains, a dense product beside the base's; what is saved at the end is
dense too, and ``keep`` of it is not zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.parts.base import Cost, LinearLike, Shape
from formwright.parts.context import Context
from formwright.parts.linears.adapted import Change, cut
from formwright.registry import Paper, register
from formwright.surgery.adapt._changes import Adapts, held, number, present
from formwright.surgery.base import Companion, Plan

#: The gates' stretch, and where their logarithmic odds start.
LOW, HIGH, OPEN = -1.5, 1.5, 5.0


@register("change", "diff-pruning", paper=Paper("Guo et al.", 2020, "2012.07463"), summary="y + (z w) x, gates z")
class Difference(Change):
    """``w`` (out, in), ``gate`` (out, in), ``matrix`` (): log odds are 5 + ``pace`` times ``gate`` or ``matrix``.

    ``penalty``: weight of the expected number of open gates. ``pace`` lets gates move as fast as they must under one
    learning rate for all.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        penalty: float = 0.0,
        pace: float = 100.0,
        number: int = 0,
        rate: float = 0.0,
    ) -> None:
        super().__init__(number, rate)
        self.penalty, self.pace = penalty, pace
        self.w = nn.Parameter(torch.empty(out_features, in_features))
        self.gate = nn.Parameter(torch.empty(out_features, in_features))
        self.matrix = nn.Parameter(torch.empty(()))

    def reset(self, generator: torch.Generator) -> None:
        for parameter in (self.w, self.gate, self.matrix):
            parameter.zero_()

    def odds(self) -> tuple[Tensor, Tensor]:
        """Logarithmic odds of the entries and of the matrix."""
        return OPEN + self.pace * self.gate, OPEN + self.pace * self.matrix

    def difference(self, ctx: Context | None = None) -> Tensor:
        """z w, (out, in); with noise where a context is given."""
        gates = torch.ones_like(self.matrix)
        for name, odds in zip(("gate", "matrix"), self.odds()):
            if ctx is not None:
                u = ctx.noise(tuple(odds.shape), odds, "uniform", f"{self.key}.{name}").clamp(1e-6, 1 - 1e-6)
                odds = odds + torch.logit(u)
            gates = gates * (torch.sigmoid(odds) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)
        return gates * self.w

    def expected(self) -> Tensor:
        """The expected number of open gates."""
        entries, matrix = self.odds()
        return torch.sigmoid(entries).sum() * torch.sigmoid(matrix)

    def forward(self, x: Tensor, y: Tensor, base: LinearLike, ctx: Context | None, mask: Tensor | None) -> Tensor:
        if self.training and ctx is None:
            raise SpecError(f"{self.key or 'diff-pruning'} draws gates, so its linear must be given the context")
        if self.training and self.penalty and ctx is not None and ctx.notes is not None:
            ctx.loss(self.penalty * self.expected())
        made = F.linear(x.to(self.w.dtype), self.difference(ctx if self.training else None))
        return y + (made if mask is None else torch.where(mask, made, 0.0)).to(y.dtype)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.difference().to(weight.dtype), bias

    def take(self, base: LinearLike, out: Tensor | None, inn: Tensor | None) -> Difference:
        taken = copy.deepcopy(self)
        for name in ("w", "gate"):
            setattr(taken, name, cut(cut(getattr(self, name), 0, out), 1, inn))
        return taken

    def scale_in(self, s: float) -> None:
        self.w.mul_(s)

    def cost(self, shape: Shape) -> Cost:
        return super().cost(shape) + Cost(0, self.w.numel() * shape.tokens)


@register(
    "surgery", "diff-pruning", paper=Paper("Guo et al.", 2020, "2012.07463"), summary="a sparse difference to weights"
)
class DiffPruning(Adapts):
    """Options: keep: share of the entries that stay, default 0.005. penalty: weight of an open gate, default 1.25e-7.
    project: the share of the run after which the others close, default 0.6. pace: of the gates beside the weights,
    default 100. And those of :class:`Adapts`; default all."""

    own: ClassVar[Mapping[str, Any]] = {"keep": 0.005, "penalty": 1.25e-7, "project": 0.6, "pace": 100.0}
    places = ("all",)
    examples = ({"keep": 0.1, "where": ["q", "up"]},)

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        found = number("diff-pruning: keep", options["keep"], 0.0, above=True)
        if not found and options["keep"] > 1:
            found = [f"diff-pruning: keep={options['keep']!r} is a share, at most 1"]
        found += number("diff-pruning: penalty", options["penalty"], 0.0)
        found += number("diff-pruning: project", options["project"], 0.0, 1.0)
        return found + number("diff-pruning: pace", options["pace"], 0.0, above=True)

    def shared(self, options: Mapping[str, Any], slots: Sequence[str]) -> dict[str, Any]:
        return {key: float(options[key]) for key in ("keep", "penalty", "project", "pace")}

    def arguments(self, decisions: Mapping[str, Any], address: str) -> dict[str, Any]:
        return {"penalty": decisions["penalty"], "pace": decisions["pace"]}

    def told(self, decisions: Mapping[str, Any]) -> str:
        return f"{self.name}, {decisions['keep']:.2%} of the entries"

    def companion(self, model: Any, plan: Plan) -> Companion | None:
        return Projection(model, plan) if present(model, plan) else None


class Projection(Companion):
    """Closes all gates but the largest entries' when the time has come; see the module."""

    def __init__(self, model: Any, plan: Plan) -> None:
        self.changes: list[Difference] = list(held(model, plan).values())  # type: ignore[arg-type]
        self.keep, self.when = plan.decisions["keep"], plan.decisions["project"]
        self.done = False

    def gradients(self, run: Any) -> None:
        if self.done:
            for change in self.changes:
                change.gate.grad = change.matrix.grad = None

    @torch.no_grad()
    def stepped(self, run: Any) -> None:
        if not self.done and (run.progress >= self.when or run.last):
            self.project()
        elif self.done:
            for change in self.changes:
                change.w.mul_(change.gate > 0)

    @torch.no_grad()
    def project(self) -> None:
        """Open the gates of the largest entries of z w in all slots together, close the rest."""
        made = [change.difference().flatten() for change in self.changes]
        sizes = torch.cat([difference.abs() for difference in made])
        wanted = max(1, int(self.keep * sizes.numel()))
        kept = torch.zeros_like(sizes, dtype=torch.bool).scatter_(0, sizes.topk(wanted).indices, True)
        for change, difference, open_ in zip(self.changes, made, kept.split([len(one) for one in made])):
            shape = change.w.shape
            change.w.copy_((difference * open_).view(shape))
            # So far from the edge that no noise opens or closes a gate any more.
            change.gate.copy_(torch.where(open_.view(shape), 1.0, -1.0) * (40.0 / change.pace))
            change.matrix.fill_(40.0 / change.pace)
        self.done = True

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done = state["done"]
