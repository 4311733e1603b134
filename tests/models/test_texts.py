"""Texts in, vectors and labels out: the caller's order, no trace of padding or mates, modes left as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from formwright import Batch, build
from formwright.kit.errors import DataError
from formwright.models import text as text_module
from formwright.models.batch import pad
from formwright.models.text import pieces
from formwright.models.tokenizer import Tokenizer

TEXTS = ["the cat sat on a mat", "", "dogs", "the dogs ran far away from the cat and sat", "cat", "a mat and a cat"]

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]


def tokenizer() -> Tokenizer:
    backend = Backend(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return Tokenizer(backend, settings={"pad_token": "[PAD]", "eos_token": {"content": "[SEP]"}})


def encoder(head: dict, **stem):
    model = build(
        {
            "stem": {
                "part": "token-embedding",
                "vocab": len(WORDS),
                "width": 16,
                "types": 2,
                "positions": {"kind": "learned", "max": 14},
                **stem,
            },
            "layers": [{"repeat": 2, "layers": [{"part": "attention", "heads": 2}, {"part": "mlp", "hidden": 24}]}],
            "head": head,
        }
    )
    model.tokenizer = tokenizer()
    return model


@pytest.mark.parametrize("how", ["mean", "first", "last", "max"])
def test_vectors_depend_on_their_text_alone(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder({"part": f"{how}-pool", "normalize": True})
    vectors = model.encode(TEXTS)
    assert isinstance(vectors, np.ndarray) and vectors.dtype == np.float32 and vectors.shape == (6, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    for index, text in enumerate(TEXTS):
        np.testing.assert_allclose(model.encode(text), vectors[index], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS[::-1], batch_size=2), vectors[::-1], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(text_module, "BUDGET", 5)
    np.testing.assert_allclose(model.encode(TEXTS), vectors, rtol=1e-4, atol=1e-5)
    ids, lengths = pad(model.rows(TEXTS))
    padded = Batch(inputs={"tokens": ids}, lengths={"tokens": lengths})
    np.testing.assert_allclose(model.encode(padded), vectors, rtol=1e-4, atol=1e-5)
    assert torch.is_tensor(model.encode(TEXTS, as_tensor=True))
    assert model.encode([]).shape == (0, 16)


def test_a_batch_is_cut_between_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder({"part": "mean-pool"})
    monkeypatch.setattr(text_module, "BUDGET", 6)
    ids, lengths = pad([[1] * size for size in (3, 0, 2, 9, 1, 1, 4, 0)])
    batch = Batch(inputs={"tokens": ids}, lengths={"tokens": lengths})
    cut = pieces(model, batch)
    sizes = [piece.offsets["tokens"].diff().tolist() for piece in cut]
    assert [size for piece in sizes for size in piece] == lengths.tolist()
    assert all(sum(size) <= 6 or len([s for s in size if s]) == 1 for size in sizes)
    assert all(piece.inputs["tokens"].shape[1] == sum(size) for piece, size in zip(cut, sizes))
    assert pieces(model, batch.replace(condition={"c": torch.zeros(8)}))[0].condition


def test_long_texts_are_cut_with_one_warning() -> None:
    model = encoder({"part": "mean-pool"})
    assert model.limit == 14
    long = " ".join(["cat"] * 30)
    with pytest.warns(UserWarning, match=r"2 of 3 texts were cut to 14 tokens"):
        rows = model.rows([long, "cat", long])
    assert [len(row) for row in rows] == [14, 3, 14]
    assert rows[0][0] == 1 and rows[0][-1] == 2, "special tokens stay"
    model.max_length = 5
    assert model.limit == 5


def test_predictions() -> None:
    model = encoder({"part": "sequence-classifier", "classes": 3, "labels": ["x", "y", "z"], "dropout": 0.5})
    model.train()
    model.item("b0.mlp").eval()
    found = model.predict(TEXTS)
    assert model.training and not model.item("b0.mlp").training and model.item("b1.mlp").training
    assert model.labels == ["x", "y", "z"]
    assert all(set(line) == {"label", "probability"} and line["label"] in "xyz" for line in found)
    assert model.predict(TEXTS[3:4])[0]["label"] == found[3]["label"]
    assert model.predict(TEXTS, batch_size=1)[0]["probability"] == pytest.approx(found[0]["probability"], abs=1e-5)
    paired = model.predict(["the cat"], ["the dogs"])[0]
    ids = torch.tensor(model.tokenizer.encode(["the cat"], ["the dogs"]))
    types = torch.tensor(model.tokenizer.types(["the cat"], ["the dogs"]))
    assert types.tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    logits = model.outputs(Batch(inputs={"tokens": ids, "types": types}))["logits"]
    assert paired["probability"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)


def test_what_a_model_cannot_do_it_says() -> None:
    regression = encoder({"part": "regression", "outputs": 1})
    with pytest.raises(DataError, match=r"no classifier head, so it predicts no labels"):
        regression.predict(["cat"])
    with pytest.raises(DataError, match=r"no pooling head"):
        regression.encode(["cat"])
    model = encoder({"part": "mean-pool"})
    with pytest.raises(DataError, match=r"text 1 is a int, not a string"):
        model.encode(["cat", 5])
    model.tokenizer = None
    with pytest.raises(DataError, match=r"carries no tokenizer, so it reads ids, not texts"):
        model.encode(["cat"])


def test_tokenizers_know_their_special_tokens() -> None:
    made = tokenizer()
    assert (made.pad_id, made.end_id, made.start_id, made.size) == (0, 2, None, len(WORDS))
    ids, places = made.offsets("the cat")
    assert made.decode(ids) == "the cat" and places == [(0, 3), (4, 7)]
    assert made.encode(["the cat"], special=False) == [ids]
    assert b"WordLevel" in made.files["tokenizer.json"]
