"""Adapting: prices change nothing, what trains is what was said, and what is written is as small as it can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import formwright as fw
from formwright.hub import load, load_adapter
from formwright.kit.errors import Refusal, SpecError
from formwright.surgery import samples
from formwright.tasks import task
from formwright.training.adapt import adapt, methods, price, prices


@pytest.fixture
def table(tmp_path: Path) -> Path:
    words = {"red": ["rose", "blood", "brick"], "blue": ["sky", "sea", "ink"], "green": ["grass", "leaf", "moss"]}
    lines = ["text,label"]
    for turn in range(45):
        label = list(words)[turn % 3]
        lines.append(f"{' '.join(words[label][(turn + i) % 3] for i in range(4))} {turn},{label}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "t.csv"


def reader():
    return fw.load("small-causal")


def test_methods_are_found_by_what_they_promise():
    names = methods()
    assert names[:2] == ["full", "head"]
    assert {"lora", "bitfit", "prompt-tuning", "sequential-adapter", "meft", "unipelt"} <= set(names)
    assert not {"merge", "fuse", "head-only", "spt", "llm-int8"} & set(names)


def test_prices_leave_the_model_as_it_is(table):
    model, given = reader(), task("classification", data=str(table), text="text", label="label")
    before = samples.state(model)
    found = {one.method: one for one in prices(model, given, ["full", "head", "lora", "layernorm-tuning"], steps=1)}
    assert samples.equal(samples.state(model), before)
    assert len(model.history) == len(reader().history) and all(p.requires_grad for p in model.parameters())
    full, lora = found["full"], found["lora"]
    assert full.share == 1.0 and lora.trainable < 0.1 * full.trainable
    assert lora.memory.optimizer == 8 * lora.trainable
    assert found["head"].memory.saved < lora.memory.saved < full.memory.saved
    assert all(one.seconds > 0 for one in found.values())


def test_a_method_that_does_not_fit_says_why(table):
    given = task("classification", data=str(table), text="text", label="label")
    refused = price(reader(), given, "lora", rank=10**6)
    assert "rank" in refused.refused and refused.memory is None
    with pytest.raises(SpecError, match="lora"):
        price(reader(), given, "lorra")


def test_a_fresh_head_is_written_with_the_whole_model(table, tmp_path):
    given = task("classification", data=str(table), text="text", label="label")
    done = adapt(reader(), given, "lora", out=tmp_path / "out", steps=30, lr=1e-2, show=False, options={"rank": 4})
    assert done.whole and done.before is None and done.trained.steps == 30
    again = load(str(tmp_path / "out"))
    given.bind(again)
    assert given.score(again, "test").value == pytest.approx(done.test.value)
    assert done.select.value > 0


def test_an_adapter_is_written_alone_and_loads_onto_its_model(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "abcdefgh":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"def {name}(x):\n    return x + {ord(name)}\n" * 20)
    given = task("lm", data=str(tmp_path / "texts"))
    model = reader()
    done = adapt(model, given, "lora", out=tmp_path / "mine", steps=3, show=False)
    assert not done.whole and done.before is not None
    assert sum(p.stat().st_size for p in (tmp_path / "mine").rglob("*.safetensors")) < 200_000
    again = load_adapter(reader(), tmp_path / "mine")
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids), model.eval()(ids))


def test_merging_writes_plain_weights(table, tmp_path):
    given = task("classification", data=str(table), text="text", label="label")
    adapt(reader(), given, "lora", out=tmp_path / "out", steps=2, show=False, merge=True)
    merged = load(str(tmp_path / "out"))
    assert not any("adapters" in name for name in merged.state_dict())
    with pytest.raises(Refusal, match="cannot be merged"):
        adapt(reader(), given, "sequential-adapter", steps=1, show=False, merge=True)


def test_full_takes_no_options(table):
    given = task("classification", data=str(table), text="text", label="label")
    with pytest.raises(Refusal, match="takes no options"):
        adapt(reader(), given, "full", steps=1, options={"rank": 2})
