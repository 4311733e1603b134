"""From nothing to a text that goes on: train, generate, measure and slim a small decoder at the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import formwright as fw
import small
from formwright.cli.main import main
from formwright.training import configs


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code or 0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small text files."""
    place = tmp_path_factory.mktemp("library")
    for number in range(12):
        text = "\n".join(text for text, _ in small.sentences(60, seed=number))
        (place / f"{number}.txt").write_text(text, encoding="utf-8")
    return place


def test_a_decoder_from_a_recipe(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decoder"
    settings = tmp_path / "settings.toml"
    settings.write_text('steps = 99\nbatch = 4\n[objective]\nname = "causal-lm"\nsmoothing = 0.2\n')
    options = ("--recipe", "gpt-tiny", "--task", "lm", "--data", library, "--vocab", 400, "--steps", 12)
    options += ("--config", settings, "--set", "objective.smoothing=0.1", "--set", "schedule=wsd", "--tensorboard")
    assert run("train", *options, "--out", out) == 0
    model = fw.load(out)
    assert model.causal and model.tokenizer.size <= 400 and model.history[-1].name == "trained"
    assert "on select" in capsys.readouterr().err
    ran = tmp_path / "decoder.run"
    recipe = configs.read(ran / "recipe.toml")
    assert recipe["steps"] == 12 and recipe["batch"] == 4 and recipe["schedule"] == "wsd"
    assert recipe["objective"] == {"name": "causal-lm", "smoothing": 0.1}
    assert (ran / "run.png").read_bytes().startswith(b"\x89PNG") and list((ran / "tensorboard").iterdir())
    assert run("generate", out, "my invoice", "--max-new", 4) == 0
    assert capsys.readouterr().out.startswith("my invoice")
    assert run("measure", out, "--shape", "decode:1x16", "--rounds", 3) == 0
    assert run("train", *options, "--out", out) == 2  # the run is there: go on, or say so
    assert "already holds a run" in capsys.readouterr().err


def test_a_classifier_from_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fw.save(small.encoder(), tmp_path / "encoder")
    data = small.table(tmp_path / "tickets.csv")
    task = ("--task", "classification", "--data", data, "--text", "body", "--label", "queue")
    out = tmp_path / "classifier"
    stop = ("--evaluate-every", 40, "--patience", 1, "--device", "cpu")
    length = ("--steps", 120, "--lr", 0.005, "--batch", 16)
    assert run("train", tmp_path / "encoder", *task, *length, *stop, "--out", out) == 0
    assert (tmp_path / "classifier.run" / "best").is_file()
    assert fw.load(out).labels == ["billing", "bug", "other"]
    capsys.readouterr()
    assert run("predict", out, "--data", data, "--text", "body") == 0
    assert capsys.readouterr().out.startswith("id,body,queue,label,probability\n")


def test_a_column_of_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small.table(tmp_path / "tickets.csv")
    options = ("--recipe", "gpt-tiny", "--task", "lm", "--data", data, "--vocab", 300, "--steps", 1)
    assert run("train", *options, "--out", tmp_path / "x") == 0
    said = capsys.readouterr().err
    assert 'text: column "body" (guessed by its name; --text says another)' in said and "on select" in said
    assert run("train", *options, "--text", "boddy", "--out", tmp_path / "y") == 2
    assert 'tickets.csv has no column "boddy"; did you mean "body"?' in capsys.readouterr().err


def test_what_train_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("stepz = 3\n")
    good = ("train", "--recipe", "gpt-tiny", "--task", "lm/stdlib", "--out", tmp_path / "x")
    for words, sentence in (
        (("train", "--out", tmp_path / "x"), "--recipe"),
        (("train", "--recipe", "gpt-tiny"), "--out"),
        (("train", "--recipe", "gpt-tiny", "--out", tmp_path / "x"), "--task"),
        (
            ("train", "--recipe", "gpt-tinny", "--task", "lm/stdlib", "--out", tmp_path / "x", "--steps", 1),
            "did you mean 'gpt-tiny'",
        ),
        ((*good, "--config", bad), "bad.toml: unknown setting of a recipe 'stepz'; did you mean 'steps'"),
        ((*good, "--steps", 1, "--set", "lr=fast"), "'lr=fast': lr='fast' must be a number"),
        ((*good, "--set", "lr=1"), "a run needs an end"),
        ((*good, "--steps", 1, "--patience", 2), "--evaluate-every"),
        ((*good, "--steps", 1, "--shard"), "torchrun"),
        ((*good, "--steps", 1, "--device", "cuda"), "this machine has none"),
    ):
        assert run(*words) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
