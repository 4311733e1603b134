"""Distillation: the model answers as a teacher does (Hinton, Vinyals and Dean, 2015).

For heads that give vectors, a sum over rows of

    cosine * (1 - cos(s, t)) + mse * |s - t|^2 + states * mean over tokens of |h_s - h_t|^2 / |h_t|^2

with the teacher's vector t and its last states h_t; for heads that give logits, a sum over tokens (or rows) of
``T^2 KL(softmax(t / T) || softmax(s / T))``. ``hidden`` adds the difference of the streams after chosen items, which
trained projections bring to one width where the models differ (Romero et al., 2015, 1412.6550).
Cost: one pass of the teacher, unless the batch already carries what it said: ``targets["teacher"]``, its head's answer
a row, and ``targets["teacher.states"]`` (shape of the tokens, W). Logits of tokens are made chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from formwright.kit.errors import DataError, SpecError, nearest
from formwright.models.batch import Batch, Loss
from formwright.objectives import base
from formwright.objectives._hidden import Same, check_kind, difference, relative_error
from formwright.objectives.base import Gen, Models, Objective
from formwright.objectives.causal_lm import summed_nll, vocabulary
from formwright.parts.context import Context
from formwright.registry import Paper, register

KINDS = ("vectors", "tokens", "sequence", "pair", "states")


@register("objective", "distillation", paper=Paper("Hinton et al.", 2015, "1503.02531"), summary="answer as a teacher")
class Distillation(Objective):
    """Needs ``models["teacher"]``, unless every batch carries what the teacher said.

    Args:
        cosine, mse, states: weights for heads that give vectors. temperature: T, for heads that give logits.
        hidden: item ids after which the streams are compared, or {our id: the teacher's}; hidden_weight: weight of
            their mean difference; hidden_kind: ``relative``, ``mse`` or ``cosine``, see
            :mod:`formwright.objectives._hidden`.
        project: bring our streams to the teacher's width by linears that are trained with the model; pass
            ``others={"projection": projections(student, teacher, hidden)}`` as well.
        hard: weight of the ordinary cross entropy with ``targets["tokens"]`` or ``targets["label"]``, 0 to 1; the
            teacher's part weighs 1 - hard.
        begin: item id before which the model is the teacher's equal and fixed: every batch carries the stream there as
            ``targets["teacher.stream"]``, and the items before are not run. Not together with ``hidden``.
        head: name of the head to compare where there are several. logits: numbers of logits held at once.
    """

    others = {"teacher": "frozen"}

    def __init__(
        self,
        cosine: float = 1.0,
        mse: float = 0.0,
        states: float = 0.0,
        temperature: float = 1.0,
        hidden: tuple[str, ...] | list[str] | Mapping[str, str] = (),
        hidden_weight: float = 1.0,
        hidden_kind: str = "relative",
        project: bool = False,
        hard: float = 0.0,
        begin: str | None = None,
        head: str | None = None,
        logits: int = base.LOGITS,
    ) -> None:
        if temperature <= 0:
            raise SpecError(f"temperature={temperature} must be above 0")
        self.cosine, self.mse, self.states = cosine, mse, states
        self.temperature, self.hard = temperature, base.check_unit("hard", hard, 0.0, 1.0)
        self.hidden = dict(hidden) if isinstance(hidden, Mapping) else tuple(hidden)
        self.hidden_weight, self.hidden_kind, self.project = hidden_weight, check_kind(hidden_kind), project
        self.pairs = dict(hidden) if isinstance(hidden, Mapping) else {id: id for id in hidden}
        if project and not self.pairs:
            raise SpecError("distillation: project brings hidden streams to one width; say which with hidden")
        if project:
            self.others = {**self.others, "projection": "trained"}
        if begin is not None and self.pairs:
            raise SpecError("distillation: begin leaves out the items that hidden may compare; give one of them")
        self.begin, self.head, self.logits = begin, head, logits

    def bind(self, models: Models) -> None:
        name, head = self.head_of(models["model"])
        owner = base.reader(models["model"])
        teacher = models.get("teacher")
        problems = self._misplaced(owner, self.pairs)
        if teacher is not None:
            problems += self._misplaced(base.reader(teacher), self.pairs.values())
            problems += self._unlike(owner.width, base.reader(teacher).width, models.get("projection"))
        if teacher is not None:
            other = base.reader(teacher).head(name) if name in base.reader(teacher).heads else self.head_of(teacher)[1]
            if other.kind != head.kind:
                problems.append(f"distillation: the model's head gives {head.kind}, the teacher's {other.kind}")
            elif head.kind in ("vectors", "states") and base.reader(teacher).width != owner.width:
                problems.append(f"distillation: widths differ, {owner.width} and {base.reader(teacher).width}")
            elif head.kind not in ("vectors", "states") and vocabulary(other) != vocabulary(head):
                problems.append(f"distillation: {vocabulary(head)} and {vocabulary(other)} classes")
        if problems:
            raise DataError("\n".join(problems))

    @staticmethod
    def _misplaced(owner: Any, ids: Iterable[str]) -> list[str]:
        """A sentence for every id that is no item of the top list."""
        tops = [item.id for item in owner.items()]
        return [
            f"distillation compares after items of the top list; {id} is none{nearest(id, tops)}"
            for id in ids
            if id not in tops
        ]

    def _unlike(self, ours: int, theirs: int, projection: Any) -> list[str]:
        """What is wrong about the widths of hidden streams."""
        if self.pairs and not self.project and ours != theirs:
            return [f"distillation: hidden streams are {ours} and {theirs} wide; say project=True"]
        if self.project and projection is None:
            return [
                "distillation with project=True trains linears: pass others={'projection': projections(student, "
                "teacher, hidden)} (formwright.objectives._hidden.projections)"
            ]
        return []

    def head_of(self, model: Any) -> tuple[str, Any]:
        return base.head_of(model, KINDS, "distillation", self.head)

    def loss(self, models: Models, batch: Batch, gen: Gen) -> Mapping[str, Loss]:
        model = models["model"]
        _, head = self.head_of(model)
        notes = base.listening()
        begin = None
        if self.begin is not None:
            begin = (self.begin, base.target(batch, "teacher.stream", "distillation"))
        x, ctx, seen = base.last_states(model, batch, tuple(self.pairs), begin, notes=notes, **gen.context())
        said = self._teacher(models, batch, head.kind, ctx)
        if head.kind in ("vectors", "states"):
            total, count, parts = self._vectors(head, x, ctx, said)
        elif head.kind == "tokens":
            total, count, parts = self._tokens(head, x, ctx, said, batch)
        else:
            total, count, parts = self._rows(head, x, ctx, said, batch)
        if self.pairs:
            chosen = self._chosen(x, ctx, batch) if head.kind == "tokens" else None
            bridge = models["projection"] if self.project else Same()
            gaps = [
                difference(self.hidden_kind, bridge(our, seen[our]), said["hidden"][their], ctx, chosen)
                for our, their in self.pairs.items()
            ]
            gap = torch.stack(gaps).mean()
            total = total + self.hidden_weight * gap
            parts["hidden"] = gap.detach()
        whole, more = base.with_auxiliary(total, count, notes)
        return {"model": Loss(whole, count, {**parts, **more})}

    @staticmethod
    def _chosen(x: Tensor, ctx: Context, batch: Batch) -> Tensor:
        """Tokens that are compared: those with a target, or all real ones."""
        wanted = batch.targets.get("tokens")
        return ctx.valid(x) if wanted is None else wanted != -100

    def _teacher(self, models: Models, batch: Batch, kind: str, ctx: Context) -> dict[str, Any]:
        """What the teacher says: its ``answer`` a row, its last ``states``, and the head for answers made of those."""
        teacher = models.get("teacher")
        said: dict[str, Any] = {
            "answer": batch.targets.get("teacher"),
            "states": batch.targets.get("teacher.states"),
            "hidden": {},
        }
        needs = {"states"} if kind in ("tokens", "states") else {"answer", "states"} if self.states else {"answer"}
        if not self.pairs and all(said[name] is not None for name in needs) and (kind != "tokens" or teacher):
            return {**said, "head": None if teacher is None else self.head_of(teacher)[1], "ctx": ctx}
        if teacher is None:
            raise DataError("distillation needs a teacher: pass others={'teacher': model}")
        with torch.no_grad():
            x, own, seen = base.last_states(teacher, batch, tuple(self.pairs.values()))
            _, head = self.head_of(teacher)
            answer = None if kind == "tokens" else head(x, own)
            return {"answer": answer, "states": x, "hidden": seen, "head": head, "ctx": own}

    def _vectors(self, head: Any, x: Tensor, ctx: Context, said: dict[str, Any]) -> tuple[Tensor, Tensor, dict]:
        total, parts = x.new_zeros((), dtype=torch.float32), {}
        rows = len(ctx.offsets) - 1 if ctx.offsets is not None else len(x)
        if head.kind == "vectors":
            ours, theirs = head(x, ctx).float(), said["answer"].float()
            cosine = F.cosine_similarity(ours, theirs, dim=-1)
            total = total + self.cosine * (1.0 - cosine).sum() + self.mse * (ours - theirs).square().sum()
            parts["cosine"] = cosine.detach().sum()
        weight = self.states or float(head.kind == "states")
        if weight:
            gap = relative_error(x, said["states"], ctx)
            total = total + weight * gap
            parts["states"] = gap.detach()
        return total, torch.tensor(rows, device=x.device), parts

    def _tokens(
        self, head: Any, x: Tensor, ctx: Context, said: dict[str, Any], batch: Batch
    ) -> tuple[Tensor, Tensor, dict]:
        wanted, chosen = batch.targets.get("tokens"), self._chosen(x, ctx, batch)
        ours, theirs = x[chosen], said["states"][chosen]
        total, other = ours.sum() * 0.0, said["head"]

        def piece(mine: Tensor, target: Tensor, inner: Context) -> Tensor:
            with torch.no_grad():
                target = other(target[None], inner)[0]
            return divergence(head(mine[None], inner)[0], target, self.temperature)

        again = torch.is_grad_enabled()
        for index, where in enumerate(base.token_chunks(len(ours), 2 * vocabulary(head), self.logits)):
            inner = base.flat_context(ctx, index)
            part, target = ours[where], theirs[where]
            kept = checkpoint(piece, part, target, inner, use_reentrant=False) if again else piece(part, target, inner)
            total = total + kept
        parts = {"divergence": total.detach()}
        if self.hard:
            if wanted is None:
                raise DataError(
                    "distillation with hard > 0 also compares with targets['tokens'], which the batch lacks"
                )
            nll = summed_nll(head, ours, wanted[chosen], ctx, 0.0, self.logits)
            total = (1.0 - self.hard) * total + self.hard * nll
            parts["nats"] = nll.detach()
        return total, chosen.sum(), parts

    def _rows(
        self, head: Any, x: Tensor, ctx: Context, said: dict[str, Any], batch: Batch
    ) -> tuple[Tensor, Tensor, dict]:
        ours = head(x, ctx).float()
        total = divergence(ours, said["answer"], self.temperature)
        parts = {"divergence": total.detach()}
        if self.hard:
            label = base.target(batch, "label", "distillation")
            nll = F.cross_entropy(ours, label, reduction="sum")
            total = (1.0 - self.hard) * total + self.hard * nll
            parts["nats"] = nll.detach()
        return total, torch.tensor(len(ours), device=x.device), parts


def divergence(ours: Tensor, theirs: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(theirs / T) || softmax(ours / T)), summed over all rows (N, C)."""
    p, q = (F.log_softmax(t.float() / temperature, -1) for t in (theirs, ours))
    return F.kl_div(q, p, reduction="sum", log_target=True) * temperature**2
