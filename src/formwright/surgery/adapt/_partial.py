"""What methods share that add nothing and train a few of a model's own parameters.

They cost nothing at all when the model answers, and can be taken back only where the old values were kept
(``keep_undo``); saved alone, such an adapter is the new values.
"""

from __future__ import annotations

import glob
from typing import Any

from torch import nn

from formwright.kit.errors import Refusal, SpecError, all_of, unknown
from formwright.surgery.adapt._changes import patterns
from formwright.surgery.adapt._training import plain_name, put_back, remember, train_only
from formwright.surgery.base import Displaced, Plan, Promises, Surgery, check_options, chosen_addresses


class Tunes(Surgery):
    """Options: where: roles (``norm`` is one), items or addresses of what is tuned, default all. train: patterns of
    parameter names that stay trainable besides, such as "heads.*"."""

    family = "adapt"
    tunes = True
    #: What is tuned, for sentences.
    what = "parameters"

    def found(self, model: Any) -> dict[str, str]:
        """Parameter name -> the address it is chosen by, for all that this method tunes."""
        raise NotImplementedError

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options(self.name, options, ("where", "train"))
        found = self.found(model)
        if not found:
            raise Refusal(f"{self.name}: this model has no {self.what} to tune")
        known = list(dict.fromkeys(found.values()))
        chosen = chosen_addresses(known, options.get("where"), ("*",), f"{self.name}: where")
        decisions = {
            "tuned": [plain_name(name) for name, address in found.items() if address in chosen],
            "train": patterns(model, options.get("train"), self.name),
            "before": remember(model),
        }
        return self.made(model, dict(options), decisions)

    def promises(self, plan: Plan) -> Promises:
        own = tuple(glob.escape(name) for name in plan.decisions["tuned"])
        return Promises(preserves_function=0.0, trains_only=(*own, *plan.decisions["train"]))

    def check(self, model: Any, plan: Plan) -> None:
        known = plainly_named(model)
        missing = [name for name in plan.decisions["tuned"] if name not in known]
        all_of(SpecError, [f"{self.name}: {unknown('parameter', name, known)}" for name in missing])

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        """What is displaced are the values."""
        train_only(model, self.promises(plan).trains_only or ())
        held = plainly_named(model)
        return {name: held[name].detach().clone() for name in plan.decisions["tuned"]}

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        held = plainly_named(model)
        for name, value in displaced.items():
            held[name].data.copy_(value)
        put_back(model, plan.decisions["before"])

    def words(self, plan: Plan) -> str:
        return f"Tunes {len(plan.decisions['tuned'])} {self.what} of the model's own ({self.name}); only they train."


def plainly_named(model: Any) -> dict[str, nn.Parameter]:
    """The model's parameters by their names without wrappers."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def norms(model: Any) -> dict[str, str]:
    """Parameter name -> address (``b0.mlp:norm``, ``stem:norm``) of every parameter of a norm, the heads' left out."""
    found = {}
    ids = sorted((item.id for item in model.walk()), key=len, reverse=True)
    for path, module in model.named_modules():
        if getattr(type(module), "registered", ("", ""))[0] != "norm" or path.startswith("heads."):
            continue
        owner = next((id for id in ids if path.startswith(f"{id}.")), path.partition(".")[0])
        for name, _ in module.named_parameters():
            found[f"{path}.{name}"] = f"{owner}:{path.rpartition('.')[2]}"
    return found
