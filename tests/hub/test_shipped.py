"""The models that come with the package: found by name, sound, better than counting; floats stored in fewer bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import formwright as fw
from formwright.hub.locate import SHIPPED, known_names, locate
from formwright.hub.native import manifest
from formwright.kit.errors import DataError, SpecError
from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.tasks._lm import windows

NAMES = ("small-causal", "small-masked")
CODE = '''def read(self, size=-1):
    """Read up to size bytes from the object and return them."""
    if self.closed:
        raise ValueError("I/O operation on closed file")
    result = []
    for line in self.lines:
        result.append(line)
    return result
'''


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_enough(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(name) == SHIPPED / name and name in known_names()
    model = fw.load(name, verify=True)
    assert model.name == name and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 1_066_112
    assert model.spec == build(recipe(name), seed=None, device="meta").spec
    assert model.tokenizer.decode(model.rows([CODE])[0]) == CODE
    assert (model.tokenizer.pad_id, model.tokenizer.mask_id) == (0, 1)
    files = sum(file.stat().st_size for file in (SHIPPED / name).iterdir())
    assert files < 2_300_000
    figures = manifest(SHIPPED / name)["scores"]
    card = (SHIPPED / name / "README.md").read_text(encoding="utf-8")
    assert all(f"| {what} | {value:.4f} |" in card for what, value in figures.items())


def test_the_causal_model_knows_python() -> None:
    model = fw.load("small-causal")
    (window,) = windows(model.tokenizer, CODE, 256)
    logits = model(torch.tensor([window.tokens]))[0]
    nats = F.cross_entropy(logits, torch.tensor(window.targets), reduction="sum")
    assert float(nats.detach()) / np.log(2) / window.bytes < 1.5
    figures = manifest(SHIPPED / "small-causal")["scores"]
    assert figures["bits/byte"] < 1.5 < figures["bigram bits/byte"] < figures["unigram bits/byte"]


def test_the_masked_model_knows_python() -> None:
    model = fw.load("small-masked")
    row = torch.tensor(model.rows([CODE]))
    guessed = []
    for place in range(row.shape[1]):
        hidden = row.clone()
        hidden[0, place] = model.tokenizer.mask_id
        guessed.append(int(model(hidden)[0, place].argmax()) == int(row[0, place]))
    assert np.mean(guessed) > 0.4
    figures = manifest(SHIPPED / "small-masked")["scores"]
    assert figures["masked accuracy"] > 2 * figures["bigram masked accuracy"]
    assert figures["bits/masked token"] < figures["bigram bits/masked token"] < figures["unigram bits/masked token"]


def small(dtype: torch.dtype = torch.float32):
    model = build(recipe("small-causal", vocab=300, width=32, layers=1), seed=0)
    return model.to(dtype)


def test_floats_may_lie_in_half_the_bytes(tmp_path: Path) -> None:
    model = small()
    fw.save(model, tmp_path / "whole")
    fw.save(model, tmp_path / "half", store="float16")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = fw.load(tmp_path / "half")
    for ours, theirs in zip(model.parameters(), loaded.parameters()):
        assert theirs.dtype == torch.float32 and torch.equal(ours.detach().half().float(), theirs.detach())
    assert {p.dtype for p in fw.load(tmp_path / "half", dtype="float16").parameters()} == {torch.float16}
    fw.save(loaded, tmp_path / "again", store="float16")
    halves = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "again")]
    assert halves[0] == halves[1]


def test_what_half_cannot_say_is_refused(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.slot("b0.attention:q").weight[0, 0] = 1e6
    with pytest.raises(DataError, match="beyond float16"):
        fw.save(model, tmp_path / "half", store="float16")
    assert not (tmp_path / "half").exists()
    mixed = small()
    mixed.final_norm.double()
    with pytest.raises((SpecError, DataError), match="float"):
        fw.save(mixed, tmp_path / "half", store="float16")
    with pytest.raises(SpecError, match="is no float type"):
        fw.save(small(), tmp_path / "half", store="int8")
