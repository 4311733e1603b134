"""slim finds a cheaper model, says what it kept on data it did not choose by, resumes, and refuses nonsense at once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import formwright as fw
import small
from formwright.kit.errors import DataError, Refusal, SpecError
from formwright.parts.base import kind_of
from formwright.search import moves
from formwright.search.chain import Chain
from formwright.search.crew import Crew
from formwright.search.front import Front
from formwright.search.slim import Search, label
from formwright.search.workspace import Workspace


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.table(tmp_path_factory.mktemp("data") / "tickets.csv")


def task(tickets: Path) -> Any:
    return fw.task("classification", data=str(tickets), text="body", label="queue")


def test_a_classifier_with_a_table(tickets: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = fw.slim(
        small.classifier(),
        task=task(tickets),
        keep=0.9,
        minutes=0.5,
        target="size",
        shape="encode:8x16",
        out=tmp_path / "slim",
        say=lines.append,
    )
    chosen = next(point for point in found.front if point.data["written"])
    original = found.front[0]
    assert found.found and chosen.data["kept"] >= 0.9 and chosen.data["bytes"] < original.data["bytes"]
    assert original.name == "original" and original.data["kept"] == 1.0
    assert chosen.data["bound"] <= chosen.data["kept"] + 0.05
    assert any("smallest loss this data can certify" in line for line in lines)
    again = fw.load(tmp_path / "slim")
    assert [entry.kind for entry in again.history] == [entry.kind for entry in found.model.history]
    assert again.predict(["my invoice refund charge"])[0]["label"] == "billing"
    assert json.loads((tmp_path / "slim/evidence/pareto.json").read_text())["points"]
    assert (tmp_path / "slim/report.html").is_file() and (tmp_path / "slim/README.md").is_file()
    assert chosen.load().history == again.history
    with pytest.raises(DataError, match="already exists"):
        fw.slim(small.classifier(), task=task(tickets), out=tmp_path / "slim", minutes=0.1)
    # A resumed search that was finished does no work again, and comes to the same.
    before = (tmp_path / "slim.run/results.jsonl").read_text()
    resumed = fw.slim(small.classifier(), task=task(tickets), out=tmp_path / "slim", resume=True)
    assert (tmp_path / "slim.run/results.jsonl").read_text() == before
    assert [p.data["quality"] for p in resumed.front] == [p.data["quality"] for p in found.front]


def test_a_stopped_search_goes_on_where_it_was(tickets: Path, tmp_path: Path) -> None:
    model = small.classifier()
    options: dict[str, Any] = {
        "task": task(tickets),
        "keep": 0.5,
        "minutes": 0.5,
        "target": "size",
        "shape": "encode:8x16",
        "out": tmp_path / "s",
    }

    class Stop(Exception):
        pass

    def stop(**state: Any) -> None:
        if state.get("tried", 0) >= 3:
            raise Stop

    with pytest.raises(Stop):
        fw.slim(model, **options, status=stop)
    done = (tmp_path / "s.run/results.jsonl").read_text()
    assert not (tmp_path / "s").exists()
    with pytest.raises(DataError, match="already holds a search"):
        fw.slim(model, **options)
    found = fw.slim(model, **options, resume=True)
    assert found.found and (tmp_path / "s.run/results.jsonl").read_text().startswith(done)


def test_nonsense_is_refused_before_any_work(tickets: Path, tmp_path: Path) -> None:
    model = small.classifier(steps=0)
    for options, words in (
        ({"keep": 2}, "keep=2"),
        ({"keep": 0}, "keep=0"),
        ({"target": "latencyy"}, "did you mean 'latency'"),
        ({"minutes": 0}, "minutes"),
        ({"shape": "encode"}, "shape"),
    ):
        with pytest.raises(SpecError, match=words):
            fw.slim(model, task=task(tickets), out=tmp_path / "x", **options)
        assert not (tmp_path / "x.run").exists()
    with pytest.raises(DataError, match="no search to resume"):
        fw.slim(model, task=task(tickets), out=tmp_path / "x", resume=True)
    with pytest.raises(DataError, match="no better than chance"):
        fw.slim(model, task=task(tickets), minutes=0.1, shape="encode:2x8")
    options = {"keep": 0.999, "minutes": 0.1, "shape": "encode:2x8"}
    with pytest.raises(Refusal, match="stopped"):
        fw.slim(small.classifier(), task=task(tickets), **options, confirm=lambda question: False)


def test_without_out_nothing_stays(tickets: Path) -> None:
    found = fw.slim(small.classifier(), task=task(tickets), keep=0.5, minutes=0.1, target="macs", shape="encode:8x16")
    assert found.front[0].name == "original"
    with pytest.raises(DataError, match="give out="):
        found.front[-1].load()


def test_gains_are_shares(tickets: Path) -> None:
    from formwright.measure.workload import workload

    model = small.encoder()
    load = workload(model, "encode:8x16")
    for target in ("latency", "size", "macs", "memory"):
        gains = moves.item_gains(model, target, load, [text for text, _ in small.sentences(40)])
        assert set(gains) == {item.id for item in model.residuals()}
        assert all(0 < share < 1 for share in gains.values()) and sum(gains.values()) <= 1 + 1e-9
    macs = moves.item_gains(model, "macs", load, [])
    assert macs["b0.mlp"] == pytest.approx(macs["b1.mlp"])


def test_a_planted_useless_sublayer_goes_first(tickets: Path) -> None:
    import torch

    model = small.encoder()
    with torch.no_grad():
        part = model.item("b1.mlp").part
        part.down.weight.zero_()
        part.down.bias.zero_()
    gains = {item.id: 0.1 for item in model.residuals()}
    first = moves.price(model, fw.copy(model), gains, [text for text, _ in small.sentences(16)], set())[0]
    assert first.item == "b1.mlp"


def test_the_test_split_is_scored_once_and_last(tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = task(tickets)
    asked: list[str] = []
    score = made.score
    monkeypatch.setattr(made, "score", lambda view, split: asked.append(split) or score(view, split))
    found = fw.slim(small.classifier(), task=made, keep=0.5, minutes=0.3, target="size", shape="encode:8x16")
    assert asked.count("test") == len(found.front)
    assert "select" not in asked[asked.index("test") :]


def test_a_workspace_keeps_results_once(tmp_path: Path) -> None:
    calls = []
    with Workspace(tmp_path / "r", {"a": 1}, resume=False) as space:
        for _ in range(2):
            assert space.once("x", lambda: calls.append(1) or {"value": 1})["value"] == 1
    with Workspace(tmp_path / "r", None, resume=True) as space:
        assert space.recipe == {"a": 1} and space.once("x", lambda: {"value": 2})["value"] == 1
    assert calls == [1]
    assert Search.__doc__


def test_precision_leaves_alone_what_it_costs_most(tickets: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """As few layers as keep enough, the dearest first; a dropped one among them is no error; they stay float."""
    model, made = small.classifier(), task(tickets)
    made.bind(model)
    recipe = {"keep": 0.9, "target": "size", "shape": "encode:2x8", "minutes": 1.0, "seed": 0, "strict": False}
    precision = [{"surgery": "llm-int8", "options": {}}]
    with Workspace(tmp_path / "run", recipe, resume=False) as space:
        search = Search(model, made, space, Crew(), lambda line: None, lambda **state: None)
        items = [item.id for item in model.residuals()]
        measured = search.bench.spared(items[:2], precision)
        assert list(measured) == items[:2] and all(abs(loss) <= 1.0 for loss in measured.values())
        lost = {item: 1.0 - 0.1 * number for number, item in enumerate(items)}  # the last brings most back
        monkeypatch.setattr(search.bench, "spared", lambda asked, moves: lost)
        tried = []

        def candidate(key: str, model: Any, drops: Any, healed: int, moves: Any, steps: Any) -> Any:
            tried.append((key, moves[0]["spared"]))
            return SimpleNamespace(accepted=len(tried) == 2)

        monkeypatch.setattr(search, "candidate", candidate)
        found = search.spare(precision)
        assert tried == [("precise/1", [items[-1]]), ("precise/2", [items[-1], items[-2]])]
        precise = search.bench.precise(search.bench.cut([items[-1]]), found)
    kinds = {address.partition(":")[0]: kind_of(slot) for address, slot in precise.slots().items()}
    assert kinds[items[-2]] == "dense" and kinds[items[0]] == "int8"
    assert label([], 0, found) == f"int8 but {items[-1]}, {items[-2]}"


@pytest.mark.parametrize(("spread", "written"), [(0.02, "fast"), (0.30, "good")])
def test_times_within_their_noise_are_one_time(spread: float, written: str) -> None:
    """2 % apart: told apart at a spread of 2 %, not at 30 %; then the better one on select is written."""

    def point(name: str, speed: float, select: float, accepted: bool = True) -> dict[str, Any]:
        row = {"name": name, "speed": speed, "kept": select, "select": select, "accepted": accepted}
        return {**row, "ms_spread": spread, "written": False}

    task = SimpleNamespace(higher_is_better=True)
    front = Front(SimpleNamespace(target="latency", task=task, space=None, bench=None, original=None))  # type: ignore
    points = [point("original", 1.0, 1.0), point("good", 3.00, 0.998), point("fast", 3.06, 0.991)]
    points.append(point("worse", 5.0, 0.7, accepted=False))
    front.choose(points)
    assert [p["name"] for p in points if p["written"]] == [written]


@pytest.mark.parametrize(("sure", "healed"), [(True, []), (False, [["a", "b", "c"]])])
def test_a_set_that_select_is_not_sure_of_is_followed_by_a_more_careful_one(
    sure: bool, healed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thirds of the accepted moves, healed from where those were left, and put on record as a candidate."""
    chain = Chain.__new__(Chain)
    chain.search = SimpleNamespace(sure=lambda key: sure, status=lambda **state: None)  # type: ignore[assignment]
    chain.space = SimpleNamespace(results={}, elapsed=0.0)  # type: ignore[assignment]
    calls, judged = [], []

    def heal(key: str, drops: list[str], rungs: list[list[str]], weights: Any) -> list[dict[str, Any]]:
        assert (key, drops, weights) == ("1.careful", [], "weights")
        calls.extend(rungs)
        return [{"key": key, "rung": rungs[0], "steps": 400}]

    monkeypatch.setattr(chain, "steps", lambda drops: 1000)
    monkeypatch.setattr(chain, "heal", heal)
    monkeypatch.setattr(chain, "judge", lambda made, drops, before: judged.append((made["key"], drops, before)))
    chain.insure("1", ["a", "b", "c", "d"], "weights", 6000, 1)
    assert calls == healed
    assert judged == ([] if sure else [("1.careful", [], 6000)])
    chain.insure("1", ["a", "b"], "weights", 6000, 2)  # fewer moves go unhealed
    monkeypatch.setattr(chain, "steps", lambda drops: 10)  # no time is left
    chain.insure("1", ["a", "b", "c", "d"], "weights", 6000, 1)
    assert calls == healed
