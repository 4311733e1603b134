"""Documents packed from a store of their ids: every token once an epoch, made once, found again, never believed."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formwright.kit.errors import DataError, SpecError
from formwright.tasks import _stream, _tokens, task
from formwright.tasks._documents import cut
from formwright.tasks._packing import Packing
from formwright.tasks._stream import _Draw
from formwright.tasks._tokens import cache, tokens_of


@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 5), st.integers(0, 9), st.integers(0, 3))
def test_packing_deals_every_prediction_once_an_epoch(sizes: list[int], length: int, more: int, seed: int) -> None:
    borders = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    wanted = sorted(t for a, b in pairwise(borders) for t in range(a + 1, b))
    if not wanted:
        with pytest.raises(DataError, match="no token to predict"):
            Packing(borders, length, length + more, seed)
        return
    packing = Packing(borders, length, length + more, seed)
    index, first = 0, None
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < len(wanted):
            places = packing.at(index)
            assert 0 < (places[:, 1] - places[:, 0]).sum() <= length + more
            assert (places[:, 1] - places[:, 0]).max() <= length
            seen += [t + 1 for start, stop in places for t in range(start, stop)]
            index += 1
        assert sorted(seen) == wanted
        first = index if first is None else first
    again = Packing(borders, length, length + more, seed)
    for place in (index - 1, 0, first):
        assert np.array_equal(again.at(place), packing.at(place))


@given(st.lists(st.text(alphabet="abcdé", min_size=1, max_size=6), max_size=20), st.integers(1, 40))
def test_what_is_drawn_is_a_beginning_of_the_seeded_order(texts: list[str], limit: int) -> None:
    drawn = _Draw(limit, 5)
    for text in texts:
        drawn.add(text)
    ordered = sorted(texts, key=lambda text: _stream.order_key(5, text))
    sizes = np.cumsum([len(text.encode()) for text in ordered])
    assert drawn.texts() == ordered[: max(int((sizes <= limit).sum()), min(1, len(ordered)))]


def rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (i % 4 + 1) for i in range(40)]


def started(make: Any, **more: Any) -> SimpleNamespace:
    """A byte tokenizer whose texts begin with 0 and end with 1."""
    tokenizer = make.tokenizer()
    for name, value in {"start_id": 0, "end_id": 1, **more}.items():
        setattr(tokenizer, name, value)
    return make.model(tokenizer=tokenizer)


def test_documents_begin_and_end_and_stay_apart(tmp_path: Path, make: Any) -> None:
    made = task("lm", data=rows(tmp_path / "t.jsonl", [*TEXTS, "", " \n", TEXTS[3]]), length=4096, tokens=4096)
    assert made.documents == 40
    assert {"2 texts left out: blank", "1 texts left out: repeated"} <= set(made.describe())
    made.bind(started(make))
    draw, found = made.drawer("calibrate", 0), Counter()
    for index in range(3):
        batch = draw(index)
        offsets = batch.offsets["tokens"].tolist()
        for start, stop in pairwise(offsets):
            ids = [*batch.inputs["tokens"][0, start:stop].tolist(), int(batch.targets["tokens"][0, stop - 1])]
            assert ids[0] == 0 and ids[-1] == 1 and 0 not in ids[1:] and 1 not in ids[:-1]
            found[bytes(i - 2 for i in ids[1:-1]).decode()] += 1
        if sum(found.values()) == len(made.texts("calibrate")):
            break
    assert found == Counter(made.texts("calibrate"))


def test_the_store_is_made_once_and_made_again_when_anything_changes(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows(tmp_path / "t.jsonl", TEXTS)
    calls = []
    whole = _tokens._write
    monkeypatch.setattr(_tokens, "_write", lambda *args: (calls.append(1), whole(*args)))

    def first(model: Any, **options: Any) -> torch.Tensor:
        made = task("lm", data=path, length=16, **options)
        made.bind(model)
        return made.drawer("calibrate", 0)(0).inputs["tokens"]

    one = first(make.model())
    assert torch.equal(first(make.model()), one) and len(calls) == 1
    first(make.model(), tokens=999)  # another layout of the same ids
    assert len(calls) == 1
    first(started(make, files={"bytes": b"started"}))
    assert len(calls) == 2
    first(make.model(), seed=1)
    assert len(calls) == 3
    rows(path, [*TEXTS, "one more text"])
    first(make.model())
    assert len(calls) == 4
    first(started(make, files=None))
    first(started(make, files=None))  # nobody knows whether it is the same tokenizer
    assert len(calls) == 6


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "garble"])
def test_a_damaged_store_is_noticed_and_made_again(tmp_path: Path, make: Any, harm: str) -> None:
    made = task("lm", data=rows(tmp_path / "t.jsonl", TEXTS), length=16)
    made.bind(make.model())
    before = made.drawer("calibrate", 0)(5)
    (folder,) = (cache() / "tokens").iterdir()
    ids = folder / "ids.bin"
    data = bytearray(ids.read_bytes())
    data[100] ^= 1
    {
        "flip": lambda: ids.write_bytes(data),
        "cut": lambda: ids.write_bytes(data[:-2]),
        "remove": lambda: (folder / "borders.bin").unlink(),
        "garble": lambda: (folder / "store.json").write_text("{"),
    }[harm]()
    made.bind(make.model())
    with pytest.warns(UserWarning, match="is damaged .* it is made again"):
        after = made.drawer("calibrate", 0)(5)
    assert torch.equal(before.inputs["tokens"], after.inputs["tokens"])
    made.bind(make.model())
    made.drawer("calibrate", 0)


def test_what_goes_wrong_while_tokenising_leaves_no_store(tmp_path: Path, make: Any) -> None:
    path = rows(tmp_path / "t.jsonl", TEXTS)
    made = task("lm", data=path)
    made.bind(started(make, size=50))
    with pytest.raises(DataError, match=r"the tokenizer gives the id \d+, which is beyond its size 50"):
        made.drawer("calibrate", 0)
    assert not list((cache() / "tokens").glob("*"))
    made = task("lm", data=path)
    made.bind(make.model())
    rows(path, TEXTS[:20])
    with pytest.raises(DataError, match=r"t.jsonl was changed while it was read"):
        made.drawer("calibrate", 0)


def test_a_long_document_is_tokenised_in_pieces(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tokens, "BATCH", 9000)
    text = "".join(f"line {i}\n" for i in range(9000))
    longest = []
    tokenizer = started(make).tokenizer
    whole = tokenizer.encode
    tokenizer.encode = lambda texts, **more: (longest.append(max(map(len, texts), default=0)), whole(texts, **more))[1]
    store = tokens_of(lambda: iter([["a"], [text[:70], text[70:]], ["b"]]), tokenizer, "three", len(text))
    assert max(longest) <= 8192 and len(longest) > 5
    assert store.borders.tolist() == [0, 3, 5 + len(text), 8 + len(text)]
    assert bytes(int(i) - 2 for i in store.ids[4 : 4 + len(text)]).decode() == text
    bare = tokens_of(lambda: iter([["a"], ["b"]]), tokenizer, "pieces", 2, whole=False)
    assert bare.ids.tolist() == [ord("a") + 2, ord("b") + 2] and bare.borders.tolist() == [0, 1, 2]
    assert store.ids.dtype == np.uint16 and "".join(cut([text])) == text


def test_text_files_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(SpecError, match=r"--text body: a.txt is no table, so it has no columns"):
        task("lm", data=tmp_path / "a.txt", text="body")


def test_rows_without_text_are_refused_when_strict(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t.jsonl: empty text \(line 3\)"):
        task("lm", data=rows(tmp_path / "t.jsonl", ["some words here", "more words there", ""]), strict=True)
