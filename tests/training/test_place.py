"""Two processes train as one does: replicas and shards, and checkpoints that pass between them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from formwright.kit.errors import SpecError
from formwright.training.checkpoint import RunDirectory
from formwright.training.place import Place, here
from training import ranks

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    return ranks.go(out), out


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """What two processes found, and the directory of their runs."""
    out = tmp_path_factory.mktemp("together")
    shutil.copytree(cut(alone[1], out / "cut"), out / "resumed")
    place = [str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, ranks.__file__, str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((out / "found.json").read_text()), out


def cut(run: Path, to: Path) -> Path:
    """A copy of a run without its last checkpoint."""
    shutil.copytree(run, to)
    shutil.rmtree(RunDirectory(to).at(ranks.STEPS))
    assert RunDirectory(to).checkpoints()
    return to


def near(found, done, rel=1e-5) -> None:
    steps, losses = zip(*found)
    known = dict(done.losses)
    assert losses == pytest.approx([known[step] for step in steps], rel=rel)


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_the_loss_curve_is_that_of_one_process(kind, alone, together):
    found, out = together
    done, _ = alone
    assert len(found[kind]["losses"]) == ranks.STEPS
    near(found[kind]["losses"], done)
    near(found[kind]["spans"], done)
    assert found[kind]["scores"]["nats"] == pytest.approx(done.scores["nats"], rel=1e-5)
    weights = torch.load(out / f"{kind}.pt")
    for name, value in done.model.state_dict().items():
        assert type(weights[name]) is torch.Tensor
        assert float((weights[name] - value).abs().gt(1e-4).float().mean()) < 0.01


@pytest.mark.parametrize("kind", ["replicas", "shards"])
def test_one_process_goes_on_where_two_were(kind, alone, together, tmp_path):
    found, out = together
    resumed = ranks.go(cut(out / f"{kind}.run", tmp_path / "run"), resume=True)
    assert resumed.losses
    near(resumed.losses, alone[0])
    near(found["resumed"], alone[0])  # two with shards, where one was


def test_processes_must_hold_the_same_model_and_share_complaints(together):
    found, _ = together
    assert "hold different models" in found["different"]
    assert "already holds a run" in found["complaint"]


def test_one_process_needs_no_other():
    assert type(here()) is Place
    with pytest.raises(SpecError, match="torchrun"):
        here(shard=True)
