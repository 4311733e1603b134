"""Every script in examples/ runs as a reader runs it: in a process of its own, from any folder, in seconds.

Most of a short script's time is spent importing PyTorch, so one process imports it and each example runs in a fork.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: What each must print, so that an example that does nothing is noticed.
PRINTS = {
    "build_from_spec": r"saved, loaded, and equal to the last bit",
    "lora_two_adapters": r"majority says 1 and minority says 0",
    "plan_edit_apply": r"will drop \['b1.mlp', 'b2.mlp'\]",
    "slim_your_classifier": r"kept \[95 % bound\][\s\S]*'label': 'billing'",
    "stream_a_hybrid_stack": r"ragged pieces equal one pass",
    "train_a_tiny_decoder": r"loss \d\.\d+ -> [01]\.\d+",
}
RUNNER = """
import os, runpy, sys, traceback
import matplotlib.figure, torch, torch._dynamo
out, *examples = sys.argv[1:]
for path in examples:
    name = os.path.splitext(os.path.basename(path))[0]
    child = os.fork()
    if child == 0:
        os.chdir(os.path.join(out, name))
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(out, f"{name}.{kind}"), os.O_CREAT | os.O_WRONLY), number)
        sys.argv, code = [path], 0
        try:
            runpy.run_path(path, run_name="__main__")
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(name, os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Where each example's output lies, and how each one ended."""
    out = tmp_path_factory.mktemp("examples")
    for path in EXAMPLES:
        (out / path.stem).mkdir()
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(out), *map(str, EXAMPLES)],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out, {name: int(status) for name, status in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, outcomes: tuple[Path, dict[str, int]]) -> None:
    out, ended = outcomes
    said, complaints = ((out / f"{path.stem}.{kind}").read_text() for kind in ("out", "err"))
    assert ended[path.stem] == 0, said + complaints
    assert "Warning" not in complaints, complaints
    assert re.search(PRINTS[path.stem], said), said
    assert not list((out / path.stem).iterdir()), "an example cleans up after itself"


def test_every_example_is_short_and_says_how_to_run_it() -> None:
    assert {path.stem for path in EXAMPLES} == set(PRINTS)
    for path in EXAMPLES:
        source = path.read_text(encoding="utf-8")
        assert f"python examples/{path.name}" in source, path.name
        assert len(source.splitlines()) < 120, path.name
