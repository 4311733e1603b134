"""Names of models: directories, installed packages, the hub's cache; nothing else, and nothing imported."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

import formwright as fw
from formwright.hub.locate import DATA_FILES, cache_folder, known_names, locate
from formwright.kit.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home" / "hub"


def model_at(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names or ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def package(site: Path, name: str, *, inside: str = "model", listed: bool = True, top: str = "") -> Path:
    """An installed distribution whose code would fail if it ran."""
    top = top or name.replace("-", "_")
    folder = model_at(site / top / inside)
    (site / top / "__init__.py").write_text("raise RuntimeError('imported')")
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    if listed:
        files = [f.relative_to(site).as_posix() for f in (site / top).rglob("*") if f.is_file()]
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def test_a_directory_is_itself_and_wins(site: Path, tmp_path: Path) -> None:
    package(site, "some-model")
    here = model_at(Path("some-model"))
    assert locate("some-model") == here
    assert locate(tmp_path / "here" / "some-model") == tmp_path / "here" / "some-model"
    ours = model_at(Path("ours"), "formwright.json")
    assert locate("./ours") == ours


def test_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model_at(tmp_path / "mine")
    assert locate("~/mine") == tmp_path / "mine"


@pytest.mark.parametrize("listed", [True, False])
def test_an_installed_package_is_searched_and_not_imported(site: Path, listed: bool) -> None:
    folder = package(site, "some-model", listed=listed)
    for name in ("some-model", "some_model") if listed else ("some-model",):
        assert locate(name).resolve() == folder.resolve()
    assert "some_model" not in sys.modules


def test_a_distribution_whose_package_has_another_name(site: Path) -> None:
    folder = package(site, "some-weights", top="inner")
    assert locate("some-weights").resolve() == folder.resolve()
    assert locate("inner").resolve() == folder.resolve()


def test_the_shallowest_directory_of_a_package_is_meant(site: Path) -> None:
    folder = package(site, "some-model", inside="model")
    model_at(folder / "onnx" / "small")
    assert locate("some-model").resolve() == folder.resolve()


def test_a_package_with_several_models_or_none(site: Path) -> None:
    package(site, "two-models", inside="a")
    (site / "two_models-1.2.dist-info/RECORD").unlink()
    model_at(site / "two_models/b")
    with pytest.raises(DataError, match=r"two-models 1\.2 carries several models; give the path of one: .*a, .*b"):
        locate("two-models")
    with pytest.raises(DataError, match=r"installed packages: pytest [\d.]+ carries no weights"):
        locate("pytest")


def cached(cache: Path, name: str, *, ref: str | None = "abc", commits: tuple[str, ...] = ("abc",)) -> list[Path]:
    kept = cache / f"models--{name.replace('/', '--')}"
    folders = [model_at(kept / "snapshots" / commit) for commit in commits]
    if ref is not None:
        (kept / "refs").mkdir()
        (kept / "refs/main").write_text(ref)
    return folders


def test_the_hubs_cache(own_cache: Path) -> None:
    (folder,) = cached(own_cache, "org/name")
    assert locate("org/name") == folder
    (plain,) = cached(own_cache, "gpt-tiny")
    assert locate("gpt-tiny") == plain
    old, new = cached(own_cache, "org/commits", ref=None, commits=("old", "new"))
    os.utime(old, (time.time() - 100,) * 2)
    assert locate("org/commits") == new
    cached(own_cache, "org/cut")[0].joinpath("model.safetensors").unlink()
    with pytest.raises(DataError, match=r"org/cut is incomplete there .it needs config\.json and \*\.safetensors"):
        locate("org/cut")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere"
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "huggingface" / "hub"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "huggingface" / "hub"


def test_nothing_found_tells_what_was_tried_and_the_nearest_name(site: Path, own_cache: Path) -> None:
    package(site, "some-model")
    cached(own_cache, "org/name")
    assert {"some-model", "org/name"} <= set(known_names())
    with pytest.raises(DataError) as caught:
        locate("some-modle")
    told = str(caught.value)
    assert told.startswith("no model 'some-modle'; did you mean 'some-model'?")
    for line in ("some-modle: no such directory", "installed packages: none is called some-modle", "hub cache: "):
        assert line in told
    with pytest.raises(DataError, match=r"network: not asked \(allow it with --download, in Python download=True\)"):
        locate("org/nothing")
    with pytest.raises(DataError) as caught:
        locate("./some-model")
    assert "hub cache" not in str(caught.value) and "installed packages" not in str(caught.value)


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other/notes.txt").write_text("")
    model_at(Path("outer/inner"))
    for name, sentence in (
        ("empty", "an empty directory"),
        ("other", r"holds neither formwright\.json nor config\.json \(but notes\.txt\)"),
        ("outer", r"holds no model itself, but inner in it does"),
    ):
        with pytest.raises(DataError, match=sentence):
            fw.load(name)
    with pytest.raises(DataError, match=r"is a file; a model is a directory: give outer/inner"):
        locate("outer/inner/model.safetensors")


def test_downloading_only_when_asked(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub as hub

    asked: list[tuple] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(model_at(tmp_path / f"got{len(asked)}", *(["README.md"] if len(asked) > 1 else [])))

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    with pytest.raises(DataError):
        locate("org/name")
    assert asked == []
    assert locate("org/name", download=True) == tmp_path / "got1"
    assert asked == [("org/name", list(DATA_FILES))]
    assert not {"*.py", "*.bin", "*"} & set(DATA_FILES)
    with pytest.raises(DataError, match=r"was downloaded to .*got2, but holds neither"):
        locate("org/name", download=True)

    def fail(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=r"cannot download org/name: no route to host$"):
        locate("org/name", download=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match="needs huggingface_hub: pip install huggingface_hub"):
        locate("org/name", download=True)


def test_an_artifact_whose_writer_died_between_two_renames_is_found_again() -> None:
    model_at(Path("mine.old-999999999"), "formwright.json")
    assert locate("mine") == Path("mine")


def test_load_names_a_model_as_it_was_asked_for(site: Path) -> None:
    spec = {"stem": {"part": "token-embedding", "vocab": 5, "width": 4}, "layers": []}
    fw.save(fw.build(spec), "models/small")
    assert fw.load("models/small").name == "small"
    assert fw.load(Path("models/../models/small")).name == "small"
    os.chdir("models/small")
    assert fw.load(".").name == "small"
