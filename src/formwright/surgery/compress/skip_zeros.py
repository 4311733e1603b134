"""Skip zeros: let the products behind a sparse activation read only what is active.

Runwal et al., 2024 (2402.01911): a model tuned with the density loss has few active hidden units, and a single token
then needs a small part of each ``down`` projection. Their weights are laid out so that a unit's column lies together,
and a compiled kernel passes over silent units. At a tolerance of 0 nothing changes in what the model computes.
Cost: none in memory; of many tokens at once none in time either.
"""

from __future__ import annotations

from typing import Any

import torch

from formwright.kit.errors import Refusal, SpecError, all_of, unknown
from formwright.parts.linears.dense import Dense
from formwright.parts.linears.skipping import Skipping
from formwright.registry import Paper, register
from formwright.surgery.base import Displaced, Plan, Promises, Surgery, check_options, chosen_slots, core, on, set_core

#: Activations that give true zeros.
ZEROS = ("relu", "relu2")


@register("surgery", "skip-zeros", paper=Paper("Runwal et al.", 2024, "2402.01911"), summary="products that skip zeros")
class SkipZeros(Surgery):
    """Options: where: roles, items or addresses of slots, default the dense ``down`` of every perceptron whose
    activation gives zeros (relu), or of all where a tolerance is given. tolerance: hidden values up to this size count
    as zero, default 0."""

    family = "compress"
    examples = ({"where": ["down"]}, {"tolerance": 0.01})

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options("skip-zeros", options, ("where", "tolerance"))
        tolerance = options.get("tolerance", 0.0)
        problems = []
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < float("inf"):
            problems.append(f"skip-zeros: tolerance={tolerance!r} must be a finite number of at least 0")
        all_of(SpecError, problems)
        chosen = chosen_slots(model, options.get("where"), ("down",), "skip-zeros: where")
        if options.get("where") is None and not tolerance:
            silent = {id for id, part in model.parts() if getattr(part, "activation_name", "") in ZEROS}
            chosen = [address for address in chosen if address.partition(":")[0] in silent]
        slots = [address for address in chosen if type(core(model.slot(address))) is Dense]
        if not slots:
            raise Refusal(
                "skip-zeros: no dense down projection stands behind an activation that gives zeros (relu); give a "
                "tolerance to pass over small values, or where=[...]"
            )
        made = self.made(model, dict(options), {"slots": slots, "tolerance": float(tolerance)})
        self.check(model, made)
        return made

    def promises(self, plan: Plan) -> Promises:
        return Promises(preserves_function=1e-5 if plan.decisions["tolerance"] == 0 else None)

    def check(self, model: Any, plan: Plan) -> None:
        known, problems = model.slots(), []
        for address in plan.decisions["slots"]:
            if address not in known:
                problems.append(f"skip-zeros: {unknown('slot', address, known)}")
            elif type(core(known[address])) is not Dense:
                problems.append(f"skip-zeros: {address} is not dense, so its columns cannot be laid out")
        all_of(SpecError, problems)

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        displaced: Displaced = {}
        for address in plan.decisions["slots"]:
            old: Any = core(model.slot(address))
            with torch.device("meta"):
                new = Skipping(
                    old.in_features, old.out_features, old.bias is not None, old.role,
                    tolerance=plan.decisions["tolerance"],
                )  # fmt: skip
            new.to(old.weight.dtype).train(old.training)
            new.columns.requires_grad_(old.weight.requires_grad)
            if old.bias is not None and new.bias is not None:
                new.bias.requires_grad_(old.bias.requires_grad)
            displaced[address] = set_core(model, address, on(new, old))  # type: ignore[arg-type]
        return displaced

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        for address in list(displaced):
            old, new = displaced.pop(address), core(model.slot(address))
            new.columns.copy_(old.weight.T)  # type: ignore[operator]
            if old.bias is not None:
                new.bias.copy_(old.bias)  # type: ignore[operator]

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        for address, module in displaced.items():
            set_core(model, address, module)

    def words(self, plan: Plan) -> str:
        tolerance = plan.decisions["tolerance"]
        beyond = f" of up to {tolerance:g}" if tolerance else ""
        return f"{len(plan.decisions['slots'])} products pass over hidden values that are zero{beyond}."
