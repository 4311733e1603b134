"""The same search with the workers of a local Ray: same ranking, same unhealed cut, healing in several sets at once."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import formwright as fw
import small
from formwright.cli.main import main
from formwright.kit.errors import DataError, SpecError
from formwright.search import chain, crew
from formwright.search.bench import Bench
from plugins import forgotten

ray = pytest.importorskip("ray", reason="ray is not installed")

#: A task that kills every process but the one it was made in, when it is to score a model without this sublayer.
DEADLY = """
import os
from pathlib import Path

from formwright.tasks.classification import Classification


class Deadly(Classification):
    def __init__(self, data, item, log):
        super().__init__(data, text="body", label="queue")
        self.item, self.log, self.home = item, log, os.getpid()

    def score(self, view, split):
        if os.getpid() != self.home and view.item(self.item).dropped:
            with Path(self.log).open("a") as file:
                file.write("died")
            os._exit(1)
        return super().score(view, split)
"""

#: A part in a file of its own, which a worker has to be sent.
TWICE = """
from formwright.parts.base import Part


class Twice(Part):
    def __init__(self, width):
        super().__init__()

    def forward(self, x, ctx):
        return 2 * x
"""


@pytest.fixture(scope="module")
def local() -> Iterator[crew.Cluster]:
    """A Ray with two processors, started as ``--ray local`` starts one."""
    init = ray.init
    # Ray leaves the handles of the processes that it starts to the garbage collector.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray, "init", lambda **options: init(num_cpus=2, **options))
            started = crew.hire("local")
        assert isinstance(started, crew.Cluster)
        with started:
            yield started
        del started
        gc.collect()
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tickets.csv for a classifier, pairs.jsonl for an encoder."""
    made = tmp_path_factory.mktemp("data")
    small.table(made / "tickets.csv")
    with (made / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for text, _ in small.sentences(160, 3):
            file.write(json.dumps({"query": " ".join(text.split()[:3]), "document": text}) + "\n")
    return made


@pytest.fixture
def plugins() -> Iterator[None]:
    with forgotten():
        yield


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Healings of a few steps."""
    monkeypatch.setattr(chain, "LEAST", 2)
    monkeypatch.setattr(chain, "ENOUGH", 8)


def results(run: Path) -> dict[str, dict[str, Any]]:
    return {line["key"]: line for line in map(json.loads, (run / "results.jsonl").read_text().splitlines())}


def test_the_same_search_in_order_and_on_ray(local: crew.Cluster, folder: Path, tmp_path: Path, brief: None) -> None:
    model = small.encoder()
    task = fw.task("retrieval", data=str(folder / "pairs.jsonl"), query="query", document="document")
    lines: list[str] = []
    for name, address in (("here", None), ("away", "local")):
        options: dict[str, Any] = {"keep": 0.8, "minutes": 0.5, "target": "macs", "shape": "encode:8x16"}
        found = fw.slim(model, task=task, out=tmp_path / name, ray=address, say=lines.append, **options)
        assert "--ray" not in found.command
    here, away = results(tmp_path / "here.run"), results(tmp_path / "away.run")
    assert "  Ray local: 2 workers of 1 thread; timing stays here" in lines
    assert here["order"] == away["order"] and set(here["order"]["loss"]) == {i.id for i in model.residuals()}
    unhealed = {key for key in here if key.startswith("candidate/u")}
    assert unhealed == {key for key in away if key.startswith("candidate/u")} and len(unhealed) > 1
    for key in unhealed:
        assert here[key] == away[key]
        score = key.replace("candidate", "select")
        assert here[score]["per_item"] == away[score]["per_item"]
    assert (tmp_path / "away.run" / "recipe.json").read_text().find("ray") < 0


def test_sets_are_healed_at_the_same_time(
    local: crew.Cluster, folder: Path, tmp_path: Path, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "MISSES", 0)  # nothing goes unhealed, so every set is worth healing
    task = fw.task("classification", data=str(folder / "tickets.csv"), text="body", label="queue")
    options: dict[str, Any] = {"keep": 0.5, "minutes": 0.5, "target": "macs", "shape": "encode:8x16"}

    class Stop(Exception):
        pass

    def stop(**state: Any) -> None:
        if "and heal" in state["now"]:
            raise Stop

    model = small.classifier()
    with pytest.raises(Stop):
        fw.slim(model, task=task, out=tmp_path / "s", status=stop, **options)
    begun = (tmp_path / "s.run/results.jsonl").read_text()
    fw.slim(model, task=task, out=tmp_path / "s", ray="local", resume=True)
    found = results(tmp_path / "s.run")
    assert (tmp_path / "s.run/results.jsonl").read_text().startswith(begun)
    sets = found["heal/1"]["sets"]
    assert [made["key"] for made in sets] == ["1", "1.2"] and len(sets[0]["rung"]) != len(sets[1]["rung"])
    for made in sets:
        assert 2 <= made["steps"] <= 8
        healed = found[f"candidate/{made['key']}"]
        assert healed["drops"] == made["rung"] and healed["healed"] == made["steps"]
        again = fw.load(tmp_path / "s.run/steps" / made["key"])
        assert {i.id for i in model.residuals()} - {i.id for i in again.residuals()} == set(made["rung"])
        assert task.score(again, "select").value == pytest.approx(healed["select"])
    # What was begun with Ray is finished without.
    before = (tmp_path / "s.run/results.jsonl").read_text()
    fw.slim(model, task=task, out=tmp_path / "s", resume=True)
    assert (tmp_path / "s.run/results.jsonl").read_text() == before


def test_a_candidate_that_kills_its_worker_is_skipped(
    local: crew.Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: None
) -> None:
    monkeypatch.setattr(crew, "RETRIES", 1)
    monkeypatch.setattr(chain.Chain, "healed", lambda *rest: None)
    order = ["b0.mlp", "b1.mlp", "b1.attention", "b0.attention"]
    monkeypatch.setattr(chain.Chain, "order", lambda self: (order, dict.fromkeys(order, 0.25)))
    (tmp_path / "deadly.py").write_text(DEADLY)
    lines: list[str] = []
    model = small.classifier()
    options = {"data": str(folder / "tickets.csv"), "item": "b1.mlp", "log": str(tmp_path / "log")}
    task = fw.task(f"{tmp_path}/deadly.py:Deadly", **options)
    options = {"keep": 0.1, "minutes": 0.5, "target": "macs", "shape": "encode:8x16", "say": lines.append}
    fw.slim(model, task=task, out=tmp_path / "s", ray="local", **options)
    found = results(tmp_path / "s.run")
    told = [line for line in lines if "worker died" in line]
    assert len(told) == 1 and told[0].startswith("drop b0.mlp, b1.mlp: ") and told[0].endswith("; skipped")
    assert (tmp_path / "log").read_text() == "died" * 2
    drops = {key: made["drops"] for key, made in found.items() if key.startswith("candidate/u")}
    assert drops == {"candidate/u1": ["b0.mlp"], "candidate/u3": ["b0.mlp", "b1.attention"]}


def test_what_a_worker_has_not_travels(
    local: crew.Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: None
) -> None:
    (tmp_path / "twice.py").write_text(TWICE)
    monkeypatch.chdir(tmp_path)  # workers stand elsewhere
    spec = small.spec({"part": "mean-pool", "normalize": True})
    spec["layers"].append({"part": "twice.py:Twice"})
    model = fw.build(spec, seed=0)
    model.tokenizer, model.name = small.tokenizer(), "twice"
    task = fw.task("retrieval", data=str(folder / "pairs.jsonl"), query="query", document="document")
    task.bind(model)
    local.take(Bench(model, task, 0))
    [(healed, score)] = local.run(Bench.healed, [(["b0.mlp"], model, 2, None, "float32", [])])
    assert healed.name == "twice" and healed.history[-1].data["steps"] == 2
    assert score["value"] == task.score(healed, "select").value
    # What is wrong with one candidate is said, and costs that candidate.
    [lost] = local.run(Bench.judged, [(["b9.mlp"], [])])
    assert isinstance(lost, crew.Lost) and "b9.mlp" in lost.why


def test_nothing_is_left_running(local: crew.Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.encoder()
    task = fw.task("retrieval", data=str(folder / "pairs.jsonl"), query="query", document="document")
    task.bind(model)
    local.take(Bench(model, task, 0))

    def interrupted(*rest: Any, **more: Any) -> None:
        time.sleep(1.0)
        raise KeyboardInterrupt

    endless = (["b0.mlp"], None, 10**9, None, "float32", None)
    with monkeypatch.context() as patch:
        patch.setattr(ray, "get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(local.run(Bench.healed, [endless] * 3))
    late = crew.Lost("its worker is not back in time")
    assert list(local.run(Bench.healed, [endless] * 3, 0.5)) == [late] * 3
    until = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 2


def test_sets_around_the_guessed_one() -> None:
    order = [f"b{number}.mlp" for number in range(12)]
    gains = dict.fromkeys(order, 0.05)
    rung = [*order[1:4], order[0]]  # where some go unhealed, the guess need not begin as the order does
    for size in (1, 2, 3, 5, 99):
        search: Any = SimpleNamespace(space=None, bench=None, crew=SimpleNamespace(size=size))
        sets = chain.Chain(search, []).around(rung, order, gains)
        assert sets[0] == rung and len({len(made) for made in sets}) == len(sets) <= size
        assert all(made == [*rung, *order[4:]][: len(made)] for made in sets)
        assert [len(made) for made in sets] == [4, 3, 6, 2, 8, 5, 7][:size]


def test_other_versions_are_refused(local: crew.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fw, "__version__", "9.9")
    with pytest.raises(DataError, match=r"worker on .* formwright 0.*; it needs formwright 9\.9 and torch"):
        crew.hire("local")


def test_bad_addresses(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One sentence before any work, and no waiting for what will not come."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(crew, "MEET", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        with pytest.raises(DataError, match="no Ray cluster, or does not let this machine in"):
            crew.hire(f"127.0.0.1:{port}")
    for address, words, kind in (
        (f"127.0.0.1:{port}", "nothing answers there", DataError),
        (f"ray://127.0.0.1:{port}", "nothing answers there", DataError),
        ("127.0.0.1:99999", "nothing answers there", DataError),
        ("somewhere", "give local, auto, HOST:PORT", SpecError),
    ):
        with pytest.raises(kind, match=words):
            crew.hire(address)
    fw.save(small.classifier(steps=0), tmp_path / "model")
    words = ["slim", tmp_path / "model", "--task", "classification", "--data", folder / "tickets.csv"]
    words += ["--text", "body", "--label", "queue", "--out", tmp_path / "out", "--ray"]
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, words), "local"])
    assert stopped.value.code == 2 and 'pip install "formwright[ray]"' in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["model"]
