"""Prompt tuning: learned vectors before the embeddings of every text.

Lester et al., 2021 (2104.08691). They start as vectors of the vocabulary, drawn or of a given text. Everything behind
the stem sees them as tokens; heads, pools and losses see the text's own places alone. Not the identity at the start.
Cost: length x table width parameters, and sequences that are longer by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from formwright.kit.errors import Refusal, SpecError, all_of, unknown
from formwright.models.items import Reshape
from formwright.parts.adapters.prompt import Prompt, Prompted
from formwright.parts.base import TableLike
from formwright.parts.make import bad_name
from formwright.registry import Paper, register
from formwright.surgery.adapt._attach import COMMON
from formwright.surgery.adapt._changes import count, patterns
from formwright.surgery.adapt._training import put_back, remember, train_only
from formwright.surgery.adapt.switch import numbers
from formwright.surgery.base import Displaced, Plan, Promises, Surgery, check_options, on, slot_generator

TABLE = "stem:tokens"
STARTS = ("vocabulary", "normal")


@register(
    "surgery",
    "prompt-tuning",
    paper=Paper("Lester et al.", 2021, "2104.08691"),
    summary="learned vectors before every text",
)
class PromptTuning(Surgery):
    """Options:

    length: vectors, default 20. start: "vocabulary" (rows of the token table, drawn) or "normal" (N(0, 0.02)). text:
    start from the rows of these words or ids instead, repeated up to the length. name: of the adapter. train: patterns
    of parameter names that stay trainable besides. seed: of the start.
    """

    family = "adapt"
    tunes = True
    examples = ({"length": 3, "name": "first"}, {"length": 2, "text": [1, 2], "name": "other"})

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options(self.name, options, ("length", "start", "text", *(name for name in COMMON if name != "where")))
        length, start, name = (
            options.get("length", 20),
            options.get("start", "vocabulary"),
            options.get("name", "default"),
        )
        problems = count(f"{self.name}: length", length)
        problems += [] if start in STARTS else [f"{self.name}: {unknown('start', str(start), STARTS)}"]
        problems += [f"{self.name}: adapter name {bad}" for bad in [bad_name(name, torch.nn.ModuleDict())] if bad]
        all_of(SpecError, problems)
        self._reads_tokens(model)
        decisions = {
            "name": name,
            "number": 1 + max(numbers(model).values(), default=-1),
            "length": length,
            "start": start,
            "ids": self._ids(model, options.get("text")),
            "seed": options.get("seed", 0),
            "train": patterns(model, options.get("train"), self.name),
            "before": remember(model),
        }
        made = self.made(model, dict(options), decisions)
        self.check(model, made)
        return made

    def _reads_tokens(self, model: Any) -> None:
        if hasattr(model, "towers"):
            raise Refusal(f"{self.name}: a system's stems belong to its towers: plan for model.tower(NAME)")
        if model.stem.field() != "tokens" or not isinstance(getattr(model.stem, "tokens", None), TableLike):
            raise Refusal(
                f"{self.name}: this model reads {model.stem.field()}, and a prompt is more rows of a token table"
            )
        changing = [item.id for item in model.walk() if isinstance(item, Reshape) and not _keeps_length(item)]
        all_of(
            Refusal, [f"{self.name}: {id} changes the length, so a prompt cannot be taken off again" for id in changing]
        )

    def _ids(self, model: Any, text: str | Sequence[int] | None) -> list[int]:
        """Ids that the prompt starts from; none to draw them."""
        if text is None:
            return []
        if isinstance(text, str) and model.tokenizer is None:
            raise SpecError(f"{self.name}: text={text!r}: this model carries no tokenizer; give ids")
        ids = model.tokenizer.encode([text], None)[0] if isinstance(text, str) else [int(id) for id in text]
        rows = model.stem.tokens.rows
        if not ids or not all(0 <= id < rows for id in ids):
            raise SpecError(f"{self.name}: text must hold ids from 0 to {rows - 1}, and at least one")
        return ids

    def promises(self, plan: Plan) -> Promises:
        own = f"*.adapters.{plan.decisions['name']}.*"
        return Promises(undo=True, trains_only=(own, *plan.decisions.get("train", ())))

    def check(self, model: Any, plan: Plan) -> None:
        self._reads_tokens(model)
        name, length, problems = plan.decisions["name"], plan.decisions["length"], []
        if name in numbers(model):
            problems.append(
                f"{self.name}: the model already has an adapter named {name!r}; choose another name, or undo it"
            )
        places = model.reach if model.prompted is None else model.reach and model.reach + model.prompted.longest
        if places is not None and length >= places:
            problems.append(
                f"{self.name}: length={length} leaves no place for a text: this model has {places} positions"
            )
        all_of(SpecError, problems)

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        table, decided = model.stem.tokens, plan.decisions
        with torch.device("meta"):
            prompt = Prompt(table.width, length=decided["length"])
        dtype = next((p.dtype for p in table.parameters() if p.is_floating_point()), torch.get_default_dtype())
        prompt.number = decided["number"]
        if not isinstance(table, Prompted):
            table = Prompted(table).train(table.training)
            model.set_slot(TABLE, table)
        table.adapters[decided["name"]] = on(prompt.to(dtype), model).train(table.training)
        train_only(model, self.promises(plan).trains_only or ())
        return {}

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        table, decided = model.stem.tokens, plan.decisions
        prompt, generator = (
            table.adapters[decided["name"]],
            slot_generator(decided["seed"], f"{TABLE}/{decided['name']}"),
        )
        if decided["start"] == "normal" and not decided["ids"]:
            prompt.reset(generator)
            return
        drawn = decided["ids"] or torch.randint(0, table.rows, (decided["length"],), generator=generator).tolist()
        ids = [drawn[place % len(drawn)] for place in range(decided["length"])]
        prompt.rows.copy_(table.base(torch.tensor(ids, device=model.device)))

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        table = model.stem.tokens
        del table.adapters[plan.decisions["name"]]
        if not table.adapters:
            model.set_slot(TABLE, table.base)
        put_back(model, plan.decisions["before"])

    def words(self, plan: Plan) -> str:
        length, name = plan.decisions["length"], plan.decisions["name"]
        return f"Put a prompt of {length} learned vectors, {name!r}, before every text; only it trains."


def _keeps_length(item: Reshape) -> bool:
    reshape: Any = item.reshape
    return reshape.traits.streams
