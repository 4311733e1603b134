"""The loop: accumulation, clipping, what may move, schedules, hooks, budgets, and the caller's generators."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, Loss, Score
from formwright.models.build import build
from formwright.objectives.base import Objective
from formwright.objectives.causal_lm import CausalLM
from formwright.training import Recipe, train
from formwright.training.hooks import EMA, EarlyStopping, Evaluate, Hook
from formwright.training.parameters import addresses, chosen, groups
from formwright.training.scaling import LossScale
from formwright.training.schedules import SHAPES, factor
from formwright.training.sources import Buckets, FromList, FromTask
from training.resumable import Counting, batch, model


def trained(data, **settings):
    m = settings.pop("m", None) or model()
    return train(m, data, **{"steps": 1, "lr": 1e-2, "warmup": 0.0, "show": False, **settings})


def weights(m) -> list[torch.Tensor]:
    return [p.detach().clone() for p in m.parameters()]


@given(
    st.sampled_from(sorted(SHAPES)),
    st.floats(0.0, 0.9),
    st.floats(0.0, 1.0),
    st.floats(-0.5, 1.5),
)
def test_schedules_stay_between_zero_and_one_and_fall_after_warming_up(name, warmup, floor, p):
    value = factor(name, p, warmup, floor)
    assert 0.0 <= value <= 1.0 + 1e-12
    later = factor(name, p + 0.01, warmup, floor)
    if p + 0.01 < warmup:
        assert later >= value
    elif p >= warmup:
        assert later <= value + 1e-12
    if name not in ("constant", "inverse-sqrt"):
        assert factor(name, 1.0, warmup, floor) == pytest.approx(floor)
    assert factor(name, warmup, warmup, floor) == pytest.approx(1.0)


def test_schedules_at_known_points():
    assert factor("cosine", 0.5) == pytest.approx(0.5)
    assert factor("linear", 0.75, floor=0.2) == pytest.approx(0.2 + 0.8 * 0.25)
    assert factor("cosine", 0.05, warmup=0.1) == pytest.approx(0.5)
    assert factor("constant", 1.0) == 1.0 and factor("inverse-sqrt", 0.4, warmup=0.1) == pytest.approx(0.5)
    assert factor("inverse-sqrt", 1.0, warmup=0.0) == pytest.approx(0.1)
    assert factor("wsd", 0.8) == pytest.approx(1.0) and factor("wsd", 0.9) == pytest.approx(0.5)


def test_accumulation_and_batch_size_do_not_change_a_step():
    quiet = model().eval()
    for module in quiet.modules():
        if hasattr(module, "rate"):
            module.rate = 0.0
    wide = batch(0, 0)
    ragged = Batch(
        inputs=wide.inputs,
        targets={"tokens": wide.targets["tokens"].masked_fill(torch.arange(4)[:, None] == 1, -100)},
    )

    def part(rows) -> Batch:
        return Batch(
            inputs={"tokens": ragged.inputs["tokens"][rows]}, targets={"tokens": ragged.targets["tokens"][rows]}
        )

    whole = trained(lambda seed, index: ragged, m=copy.deepcopy(quiet))
    pieces = [part([0, 1, 2]), part([3])]  # unequal pieces with unequal counts
    cut = trained(lambda seed, index: pieces[index], m=copy.deepcopy(quiet), accumulation=2)
    by_rows = trained(lambda seed, index: pieces[index], m=copy.deepcopy(quiet), batch=4)
    assert whole.losses[0][1] == pytest.approx(cut.losses[0][1], rel=1e-6)
    # Adam's first step is lr * sign(gradient), which magnifies rounding where a gradient is next to nothing.
    assert cut.losses == by_rows.losses
    for one, two, three in zip(weights(whole.model), weights(cut.model), weights(by_rows.model)):
        assert torch.equal(two, three)
        assert float((one - two).abs().gt(1e-4).float().mean()) < 0.01


class Gradients(Hook):
    def __init__(self) -> None:
        self.before, self.after = [], []

    def gradients(self, run) -> None:
        grads = [p.grad for p in run.parameters.values() if p.grad is not None]
        self.before.append(float(torch.nn.utils.get_total_norm(grads)))

    def stepped(self, run) -> None:
        self.after.append(run.gradient)


def test_clipping_bounds_the_step_and_hooks_see_the_gradient_before():
    def plain_step(clip):
        hook, m = Gradients(), model()
        for module in m.modules():
            if hasattr(module, "rate"):
                module.rate = 0.0
        # With eps far above the gradient Adam is gradient descent, so the step shows the clipped norm.
        start = weights(m)
        trained(
            batch,
            m=m,
            clip=clip,
            eps=1e6,
            lr=1e6,
            betas=(0.0, 0.0),
            weight_decay=0.0,
            schedule="constant",
            hooks=[hook],
        )
        moved = torch.nn.utils.get_total_norm([a - b for a, b in zip(weights(m), start)])
        return hook, float(moved)

    hook, free = plain_step(None)
    assert free == pytest.approx(hook.before[0], rel=1e-3) and hook.after == pytest.approx(hook.before)
    _, bound = plain_step(free / 10)
    assert bound == pytest.approx(free / 10, rel=1e-3)
    _, loose = plain_step(free * 10)
    assert loose == pytest.approx(free, rel=1e-3)


def test_what_is_frozen_stays_bit_identical_and_is_free_again_afterwards():
    m = model()
    m.item("b1.mlp").part.up.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    trained(batch, m=m, steps=3, trainable=["*", "!stem:*", "!b0.attention:[qk]"])
    moved = {name for name, p in m.named_parameters() if not torch.equal(p, before[name])}
    assert "stem.tokens.weight" not in moved and "b1.mlp.part.up.weight" not in moved
    assert not any(".q." in name or ".k." in name for name in moved)
    assert {
        "b0.attention.part.v.weight",
        "b0.attention.norm.weight",
        "b1.mlp.part.down.bias",
        "final_norm.weight",
    } <= moved
    needs = {name for name, p in m.named_parameters() if not p.requires_grad}
    assert needs == {"b1.mlp.part.up.weight"} and all(p.grad is None for p in m.parameters())


def test_addresses_patterns_and_groups():
    m = model()
    known = addresses(m)
    assert known["b0.attention.part.q.weight"] == "b0.attention:q.weight"
    assert known["b0.attention.norm.bias"] == "b0.attention:norm.bias"
    assert known["stem.tokens.weight"] == "stem:tokens.weight" and known["final_norm.bias"] == "final_norm:bias"
    assert set(chosen(m, ["b1.*:up"])) == {"b1.mlp.part.up.weight", "b1.mlp.part.up.bias"}
    assert set(chosen(m, ["!b*", "b1.mlp:down.bias"])) >= {"stem.tokens.weight", "b1.mlp.part.down.bias"}
    with pytest.raises(SpecError, match=r"'b9\.\*' matches no parameter"):
        chosen(m, ["b9.*"])
    made = groups(dict(m.named_parameters()), 0.1)
    assert made[0]["weight_decay"] == 0.1 and all(p.dim() >= 2 for p in made[0]["params"])
    assert made[1]["weight_decay"] == 0.0 and all(p.dim() < 2 for p in made[1]["params"])
    with pytest.raises(SpecError, match="nothing would be trained"):
        trained(batch, trainable=["!*"])


def test_training_learns_and_writes_its_history_and_leaves_the_generators_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    m = model()
    result = trained(Counting(), m=m, steps=60, evaluate_every=30)
    assert torch.equal(before, torch.get_rng_state()) and not m.training
    assert result.losses[-1][1] < 0.7 * result.losses[0][1]
    entry = m.history[-1]
    assert (entry.kind, entry.name) == ("event", "trained")
    assert entry.data["data"] == {"task": "counting", "split": "calibrate", "fingerprint": "counting-1"}
    assert entry.data["scores"] == dict(result.scores) and result.why == "all steps done"
    assert Recipe.from_dict(entry.data["recipe"]).lr == 1e-2


def test_a_budget_in_minutes_ends_the_run_and_drives_the_schedule():
    rates = []

    class Rates(Hook):
        def stepped(self, run) -> None:
            rates.append(run.lr)

    result = trained(batch, minutes=0.03, steps=None, hooks=[Rates()])
    assert result.why == "the time is up" and result.seconds < 10
    assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0]
    assert trained(batch, minutes=9.0, steps=2).steps == 2
    assert trained(batch, steps=0).steps == 0


def test_early_stopping_and_averages():
    class Scores(Hook):
        def stepped(self, run) -> None:
            run.score("given", Score([1.0, 2.0, 1.5, 1.9, 1.0, 1.0][run.step - 1]))

    result = trained(batch, steps=6, hooks=[Scores(), EarlyStopping(patience=2)])
    assert result.steps == 4 and result.why == "no better score in 2 evaluations"
    seen, ema = [], EMA(0.5)

    class Keep(Hook):
        def stepped(self, run) -> None:
            seen.append({name: p.detach().clone() for name, p in run.parameters.items()})

    start = weights(model())
    m = trained(batch, steps=2, hooks=[ema, Keep()]).model
    for first, now, name in zip(start, m.parameters(), ema.averages):
        by_hand = first + (1 - 2 / 11) * (seen[0][name] - first)
        by_hand = by_hand + (1 - 3 / 12) * (seen[1][name] - by_hand)
        torch.testing.assert_close(now.detach(), by_hand)


class TwoModels(Objective):
    """The model agrees with a moving average of itself and with a second model that is trained too."""

    others = {"slow": "ema", "friend": "trained"}

    def loss(self, models, batch, gen):
        own = CausalLM().loss(models, batch, gen)["model"]
        friend = CausalLM().loss({"model": models["friend"]}, batch, gen)["model"]
        with torch.no_grad():
            models["slow"](batch)
        return {"model": Loss(own.total + friend.total, own.count)}


def test_other_models_are_averaged_or_trained():
    m, friend = model(), model()
    before = weights(friend)
    slow = copy.deepcopy(m)
    trained(batch, m=m, steps=2, objective=TwoModels(), others={"friend": friend, "slow": slow}, ema=0.5)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(friend)))
    start = weights(model())
    for first, average, now in zip(start, weights(slow), weights(m)):
        if not torch.equal(first, now):
            assert float((average - first).abs().max()) > 0 and not torch.equal(average, now)
    with pytest.raises(SpecError, match="others has teacher"):
        trained(batch, others={"teacher": friend})


def test_bfloat16_products_leave_parameters_in_float32():
    m = trained(batch, steps=2, precision="bfloat16").model
    assert {p.dtype for p in m.parameters()} == {torch.float32}


def test_float16_scales_its_loss_and_skips_a_step_that_overflows(tmp_path):
    class Overflow(Hook):
        """The first gradient overflows; its step is lost and no other."""

        def __init__(self) -> None:
            self.factors, self.weights = [], []

        def gradients(self, run) -> None:
            if run.step == 0:
                next(p.grad for p in run.parameters.values() if p.grad is not None).view(-1)[0] = math.inf

        def stepped(self, run) -> None:
            self.factors.append(run.scale.factor)
            self.weights.append(weights(run.model))

    hook = Overflow()
    m = trained(batch, steps=4, precision="float16", hooks=[hook]).model
    assert hook.factors[0] == 2.0**15 and {p.dtype for p in m.parameters()} == {torch.float32}
    start = weights(model())
    for before, after, factors in zip((start, *hook.weights), hook.weights, pairwise((2.0**16, *hook.factors))):
        still = all(torch.equal(a, b) for a, b in zip(before, after))
        assert still == (factors[1] < factors[0])  # a step is lost where the scale falls, and nowhere else
    assert hook.factors[-1] == hook.factors[-2]
    scale = LossScale("float16")
    for _ in range(2000):
        scale.step_used()
    assert scale.factor == 2.0**17 and [scale.overflowed() for _ in range(28)][-2:] == [True, False]
    assert not LossScale("float32").overflowed()


def test_an_empty_batch_is_named_and_one_without_targets_moves_nothing():
    whole = batch(0, 0)
    none = Batch(inputs={"tokens": whole.inputs["tokens"][:0]}, targets={"tokens": whole.targets["tokens"][:0]})
    short = Batch(inputs={"tokens": whole.inputs["tokens"][:, :0]}, targets={"tokens": whole.targets["tokens"][:, :0]})
    for empty in (none, short):
        with pytest.raises(DataError, match="batch 1 of the data is empty"):
            trained(lambda seed, index, empty=empty: empty if index else whole, steps=3)
    silent = whole.replace(targets={"tokens": torch.full_like(whole.targets["tokens"], -100)})
    m = trained(lambda seed, index: silent, steps=2).model
    assert all(torch.equal(a, b) for a, b in zip(weights(m), weights(model())))


def test_patience_ends_a_run_and_the_model_keeps_its_best_weights(tmp_path):
    class Falling(Counting):
        """Scores that are best at the second evaluation."""

        def __init__(self) -> None:
            self.given, self.seen = iter([3.0, 1.0, 2.0, 2.0, 2.0]), []

        def score(self, view, split):
            self.seen.append(weights(view))
            return Score(next(self.given))

    task = Falling()
    done = trained(task, steps=20, evaluate_every=2, patience=2, out=tmp_path / "run", plot=False)
    assert done.steps == 8 and done.why == "no better score in 2 evaluations"
    assert all(torch.equal(a, b) for a, b in zip(weights(done.model), task.seen[1]))
    with pytest.raises(SpecError, match="evaluate_every"):
        trained(batch, patience=2)


def test_everything_wrong_with_a_recipe_is_said_at_once():
    with pytest.raises(SpecError) as error:
        Recipe(schedule="cosin", warmup=2.0, lr=-1.0, precision="half", betas=(1.0, 0.5), gradient_checkpointing=-1)
    for said in (
        "did you mean 'cosine'",
        "warmup=2.0",
        "needs an end",
        "lr and weight_decay",
        "precision",
        "betas",
        "gradient_checkpointing",
    ):
        assert said in str(error.value)
    with pytest.raises(SpecError, match=r"'stepz'; did you mean 'steps'"):
        trained(batch, stepz=3)
    with pytest.raises(SpecError, match=r"unknown objective 'causal_lm'; did you mean 'causal-lm'"):
        trained(batch, objective="causal_lm")
    with pytest.raises(SpecError, match="unknown option 'smooth'"):
        trained(batch, objective={"name": "causal-lm", "smooth": 0.1})
    with pytest.raises(DataError, match="not a str"):
        trained("texts")
    assert Recipe.from_dict(Recipe(steps=3).to_dict()) == Recipe(steps=3)


def test_sources_are_functions_of_seed_and_index():
    batches = [batch(0, index) for index in range(5)]
    source, other = FromList(batches, 1), FromList(batches, 1)
    order = [batches.index(source.draw(index)) for index in range(10)]
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5)) and order[:5] != order[5:]
    assert batches.index(other.draw(7)) == order[7]
    task = FromTask(Counting(), "calibrate", 2)
    assert torch.equal(task.draw(4).inputs["tokens"], batch(2, 4).inputs["tokens"])
    assert torch.equal(task.draw(1).inputs["tokens"], batch(2, 1).inputs["tokens"])
    lengths = [1 + (7 * i) % 50 for i in range(333)]
    buckets = Buckets(lengths, 8, 0)
    rows = [buckets.at(index) for index in range(buckets.per_epoch)]
    assert sorted(int(i) for chosen_rows in rows for i in chosen_rows) == list(range(333))
    spread = [max(lengths[i] for i in r) - min(lengths[i] for i in r) for r in rows]
    assert sum(spread) / len(spread) < 10
    assert [list(r) for r in rows] != [list(Buckets(lengths, 8, 1).at(i)) for i in range(buckets.per_epoch)]


def test_evaluation_scores_in_eval_mode_and_points_at_the_best(tmp_path):
    task = Counting()
    result = trained(task, steps=4, hooks=[Evaluate(task, every=2)], out=tmp_path / "run")
    assert (tmp_path / "run" / "best").read_text().startswith("steps/")
    assert math.isfinite(result.scores["nats"])


def test_a_system_is_trained_by_its_output_tower():
    system = build(
        {
            "towers": {
                "encoder": {
                    "stem": {"part": "token-embedding", "vocab": 9, "width": 8},
                    "layers": [{"part": "mlp", "hidden": 8}],
                },
                "decoder": {
                    "stem": {"use": "encoder.stem", "width": 8},
                    "layers": [
                        {"part": "attention", "heads": 2, "causal": True},
                        {"part": "attention", "heads": 2, "memory": "encoder", "id": "cross"},
                    ],
                    "head": {"part": "lm", "tied": True},
                    "memory": ["encoder"],
                },
            }
        }
    )
    tokens = torch.tensor([[1, 2, 3]])
    data = [Batch(inputs={"encoder.tokens": tokens, "decoder.tokens": tokens}, targets={"tokens": tokens.roll(-1, 1)})]
    result = trained(data, m=system, steps=20, trainable=["*", "!encoder/stem:*"])
    assert result.losses[-1][1] < result.losses[0][1]
    assert system.history[-1].data["data"]["batches"] == 1
