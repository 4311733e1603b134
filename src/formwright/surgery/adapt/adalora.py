"""AdaLoRA: a budget of ranks, moved during training to the slots that need them.

    y = base(x) + s B diag(E) A x,   s = alpha / (rank + 1e-5);   A, B ~ N(0, 0.02^2), E = 0

Zhang et al., 2023 (2303.10512). A triplet is one entry of E with its row of A and column of B. Training smooths the
importance ``|p grad p|`` of every entry, and every so often keeps the most important triplets of the whole model and
zeroes E of the others, which may come back until the last phase. The budget falls from all triplets to ``target`` a
slot along a cube. A penalty keeps the rows of A and the columns of B orthogonal, without which importances would not
compare. Cost: LoRA's at the initial rank; r^2 (in + out) for the penalty a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.parts.base import Cost, LinearLike, Shape
from formwright.parts.context import Context
from formwright.parts.linears.adapted import Change
from formwright.registry import Paper, register
from formwright.surgery.adapt._changes import count, held, number, present
from formwright.surgery.adapt.lora import LoRA, LowRank
from formwright.surgery.base import Companion, Plan

#: How much of the past the importances remember.
MEMORY = 0.85


@register("change", "adalora", paper=Paper("Zhang et al.", 2023, "2303.10512"), summary="y + s B diag(E) A x")
class AdaLoRA(LoRA):
    """``A`` (rank, in), ``B`` (out, rank), ``E`` (rank,). ``penalty``: the weight of this slot's orthogonality loss."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, penalty: float = 0.0, **own: Any) -> None:
        super().__init__(in_features, out_features, rank=rank, **own)
        self.penalty = penalty
        self.E = nn.Parameter(torch.empty(rank))

    def reset(self, generator: torch.Generator) -> None:
        for factor in (self.A, self.B):
            factor.copy_(0.02 * torch.randn(factor.shape, generator=generator))
        self.E.zero_()

    def alone(self, x: Tensor, base: LinearLike, ctx: Context | None) -> Tensor:
        if self.training and self.penalty and ctx is not None and ctx.notes is not None:
            ctx.loss(self.penalty * self.skewness())
        return Change.alone(self, x, base, ctx)

    def skewness(self) -> Tensor:
        """|A A^T - I| + |B^T B - I|, zero where both are orthonormal."""
        eye = torch.eye(len(self.A), dtype=self.A.dtype, device=self.A.device)
        return (self.A @ self.A.t() - eye).norm() + (self.B.t() @ self.B - eye).norm()

    def product(self, x: Tensor, mask: Tensor | None) -> Tensor:
        inner = F.linear(x.to(self.A.dtype), self.A) * (self.scaling * self.E)
        if mask is not None:
            inner = torch.where(mask, inner, 0.0)
        return F.linear(inner, self.B)

    def weight(self) -> Tensor:
        return self.B @ (self.scaling * self.E[:, None] * self.A)

    def cost(self, shape: Shape) -> Cost:
        own = super().cost(shape)
        return Cost(own.parameters + self.E.numel(), own.macs)


@register("surgery", "adalora", paper=Paper("Zhang et al.", 2023, "2303.10512"), summary="LoRA with a budget of ranks")
class Adalora(LowRank):
    """Options:

    rank: at the start, default 12. target: triplets a slot that are left, on average, default 8. begin, end: shares of
    the run before the budget falls and after it has fallen, default 0.1 and 0.3. every: steps between allocations,
    default 10. orthogonality: weight of the penalty, default 0.5. alpha, dropout, and those of :class:`Adapts`.
    """

    own: ClassVar[Mapping[str, Any]] = {
        "rank": 12,
        "target": 8,
        "alpha": None,
        "dropout": 0.0,
        "begin": 0.1,
        "end": 0.3,
        "every": 10,
        "orthogonality": 0.5,
    }
    examples = ({"rank": 3, "target": 2},)

    def wrong(self, options: Mapping[str, Any]) -> list[str]:
        found = super().wrong(options) + count("adalora: target", options["target"])
        found += count("adalora: every", options["every"])
        found += number("adalora: orthogonality", options["orthogonality"], 0.0)
        shares = number("adalora: begin", options["begin"], 0.0, 1.0) + number("adalora: end", options["end"], 0.0, 1.0)
        if not shares and options["begin"] + options["end"] >= 1:
            shares = [
                f"adalora: begin={options['begin']:g} and end={options['end']:g} leave no time in which the budget "
                "could fall: their sum must be below 1"
            ]
        if not found and options["target"] > options["rank"]:
            found.append(
                f"adalora: target={options['target']} is more than rank={options['rank']}, from which the budget falls"
            )
        return found + shares

    def shared(self, options: Mapping[str, Any], slots: Sequence[str]) -> dict[str, Any]:
        rank, alpha = options["rank"], options["alpha"]
        return {
            "scaling": (2.0 * rank if alpha is None else float(alpha)) / (rank + 1e-5),
            "dropout": float(options["dropout"]),
            "target": options["target"],
            "schedule": {key: options[key] for key in ("begin", "end", "every")},
            "penalty": options["orthogonality"] / (2 * max(1, len(slots))),
        }

    def arguments(self, decisions: Mapping[str, Any], address: str) -> dict[str, Any]:
        return {**super().arguments(decisions, address), "penalty": decisions["penalty"]}

    def companion(self, model: Any, plan: Plan) -> Companion | None:
        return Budget(model, plan) if present(model, plan) else None


class Budget(Companion):
    """Gives out the triplets of one plan; see the module. ``wanted(progress)`` is how many are alive."""

    def __init__(self, model: Any, plan: Plan) -> None:
        decided = plan.decisions
        self.changes: dict[str, AdaLoRA] = held(model, plan)  # type: ignore[assignment]
        self.whole = sum(decided["slots"].values())
        self.target = min(self.whole, decided["target"] * len(self.changes))
        self.begin, self.end, self.every = (decided["schedule"][key] for key in ("begin", "end", "every"))
        self.importance: dict[str, Tensor] = {}
        self.doubt: dict[str, Tensor] = {}
        self.alive: Tensor | None = None

    def wanted(self, progress: float) -> int:
        if progress <= self.begin:
            return self.whole
        if progress >= 1 - self.end:
            return self.target
        passed = (progress - self.begin) / (1 - self.end - self.begin)
        return self.target + round((self.whole - self.target) * (1 - passed) ** 3)

    def gradients(self, run: Any) -> None:
        """Smooth the importances; after the last allocation they are needed no more."""
        if self.alive is not None:
            return
        for address, change in self.changes.items():
            for name, parameter in change.named_parameters():
                if parameter.grad is not None:
                    self._smooth(f"{address} {name}", (parameter.detach() * parameter.grad).abs())

    def _smooth(self, key: str, now: Tensor) -> None:
        before = self.importance.get(key, torch.zeros_like(now))
        mean = MEMORY * before + (1 - MEMORY) * now
        doubt = self.doubt.get(key, torch.zeros_like(now))
        self.importance[key], self.doubt[key] = mean, MEMORY * doubt + (1 - MEMORY) * (now - mean).abs()

    def scores(self) -> Tensor:
        """(triplets,) over all slots, in their order."""
        found = []
        for address, change in self.changes.items():
            a, b, e = (self._score(f"{address} {name}", getattr(change, name)) for name in "ABE")
            found.append(e + a.mean(1) + b.mean(0))
        return torch.cat(found)

    def _score(self, key: str, like: Tensor) -> Tensor:
        return self.importance[key] * self.doubt[key] if key in self.importance else torch.zeros_like(like)

    @torch.no_grad()
    def stepped(self, run: Any) -> None:
        if self.alive is None and (run.progress >= 1 - self.end or run.last):
            self.alive = self._best(self.target)
        if self.alive is not None:
            self._keep(self.alive)
        elif run.step % self.every == 0 and run.progress > self.begin:
            self._keep(self._best(self.wanted(run.progress)))

    def _best(self, wanted: int) -> Tensor:
        scores = self.scores()
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, scores.topk(wanted).indices, True)

    def _keep(self, alive: Tensor) -> None:
        changes = list(self.changes.values())
        for change, kept in zip(changes, alive.split([len(change.E) for change in changes])):
            change.E.mul_(kept)

    def state_dict(self) -> dict[str, Any]:
        # Copies: a checkpoint of tensors that go on changing would not be of one step.
        held = {"importance": self.importance, "doubt": self.doubt}
        state: dict[str, Any] = {
            name: {key: value.clone() for key, value in values.items()} for name, values in held.items()
        }
        return {**state, "alive": self.alive}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.importance, self.doubt = dict(state["importance"]), dict(state["doubt"])
        self.alive = state["alive"]
