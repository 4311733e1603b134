"""Masked language modelling: what is hidden and how it is shown, and a loss computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, pad
from formwright.models.build import build
from formwright.models.masking import SPAN_MOST, Masking, _lengths, word_tables
from formwright.models.text import to_packed
from formwright.objectives.base import Gen
from formwright.objectives.masked_lm import MaskedLM
from formwright.training import train
from formwright.training.hooks import Hook
from formwright.training.tokenizer import train_tokenizer

VOCAB = 30
SPARED = np.arange(VOCAB) < 2
ROWS = [list(range(2, 22)), [5, 6, 7], [9]]


def masking(unit: str = "token", rate: float = 0.15, **more) -> Masking:
    return Masking(rate, unit, 1, VOCAB, SPARED, **more)


def encoder(seed: int = 0, causal: bool = False):
    return build(
        {
            "stem": {"part": "token-embedding", "vocab": VOCAB, "width": 16, "std": 0.5},
            "layers": [{"part": "attention", "heads": 2, "causal": causal}, {"part": "mlp", "hidden": 24}],
            "head": {"part": "lm", "tied": True},
        },
        seed=seed,
    )


def text_batch(rows=ROWS) -> Batch:
    tokens, lengths = pad(rows)
    return Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths})


def test_the_loss_by_hand_is_over_hidden_tokens_only():
    model, whole = encoder(), text_batch()
    objective = MaskedLM(mask=1, rate=0.3)
    hidden = objective.hide(model, whole, Gen(7))
    wanted = hidden.targets["tokens"]
    assert int((wanted != -100).sum()) == 6 + 1 + 1  # 30 % of 20, and at least one of 3 and of 1
    logits = model(hidden)
    by_hand = F.cross_entropy(logits[wanted != -100], wanted[wanted != -100], reduction="sum")
    loss = objective.loss({"model": model}, whole, Gen(7))["model"]
    assert float(loss.total.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5) and int(loss.count) == 8
    assert torch.equal(wanted[wanted != -100], whole.inputs["tokens"][wanted != -100])
    packed = objective.loss({"model": model}, to_packed(whole), Gen(7))["model"]
    assert float(packed.total.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)


def test_the_head_is_asked_about_hidden_tokens_only(monkeypatch):
    model, asked = encoder(), []
    head, forward = model.head(), model.head().forward
    monkeypatch.setattr(head, "forward", lambda x, ctx: asked.append(x.shape[-2]) or forward(x, ctx))
    MaskedLM(mask=1).loss({"model": model}, text_batch(), Gen(0))
    assert asked == [3 + 1 + 1]


def test_noise_is_a_function_of_the_step():
    model, objective = encoder(), MaskedLM(mask=1)
    one, again, other = (objective.hide(model, text_batch(), Gen(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.inputs["tokens"], again.inputs["tokens"])
    assert torch.equal(one.targets["tokens"], again.targets["tokens"])
    assert not torch.equal(one.targets["tokens"], other.targets["tokens"])


def test_shares_of_what_stands_for_a_hidden_token():
    rng, row = np.random.default_rng(0), np.full(20_000, 5)
    hidden = np.ones(len(row), bool)
    shown = masking().shown(row, hidden, rng)
    share = {"mask": (shown == 1).mean(), "same": (shown == 5).mean()}
    # A random token is the right one once in 28; three standard deviations of 20,000 draws are 0.0085 at most.
    assert share["mask"] == pytest.approx(0.8, abs=0.0085)
    assert share["same"] == pytest.approx(0.1 + 0.1 / 28, abs=0.0085)
    assert not np.isin(shown[shown != 1], np.flatnonzero(SPARED)).any()
    assert (Masking(0.5, "token", 1, VOCAB, SPARED, replaced=1.0, random=0.0).shown(row, hidden, rng) == 1).all()


def test_whole_words_are_hidden_whole_and_spans_have_their_lengths():
    begins, ends = word_tables(["<e>", "<m>", "re", "ad", "Ġthe", "Ġfile", "s", ".", "_x", "1"], VOCAB)
    assert begins.nonzero()[0].tolist() == [2, 3, 6, 8, 9] and ends.nonzero()[0].tolist() == [2, 3, 4, 5, 6, 8, 9]
    words = masking("word", 0.3, begins=begins, ends=ends)
    row = np.array([2, 3, 8, 7, 4, 5, 6, 7, 2])  # read_x . the files . re
    borders = [(0, 3), (3, 4), (4, 5), (5, 7), (7, 8), (8, 9)]
    seen = set()
    for seed in range(40):
        hidden = words.hidden(row, np.random.default_rng(seed))
        assert all(hidden[a:b].all() or not hidden[a:b].any() for a, b in borders)
        seen |= {border for border in borders if hidden[border[0]]}
    assert seen == set(borders)
    begins, ends = word_tables(["[CLS]", "play", "##ing", "ball"], 4)
    assert begins.tolist() == [False, False, True, False] and ends.all()
    lengths = _lengths(50_000, np.random.default_rng(0))
    assert lengths.min() == 1 and lengths.max() == SPAN_MOST and lengths.mean() == pytest.approx(3.8, abs=0.04)
    runs = [np.diff(np.flatnonzero(np.diff(np.r_[0, h, 0]))) for h in _hidden_of("span", 40)]
    assert np.mean(np.concatenate(runs)[::2]) > 2.0


def _hidden_of(unit: str, count: int):
    row = np.full(400, 5)
    return [masking(unit).hidden(row, np.random.default_rng(seed)).astype(int) for seed in range(count)]


@pytest.mark.parametrize("unit", ["token", "span"])
def test_the_share_is_kept_and_specials_are_spared(unit):
    for hidden in _hidden_of(unit, 20):
        assert 60 <= hidden.sum() < 60 + (SPAN_MOST if unit == "span" else 1)
    row = np.array([0, 0, 3, 0])
    assert masking(unit).hidden(row, np.random.default_rng(0)).tolist() == [False, False, True, False]
    for empty in (np.array([], dtype=int), np.zeros(4, dtype=int)):
        assert not masking(unit).hidden(empty, np.random.default_rng(0)).any()


def test_the_mask_token_comes_from_the_tokenizer():
    tokenizer = train_tokenizer(["def read_text(path):\n    return path\n"] * 3, 300, mask=True)
    assert tokenizer.mask_id == 1 and tokenizer.special_ids == {0, 1}
    model = build(
        {
            "stem": {"part": "token-embedding", "vocab": tokenizer.size, "width": 8},
            "layers": [],
            "head": {"part": "lm", "tied": True},
        }
    )
    model.tokenizer = tokenizer
    rows = tokenizer.encode(["def read_text(path):"])
    hidden = MaskedLM(unit="word", replaced=1.0, random=0.0).hide(model, text_batch(rows), Gen(0))
    assert (hidden.inputs["tokens"] == 1).sum() == (hidden.targets["tokens"] != -100).sum() > 0
    with pytest.raises(DataError, match="say which id with mask=ID"):
        MaskedLM().loss({"model": encoder()}, text_batch(), Gen(0))
    with pytest.raises(SpecError, match="whole words need a tokenizer"):
        MaskedLM(unit="word", mask=1).loss({"model": encoder()}, text_batch(), Gen(0))


def test_refusals():
    with pytest.raises(DataError, match="no part of this model sees later tokens"):
        MaskedLM().bind({"model": encoder(causal=True)})
    for options in ({"rate": 0.0}, {"unit": "words"}, {"replaced": 0.8, "random": 0.3}, {"smoothing": 2.0}):
        with pytest.raises(SpecError):
            MaskedLM(**options)


def test_a_run_that_was_cut_off_hides_the_same_tokens(tmp_path):
    class Cut(Hook):
        def stepped(self, run) -> None:
            if run.step == 3:
                raise RuntimeError("cut off")

    class Whole(Cut):
        def stepped(self, run) -> None:
            """Goes on."""

    def run(model, cut: type, **more):
        cut.__name__ = "Cut"  # a run goes on with hooks of the same names
        settings = {"steps": 4, "lr": 1e-2, "save_every": 2, "show": False, "accumulation": 2, **more}
        train(model, [text_batch(), text_batch(ROWS[:2])], objective=MaskedLM(mask=1), hooks=[cut()], **settings)

    whole, halves = encoder(), encoder()
    run(whole, Whole)
    with pytest.raises(RuntimeError, match="cut off"):
        run(halves, Cut, out=tmp_path / "run")
    run(halves, Whole, out=tmp_path / "run", resume=True)
    for one, two in zip(whole.parameters(), halves.parameters()):
        assert torch.equal(one, two)
