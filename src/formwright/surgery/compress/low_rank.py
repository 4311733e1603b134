"""Low rank: replace a weight by two thin ones.

Winata et al., 2020 (1910.13923), and the toolkit of Cahyawijaya, 2021 (2108.10808). A weight (out, in) of rank r costs
r (in + out) numbers and products a token instead of in out; from the break-even rank r* = in out / (in + out) on a
slot is left dense. A fraction as rank is one of r*, not of the parameters: the plan states what came out. Uniform
ranks are poor, since slots differ in what they tolerate: ``parameters=0.5`` shares one budget out
(:mod:`formwright.surgery.compress._ranks`) by what each slot's lost energy does to the model's output, measured on the
evidence, or by the energy alone where there is none. Cost of planning: one spectrum a slot; for the whitened solver a
pass over the evidence and a covariance (in, in) a slot; with a budget about half a pass over 2,048 tokens a slot.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import DataError, Refusal, SpecError, all_of, unknown
from formwright.models.batch import Batch
from formwright.parts.base import LinearLike, kind_of
from formwright.parts.linears.dense import Dense
from formwright.parts.linears.low_rank import LowRank, break_even
from formwright.registry import Paper, register
from formwright.surgery.base import (
    Displaced,
    Plan,
    Promises,
    Surgery,
    check_options,
    chosen_slots,
    core,
    on,
    set_core,
    slot_generator,
)
from formwright.surgery.compress._factors import SOLVERS, SPLITS, axes, factorise
from formwright.surgery.compress._inputs import gather, inputs_of
from formwright.surgery.compress._ranks import Offer, allocate
from formwright.surgery.compress._sensitivity import offers_by_effect
from formwright.surgery.evidence import batches

OPTIONS = (
    "rank",
    "parameters",
    "solver",
    "split",
    "where",
    "exclude",
    "multiple_of",
    "seed",
    "batch",
    "max_length",
)


@register("surgery", "low-rank", paper=Paper("Winata et al.", 2020, "1910.13923"), summary="two thin weights for one")
class LowRankSurgery(Surgery):
    """Options: one of

    rank: a whole number, a fraction (0, 1] of the break-even rank, or "energy:0.9" (least rank that keeps that share
    of the squared singular values); parameters: share of the chosen weights' parameters that is left, shared out.

    solver: "svd", "whitened" (least error of the outputs; runs the evidence), "snmf" or "random"; default whitened
    where evidence is given, else svd. split: "sqrt" or "left" (where the singular values go). where, exclude: roles,
    items or addresses, default every dense slot of the layers. multiple_of: ranks that are computed, not given, are
    multiples of it. seed: of "random". batch, max_length: how evidence is run.

    ``decisions["ranks"]`` may be edited; ``decisions["kept"]`` names what stays dense and why.
    """

    family = "compress"
    examples = (
        {"parameters": 0.6, "solver": "whitened", "multiple_of": 1},
        {"rank": 0.5, "solver": "svd", "split": "left", "multiple_of": 1, "where": ["up", "down"]},
    )

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        solver, split, step = _checked(options, evidence)
        slots, kept = _slots(model, options.get("where"), options.get("exclude"))
        tensors: dict[str, Tensor] = {}
        made: list[Batch] = []
        if evidence is not None and (solver == "whitened" or "parameters" in options):
            made = batches(model, evidence, options.get("batch", 8), options.get("max_length", 256), "low-rank")
        if solver == "whitened":
            tensors = gather(model, slots, made)
            for address in [address for address in slots if f"{address}.covariance" not in tensors]:
                kept[address] = "the evidence never reached it"
                del slots[address]
        known = {address: inputs_of(tensors, address) for address in slots}
        if "parameters" in options and made and solver in ("svd", "whitened"):
            offers = offers_by_effect(model, slots, known, made, options["parameters"])
        else:
            offers = {
                address: Offer(slot.in_features, slot.out_features, axes(slot.weight, known[address], False)[0])
                for address, slot in slots.items()
            }
        ranks, shares = self._ranks(offers, options, step, kept)
        if not ranks:
            raise Refusal(f"low-rank: no slot can be made smaller ({_reasons(kept) or 'none was chosen'})")
        if "rank" in options:
            dense = [address for address, reason in kept.items() if "break-even" in reason]
            if dense:
                warnings.warn(f"low-rank: {len(dense)} slots stay dense, {kept[dense[0]]}", stacklevel=3)
        decisions = {
            "ranks": ranks,
            "kept": kept,
            "energy": shares,
            "solver": solver,
            "split": split,
            "seed": options.get("seed", 0),
            "parameters": _counts(slots, ranks),
        }
        tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in ranks}
        return self.made(model, dict(options), decisions, **tensors)

    def _ranks(
        self,
        offers: dict[str, Offer],
        options: dict[str, Any],
        step: int,
        kept: dict[str, str],
    ) -> tuple[dict[str, int], dict[str, float]]:
        """(rank, share of the energy kept) of the slots that become smaller; the others' reasons go into ``kept``."""
        wanted = options.get("rank")
        if wanted is None:
            total = sum(offer.dense for offer in offers.values())
            ranks = allocate(offers, int(options["parameters"] * total), step)
        else:
            ranks = {address: _one(wanted, offer, step) for address, offer in offers.items()}
        shares = {}
        for address, offer in offers.items():
            rank, best = ranks[address], break_even(offer.in_features, offer.out_features)
            if wanted is None and rank == 0:
                kept[address] = "the budget leaves it dense"
            elif rank == 0:
                kept[address] = f"rank 0 of break-even {best}: a fraction too small to act on"
            elif rank > offer.limit:
                kept[address] = f"rank {rank} is not below break-even {best}, so two factors would save nothing"
                ranks[address] = 0
            if ranks[address]:
                shares[address] = round(float(offer.kept()[rank]), 6)
        return {address: rank for address, rank in ranks.items() if rank}, shares

    def promises(self, plan: Plan) -> Promises:
        needs = ("evidence",) if plan.decisions.get("solver") == "whitened" else ()
        return Promises(mergeable=True, needs=needs)

    def check(self, model: Any, plan: Plan) -> None:
        known, problems = model.slots(), []
        for address, rank in plan.decisions["ranks"].items():
            if address not in known:
                problems.append(f"low-rank: {unknown('slot', address, known)}")
                continue
            slot = known[address]
            most = min(slot.in_features, slot.out_features)
            if type(core(slot)) is not Dense:
                problems.append(f"low-rank: {address} is {kind_of(slot)}; only a dense weight can be factorised")
            elif not isinstance(rank, int) or not 1 <= rank <= most:
                problems.append(f"low-rank: rank {rank!r} of {address} must be a whole number from 1 to {most}")
            elif plan.decisions["solver"] == "whitened" and f"{address}.covariance" not in plan.tensors:
                problems.append(
                    f"low-rank: this plan has lost the covariance of {address}; plan again, or give its tensors too"
                )
        all_of(SpecError, problems)

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        displaced: Displaced = {}
        for address, rank in plan.decisions["ranks"].items():
            old = core(model.slot(address))
            bias = old.dense_bias()
            with torch.device("meta"):
                made = LowRank(old.in_features, old.out_features, bias is not None, old.role, rank=rank)
            weight = next(old.parameters())
            made.to(weight.dtype).train(old.training).requires_grad_(weight.requires_grad)
            if bias is not None:
                made.second.bias.requires_grad_(bias.requires_grad)  # type: ignore[union-attr]
            displaced[address] = set_core(model, address, on(made, old))  # type: ignore[arg-type]
        return displaced

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        decided = plan.decisions
        for address in list(displaced):
            old, new = displaced.pop(address), core(model.slot(address))
            assert isinstance(new, LowRank)
            values = dict(new.named_parameters())
            factors = factorise(
                old.weight,
                new.rank,
                decided["solver"],
                decided["split"],
                inputs_of(plan.tensors, address),
                slot_generator(decided["seed"], address),
            )
            values["first.weight"].copy_(factors.first)
            values["second.weight"].copy_(factors.second)
            if old.bias is not None:
                values["second.bias"].copy_(old.bias if factors.shift is None else old.bias + factors.shift)

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        for address, module in displaced.items():
            set_core(model, address, module)

    def words(self, plan: Plan) -> str:
        ranks = plan.decisions["ranks"]
        before, after = plan.decisions.get("parameters", (0, 0))
        least, most = min(ranks.values(), default=0), max(ranks.values(), default=0)
        rank = f"rank {least}" if least == most else f"rank {least} to {most}"
        left = f", {after / before:.0%} of their parameters" if before else ""
        return f"Replaced {len(ranks)} weights by two factors each ({rank}{left})."


def _checked(options: dict[str, Any], evidence: Any) -> tuple[str, str, int]:
    """(solver, split, multiple_of); every complaint about the options at once."""
    check_options("low-rank", options, OPTIONS)
    rank, share, step = options.get("rank"), options.get("parameters"), options.get("multiple_of", 16)
    solver = options.get("solver") or ("whitened" if evidence is not None else "svd")
    split = options.get("split", "sqrt")
    problems = []
    if (rank is None) == (share is None):
        problems.append("low-rank: give either rank (a number, a fraction or 'energy:0.9') or parameters (share left)")
    if rank is not None and _energy(rank) is None:
        if isinstance(rank, bool) or not isinstance(rank, (int, float)):
            problems.append(f"low-rank: rank={rank!r} must be a number, a fraction of break-even, or 'energy:0.9'")
        elif rank <= 0:
            problems.append(f"low-rank: rank={rank} must be above 0")
        elif isinstance(rank, float) and rank > 1.0:
            problems.append(f"low-rank: rank={rank} is a fraction of the break-even rank, so at most 1")
    if share is not None and not (isinstance(share, (int, float)) and 0.0 < share < 1.0):
        problems.append(f"low-rank: parameters={share!r} is the share that is left, between 0 and 1")
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        problems.append(f"low-rank: multiple_of={step!r} must be a whole number of at least 1")
    if solver not in SOLVERS:
        problems.append(f"low-rank: {unknown('solver', str(solver), SOLVERS)}")
    if split not in SPLITS:
        problems.append(f"low-rank: {unknown('split', str(split), SPLITS)}")
    all_of(SpecError, problems)
    if solver == "whitened" and evidence is None:
        raise DataError("low-rank: the whitened solver decides from evidence: give evidence=[texts], or solver='svd'")
    return solver, split, step


def _energy(rank: Any) -> float | None:
    """0.9 of ``"energy:0.9"``."""
    if not isinstance(rank, str) or not rank.startswith("energy:"):
        return None
    try:
        share = float(rank.removeprefix("energy:"))
    except ValueError:
        return None
    return share if 0.0 < share < 1.0 else None


def _one(wanted: Any, offer: Offer, step: int) -> int:
    """The rank of one slot by itself: as given, or computed and rounded to ``step`` where that stays below limit."""
    if isinstance(wanted, int):
        return wanted
    share = _energy(wanted)
    if share is None:
        rank = int(wanted * break_even(offer.in_features, offer.out_features) + 1e-9)
        rounded = max(step, rank // step * step) if rank else 0
    else:
        rank = int((offer.kept() < share - 1e-12).sum())
        rounded = -(-rank // step) * step
    return rounded if rounded <= offer.limit or rank > offer.limit else rank


def _slots(model: Any, where: Any, exclude: Any) -> tuple[dict[str, Dense], dict[str, str]]:
    """The dense slots to factorise, and why others that were meant are not."""
    import fnmatch

    patterns = [where] if isinstance(where, str) else list(where or ())
    tables = [name for name in model.tables() for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
    if tables:
        raise Refusal(
            f"low-rank: {tables[0]} is a lookup table (and may be tied to the head), not a linear; "
            "factorising it would break the tie"
        )
    layers = {item.id for item in model.walk()}
    inside = [a for a in model.slots() if a.rpartition("/")[2].partition(":")[0] in layers]
    chosen = inside if where is None else chosen_slots(model, where, (), "low-rank: where")
    left_out = chosen_slots(model, exclude, (), "low-rank: exclude") if exclude is not None else []
    found: dict[str, Dense] = {}
    kept: dict[str, str] = {}
    for address in chosen:
        held: LinearLike = core(model.slot(address))
        if address in left_out:
            kept[address] = "excluded"
        elif isinstance(held, Dense):
            found[address] = held
        else:
            kept[address] = f"{kind_of(held)}, and only a dense weight can be factorised"
    return found, kept


def _reasons(kept: dict[str, str]) -> str:
    """Each reason once, with the first slot that it holds for and how many more there are."""
    held: dict[str, list[str]] = {}
    for address, reason in kept.items():
        held.setdefault(reason, []).append(address)
    return "; ".join(
        f"{slots[0]}{f' and {len(slots) - 1} more' if len(slots) > 1 else ''}: {reason}"
        for reason, slots in held.items()
    )


def _counts(slots: dict[str, Dense], ranks: dict[str, int]) -> list[int]:
    """[before, after]: weights of the slots that were considered."""
    before = sum(slot.weight.numel() for slot in slots.values())
    after = sum(
        ranks[address] * (slot.in_features + slot.out_features) if address in ranks else slot.weight.numel()
        for address, slot in slots.items()
    )
    return [before, after]
