"""Objectives: values computed by hand, sums that do not depend on how a batch is cut, chunks that change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, pad
from formwright.models.build import build
from formwright.models.text import to_packed
from formwright.objectives._hidden import projections
from formwright.objectives.base import Gen, make, token_chunks
from formwright.objectives.causal_lm import CausalLM
from formwright.objectives.classification import Classification
from formwright.objectives.distillation import Distillation, divergence, relative_error
from formwright.parts.context import Context

VOCAB = 23
ROWS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]]


def model(head=None, causal=True, seed=0, **options):
    return build(
        {
            "stem": {"part": "token-embedding", "vocab": VOCAB, "width": 16, "std": 0.5},
            "layers": [{"part": "attention", "heads": 2, "causal": causal, **options}, {"part": "mlp", "hidden": 24}],
            "final_norm": "layernorm",
            "head": head or {"part": "lm", "tied": True},
        },
        seed=seed,
    )


def lm_batch(rows=ROWS) -> Batch:
    tokens, lengths = pad([row[:-1] or row for row in rows])
    targets, _ = pad([row[1:] or [-100] for row in rows], -100)
    return Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths}, targets={"tokens": targets})


def value(tensor) -> float:
    return float(torch.as_tensor(tensor).detach())


def loss_of(objective, models, batch, seed=0):
    return objective.loss(models, batch, Gen(seed))["model"]


def test_causal_lm_is_the_sum_of_negative_log_likelihoods_by_hand():
    m, batch = model(), lm_batch()
    loss = loss_of(CausalLM(), {"model": m}, batch)
    by_hand = 0.0
    for row in ROWS[:-1]:
        logits = m(torch.tensor([row[:-1]]))[0]
        by_hand += sum(-value(logits[i].log_softmax(-1)[row[i + 1]]) for i in range(len(row) - 1))
    assert int(loss.count) == 4 + 1 + 2
    assert value(loss.total) == pytest.approx(by_hand, rel=1e-5)
    assert value(loss.parts["nats"]) == pytest.approx(by_hand, rel=1e-5)


def test_causal_lm_of_a_uniform_model_is_the_logarithm_of_the_vocabulary():
    m = model({"part": "lm", "vocab": VOCAB})
    with torch.no_grad():
        m.head().out.weight.zero_()
    loss = loss_of(CausalLM(), {"model": m}, lm_batch())
    assert value(loss.total / loss.count) == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_chunks_and_layouts_change_nothing():
    m, batch = model(), lm_batch()
    targets = batch.targets["tokens"][torch.arange(4)[None] < batch.lengths["tokens"][:, None]][None]
    forms = [(CausalLM(), batch), (CausalLM(logits=2 * VOCAB), batch)]
    forms.append((CausalLM(logits=1), to_packed(batch).replace(targets={"tokens": targets})))
    gradients = []
    for objective, form in forms:
        m.zero_grad()
        loss = loss_of(objective, {"model": m}, form)
        loss.total.backward()
        gradients.append([value(loss.total), *[p.grad.clone() for p in m.parameters()]])
    for other in gradients[1:]:
        assert other[0] == pytest.approx(gradients[0][0], rel=1e-6)
        for one, two in zip(gradients[0][1:], other[1:]):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert [s.stop - s.start for s in token_chunks(7, 10, 30)] == [3, 3, 1]
    assert list(token_chunks(0, 10)) == []


def test_a_batch_without_targets_to_predict_counts_nothing_and_moves_nothing():
    m, batch = model(), lm_batch([[1], [2]])
    loss = loss_of(CausalLM(), {"model": m}, batch)
    loss.total.backward()
    assert value(loss.total) == 0.0 and int(loss.count) == 0
    assert all(p.grad is None or not p.grad.any() for p in m.parameters())


def test_causal_lm_refuses_a_model_that_sees_the_answer():
    with pytest.raises(DataError, match=r"b0\.attention"):
        CausalLM().bind({"model": model(causal=False)})
    with pytest.raises(DataError, match="needs a head of kind tokens"):
        CausalLM().bind({"model": model({"part": "mean-pool"})})
    with pytest.raises(DataError, match=r"targets\['tokens'\]"):
        loss_of(CausalLM(), {"model": model()}, Batch(inputs={"tokens": torch.tensor([[1]])}))


def test_dropout_is_keyed_by_the_step():
    m = model(dropout=0.5).train()
    one, again, other = (value(loss_of(CausalLM(), {"model": m}, lm_batch(), seed).total) for seed in (1, 1, 2))
    assert one == again != other


def test_classification_by_hand_with_weights_and_ignored_rows():
    m = model({"part": "sequence-classifier", "classes": 3}, causal=False)
    tokens, lengths = pad(ROWS)
    labels = torch.tensor([0, 2, -100, 1])
    batch = Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths}, targets={"label": labels})
    logp = m(batch).log_softmax(-1)
    loss = loss_of(Classification(), {"model": m}, batch)
    assert value(loss.total) == pytest.approx(-value(logp[0, 0] + logp[1, 2] + logp[3, 1]), rel=1e-5)
    assert int(loss.count) == 3
    right = sum(int(logp[i].argmax()) == int(labels[i]) for i in (0, 1, 3))
    assert value(loss.parts["accuracy"]) == pytest.approx(right)
    weighted = loss_of(Classification(weights=[1.0, 2.0, 4.0]), {"model": m}, batch)
    assert value(weighted.total) == pytest.approx(-value(logp[0, 0] + 4 * logp[1, 2] + 2 * logp[3, 1]), rel=1e-5)
    assert value(weighted.count) == pytest.approx(7.0)
    with pytest.raises(DataError, match="label 7 is none of the model's 3 classes"):
        loss_of(Classification(), {"model": m}, batch.replace(targets={"label": torch.tensor([7, 0, 0, 0])}))
    with pytest.raises(DataError, match="2 weights for the 3 classes"):
        Classification(weights=[1.0, 1.0]).bind({"model": m})


def test_classification_of_tokens():
    m = model({"part": "token-classifier", "classes": 4}, causal=False)
    tokens, lengths = pad(ROWS)
    labels = torch.where(tokens > 0, tokens % 4, -100)
    batch = Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths}, targets={"label": labels})
    loss = loss_of(Classification(), {"model": m}, batch)
    by_hand = F.cross_entropy(m(batch).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    assert value(loss.total) == pytest.approx(value(by_hand), rel=1e-5)
    assert int(loss.count) == sum(map(len, ROWS))


def test_divergence_by_hand():
    theirs, ours, temperature = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.5]]), 2.0
    p = [math.exp(v / temperature) for v in (1.0, 0.0)]
    q = [math.exp(v / temperature) for v in (0.0, 0.5)]
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    by_hand = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))
    assert value(divergence(ours, theirs, temperature)) == pytest.approx(by_hand, rel=1e-6)
    assert value(divergence(theirs, theirs)) == 0.0


def test_relative_error_by_hand():
    ours, theirs = torch.zeros(2, 2, 2), torch.ones(2, 2, 2)
    theirs[0, 0] *= 2.0  # still a relative error of one
    assert value(relative_error(ours, theirs, Context())) == pytest.approx(2.0)
    assert value(relative_error(ours, theirs, Context(lengths=torch.tensor([1, 0])))) == pytest.approx(1.0)
    packed = Context(offsets=torch.tensor([0, 1, 4]), borders=(0, 1, 4))
    assert value(relative_error(ours.view(1, 4, 2), theirs.view(1, 4, 2), packed)) == pytest.approx(2.0)
    chosen = torch.tensor([[True, True], [True, False]])
    assert value(relative_error(ours, theirs, Context(), chosen)) == pytest.approx(3.0)


def vector_batch() -> Batch:
    tokens, lengths = pad(ROWS)
    return Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths})


def test_distillation_of_vectors_by_hand_and_from_what_a_batch_carries():
    head = {"part": "mean-pool", "normalize": True}
    student, teacher = model(head, False, seed=1), model(head, False, seed=2)
    batch = vector_batch()
    objective = Distillation(cosine=2.0, mse=3.0)
    loss = loss_of(objective, {"model": student, "teacher": teacher}, batch)
    ours, theirs = student(batch), teacher(batch)
    cosine = F.cosine_similarity(ours, theirs)
    by_hand = 2 * (1 - cosine).sum() + 3 * (ours - theirs).square().sum()
    assert value(loss.total) == pytest.approx(value(by_hand), rel=1e-5)
    assert value(loss.parts["cosine"]) == pytest.approx(value(cosine.sum()), rel=1e-5)
    carried = loss_of(objective, {"model": student}, batch.replace(targets={"teacher": theirs.detach()}))
    assert value(carried.total) == pytest.approx(value(by_hand), rel=1e-5)
    with pytest.raises(DataError, match="needs a teacher"):
        loss_of(objective, {"model": student}, batch)
    same = loss_of(Distillation(states=1.0, hidden=["b0.attention"]), {"model": teacher, "teacher": teacher}, batch)
    assert abs(value(same.total)) < 1e-5


def test_distillation_of_hidden_states_by_hand():
    head = {"part": "mean-pool"}
    student, teacher = model(head, False, seed=1), model(head, False, seed=2)
    batch = vector_batch()
    loss = loss_of(Distillation(cosine=0.0, hidden=["b0.attention"]), {"model": student, "teacher": teacher}, batch)
    by_hand = 0.0
    for row in ROWS:
        streams = []
        for m in (student, teacher):
            x, ctx = m.embed(torch.tensor([row]))
            streams.append(m.run(x, ctx, stop="b1.mlp")[0][0])
        gap = (streams[0] - streams[1]).square().sum(-1) / streams[1].square().sum(-1)
        by_hand += value(gap.mean())
    assert value(loss.total) == pytest.approx(by_hand, rel=1e-4)
    with pytest.raises(DataError, match=r"b7\.mlp is none"):
        Distillation(hidden=["b7.mlp"]).bind({"model": student, "teacher": teacher})


@pytest.mark.parametrize("most", [1 << 20, 2 * VOCAB * 2])
def test_distillation_of_logits_with_temperature_hard_targets_and_chunks(most):
    student, teacher, batch = model(seed=1), model(seed=2), lm_batch()
    objective = Distillation(temperature=2.0, hard=0.25, logits=most)
    loss = loss_of(objective, {"model": student, "teacher": teacher}, batch)
    chosen = batch.targets["tokens"] != -100
    kl = divergence(student(batch)[chosen], teacher(batch)[chosen], 2.0)
    nll = F.cross_entropy(student(batch)[chosen], batch.targets["tokens"][chosen], reduction="sum")
    assert value(loss.total) == pytest.approx(0.75 * value(kl) + 0.25 * value(nll), rel=1e-5)
    assert int(loss.count) == int(chosen.sum())
    loss.total.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_distillation_of_labels():
    head = {"part": "sequence-classifier", "classes": 3}
    student, teacher, batch = model(head, False, 1), model(head, False, 2), vector_batch()
    loss = loss_of(Distillation(), {"model": student, "teacher": teacher}, batch)
    assert value(loss.total) == pytest.approx(value(divergence(student(batch), teacher(batch))), rel=1e-5)


def test_sums_do_not_depend_on_how_a_batch_is_cut():
    head = {"part": "mean-pool", "normalize": True}
    models = {"model": model(head, False, 1), "teacher": model(head, False, 2)}
    objective = Distillation(mse=1.0, states=1.0, hidden=["b0.attention"])
    whole = loss_of(objective, models, vector_batch())
    pieces = []
    for rows in (ROWS[:1], ROWS[1:]):
        tokens, lengths = pad(rows)
        pieces.append(loss_of(objective, models, Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths})))
    assert value(whole.total) == pytest.approx(sum(value(p.total) for p in pieces), rel=1e-5)
    assert int(whole.count) == sum(int(p.count) for p in pieces) == len(ROWS)


def test_options_out_of_range_are_refused():
    for refused in (
        lambda: Distillation(temperature=0.0),
        lambda: Distillation(hard=1.5),
        lambda: CausalLM(smoothing=-0.1),
        lambda: Classification(smoothing=2.0),
    ):
        with pytest.raises(SpecError):
            refused()
    wide = build(
        {"stem": {"part": "token-embedding", "vocab": 9, "width": 8}, "layers": [], "head": {"part": "mean-pool"}}
    )
    with pytest.raises(DataError, match="widths differ, 8 and 16"):
        Distillation().bind({"model": wide, "teacher": model({"part": "mean-pool"})})
    with pytest.raises(DataError, match="gives vectors, the teacher's tokens"):
        Distillation().bind({"model": wide, "teacher": model()})


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_streams_of_two_widths_by_hand(kind):
    student, teacher, batch = model(seed=1), wide_model(), lm_batch()
    hidden = {"b0.attention": "b1.mlp"}
    bridge = projections(student, teacher, hidden, seed=3)
    assert bridge("b0.attention", torch.eye(16)).shape == (16, 24)
    models = {"model": student, "teacher": teacher, "projection": bridge}
    objective = Distillation(hidden=hidden, hidden_kind=kind, hidden_weight=2.0, project=True)
    objective.bind(models)
    chosen = batch.targets["tokens"] != -100
    streams = []
    for m, stop in ((student, "b1.mlp"), (teacher, None)):
        x, ctx = m.embed(batch)
        streams.append(m.run(x, ctx, stop=stop)[0][chosen])
    ours, theirs = streams[0] @ bridge.weights["b0/attention"].T, streams[1]
    if kind == "mse":
        gap = (ours - theirs).square().mean(-1).sum()
    else:
        gap = (1 - (ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)).sum()
    kl = divergence(student(batch)[chosen], teacher(batch)[chosen])
    loss = loss_of(objective, models, batch)
    assert value(loss.total) == pytest.approx(value(kl + 2 * gap), rel=1e-5)
    loss.total.backward()
    assert bridge.weights["b0/attention"].grad.abs().sum() > 0


def wide_model():
    return build(
        {
            "stem": {"part": "token-embedding", "vocab": VOCAB, "width": 24, "std": 0.5},
            "layers": [{"part": "attention", "heads": 2, "causal": True}, {"part": "mlp", "hidden": 24}],
            "final_norm": "layernorm",
            "head": {"part": "lm", "tied": True},
        },
        seed=2,
    )


def test_streams_of_two_widths_need_a_bridge():
    models = {"model": model(), "teacher": wide_model()}
    with pytest.raises(DataError, match="16 and 24 wide; say project=True"):
        Distillation(hidden=["b0.attention"]).bind(models)
    with pytest.raises(DataError, match="others="):
        Distillation(hidden=["b0.attention"], project=True).bind(models)
    with pytest.raises(DataError, match=r"b1\.mpl is none.*b1\.mlp"):
        Distillation(hidden={"b0.attention": "b1.mpl"}).bind(models)
    for options in ({"project": True}, {"hidden_kind": "mae"}):
        with pytest.raises(SpecError):
            Distillation(**options)


def test_an_objective_is_made_from_its_description():
    made = make({"name": "classification", "smoothing": 0.1})
    assert isinstance(made, Classification) and made.smoothing == 0.1
    assert make(made) is made and isinstance(make("causal-lm"), CausalLM)
    with pytest.raises(SpecError, match="smoothing"):
        make({"name": "classification", "smothing": 0.1})
    with pytest.raises(SpecError, match="an objective is a name"):
        make({"smoothing": 0.1})
