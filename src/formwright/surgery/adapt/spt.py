"""SPT: fine-tune with less, by attention over matching codes and a perceptron of which each token takes a part.

Gui et al., 2023 (2310.10365). Attention becomes :mod:`~formwright.parts.mixers.pq_attention` and a perceptron
:mod:`~formwright.parts.channels.routed_mlp`, both with the trained weights that were there; routers start near one
half, where a taken block is as it was. Adapters (``lora``) go in before or after. The start is not the model's
function, since half of each perceptron is left out: train some hundred steps. What is gained: attention keeps two
bytes for an eighth of the pairs, and the perceptron does half of its products.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import nn

from formwright.kit.errors import FormwrightError, Refusal, SpecError, all_of, unknown
from formwright.models.items import part_name
from formwright.parts.base import LinearLike, initialise
from formwright.parts.channels.mlp import MLP, GatedMLP
from formwright.parts.channels.routed_mlp import RoutedMLP
from formwright.parts.context import Notes, keyed_generator
from formwright.registry import Paper, register
from formwright.surgery.base import Displaced, Plan, Surgery, check_options, copy, on, surgery
from formwright.surgery.evidence import batches

ATTENTION = ("fraction", "keys", "select", "codewords", "code_width", "refine")
ROUTED = ("blocks", "top", "balance")
#: Queries and keys of a layer that a codebook is fitted to.
FITTED = 4096


@register("surgery", "spt", paper=Paper("Gui et al.", 2023, "2310.10365"), summary="sparse attention, routed MLPs")
class Spt(Surgery):
    """Options:

    attention, mlp: whether to exchange each, default both. fraction, keys, select, codewords, code_width, refine: of
    ``pq-attention``. blocks, top, balance: of ``routed-mlp``. where: patterns of items. seed: of what is new.
    Evidence (texts, batches) fits the codebooks to the model's queries and keys; without it, and within loops and
    shared lists, they are drawn.
    """

    family = "adapt"
    examples = ({"code_width": 4}, {"attention": False, "blocks": 2, "top": 1})

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options("spt", options, ("attention", "mlp", "where", "seed", *ATTENTION, *ROUTED))
        seed = options.get("seed", 0)
        chosen = _chosen(model, options.get("where"))
        routing = {"blocks": 4, "top": 2, "balance": 0.0}
        routing |= {name: options[name] for name in ROUTED if name in options}
        routed = {id: dict(routing) for id, part in chosen.items() if isinstance(part, (MLP, GatedMLP))}
        attending = [id for id, part in chosen.items() if part_name(part) == "attention"]
        decisions: dict[str, Any] = {"mlp": routed if options.get("mlp", True) else {}, "seed": seed}
        if options.get("attention", True) and attending:
            given = {name: options[name] for name in ATTENTION if name in options}
            swap = surgery("swap-mixer").plan(model, mixer="pq-attention", options=given, where=attending, seed=seed)
            decisions["attention"] = swap.decisions
        if not decisions["mlp"] and "attention" not in decisions:
            raise Refusal("spt: nothing to exchange: this model has no attention and no perceptron where it was asked")
        made = self.made(model, dict(options), decisions)
        self.check(model, made)
        if evidence is None or "attention" not in decisions:
            return made
        return self.made(model, dict(options), decisions, **_codebooks(model, made, evidence, seed))

    def check(self, model: Any, plan: Plan) -> None:
        held, problems = dict(model.parts()), []
        for id, options in plan.decisions["mlp"].items():
            if id not in held:
                problems.append(f"spt: {unknown('item', id, held)}")
                continue
            try:
                _laid(held[id], options)
            except FormwrightError as error:
                problems.append(f"spt: {id}: {error}")
        all_of(SpecError, problems)
        if "attention" in plan.decisions:
            surgery("swap-mixer").check(model, _swap(plan))

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        displaced: Displaced = {}
        if "attention" in plan.decisions:
            displaced |= surgery("swap-mixer").reshape(model, _swap(plan))
        for id, options in plan.decisions["mlp"].items():
            item = model.item(id)
            displaced[id], item.part = item.part, _routed(item.part, options)
        return displaced

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        if "attention" in plan.decisions:
            attention = {id: displaced[id] for id in plan.decisions["attention"]["swap"]}
            surgery("swap-mixer").fill(model, _swap(plan), attention)
            for id in attention:
                if id in plan.tensors:
                    model.item(id).part.quantizer.codebook.copy_(plan.tensors[id])
        for id in plan.decisions["mlp"]:
            part = model.item(id).part
            initialise(part.router, plan.decisions["seed"], f"{id}.router")
            for slot in part.down:
                for bias in (p for name, p in slot.named_parameters() if name.rpartition(".")[2] == "bias"):
                    bias.div_(part.top)

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        for id, part in displaced.items():
            model.item(id).part = part

    def words(self, plan: Plan) -> str:
        said = []
        if "attention" in plan.decisions:
            said.append(f"attention over matching codes in {len(plan.decisions['attention']['swap'])} items")
        if plan.decisions["mlp"]:
            first = next(iter(plan.decisions["mlp"].values()))
            share = f"{first['top']} of {first['blocks']} blocks"
            said.append(f"{share} of {len(plan.decisions['mlp'])} perceptrons for each token")
        return f"Put {' and '.join(said)}; train before use."


def _chosen(model: Any, where: Any) -> dict[str, Any]:
    held = dict(model.parts())
    if where is None:
        return held
    patterns = [where] if isinstance(where, str) else list(where)
    all_of(SpecError, [f"spt: {unknown('item', p, held)}" for p in patterns if not fnmatch.filter(held, p)])
    return {id: part for id, part in held.items() if any(fnmatch.fnmatchcase(id, p) for p in patterns)}


def _swap(plan: Plan) -> Plan:
    """The part of the plan that ``swap-mixer`` carries out."""
    return Plan("swap-mixer", 1, {}, plan.decisions["attention"])


def _laid(old: Any, options: dict[str, Any]) -> RoutedMLP:
    """A routed perceptron of the old one's sizes, without memory."""
    with torch.device("meta"):
        return RoutedMLP(
            old.up.in_features,
            hidden=old.up.out_features,
            gated=isinstance(old, GatedMLP),
            activation=old.activation_name,
            bias=old.up.dense_bias() is not None,
            dropout=old.rate,
            **options,
        )


def _routed(old: Any, options: dict[str, Any]) -> RoutedMLP:
    """The same with the old one's slots, each cut into blocks."""
    made = _laid(old, options)
    floats = next((p.dtype for p in old.parameters() if p.is_floating_point()), torch.get_default_dtype())
    on(made.router.to(floats), old)
    units = torch.arange(old.up.out_features).chunk(made.blocks)

    def cut(slot: LinearLike, hidden_in: bool) -> nn.ModuleList:
        return nn.ModuleList(slot.take(inn=own) if hidden_in else slot.take(out=own) for own in units)

    made.up, made.down = cut(old.up, False), cut(old.down, True)
    if isinstance(old, GatedMLP):
        made.gate = cut(old.gate, False)
    return made.train(old.training)


@torch.no_grad()
def _codebooks(model: Any, plan: Plan, evidence: Any, seed: int) -> dict[str, torch.Tensor]:
    """Item -> its codebook, fitted to the queries and keys that the evidence makes there."""
    trial = copy(model, share=True)
    swapper = surgery("swap-mixer")
    displaced = swapper.reshape(trial, _swap(plan))
    swapper.fill(trial, _swap(plan), dict(displaced))
    ids = list(plan.decisions["attention"]["swap"])
    parts = {id: trial.item(id).part for id in ids}
    for part in parts.values():
        part.fraction = 1.0  # every key is read, so that later layers see what they did before
    seen: dict[str, list[torch.Tensor]] = {id: [] for id in ids}
    for batch in batches(trial, evidence, what="spt"):
        notes = Notes(want={(id, name) for id in ids for name in ("queries", "keys")})
        x, ctx = trial.embed(batch, notes=notes)
        trial.run(x, ctx)
        for (id, _), value in notes.got.items():
            seen[id].append(value.reshape(-1, value.shape[-1]).float())
    made = {}
    for id, values in seen.items():
        if values:
            generator, quantizer, vectors = (
                keyed_generator(seed, f"{id}.codebook"),
                parts[id].quantizer,
                torch.cat(values),
            )
            quantizer.fit(vectors[torch.randperm(len(vectors), generator=generator)[:FITTED]], generator)
            made[id] = quantizer.codebook.detach().clone()
    return made
