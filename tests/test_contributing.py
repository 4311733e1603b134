"""CONTRIBUTING.md shows what ``formwright new`` writes, and each of its examples does the whole way: it loads as a
plug-in, stands in a model, is applied, scored, trained, saved and loaded again."""

from __future__ import annotations

import configparser
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import formwright as fw
from formwright import registry
from formwright.cli.new import WHATS, attribute, function_name, render
from plugins import forgotten

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SHOWN = re.compile(r"<!-- formwright new (\w+) ([\w-]+) -->\n```python\n(.*?)^```$", re.S | re.M)
EXAMPLES = {what: (name, source) for what, name, source in SHOWN.findall(TEXT)}
DECODER = {
    "stem": {"part": "token-embedding", "vocab": 12, "width": 16},
    "layers": [{"part": "attention", "heads": 2, "causal": True}, {"part": "mlp", "hidden": 24}],
    "head": {"part": "lm", "vocab": 12},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory that holds the four examples as a reader has copied them from the page."""
    monkeypatch.chdir(tmp_path)
    for name, source in EXAMPLES.values():
        (tmp_path / f"{function_name(name)}.py").write_text(source, encoding="utf-8")
    with forgotten():
        yield tmp_path


def block(language: str, after: str) -> str:
    """The first block of a language after a line of the page."""
    found = re.search(rf"```{language}\n(.*?)^```$", TEXT[TEXT.index(after) :], re.S | re.M)
    assert found is not None
    return found[1]


def sentences(seed: int, index: int) -> fw.Batch:
    """Rows of ids and the ids one further on."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    tokens = torch.randint(0, 12, (4, 9), generator=generator)
    return fw.Batch(inputs={"tokens": tokens[:, :-1]}, targets={"tokens": tokens[:, 1:]})


def test_every_kind_is_shown_as_it_is_written() -> None:
    assert set(EXAMPLES) == set(WHATS)
    for what, (name, source) in EXAMPLES.items():
        assert source == render(what, name), f"the {what} in CONTRIBUTING.md is stale; run python docs/build.py"
        assert f"formwright new {what} {name}\n" in TEXT  # the command that writes it stands on the page too


def test_every_kind_loads_by_its_path(here: Path) -> None:
    for what, (name, _) in EXAMPLES.items():
        path = f"{function_name(name)}.py:{attribute(what, name)}"
        made = registry.resolve(WHATS[what][0][0], path)
        assert made.registered[1] == name


# ---------------------------------------------------------------------- the whole way


def test_the_part(here: Path) -> None:
    spec = json.loads(block("json", "### A part"))
    model = fw.build(spec, seed=0)
    assert model.causal and model.streams
    assert model.layout()[0]["is"] == "token-shift"

    run = fw.train(model, sentences, objective="causal-lm", steps=2, lr=1e-2)
    assert all(loss == loss for _, loss in run.losses)
    fw.apply(model, "lora", rank=2, where="out")
    fw.save(model, "shifted")
    loaded = fw.load("shifted", plugin="token_shift.py")
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(loaded(tokens), model(tokens))
    ids = fw.generate(loaded, [[3, 1, 4], [1]], max_new=3)
    assert [len(row) for row in ids] == [3, 3]
    assert ids[0] == fw.generate(loaded, [3, 1, 4], max_new=3)


def test_a_saved_model_does_not_import_the_part_unasked(here: Path) -> None:
    """In a process that has never seen the file."""
    fw.save(fw.build(json.loads(block("json", "### A part")), seed=0), "shifted")
    registry._plugins.clear()
    for name in [name for name in sys.modules if name.startswith("formwright_plugin_")]:
        del sys.modules[name]
    with pytest.raises(fw.FormwrightError, match=r"token_shift\.py"):
        fw.load("shifted")
    assert fw.load("shifted", plugin="token_shift.py").layout()[0]["is"] == "token-shift"


def test_the_surgery(here: Path) -> None:
    model = fw.build(DECODER, seed=0)
    original = fw.copy(model)
    fw.apply(model, "drop_bias.py:DropBias")
    assert all(slot.dense_bias() is None for slot in model.slots().values())
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens), original(tokens))  # fresh biases are zero

    fw.train(model, sentences, objective="causal-lm", steps=2, lr=1e-2)
    assert not torch.equal(model(tokens), original(tokens))
    fw.apply(model, "lora", rank=2)
    fw.save(model, "bare")
    loaded = fw.load("bare", plugin="drop_bias.py")
    assert torch.equal(loaded(tokens), model(tokens))
    assert [e.name for e in loaded.history if e.kind == "surgery"] == ["drop_bias.py:DropBias", "lora"]


def test_the_surgery_below_an_adapter(here: Path) -> None:
    registry.load_plugin("drop_bias.py")
    model = fw.apply(fw.build(DECODER, seed=0), "lora", rank=2)
    fw.apply(model, "drop-bias", where="b0.*")
    kinds = model.layout()[0]["slots"]
    assert kinds["q"] == "lora(dense)"
    assert model.slot("b0.attention:q").dense_bias() is None


def test_the_task(here: Path) -> None:
    task = fw.task("echo.py:echo", length=6, size=60)
    model = fw.build(
        {
            "stem": {"part": "token-embedding", "vocab": 3, "width": 16, "positions": {"kind": "learned", "max": 8}},
            "layers": [{"part": "attention", "heads": 2}, {"part": "mlp", "hidden": 24}],
            "head": {"part": "sequence-classifier", "classes": 2},
        },
        seed=0,
    )
    task.bind(model)
    before = task.score(model, "test")
    assert before.per_item is not None and len(before.per_item) == 60
    run = fw.train(model, task, objective="classification", steps=60, lr=1e-2)
    assert run.losses[-1][1] < run.losses[0][1]
    assert task.score(model, "test").value > max(0.8, before.value)  # six tokens are learnt in a few steps
    assert task.fingerprint() == fw.task("echo.py:echo", length=6, size=60).fingerprint()


def test_the_op(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own tests of it, run as a reader would have them beside the file."""
    monkeypatch.syspath_prepend(str(here))
    module = ModuleType("op_test")
    try:
        exec(compile(block("python", "<!-- the test of the op -->"), "CONTRIBUTING.md", "exec"), module.__dict__)
        checks: list[Any] = [check for name, check in vars(module).items() if name.startswith("test_")]
        assert len(checks) == 2
        for check in checks:
            check()
    finally:
        sys.modules.pop("swiglu", None)


# ---------------------------------------------------------------------- the house


def test_the_house_is_the_import_contract() -> None:
    """The table's order is the contract's, and it names every package that there is."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    order: list[list[str]] = []
    for line in contract["importlinter:contract:layers"]["layers"].split("\n"):
        names = [name.strip(" ()").removeprefix("formwright.") for name in line.split("|")]
        order.append(sorted(name for name in names if name and list(registry.ROOT.glob(f"{name}*"))))
    order = [names for names in order if names]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in TEXT.split("\n") if line.startswith("| `")]
    known = {name for names in order for name in names}
    house = [sorted(names) for names in rows if names and set(names) <= known]
    assert house == order
    packages = {path.name for path in registry.ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert packages <= {name for held in house for name in held} | {"report"}
