"""What looks on at a run: its journal, its progress line, TensorBoard's files, and its picture."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from formwright.kit.errors import SpecError
from formwright.kit.journal import read_jsonl
from formwright.report.curves import picture, scores, smooth, speeds
from formwright.training import Interrupted, train
from formwright.training.hooks import Hook
from formwright.training.watchers import Speed, TensorBoard
from training.resumable import Counting, batch, model


def run(out, **settings):
    return train(model(), Counting(), out=out, **{"steps": 20, "lr": 1e-2, "show": False, **settings})


class Stop(Hook):
    def stepped(self, run) -> None:
        if run.step == 12:
            os.kill(os.getpid(), signal.SIGINT)


def test_the_picture_is_drawn_at_the_end_and_at_ctrl_c(tmp_path):
    run(tmp_path / "whole", evaluate_every=10)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", hooks=[Stop()])
    for name in ("whole", "cut"):
        assert (tmp_path / name / "run.png").read_bytes().startswith(b"\x89PNG")
    events = read_jsonl(tmp_path / "whole" / "events.jsonl")
    assert [line["step"] for line in events] == [10, 20]
    assert [line["tokens"] for line in events] == [10 * 32, 20 * 32]


def test_the_picture_takes_what_the_journals_know():
    events = [{"step": i, "loss": 5 / (1 + i), "lr": 1e-3, "tokens": 100 * i, "seconds": 0.5 * i} for i in range(1, 60)]
    results = [{"step": 20, "task": "one $ task", "value": 0.3}, {"step": 40, "task": "one $ task", "value": 0.4}]
    assert speeds(events)[0] == (2, pytest.approx(200.0)) and scores(results)["one $ task"][1] == (40, 0.4)
    assert smooth([1.0, 3.0, 8.0], 2) == [2.0, 4.0, 5.5]
    old = [{"step": 10, "loss": 2.0, "lr": 1e-3, "seconds": 3.0}]  # a journal of the first format
    sizes = [len(picture(events, results, "name")), len(picture(old, [], "")), len(picture(events, [], ""))]
    assert min(sizes) > 5000


def test_the_progress_line_tells_loss_and_speed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("formwright.training.watchers.Progress", lambda title, total, show: _Bar())
    told: list[str] = []

    class _Bar:
        def __enter__(self):
            return self

        def update(self, done, note) -> None:
            told.append(note)

        def __exit__(self, *error) -> None:
            told.append("closed")

    train(model(), batch, steps=3, show=True)
    assert len(told) == 4 and told[2].startswith("step 3  loss 3.") and told[2].endswith(" tokens/s")
    assert told[-1] == "closed"
    speed = Speed()
    assert [speed.at(second, 50 * second) for second in (1.0, 2.0, 4.0)] == [0.0, 50.0, 50.0]


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Interrupted):
        run(tmp_path / "run", hooks=[Stop()], tensorboard=True)
    run(tmp_path / "run", hooks=[Stop()], tensorboard=True, resume=True)
    seen = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = seen.Scalars("loss/loss")
    events = {line["step"]: line["loss"] for line in read_jsonl(tmp_path / "run" / "events.jsonl")}
    assert {point.step: pytest.approx(point.value, rel=1e-6) for point in losses} == events
    assert {"lr", "gradient", "tokens a second"} <= set(seen.Tags()["scalars"])


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SpecError, match=r"tensorboard: pip install 'formwright\[train\]'"):
        TensorBoard()
