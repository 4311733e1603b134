"""Bits per byte: bytes are counted of the text, whatever the tokenizer; closed forms for simple models."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formwright.kit.errors import DataError, SpecError
from formwright.tasks import task
from formwright.tasks._lm import pieces, windows
from formwright.tasks.base import SPLITS


@given(st.text(max_size=400), st.integers(1, 50))
def test_pieces_are_the_text_cut_at_lines(text: str, most: int) -> None:
    cut = pieces(text, most)
    assert "".join(cut) == text
    assert all(0 < len(piece) <= most for piece in cut)


class Words:
    """Tokens are runs without a space; spaces belong to no token. Made to have gaps between the spans."""

    pad_id = 0

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        import re

        spans = [match.span() for match in re.finditer(r"[^ ]+", text)]
        return [len(text[a:b]) for a, b in spans], spans


class Started(Words):
    start_id = 99


@given(st.text(alphabet="ab ü€", max_size=80), st.integers(1, 7))
@settings(max_examples=80)
def test_windows_cover_every_target_and_byte_once(text: str, length: int) -> None:
    for tokenizer in (Words(), Started()):
        ids, spans = tokenizer.offsets(text)
        found = windows(tokenizer, text, length)
        targets = [target for window in found for target in window.targets]
        opened = isinstance(tokenizer, Started)
        assert targets == (ids if opened else ids[1:])
        assert all(len(w.tokens) == len(w.targets) <= length for w in found)
        if found:
            begin = 0 if opened else spans[0][1]
            assert sum(w.bytes for w in found) == len(text[begin : spans[-1][1]].encode())
            assert all(w.tokens[1:] == w.targets[:-1] for w in found)


def folder(path: Path, files: int = 40) -> Path:
    path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(files):
        words = rng.choice(["model", "tensor", "naïve", "for", "in", "x =", "\n"], 200)
        (path / f"f{i:02}.txt").write_text(" ".join(words) + f" {i}\n", encoding="utf-8")
    return path


def constant(make: Any, vocabulary: int = 258) -> Any:
    return make.logit_view(lambda batch: torch.zeros(*batch.inputs["tokens"].shape, vocabulary))


def test_a_uniform_model_costs_log2_of_its_vocabulary_per_token(tmp_path: Path, make: Any) -> None:
    made = task("lm", data=folder(tmp_path / "texts"), length=32)
    made.bind(make.model())
    score = made.score(constant(make), "test")
    # One token a byte here, except that the first byte of a text is not predicted.
    assert score.value == pytest.approx(log2(258), rel=1e-3)
    assert score.per_item is not None and score.per_item.shape == score.curves["bytes"].shape
    everyone = np.arange(len(score.per_item))
    assert made.resampled(score, everyone) == pytest.approx(score.value)
    assert not made.higher_is_better and made.metric == "bits/byte"
    baselines = made.baselines("test")
    assert baselines["uniform"].value == pytest.approx(8.0)
    assert baselines["zlib"].value < baselines["byte entropy"].value < 5


def test_a_model_that_knows_the_next_token_costs_nothing(tmp_path: Path, make: Any) -> None:
    made = task("lm", data=folder(tmp_path / "texts"), length=32)
    made.bind(make.model())

    def oracle(batch: Any) -> torch.Tensor:
        return 100.0 * torch.nn.functional.one_hot(batch.targets["tokens"].clamp(min=0), 258).float()

    assert made.score(make.logit_view(oracle), "select").value == pytest.approx(0.0, abs=1e-6)


def test_training_batches_are_packed(tmp_path: Path, make: Any) -> None:
    made = task("lm", data=folder(tmp_path / "texts"), length=32, tokens=100)
    made.bind(make.model(max_length=64))
    batches = list(made.batches("calibrate", seed=0, budget=300))
    assert len(batches) == 300
    for batch in batches[:20]:
        tokens, targets, offsets = batch.inputs["tokens"], batch.targets["tokens"], batch.offsets["tokens"]
        assert tokens.shape == targets.shape == (1, int(offsets[-1])) and 64 < tokens.shape[1] <= 100
        for start, stop in pairwise(offsets.tolist()):
            assert torch.equal(tokens[0, start + 1 : stop], targets[0, start : stop - 1]) and 0 < stop - start <= 32
    again = list(made.batches("calibrate", seed=0, budget=3))
    assert all(torch.equal(a.inputs["tokens"], b.inputs["tokens"]) for a, b in zip(batches, again))
    later = made.drawer("calibrate", 0)(299)
    assert torch.equal(later.inputs["tokens"], batches[-1].inputs["tokens"])
    other = next(iter(made.batches("calibrate", seed=1, budget=1)))
    assert not torch.equal(other.inputs["tokens"], batches[0].inputs["tokens"])
    with pytest.raises(SpecError, match="test is only scored"):
        made.drawer("test", 0)
    with pytest.raises(SpecError, match="tokens=31 of a batch must be at least the length of a piece, 32"):
        task("lm", data=tmp_path / "texts", length=32, tokens=31)


def test_an_epoch_shows_every_token_once(tmp_path: Path, make: Any) -> None:
    made = task("lm", data=folder(tmp_path / "texts", 9), length=16, rows=1)
    made.bind(make.model())
    texts = [path.read_text(encoding="utf-8") for path in sorted((tmp_path / "texts").iterdir())]
    held = [text for text in texts if text in made.texts("calibrate")]
    assert len(held) == 7
    wanted = Counter(byte + 2 for text in held for byte in text.encode()[1:])
    draw, seen, index = made.drawer("calibrate", 3), Counter(), 0
    while sum(seen.values()) < sum(wanted.values()):
        seen.update(draw(index).targets["tokens"].flatten().tolist())
        index += 1
    assert seen == wanted


def test_files_stay_whole_and_identical_ones_together(tmp_path: Path) -> None:
    path = folder(tmp_path / "texts")
    (path / "copy.txt").write_bytes((path / "f00.txt").read_bytes())
    (path / ".hidden").write_bytes(b"\xff\xfe")
    (path / "empty.txt").write_text("", encoding="utf-8")
    made = task("lm", data=path)
    assert made.documents == 40
    held = [set(made.texts(split)) for split in SPLITS]
    assert all(held) and sum(map(len, held)) == len(set().union(*held)) == 40
    sizes = [sum(len(text) for text in made.texts(split)) for split in SPLITS]
    assert sizes[0] > 4 * sizes[1]
    assert made.fingerprint() == task("lm", data=path).fingerprint()
    moved = path.rename(tmp_path / "elsewhere")
    assert made.fingerprint() == task("lm", data=moved).fingerprint()
    assert made.fingerprint() != task("lm", data=moved, seed=1).fingerprint()


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = folder(tmp_path / "texts", 5)
    (path / "a.bin").write_bytes(b"\xff\xfe\x00")
    (path / "sub").mkdir()
    (path / "sub" / "b.txt").write_bytes("schön".encode("cp1252"))
    with pytest.raises(DataError, match=r"texts: not UTF-8 text: a.bin, sub/b.txt; convert or remove them"):
        task("lm", data=path)
    made = task("lm", data=path, strict=False)
    assert "2 files skipped: not UTF-8 text (a.bin, sub/b.txt)" in made.describe()
    with pytest.raises(DataError, match="does not exist"):
        task("lm", data=tmp_path / "none")


def test_one_file_is_split_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of the book\n" for i in range(5000)), encoding="utf-8")
    made = task("lm", data=path)
    assert any(line.startswith("fewer than three files, so they are split in pieces of ") for line in made.describe())
    assert sorted("".join(made.texts(split)).count("\n") for split in SPLITS)[0] > 100
    path.write_text("short\n", encoding="utf-8")
    with pytest.raises(DataError, match="has 1 different texts; three splits need at least 3"):
        task("lm", data=path)


def test_models_that_do_not_fit(tmp_path: Path, make: Any) -> None:
    made = task("lm", data=folder(tmp_path / "texts"), length=256)
    with pytest.raises(DataError, match="not bound to a model"):
        made.score(constant(make), "test")
    with pytest.raises(DataError, match="windows of 256 tokens; toy takes 128: say length=128"):
        made.bind(make.model(max_length=128))
    with pytest.raises(DataError, match=r"needs a tokenizer with offsets\(\)"):
        made.bind(make.model(tokenizer=object()))
    made.bind(make.model())
    with pytest.raises(DataError, match=r"needs logits \(rows, length, vocabulary\); the model gives \(8, 258\)"):
        made.score(make.logit_view(lambda batch: torch.zeros(len(batch.inputs["tokens"]), 258)), "test")
    with pytest.raises(SpecError, match="length, rows and limit must be at least 1"):
        task("lm", data=tmp_path / "texts", length=0)


@pytest.fixture(scope="module")
def stdlib() -> Any:
    return task("lm/stdlib")


def test_stdlib_text(stdlib: Any) -> None:
    sizes = {split: sum(len(text.encode()) for text in stdlib.parts[split]) for split in SPLITS}
    assert sizes["calibrate"] > 5_000_000
    assert 300_000 < sizes["select"] <= 400_000 and 300_000 < sizes["test"] <= 400_000
    held = [set(stdlib.parts[split]) for split in SPLITS]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    assert stdlib.fingerprint() == task("lm/stdlib").fingerprint()
    got = stdlib.baselines("test")
    assert got["uniform"].value == 8.0
    assert 4 < got["byte entropy"].value < 6
    assert 1.5 < got["zlib"].value < 3
    assert "lower is better" in "\n".join(stdlib.describe())


def test_stdlib_trains_a_bigram_below_the_byte_entropy(stdlib: Any, make: Any) -> None:
    """A table of byte pairs counted on calibrate batches beats byte frequencies on the held-out split."""
    stdlib.bind(make.model())
    counts = torch.ones(258, 258)
    for batch in stdlib.batches("calibrate", seed=0, budget=100):
        tokens, targets = batch.inputs["tokens"], batch.targets["tokens"]
        known = targets != -100
        counts.index_put_((tokens[known], targets[known]), torch.ones(int(known.sum())), accumulate=True)
    table = (counts / counts.sum(1, keepdim=True)).log()
    small = task("lm/stdlib", limit=60_000)
    small.bind(make.model())
    score = small.score(make.logit_view(lambda batch: table[batch.inputs["tokens"]]), "test")
    assert score.value < small.baselines("test")["byte entropy"].value - 0.5
    assert score.per_item is not None
    half = np.arange(len(score.per_item) // 2)
    assert 2 < small.resampled(score, half) < 6
