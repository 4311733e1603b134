"""Distillation: the model answers as a teacher does (Hinton, Vinyals and Dean, 2015).

For heads that give vectors, a sum over rows of

    cosine * (1 - cos(s, t)) + mse * |s - t|^2 + states * mean over tokens of |h_s - h_t|^2 / |h_t|^2

with the teacher's vector t and its last states h_t; for heads that give logits, a sum over tokens (or rows) of
``T^2 KL(softmax(t / T) || softmax(s / T))``. ``hidden`` adds the relative error of the stream after chosen items.
Cost: one pass of the teacher, unless the batch already carries what it said: ``targets["teacher"]``, its head's answer
a row, and ``targets["teacher.states"]`` (shape of the tokens, W). Logits of tokens are made chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, Loss
from formwright.objectives import base
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
        hidden: item ids after which the streams are compared; hidden_weight: weight of their mean relative error.
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
        hidden: tuple[str, ...] | list[str] = (),
        hidden_weight: float = 1.0,
        hard: float = 0.0,
        begin: str | None = None,
        head: str | None = None,
        logits: int = base.LOGITS,
    ) -> None:
        if temperature <= 0:
            raise SpecError(f"temperature={temperature} must be above 0")
        self.cosine, self.mse, self.states = cosine, mse, states
        self.temperature, self.hard = temperature, base.check_unit("hard", hard, 0.0, 1.0)
        self.hidden, self.hidden_weight = tuple(hidden), hidden_weight
        if begin is not None and self.hidden:
            raise SpecError("distillation: begin leaves out the items that hidden may compare; give one of them")
        self.begin, self.head, self.logits = begin, head, logits

    def bind(self, models: Models) -> None:
        name, head = self.head_of(models["model"])
        owner = base.reader(models["model"])
        tops = [item.id for item in owner.items()]
        problems = [f"distillation compares after items of the top list; {id} is none" for id in self.hidden]
        problems = [line for id, line in zip(self.hidden, problems) if id not in tops]
        teacher = models.get("teacher")
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

    def head_of(self, model: Any) -> tuple[str, Any]:
        return base.head_of(model, KINDS, "distillation", self.head)

    def loss(self, models: Models, batch: Batch, gen: Gen) -> Mapping[str, Loss]:
        model = models["model"]
        _, head = self.head_of(model)
        notes = base.listening()
        begin = None
        if self.begin is not None:
            begin = (self.begin, base.target(batch, "teacher.stream", "distillation"))
        x, ctx, seen = base.last_states(model, batch, self.hidden, begin, notes=notes, **gen.context())
        said = self._teacher(models, batch, head.kind, ctx)
        if head.kind in ("vectors", "states"):
            total, count, parts = self._vectors(head, x, ctx, said)
        elif head.kind == "tokens":
            total, count, parts = self._tokens(head, x, ctx, said, batch)
        else:
            total, count, parts = self._rows(head, x, ctx, said, batch)
        if self.hidden:
            chosen = self._chosen(x, ctx, batch) if head.kind == "tokens" else None
            gaps = [relative_error(seen[id], said["hidden"][id], ctx, chosen) for id in self.hidden]
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
        if not self.hidden and all(said[name] is not None for name in needs) and (kind != "tokens" or teacher):
            return {**said, "head": None if teacher is None else self.head_of(teacher)[1], "ctx": ctx}
        if teacher is None:
            raise DataError("distillation needs a teacher: pass others={'teacher': model}")
        with torch.no_grad():
            x, own, seen = base.last_states(teacher, batch, self.hidden)
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


def relative_error(ours: Tensor, theirs: Tensor, ctx: Context, chosen: Tensor | None = None) -> Tensor:
    """|ours - theirs|^2 / |theirs|^2 of each token, summed over the ``chosen`` (B, L) tokens, or without them each
    row's mean, summed over rows; an empty row counts 0."""
    theirs = theirs.to(ours.dtype)
    gap = (ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-12)
    if chosen is not None:
        return gap[chosen].sum()
    if ctx.offsets is not None:
        sizes = ctx.offsets.diff()
        return (torch.segment_reduce(gap[0], "sum", lengths=sizes) / sizes.clamp(min=1)).sum()
    valid = ctx.valid(ours)
    return (torch.where(valid, gap, 0.0).sum(1) / valid.sum(1).clamp(min=1)).sum()
