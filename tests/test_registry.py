"""Names: unique, listed without importing anything heavy, found the moment a file is there, near ones suggested."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from formwright import registry
from formwright.kit.errors import SpecError
from formwright.registry import HOMES, INDEX, Paper, entries, find, names, resolve, resolve_layer, scan

HEAVY = ("torch", "numpy", "transformers", "safetensors", "tokenizers", "pydantic", "matplotlib", "plotly")


@pytest.fixture
def clean_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plug-ins registered by a test are gone after it."""
    monkeypatch.setattr(registry, "_plugins", {})


def test_the_index_is_what_the_files_say() -> None:
    record = json.loads(INDEX.read_text(encoding="utf-8"))
    from dataclasses import asdict

    found = [asdict(entry) for entry in scan()]
    assert record["entries"] == found, "run `python -m formwright.registry`"
    assert record["files"] == registry._sources(), "run `python -m formwright.registry`"


def test_every_name_loads_and_says_what_it_is() -> None:
    for (kind, name), entry in entries().items():
        assert kind in HOMES
        assert entry.summary, f"{kind}:{name} has no docstring and no summary"
        home = entry.module.removeprefix("formwright.").replace(".", "/")
        assert any(home.startswith(place) for place in HOMES[kind]), f"{kind}:{name} lives in {home}"
        target = entry.load()
        assert target.registered == (kind, name)
        assert target.paper == entry.paper


def test_listing_names_imports_nothing_heavy() -> None:
    code = f"""
    import sys
    import formwright
    assert dir(formwright) and formwright.__version__
    heavy = {HEAVY!r}
    assert not [name for name in heavy if name in sys.modules], sorted(sys.modules)
    from formwright import registry
    for kind in registry.HOMES:
        registry.names(kind)
    loaded = [name for name in heavy if name in sys.modules]
    assert not loaded, loaded
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """A package directory with ``files`` in place of ours, and no index."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    monkeypatch.setattr(registry, "INDEX", tmp_path / "_index.json")
    entries.cache_clear()
    monkeypatch.setattr(registry, "entries", entries)


@pytest.fixture
def fresh_entries():
    entries.cache_clear()
    yield
    entries.cache_clear()


MIXER = '@register("mixer", "new", paper=Paper("A", 2020))\nclass New:\n    """Mixes."""\n'


@pytest.mark.usefixtures("fresh_entries")
def test_a_new_file_is_found_without_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, {"parts/mixers/old.py": '@register("mixer", "old")\nclass Old:\n    """Old."""\n'})
    registry.main()
    assert names("mixer") == ["old"]
    (tmp_path / "parts/mixers/new.py").write_text(MIXER)
    entries.cache_clear()
    assert names("mixer") == ["new", "old"]
    found = find("mixer", "new")
    assert (found.module, found.attribute) == ("formwright.parts.mixers.new", "New")
    assert (found.paper, found.summary) == (Paper("A", 2020), "Mixes.")
    (tmp_path / "parts/mixers/old.py").unlink()
    entries.cache_clear()
    assert names("mixer") == ["new"]


@pytest.mark.usefixtures("fresh_entries")
def test_two_files_cannot_have_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, {"parts/mixers/a.py": MIXER, "parts/mixers/b.py": MIXER})
    with pytest.raises(SpecError, match=r"mixer 'new' is registered by formwright.parts.mixers.a and .*\.b"):
        scan()


@pytest.mark.usefixtures("fresh_entries")
@pytest.mark.parametrize("arguments", ["KIND, 'x'", "'mixer', NAME", "'mixr', 'x'"])
def test_kind_and_name_are_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    text = f"@register({arguments})\nclass X:\n    pass\n"
    package(tmp_path, monkeypatch, {"parts/mixers/a.py": text})
    with pytest.raises(SpecError, match=r"a.py, line 1: register takes a kind .* literal strings"):
        scan()


def test_near_names() -> None:
    with pytest.raises(SpecError, match=r"unknown mixer 'atention'; did you mean 'attention'?"):
        find("mixer", "atention")
    with pytest.raises(SpecError, match=r"unknown part 'gated-mpl'; did you mean 'gated-mlp'?"):
        resolve_layer("gated-mpl")
    with pytest.raises(SpecError, match=r"unknown kind 'mixr'; did you mean 'mixer'?"):
        registry.register("mixr", "x")
    assert resolve_layer("mixer:attention") is resolve_layer("attention") is resolve("mixer", "attention")


PLUGIN = """
from formwright.parts.base import Part, Traits
from formwright.parts.context import Context
from formwright.registry import register

@register("{kind}", "{name}")
class Doubled(Part):
    traits = Traits(causal=True, streams=True)

    def __init__(self, width, *, by: float = 2.0) -> None:
        super().__init__()
        self.by = by

    def forward(self, x, ctx: Context):
        return x * self.by
"""


@pytest.mark.usefixtures("clean_plugins")
def test_a_plugin_stands_where_a_name_does(tmp_path: Path) -> None:
    import torch

    import formwright as fw

    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.format(kind="channel", name="doubled"))
    stem = {"part": "linear", "features": 2, "width": 4}
    model = fw.build({"stem": stem, "layers": [{"part": f"{file}:Doubled", "by": 3.0, "norm": None}]})
    assert [item.id for item in model.walk()] == ["b0.doubled"]
    x = torch.randn(1, 3, 2)
    torch.testing.assert_close(model(x), 4.0 * model.embed(x)[0])
    # Once loaded, the name it registers is known like any other.
    assert "doubled" in names("channel")
    assert resolve_layer("doubled").__name__ == "Doubled"
    again = fw.build({"stem": stem, "layers": [{"part": "doubled", "by": 3.0, "norm": None}]})
    torch.testing.assert_close(again(x), model(x))
    with pytest.raises(SpecError, match=r"unknown option 'bye'; did you mean 'by'"):
        fw.build({"stem": stem, "layers": [{"part": f"{file}:Doubled", "bye": 3.0}]})


@pytest.mark.usefixtures("clean_plugins")
def test_plugins_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"does not exist"):
        resolve("mixer", f"{tmp_path}/none.py:X")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    with pytest.raises(SpecError, match=r"cannot be imported: ModuleNotFoundError"):
        resolve("mixer", f"{broken}:X")
    file = tmp_path / "mine2.py"
    file.write_text(PLUGIN.format(kind="channel", name="mine2") + "\ndef helper():\n    pass\n")
    with pytest.raises(SpecError, match=r"has no 'Doubld'; did you mean 'Doubled'"):
        resolve("channel", f"{file}:Doubld")
    from formwright.parts.make import make_part

    with pytest.raises(SpecError, match=r"'helper', which is no subclass of Part"):
        make_part({"part": f"{file}:helper"}, 8)


@pytest.mark.usefixtures("clean_plugins")
def test_a_plugin_cannot_take_a_name_that_is_taken(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"p{index}.py" for index in range(3))
    first.write_text(PLUGIN.format(kind="mixer", name="attention"))
    with pytest.raises(SpecError, match=r"mixer 'attention' is already registered by formwright.parts.mixers"):
        resolve("mixer", f"{first}:Doubled")
    second.write_text(PLUGIN.format(kind="mixer", name="own"))
    third.write_text(PLUGIN.format(kind="mixer", name="own"))
    mine = resolve("mixer", f"{second}:Doubled")
    with pytest.raises(SpecError, match=r"mixer 'own' is already registered by formwright_plugin_p1"):
        resolve("mixer", f"{third}:Doubled")
    assert resolve("mixer", "own") is mine


def test_papers_read_well() -> None:
    assert str(Paper("Vaswani et al.", 2017, "1706.03762")) == "Vaswani et al., 2017, arXiv 1706.03762"
    assert str(Paper("Ba", 2016)) == "Ba, 2016"
