"""Head: attach a head to a model, or put another in its place.

A body can say several things at once: with a new ``name`` the head stands beside those that are there, and what they
say does not change; without one it takes the only head's place. Its parameters are drawn from (seed, name). Attaching
is a line of the history like any surgery, so a loaded model has its heads again. Cost: the head's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from formwright import registry
from formwright.kit.errors import FormwrightError, Refusal, SpecError, all_of
from formwright.parts.base import initialise
from formwright.parts.make import bad_name, make, options_of
from formwright.registry import register
from formwright.surgery.base import Displaced, Plan, Promises, Surgery, on

#: The name under which a model keeps its only, unnamed head.
ONLY = "out"


@register("surgery", "head", summary="attach or replace a head")
class AttachHead(Surgery):
    """Options:

    kind: sequence-classifier, token-classifier, lm, mean-pool, regression, pair ... and that head's own options
    (classes, labels, pool, tied, normalize ...). ``labels`` alone also says how many classes there are; ``pool`` is
    the last token on a causal model, where the first has seen nothing, unless given. name: a new one attaches beside
    the others, a known one (or none, where there is one head) replaces. seed: of the parameters.
    """

    family = "adapt"
    examples = (
        {"kind": "sequence-classifier", "classes": 3, "name": "topic"},
        {"kind": "token-classifier", "labels": ["a", "b"]},
    )

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        kind, name, seed = options.get("kind"), options.get("name"), options.get("seed", 0)
        _check_model(model)
        if not isinstance(kind, str):
            raise SpecError(f"head: say which kind: {', '.join(registry.names('head'))}")
        own = {key: value for key, value in options.items() if key not in ("kind", "name", "seed")}
        known = options_of(registry.resolve("head", kind))
        if own.get("labels") is not None and "classes" in known:
            own.setdefault("classes", len(own["labels"]))
        if "pool" in known and "pool" not in own and model.causal:
            own["pool"] = "last"
        if name is None and len(model.heads) > 1:
            raise SpecError(
                f"head: this model has heads {', '.join(model.heads)}: name the one to replace, or a new one"
            )
        target = next(iter(model.heads), ONLY) if name is None else name
        decisions = {"name": target, "head": {"part": kind, **own}, "adds": target not in model.heads, "seed": seed}
        made = self.made(model, dict(options), decisions)
        self.check(model, made)
        return made

    def promises(self, plan: Plan) -> Promises:
        adds = plan.decisions["adds"]
        return Promises(preserves_function=0.0 if adds else None, undo=adds)

    def check(self, model: Any, plan: Plan) -> None:
        _check_model(model)
        name, adds = plan.decisions["name"], plan.decisions["adds"]
        problems = []
        complaint = bad_name(name, nn.ModuleDict())
        if complaint:
            problems.append(f"head: name {complaint}")
        elif adds and name in model.heads:
            problems.append(f"head: this model already has a head named {name!r}; plan again to replace it")
        elif not adds and name not in model.heads:
            problems.append(f"head: this model has no head named {name!r} to replace")
        try:
            self._made(model, plan)
        except FormwrightError as error:
            problems += [f"head: {line}" for line in str(error).split("\n")]
        all_of(SpecError, problems)

    @staticmethod
    def _made(model: Any, plan: Plan) -> Any:
        """The head laid out on meta."""
        with torch.device("meta"):
            head = make("head", plan.decisions["head"], model.width)
            if getattr(head, "tied", False):
                table = getattr(model.stem, "tokens", None)
                if table is None:
                    raise SpecError("a tied head needs a stem with a token table")
                head.tie(table)
        return head

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        name = plan.decisions["name"]
        old = dict(model.heads.items()).get(name)
        head = self._made(model, plan)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        model.heads[name] = on(head.to(dtype), model).train(model.training)
        model.tie()
        return {} if old is None else {name: old}

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        name = plan.decisions["name"]
        initialise(model.heads[name], plan.decisions["seed"], f"heads.{name}")

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        name = plan.decisions["name"]
        if plan.decisions["adds"]:
            del model.heads[name]
        else:
            model.heads[name] = displaced[name]

    def words(self, plan: Plan) -> str:
        head, name = plan.decisions["head"], plan.decisions["name"]
        said = f"the head {head['part']}" if name == ONLY else f"the head {head['part']} as {name!r}"
        return f"Attached {said}." if plan.decisions["adds"] else f"Replaced the head {name!r} by {head['part']}."


def _check_model(model: Any) -> None:
    if not hasattr(model, "heads"):
        raise Refusal("head: a system's heads belong to its towers: plan for model.tower(NAME)")
