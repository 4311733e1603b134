"""A run that was killed, interrupted or moved on ends in the same bits as one that was left alone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from formwright.kit.errors import DataError
from formwright.kit.journal import Lock, read_jsonl
from formwright.training import Diverged, Interrupted, train
from formwright.training.checkpoint import RunDirectory
from formwright.training.hooks import Hook
from training.resumable import STEPS, Counting, go, model, variant

FILES = ("models.safetensors", "optimizers.safetensors", "extra.safetensors")


def ending(run: Path) -> dict[str, bytes]:
    """Everything of a run's last checkpoint and journals that must be equal; times are left out."""
    step = RunDirectory(run).checkpoints()[-1]
    folder = RunDirectory(run).at(step)
    found = {name: (folder / name).read_bytes() for name in FILES}
    state = json.loads((folder / "state.json").read_text())
    del state["seconds"]
    found["state"] = json.dumps(state).encode()
    events = [{k: v for k, v in line.items() if k != "seconds"} for line in read_jsonl(run / "events.jsonl")]
    found["events"] = json.dumps(events).encode()
    found["results"] = (run / "results.jsonl").read_bytes()
    found["best"] = (run / "best").read_bytes()
    return found


def same(one: dict[str, bytes], two: dict[str, bytes]) -> None:
    assert [name for name in one if one[name] != two[name]] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    trained = go(str(out), resume=False, quiet=True)
    return trained, ending(out)


@pytest.fixture(scope="module")
def server():
    script = Path(__file__).with_name("resumable.py")
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("name", "most"), [("plain", 6), ("bfloat16", 4), ("float16", 3)])
def test_killed_at_random_moments_and_resumed_ends_in_the_same_bits(name, most, whole, server, tmp_path):
    out = tmp_path / "run"
    if name != "plain":
        trained = go(str(tmp_path / "whole"), resume=False, quiet=True, **variant(name))
        assert trained.why == "no better score in 3 evaluations" and trained.steps == 20
        whole = trained, ending(tmp_path / "whole")
    dice, kills, status = random.Random(7), 0, -1
    for _ in range(40):
        server.stdin.write(f"{out} {name}\n")
        server.stdin.flush()
        pid = int(next(line for line in server.stdout if line.startswith("pid")).split()[1])
        steps, wanted = 0, dice.randint(1, 6)
        for line in server.stdout:
            if line.startswith("ended"):
                status = int(line.split()[1])
                break
            steps += line.startswith("step")
            if steps == wanted and kills < most:
                time.sleep(dice.random() * 0.02)  # somewhere within a step or a checkpoint
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
        if status == 0:
            break
        assert status == signal.SIGKILL
    assert status == 0 and kills >= 2
    same(whole[1], ending(out))


class At(Hook):
    """Does something after a step."""

    def __init__(self, step, action) -> None:
        self.step, self.action = step, action

    def stepped(self, run) -> None:
        if run.step == self.step:
            self.action()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(number, whole, tmp_path):
    out = tmp_path / "run"
    interrupt = At(7, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"after step 7; .*000007 is saved.*resume=True"):
        go(str(out), resume=False, quiet=True, hooks=[interrupt])
    assert signal.getsignal(number) is before
    assert RunDirectory(out).checkpoints()[-1] == 7
    with pytest.raises(DataError, match="started with hooks"):
        go(str(out), resume=True, quiet=True)
    resumed = go(str(out), resume=True, quiet=True, hooks=[At(-1, None)])
    plain = {name: value for name, value in ending(out).items() if name != "state"}
    same({name: whole[1][name] for name in plain}, plain)
    assert resumed.steps == STEPS and resumed.losses == whole[0].losses[7:]
    for one, two in zip(whole[0].model.parameters(), resumed.model.parameters()):
        assert torch.equal(one, two)  # the averages, which the model keeps at the end


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    out = tmp_path / "run"
    first = go(str(out), resume=False, quiet=True)
    kept = ending(out)
    again = go(str(out), resume=True, quiet=True)
    same(kept, ending(out))
    assert again.steps == STEPS and again.losses == [] and again.scores == first.scores
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters()))


def test_a_run_directory_is_refused_unless_it_is_the_same_run(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(DataError, match="no run to resume"):
        go(str(out), resume=True)
    go(str(out), resume=False, quiet=True, steps=2)
    with pytest.raises(DataError, match="already holds a run"):
        go(str(out), resume=False)
    with pytest.raises(DataError, match=r"started with lr=0.01, now it is 0.5"):
        go(str(out), resume=True, steps=2, lr=0.5)
    with Lock(out), pytest.raises(DataError, match="in use by process"):
        go(str(out), resume=True, steps=2)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="not empty and holds no run"):
        go(str(other), resume=False)
    assert (other / "thesis.tex").read_text() == "mine"


def test_a_damaged_checkpoint_is_named(tmp_path):
    out = tmp_path / "run"
    go(str(out), resume=False, quiet=True, steps=3)
    (RunDirectory(out).at(3) / "models.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"000003 cannot be read.*resume from the one before"):
        go(str(out), resume=True, quiet=True, steps=3)


def test_another_model_is_refused_tensor_by_tensor(tmp_path):
    out = tmp_path / "run"
    train(model(), Counting(), steps=2, out=out, show=False)
    smaller = model()
    smaller.item("b1.mlp").drop()
    with pytest.raises(DataError, match=r"has b1\.mlp\.part"):
        train(smaller, Counting(), steps=2, out=out, resume=True, show=False)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path):
    out = tmp_path / "run"
    m = model()

    class Poison(Hook):
        def loss(self, run, losses):
            if run.step == 4:
                loss = losses["model"]
                return {"model": type(loss)(loss.total * float("nan"), loss.count)}
            return None

    with pytest.raises(Diverged, match=r"step 5: the loss is nan.*000004 is kept"):
        train(m, Counting(), steps=9, out=out, save_every=2, hooks=[Poison()], show=False)
    assert RunDirectory(out).checkpoints()[-1] == 4
    assert all(bool(torch.isfinite(p).all()) for p in m.parameters())
    assert m.history == []


@contextlib.contextmanager
def limited(size: int):
    """Within (from its start to its close), no file may grow beyond ``size`` bytes: a disk that is nearly full."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on(whole, tmp_path):
    out = tmp_path / "run"
    with contextlib.ExitStack() as stack, pytest.raises(DataError, match=r"step 9 cannot .*000006 is kept\. Make room"):
        go(str(out), resume=False, quiet=True, hooks=[At(8, lambda: stack.enter_context(limited(9000)))])
    assert RunDirectory(out).checkpoints()[-1] == 6 and not list(out.glob("steps/*.tmp-*"))
    go(str(out), resume=True, quiet=True, hooks=[At(-1, None)])
    plain = {name: value for name, value in ending(out).items() if name != "state"}
    same({name: whole[1][name] for name in plain}, plain)


def test_a_system_that_says_no_space_is_heard(tmp_path, monkeypatch):
    def full(*given, **more):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"checkpoint of step 3 .*disk is full.* there is none from before"):
        hooks = [At(2, lambda: monkeypatch.setattr("formwright.training.checkpoint.save_file", full))]
        go(str(tmp_path / "run"), resume=False, quiet=True, hooks=hooks)


def test_old_checkpoints_go_but_the_best_stays(tmp_path):
    out = tmp_path / "run"
    go(str(out), resume=False, quiet=True, keep=1)
    directory = RunDirectory(out)
    assert directory.checkpoints() == sorted({directory.best, STEPS})
    assert not list(out.glob("steps/*.tmp-*")) and not (out / "lock").exists()
