"""From nothing to a text that goes on: train, generate, measure and slim a small decoder at the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import formwright as fw
import small
from formwright.cli.main import main


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
    options = ("--recipe", "gpt-tiny", "--task", "lm", "--data", library, "--vocab", 400, "--steps", 12, "--batch", 4)
    assert run("train", *options, "--out", out) == 0
    model = fw.load(out)
    assert model.causal and model.tokenizer.size <= 400 and model.history[-1].name == "trained"
    assert "on select" in capsys.readouterr().err
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
    assert run("train", tmp_path / "encoder", *task, "--steps", 120, "--lr", 0.005, "--batch", 16, "--out", out) == 0
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
    for words, sentence in (
        (("train", "--out", tmp_path / "x"), "--recipe"),
        (("train", "--recipe", "gpt-tiny"), "--out"),
        (("train", "--recipe", "gpt-tiny", "--out", tmp_path / "x"), "--task"),
        (("train", "--recipe", "gpt-tinny", "--task", "lm/stdlib", "--out", tmp_path / "x"), "did you mean 'gpt-tiny'"),
    ):
        assert run(*words) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
