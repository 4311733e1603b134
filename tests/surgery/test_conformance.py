"""Being registered is being tested: what every surgery must do, on an encoder, a decoder and a classifier."""

from __future__ import annotations

import fnmatch
import functools
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import formwright as fw
from formwright import registry
from formwright.kit.errors import FormwrightError, Refusal, SpecError
from formwright.models.build import build
from formwright.models.model import Entry
from formwright.parts.linears.dense import Dense
from formwright.surgery import Plan, replay, surgery, words
from formwright.surgery.adapt.switch import use
from formwright.surgery.samples import MODELS, equal, outputs, reloaded, said, state, tokens


@dataclass(frozen=True)
class Case:
    name: str
    example: int
    model: str

    @property
    def id(self) -> str:
        return f"{self.name}-{self.example}-{self.model}"

    @property
    def options(self) -> dict[str, Any]:
        return dict(surgery(self.name).examples[self.example])

    def prepared(self) -> Any:
        """The model, after the surgery that this one needs before it."""
        made = MODELS[self.model]()
        before = surgery(self.name).after
        return fw.apply(made, before, tokens(), **surgery(before).examples[0]) if before else made

    def decided(self) -> Plan:
        found = decide(self)
        if isinstance(found, FormwrightError):
            pytest.skip(f"refused on this model: {found}")
        return found

    def applied(self, **how: Any) -> tuple[Any, Plan]:
        plan = self.decided()
        return fw.apply(self.prepared(), plan, **how), plan


@functools.cache
def decide(case: Case) -> Plan | FormwrightError:
    """The plan, or the sentence by which it was refused; neither may change the model."""
    model = case.prepared()
    before, layout, trainable = state(model), model.layout(), flags(model)
    try:
        found: Plan | FormwrightError = fw.plan(model, case.name, tokens(), **case.options)
    except FormwrightError as error:
        found = error
    assert equal(before, state(model)) and layout == model.layout() and trainable == flags(model)
    assert not model.training
    return found


def flags(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def answering(model: Any, plan: Plan) -> Any:
    """The model with the adapter that the plan added in use, where it did not have one before."""
    return use(model, plan.decisions["name"]) if "number" in plan.decisions else model


def shake(model: Any, seed: int = 0) -> None:
    """Move what may train, so that what starts at zero counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def change(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Greatest relative change over the heads that both have."""
    return max(float((b[name] - a[name]).norm() / a[name].norm()) for name in a if name in b)


NAMES = registry.names("surgery")
EXAMPLES = [(name, index) for name in NAMES for index in range(len(surgery(name).examples))]
CASES = [Case(name, index, model) for name, index in EXAMPLES for model in MODELS]
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.mark.parametrize("name, index", EXAMPLES)
def test_every_example_is_taken_by_some_model(name: str, index: int) -> None:
    found = [decide(Case(name, index, model)) for model in MODELS]
    assert any(isinstance(plan, Plan) for plan in found), [str(error) for error in found]


@each
def test_plan_is_plain_readable_and_safe(case: Case) -> None:
    plan = case.decided()
    assert plan.surgery == case.name and plan.fingerprint
    assert json.loads(plan.to_json()) == plan.to_dict()
    assert Plan.from_json(plan.to_json()).to_dict() == plan.to_dict()
    assert surgery(case.name).words(plan).endswith((".", ")")) and surgery(case.name).short(plan)

    other = MODELS["decoder" if case.model != "decoder" else "encoder"]()
    before = state(other)
    with pytest.raises(Refusal, match="laid out otherwise"):
        fw.apply(other, plan)
    with pytest.raises(Refusal, match="upgrade"):
        fw.apply(other, replace(plan, version=plan.version + 1))
    with pytest.raises(Refusal, match="upgrade"):
        replay(other, Entry("surgery", case.name, replace(plan, version=plan.version + 1).to_dict()))
    assert equal(before, state(other)) and not other.history


@each
def test_structure_follows_from_decisions_alone(case: Case) -> None:
    plan = case.decided()
    live, meta = case.prepared(), build(MODELS[case.model]().spec, device="meta")
    for entry in live.history:
        replay(meta, entry)
    fw.apply(live, plan)
    surgery(case.name).reshape(meta, Plan.from_json(plan.to_json()))
    shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in live.state_dict().items()]
    assert shapes == [(name, tensor.shape, tensor.dtype) for name, tensor in meta.state_dict().items()]
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert live.layout() == meta.layout() and flags(live) == flags(meta)


@each
def test_saved_and_replayed_answers_the_same(case: Case) -> None:
    model, _ = case.applied()
    shake(model)
    again = reloaded(model)
    assert equal(said(model), said(again)) and equal(state(model), state(again))
    for entry in again.history:
        assert words(entry) and json.loads(json.dumps(entry.to_dict())) == entry.to_dict()
    # A history read from a file holds lists where there were tuples.
    model.history = [Entry(**json.loads(json.dumps(entry.to_dict()))) for entry in model.history]
    assert equal(said(model), said(reloaded(model)))


@each
def test_promised_function_and_undo(case: Case) -> None:
    original = case.prepared()
    before, values, trainable = said(original), state(original), flags(original)
    model, plan = case.applied(keep_undo=True)
    promised = surgery(case.name).promises(plan)
    if promised.preserves_function is not None:
        assert change(before, said(model)) <= promised.preserves_function
    fresh = reloaded(model)
    fw.undo(model)
    assert equal(before, said(model)) and equal(values, state(model)) and flags(model) == trainable
    assert len(model.history) == len(original.history)
    if promised.undo:
        fw.undo(fresh)
        assert equal(before, said(fresh)) and equal(values, state(fresh)) and flags(fresh) == trainable
    else:
        with pytest.raises(Refusal, match="cannot be undone"):
            fw.undo(fresh)


@each
def test_only_what_is_promised_trains(case: Case) -> None:
    model, plan = case.applied()
    answering(model, plan)
    only = surgery(case.name).promises(plan).trains_only
    allowed = [n for n, on in flags(model).items() if on]
    if only is not None:
        assert allowed == [n for n in flags(model) if any(fnmatch.fnmatchcase(n, pattern) for pattern in only)]
    before = state(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(3):
        loss = torch.zeros(())
        for output in outputs(model, tokens(seed=step)).values():
            loss = loss + (output - 0.1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    tied = {name for name in moved if name.startswith("heads.")}  # a name of the table that it is tied to
    assert moved and moved - tied <= set(allowed)


@each
def test_merges_into_plain_weights(case: Case) -> None:
    model, plan = case.applied()
    if not surgery(case.name).promises(plan).mergeable:
        return
    shake(answering(model, plan))
    before = said(model)
    slots = list(plan.decisions.get("slots", plan.decisions.get("ranks")))
    fw.apply(model, "merge", where=slots, **({"adapter": plan.decisions["name"]} if "number" in plan.decisions else {}))
    assert change(before, said(model)) <= 1e-5
    assert all(type(model.slot(address)) is Dense for address in slots)


@each
def test_a_sharing_copy_leaves_the_original_alone(case: Case) -> None:
    plan, original = case.decided(), case.prepared()
    before, values, trainable, layout = said(original), state(original), flags(original), original.layout()
    changed = fw.apply(fw.copy(original, share=True), plan)
    assert equal(before, said(original)) and equal(values, state(original))
    assert flags(original) == trainable and original.layout() == layout and len(changed.history) > len(original.history)
    shared = {tensor.data_ptr() for tensor in original.state_dict().values()}
    assert shared & {tensor.data_ptr() for tensor in changed.state_dict().values()}


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_are_refused_with_the_nearest_name(name: str) -> None:
    case = Case(name, 0, "encoder")
    known = [key for key in case.options if key not in ("kind", "name")]
    for key in known or ["adapter"]:
        with pytest.raises(SpecError, match=f"did you mean '{key}'"):
            fw.plan(case.prepared(), name, tokens(), **{**case.options, f"{key}x": 1})


def test_plans_that_are_not_plans() -> None:
    for text in ("[1]", "{", '{"surgery": "lora"}', '{"surgery": "lora", "version": 1, "decisons": {}}'):
        with pytest.raises(SpecError):
            Plan.from_json(text)
    with pytest.raises(SpecError, match="'decisions' must be an object"):
        Plan.from_dict({"surgery": "lora", "version": 1, "decisions": [1]})
    model = MODELS["encoder"]()
    with pytest.raises(SpecError, match="did you mean 'finercut'"):
        fw.apply(model, "finecut", drop=1)
    with pytest.raises(Refusal, match="no surgery to undo"):
        fw.undo(model)
