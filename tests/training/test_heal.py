"""Healing: a cut model comes back towards its teacher; the teacher is asked once a text; frozen slots stay; resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from formwright.kit.errors import DataError, Refusal, SpecError
from formwright.models.build import build
from formwright.objectives.distillation import divergence
from formwright.training import Interrupted, heal, train
from formwright.training.hooks import Hook
from formwright.training.lesson import common
from formwright.training.tokenizer import END, train_tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i} * {'abcdefgh'[i % 8]} # {'very ' * (i % 5)}small" for i in range(48)]
NEW = [f"for y in range({i}): print(y, {i % 7})" for i in range(16)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS + NEW, 320)


def original(tokenizer, head, causal=False, seed=0):
    model = build(
        {
            "stem": {"part": "token-embedding", "vocab": tokenizer.size, "width": 32, "std": 0.5, "norm": "layernorm"},
            "defaults": {"order": "post"},
            "layers": [
                {
                    "repeat": 3,
                    "layers": [
                        {"part": "attention", "heads": 4, "causal": causal, "rotary": {}},
                        {"part": "mlp", "hidden": 64},
                    ],
                }
            ],
            "head": head,
        },
        seed=seed,
    )
    model.tokenizer = tokenizer
    return model


def cut(model, *ids):
    model = copy.deepcopy(model)
    for id in ids or ("b1.mlp",):
        model.item(id).drop()
    return model


VECTORS = {"part": "mean-pool", "normalize": True}


def cosine(one, two, texts=NEW) -> float:
    return float(F.cosine_similarity(*(m.encode(texts, as_tensor=True) for m in (one, two))).mean())


@pytest.mark.parametrize("states", [0.0, 1.0])
def test_a_cut_encoder_comes_back_towards_its_teacher(tokenizer, states):
    teacher = original(tokenizer, VECTORS)
    student = cut(teacher, "b1.mlp", "b2.attention")
    stem = student.stem.tokens.weight.detach().clone()
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    before = cosine(student, teacher)
    result = heal(student, teacher, TEXTS, steps=60, lr=3e-3, batch=12, states=states, show=False)
    after = cosine(student, teacher)
    assert 1 - after < 0.7 * (1 - before)
    assert torch.equal(stem, student.stem.tokens.weight)
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad for p in (*student.parameters(), *teacher.parameters()))
    entry = student.history[-1]
    assert entry.name == "healed" and entry.data["data"]["texts"] == len(TEXTS) and result.steps == 60
    assert teacher.history == []


def test_the_teacher_reads_every_text_once_for_all_runs_until_it_changes(tokenizer):
    teacher, tokens = original(tokenizer, VECTORS), []
    students = [cut(teacher) for _ in range(3)]
    # The last item: the comparison of the two models ends before it.
    teacher.item("b2.mlp").register_forward_hook(lambda module, given, out: tokens.append(out[0].shape[1]))
    once = sum(map(len, tokenizer.encode(TEXTS)))
    heal(students.pop(), teacher, TEXTS, steps=20, batch=8, show=False)
    assert sum(tokens) == once
    heal(students.pop(), teacher, TEXTS, steps=20, batch=8, show=False)
    assert sum(tokens) == once
    with torch.no_grad():
        teacher.item("b2.mlp").norm.bias.add_(0.1)
    heal(students.pop(), teacher, TEXTS, steps=6, batch=8, show=False)
    assert sum(tokens) == 2 * once


def test_a_teacher_that_says_too_much_to_be_kept_is_asked_every_time(tokenizer, monkeypatch):
    teacher = original(tokenizer, VECTORS)
    kept, asked = cut(teacher), cut(teacher)
    heal(kept, teacher, TEXTS, steps=3, show=False)
    monkeypatch.setattr("formwright.training.lesson.CACHE", 100)
    heal(asked, teacher, TEXTS, steps=3, show=False)
    assert all(torch.equal(one, two) for one, two in zip(kept.parameters(), asked.parameters()))


def test_items_before_the_first_difference_stay_and_change_nothing_about_the_rest(tokenizer):
    teacher = original(tokenizer, VECTORS)
    rows = tokenizer.encode(TEXTS)
    assert common(cut(teacher), teacher, rows) == "b1.mlp"
    assert common(cut(teacher, "b0.attention"), teacher, rows) is None
    assert common(copy.deepcopy(teacher), teacher, rows) is None
    moved = copy.deepcopy(teacher)
    with torch.no_grad():
        moved.item("b2.mlp").part.up.bias[0] += 1.0
    assert common(moved, teacher, rows) == "b2.mlp"
    begun, whole = cut(teacher), cut(teacher)
    first = heal(begun, teacher, TEXTS, steps=4, show=False)
    second = heal(whole, teacher, TEXTS, steps=4, trainable=["b1.mlp", "b2.*"], show=False)
    assert dict(first.losses) == pytest.approx(dict(second.losses))
    for (name, one), two, old in zip(begun.named_parameters(), whole.parameters(), cut(teacher).parameters()):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)
        assert torch.equal(one, old) == (not name.startswith(("b1.mlp", "b2.")))


def test_a_cut_decoder_comes_back_in_its_distribution(tokenizer):
    teacher = original(tokenizer, {"part": "lm", "tied": True}, causal=True)
    student = cut(teacher)
    rows = [torch.tensor([row]) for row in tokenizer.encode(NEW)]

    def gap() -> float:
        with torch.inference_mode():
            return sum(float(divergence(student(row)[0], teacher(row)[0])) for row in rows)

    before = gap()
    heal(student, teacher, TEXTS, steps=60, lr=3e-3, batch=12, show=False)
    assert gap() < 0.7 * before


def test_frozen_slots_and_chosen_ones(tokenizer):
    teacher = original(tokenizer, VECTORS)
    student = cut(teacher)
    student.slot("b0.mlp:up").weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    heal(student, teacher, TEXTS, steps=2, whole=True, show=False)
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert "b0.mlp.part.up.weight" not in moved and "b0.mlp.part.down.weight" in moved
    other = cut(teacher)
    heal(other, teacher, TEXTS, steps=2, trainable=["b2.*"], show=False)
    assert all((name.startswith("b2.")) == (not torch.equal(p, before[name])) for name, p in other.named_parameters())
    whole = cut(teacher)
    heal(whole, teacher, TEXTS, steps=2, embeddings=True, show=False)
    assert not torch.equal(whole.stem.tokens.weight, teacher.stem.tokens.weight)


def test_resumed_in_a_later_epoch_ends_in_the_same_bits(tokenizer, tmp_path):
    teacher = original(tokenizer, VECTORS)
    how = {"steps": 16, "batch": 8, "save_every": 5, "show": False}

    class Stop(Hook):
        def __init__(self, at) -> None:
            self.at = at

        def stepped(self, run) -> None:
            if run.step == self.at:
                import signal

                signal.raise_signal(signal.SIGINT)

    whole = cut(teacher)
    heal(whole, teacher, TEXTS, **how)
    with pytest.raises(Interrupted):
        heal(cut(teacher), teacher, TEXTS, out=tmp_path / "run", hooks=[Stop(9)], **how)
    resumed = cut(teacher)
    heal(resumed, teacher, TEXTS, out=tmp_path / "run", resume=True, hooks=[Stop(-1)], **how)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_what_cannot_be_healed_is_refused(tokenizer):
    teacher = original(tokenizer, VECTORS)
    with pytest.raises(SpecError, match="one object"):
        heal(teacher, teacher, TEXTS, steps=1)
    with pytest.raises(DataError, match="gives tokens, the teacher's vectors"):
        heal(original(tokenizer, {"part": "lm", "tied": True}), teacher, TEXTS, steps=1)
    with pytest.raises(DataError, match="no texts"):
        heal(cut(teacher), teacher, [], steps=1)
    bare = cut(teacher)
    bare.tokenizer, other = None, copy.deepcopy(teacher)
    other.tokenizer = None
    with pytest.raises(DataError, match="tokenizer"):
        heal(bare, other, TEXTS, steps=1)
    with pytest.raises(Refusal, match="one tower"):
        heal(torch.nn.Linear(2, 2), teacher, TEXTS, steps=1)


def test_a_trained_tokenizer_gives_every_text_back_and_is_stored_with_the_run(tokenizer, tmp_path):
    from formwright.models.tokenizer import Tokenizer

    assert tokenizer.size <= 320 and tokenizer.end_id == tokenizer.start_id == tokenizer.pad_id == 0
    strange = ["", " two  spaces\n\ttab", "naïve ☃ 漢字", "\x00\x07", END + "x"]
    for text in [*TEXTS, *strange]:
        assert tokenizer.decode(tokenizer.encode([text])[0], skip_special=False) == text
    with pytest.raises(SpecError, match="at least 257"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(DataError, match="all given ones are empty"):
        train_tokenizer([""], 300)
    model = original(tokenizer, {"part": "lm", "tied": True}, causal=True)
    from formwright.models.batch import Batch

    rows = torch.tensor([tokenizer.encode(TEXTS[:1])[0]])
    train(
        model,
        [Batch({"tokens": rows[:, :-1]}, targets={"tokens": rows[:, 1:]})],
        steps=1,
        out=tmp_path / "run",
        show=False,
    )
    loaded = Tokenizer.load(tmp_path / "run" / "tokenizer")
    assert loaded.encode(NEW) == tokenizer.encode(NEW) and loaded.end_id == 0
