"""Directories of every format version that was ever released load for ever, and answer as they did."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

import formwright as fw
from formwright.hub import load_adapter, native
from formwright.surgery.adapt.switch import use
from formwright.surgery.base import words

OLD = Path(__file__).parent / "old"
VERSIONS = sorted(entry.name for entry in OLD.iterdir() if (entry / "expected.json").is_file())
CASES = [(version, name) for version in VERSIONS for name in json.loads((OLD / version / "expected.json").read_text())]


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_old", OLD / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_version_is_kept() -> None:
    assert [f"v{number}" for number in range(1, native.FORMAT + 1)] == VERSIONS


@pytest.mark.parametrize(("version", "name"), CASES)
def test_an_old_directory_loads_and_answers_as_it_did(
    make: ModuleType, tmp_path: Path, version: str, name: str
) -> None:
    expected = json.loads((OLD / version / "expected.json").read_text())[name]
    shutil.copytree(OLD / version / name, tmp_path / name)  # loading cleans up beside what it loads
    model = fw.load(tmp_path / name, verify=True)
    answer = torch.tensor(expected["answer"]).reshape(expected["shape"])
    torch.testing.assert_close(make.asked(model), answer, atol=expected["tolerance"], rtol=0)
    assert [entry.name for entry in model.history] == expected["history"]
    assert [key for key, p in model.named_parameters() if p.requires_grad] == expected["trains"]
    assert all(words(entry) for entry in model.history)
    fw.save(model, tmp_path / "again")
    assert torch.equal(make.asked(fw.load(tmp_path / "again")), make.asked(model))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_adapter_loads_onto_its_old_model(make: ModuleType, tmp_path: Path, version: str) -> None:
    shutil.copytree(OLD / version / "decoder", tmp_path / "decoder")
    whole, base = (fw.load(tmp_path / "decoder") for _ in range(2))
    while any(entry.name == "lora" for entry in base.history):
        fw.undo(base)
    load_adapter(base, tmp_path / "decoder/adapters/two", verify=True)
    assert torch.equal(make.asked(use(base, "two")), make.asked(use(whole, "two")))
