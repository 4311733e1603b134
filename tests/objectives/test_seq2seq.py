"""Sequence to sequence: targets moved on, the loss by hand with smoothing, and a copying task that is learned."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from formwright.hub.families.t5 import T5
from formwright.kit.errors import DataError
from formwright.models.batch import Batch, pad
from formwright.models.build import build
from formwright.objectives.base import Gen
from formwright.objectives.seq2seq import Seq2Seq, moved_on

SOURCES, TARGETS = [[3, 4, 5], [6, 7]], [[5, 4, 1], [8]]


def t5():
    small = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    given = {**small, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "dropout_rate": 0.0}
    return build(T5().spec_of(given, "T5ForConditionalGeneration"), seed=0)


def batch() -> Batch:
    tokens, lengths = pad(SOURCES)
    wanted, _ = pad(TARGETS, -100)
    return Batch(inputs={"encoder.tokens": tokens}, lengths={"encoder.tokens": lengths}, targets={"tokens": wanted})


def test_targets_are_moved_on_behind_the_start_token():
    tokens, lengths = moved_on(torch.tensor([[5, 4, 1], [8, -100, -100]]), 0)
    assert tokens.tolist() == [[0, 5, 4], [0, 0, 0]] and lengths.tolist() == [3, 1]
    with pytest.raises(DataError, match="before its end"):
        moved_on(torch.tensor([[5, -100, 1]]), 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_by_hand(smoothing):
    m, total = t5(), 0.0
    for source, wanted in zip(SOURCES, TARGETS):
        fed = Batch(
            inputs={"encoder.tokens": torch.tensor([source]), "decoder.tokens": torch.tensor([[0, *wanted[:-1]]])}
        )
        logp = m(fed)[0].log_softmax(-1)
        right = -sum(float(logp[i, token].detach()) for i, token in enumerate(wanted))
        even = -float(logp.mean(-1).sum().detach())
        total += (1 - smoothing) * right + smoothing * even
    objective = Seq2Seq(smoothing=smoothing)
    objective.bind({"model": m})
    loss = objective.loss({"model": m}, batch(), Gen())["model"]
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-5) and int(loss.count) == 4


def test_a_batch_may_bring_what_the_decoder_reads():
    m, whole = t5(), batch()
    wanted = Seq2Seq(start=2).loss({"model": m}, whole, Gen())["model"]
    fed = whole.replace(
        inputs={**whole.inputs, "decoder.tokens": torch.tensor([[2, 5, 4], [2, 2, 2]])},
        lengths={**whole.lengths, "decoder.tokens": torch.tensor([3, 1])},
    )
    loss = Seq2Seq().loss({"model": m}, fed, Gen())["model"]
    assert torch.equal(loss.total, wanted.total)


def test_a_target_is_learned_from_its_source():
    m, whole = t5(), batch()
    moved = torch.optim.Adam(m.parameters(), lr=3e-2)
    for _ in range(80):
        moved.zero_grad()
        Seq2Seq().loss({"model": m}, whole, Gen())["model"].total.backward()
        moved.step()
    fed = Seq2Seq().fed(m, whole)
    assert F.cross_entropy(m(fed).flatten(0, 1), whole.targets["tokens"].flatten(), ignore_index=-100) < 0.1


def test_refusals():
    single = build(
        {
            "stem": {"part": "token-embedding", "vocab": 9, "width": 8},
            "layers": [],
            "head": {"part": "lm", "tied": True},
        }
    )
    with pytest.raises(DataError, match="an encoder and a decoder"):
        Seq2Seq().bind({"model": single})
    packed = Batch(
        inputs={"encoder.tokens": torch.tensor([[3, 4]])},
        offsets={"encoder.tokens": torch.tensor([0, 2])},
        targets={"tokens": torch.tensor([[5]])},
    )
    with pytest.raises(DataError, match=r"brings decoder\.tokens itself"):
        Seq2Seq().loss({"model": t5()}, packed, Gen())
    blind = t5().spec.to_dict()
    blind["towers"]["decoder"]["layers"][0]["layers"][0].pop("causal")
    with pytest.raises(DataError, match="not causal"):
        Seq2Seq().bind({"model": build(blind)})
