"""The command line: what each verb prints and writes, and one clear sentence with exit code 2 for everything wrong."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import formwright as fw
import small
from formwright.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process -> (exit code, stdout, stderr)."""

    def go(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    return go


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a saved encoder, a saved classifier and a table."""
    place = tmp_path_factory.mktemp("home")
    fw.save(small.encoder(), place / "encoder")
    fw.save(small.classifier(), place / "classifier")
    small.table(place / "tickets.csv")
    return place


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, one or more plain ``error:`` lines with these words, nothing on stdout, and no stack trace."""
    code, out, err = result
    assert code == 2, (code, out, err)
    assert out == "" and "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines, err
    for word in words:
        assert word in err, err


def test_overview_and_version(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and "slim" in out and "catalog" in out
    assert run() == (0, out, "")
    assert run("--version")[1] == f"formwright {fw.__version__}\n"


def test_overview_imports_no_torch() -> None:
    code = "import sys; sys.argv=['formwright','--help']\nfrom formwright.cli.main import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert not {'torch','numpy','typer','rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_verb_has_help(run: Run) -> None:
    from formwright.cli.main import verbs

    for verb in verbs():
        code, out, err = run(verb, "--help")
        assert code == 0 and "Usage" in out and not err, verb


def test_unknown_verb_and_option(run: Run, home: Path) -> None:
    refused(run("measur"), "did you mean 'measure'?")
    refused(run("measure", home / "encoder", "--shap", "x"), "--shap", "formwright measure --help")
    refused(run("apply", home / "encoder"), "--out")


def test_catalog(run: Run) -> None:
    code, out, _ = run("catalog", "--json")
    names = {(row["kind"], row["name"]) for row in json.loads(out)}
    assert code == 0 and {("mixer", "attention"), ("surgery", "llm-int8"), ("task", "retrieval/stdlib")} <= names
    assert "attention" in run("catalog", "--kind", "mixer")[1]
    assert run("catalog", "no such thing")[1] == "nothing matches 'no such thing'\n"
    refused(run("catalog", "--kind", "mixr"), "did you mean 'mixer'?")


def test_doctor(run: Run) -> None:
    code, out, _ = run("doctor")
    assert code == 0 and "cpu" in out and "int8" in out
    assert json.loads(run("doctor", "--json")[1])["cores"] == os.cpu_count()


def test_measure(run: Run, home: Path) -> None:
    shape = ("--shape", "encode:4x16", "--rounds", 3)
    code, out, _ = run("measure", home / "encoder", *shape, "--json")
    found = json.loads(out)
    model = fw.load(home / "encoder")
    assert code == 0 and found["parameters"] == sum(p.numel() for p in model.parameters()) and found["ms"] > 0
    assert "parameters" in run("measure", home / "encoder", *shape)[1]
    refused(run("measure", home / "encoder", "--shape", "4x16"), "encode:")
    refused(run("measure", home / "encoder", "--shape", "encode:4x1000"), "at most 64 tokens")
    refused(run("measure", home / "encoder", "--shape", "decode:1x8"), "streams")
    refused(run("measure", home / "nothing"), "nothing")
    refused(run("measure", home / "encoder", "--threads", 99), "cores")


def test_measure_with_a_table(run: Run, home: Path) -> None:
    options = ("--task", "classification", "--data", home / "tickets.csv", "--text", "body", "--label", "queue")
    code, out, err = run("measure", home / "classifier", *options, "--shape", "encode:8x16", "--rounds", 3, "--json")
    found = json.loads(out)
    assert code == 0 and found["quality"] > 0.8 and found["metric"] == "accuracy" and "fingerprint" in err
    refused(run("measure", home / "classifier", *options[:4], "--text", "boddy"), 'did you mean "body"?', "columns:")
    refused(run("measure", home / "encoder", *options), "classifier head")
    refused(run("measure", home / "classifier", "--data", home / "tickets.csv"), "--task")


def test_plan_edit_apply(run: Run, home: Path, tmp_path: Path) -> None:
    code, out, err = run(
        "plan", "finercut", home / "encoder", "--drop", 2, "--data", home / "tickets.csv", "--text", "body"
    )
    plan = json.loads(out)
    assert code == 0 and len(plan["decisions"]["drop"]) == 2 and "sublayer" in err
    plan["decisions"]["drop"] = ["b1.mlp"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert run("apply", home / "encoder", "--plan", tmp_path / "plan.json", "--out", tmp_path / "by-hand")[0] == 0
    model = fw.load(tmp_path / "by-hand")
    assert [line["id"] for line in model.layout() if line["is"] == "nothing"] == ["b1.mlp"]
    refused(
        run("apply", tmp_path / "by-hand", "--plan", tmp_path / "plan.json", "--out", tmp_path / "x"),
        "laid out otherwise",
    )
    (tmp_path / "plan.json").write_text("{")
    refused(run("apply", home / "encoder", "--plan", tmp_path / "plan.json", "--out", tmp_path / "x"), "JSON")
    refused(run("apply", home / "encoder", "--out", tmp_path / "x"), "--plan")
    refused(run("plan", "finercutt", home / "encoder"), "did you mean 'finercut'?")
    refused(run("plan", "finercut", home / "encoder", "dorp=2"), "did you mean 'drop'?")
    assert not (tmp_path / "x").exists()


def test_apply_by_name(run: Run, home: Path, tmp_path: Path) -> None:
    code, _, err = run("apply", home / "encoder", "llm-int8", "outliers=none", "--out", tmp_path / "int8")
    assert code == 0 and "wrote" in err
    assert fw.load(tmp_path / "int8").history[0].name == "llm-int8"
    refused(run("apply", tmp_path / "int8", "llm-int8", "outliers=none", "--out", tmp_path / "again"), "already int8")


def test_apply_and_heal(run: Run, home: Path, tmp_path: Path) -> None:
    words = ("apply", home / "encoder", "swap-mixer", "mixer=local", 'options={"block": 4}')
    data = ("--data", home / "tickets.csv", "--text", "body")
    code, _, err = run(*words, "--heal", 3, *data, "--out", tmp_path / "near")
    assert code == 0 and "q, k, v, o kept their weights" in err and "healed 3 steps" in err
    model = fw.load(tmp_path / "near")
    assert [entry.name for entry in model.history] == ["swap-mixer", "healed"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = run("apply", home / "encoder", "swap-mixer", "mixer=mamba", "--out", tmp_path / "mamba")
    assert code == 0 and "note: swap-mixer: Put mamba" in err and "starting anew" in err
    refused(run(*words, "--heal", 0, "--out", tmp_path / "x"), "--heal 0")
    refused(run(*words, "--heal", 2, "--data", tmp_path / "no.csv", "--out", tmp_path / "x"), "no.csv")
    assert not (tmp_path / "x").exists()


def test_encode(run: Run, home: Path, tmp_path: Path) -> None:
    code, out, _ = run("encode", home / "encoder", "my invoice", "")
    rows = json.loads(out)
    assert code == 0 and len(rows) == 2 and len(rows[0]["vector"]) == 32
    assert (
        run("encode", home / "encoder", "--data", home / "tickets.csv", "--text", "body", "--out", tmp_path / "v.npy")[
            0
        ]
        == 0
    )
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.shape == (240, 32) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    refused(run("encode", home / "classifier", "x"), "pooling head")
    refused(run("encode", home / "encoder", "x", "--out", tmp_path / "v.txt"), ".npy")
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    refused(run("encode", home / "encoder", "--data", tmp_path / "latin.txt"), "UTF-8")


def test_predict_keeps_columns_and_order(run: Run, home: Path, tmp_path: Path) -> None:
    data, out = home / "tickets.csv", tmp_path / "labelled.csv"
    assert run("predict", home / "classifier", "--data", data, "--text", "body", "--out", out)[0] == 0
    with data.open() as a, out.open() as b:
        before, after = list(csv.DictReader(a)), list(csv.DictReader(b))
    assert list(after[0]) == ["id", "body", "queue", "label", "probability"]
    assert [{k: row[k] for k in ("id", "body", "queue")} for row in after] == before
    assert sum(row["label"] == row["queue"] for row in after) > 200
    refused(run("predict", home / "encoder", "--data", data, "--text", "body"), "classifier head")
    refused(run("predict", home / "classifier", "--data", out, "--text", "body"), "already has a column")
    refused(run("predict", home / "classifier", "--data", tmp_path / "none.csv"), "does not exist")


def test_prove_says_what_does_not_hold(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from formwright import registry
    from formwright.proofs.base import Claim

    claims = [Claim("one", "1.0x", ">= 1.0x", "1.2x", True), Claim("two", "-", ">= 2", "1", False)]
    monkeypatch.setattr(
        registry, "resolve", _instead(registry.resolve, ("proof", "llm-int8"), lambda quick, seed: claims)
    )
    code, out, _ = run("prove", "llm-int8", "--quick")
    assert code == 1 and "holds" in out and "NOT HELD" in out and "measured 1.2x" in out
    refused(run("prove", "llm-int9"), "did you mean 'llm-int8'?")


def _instead(resolve: Callable, key: tuple[str, str], other: object) -> Callable:
    return lambda kind, name: other if (kind, name) == key else resolve(kind, name)


def test_a_pipe_that_closes_is_no_error(home: Path) -> None:
    command = f"{sys.executable} -m formwright catalog | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and done.stdout.count("\n") == 1


def test_bad_directories(run: Run, home: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(home / "encoder", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(run("encode", broken, "x"), "model.safetensors")
    weights.unlink()
    refused(run("encode", broken, "x"), "model.safetensors")
    shutil.rmtree(broken)
    shutil.copytree(home / "encoder", broken)
    record = json.loads((broken / "formwright.json").read_text())
    record["format"] = 99
    (broken / "formwright.json").write_text(json.dumps(record))
    refused(run("encode", broken, "x"), "newer")
    (broken / "formwright.json").write_text("{")
    refused(run("encode", broken, "x"), "formwright.json")
