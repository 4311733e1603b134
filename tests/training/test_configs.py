"""Recipes as files and words: checked, overridden, equal after the round trip; runs of the first format still open."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formwright.kit.errors import DataError, SpecError
from formwright.kit.journal import read_jsonl
from formwright.models.build import build
from formwright.training import Recipe, configs, train
from formwright.training.checkpoint import RunDirectory
from formwright.training.hooks import EMA, Evaluate, Hook
from formwright.training.schedules import SHAPES
from training.resumable import VOCAB, Counting

RECIPES = st.builds(
    Recipe,
    objective=st.fixed_dictionaries(
        {"name": st.just("causal-lm")}, optional={"head": st.none(), "smoothing": st.floats(0, 1)}
    ),
    steps=st.integers(0, 10**9),
    minutes=st.none() | st.floats(0.1, 100),
    batch=st.none() | st.integers(1, 99),
    lr=st.floats(0, 1) | st.integers(0, 1),
    schedule=st.sampled_from(sorted(SHAPES)),
    clip=st.none() | st.floats(0.1, 9),
    trainable=st.lists(st.text("*!b0.:q", min_size=1), min_size=1, max_size=3),
    dropout=st.booleans(),
)  # fmt: skip


@given(RECIPES)
def test_a_recipe_is_equal_after_the_round_trip(recipe):
    again, run = configs.parse(configs.write(recipe.to_dict(), {"threads": 1}), "a file")
    assert Recipe.from_dict(again) == recipe and again == recipe.to_dict() and run == {"threads": 1}


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_files_and_words(tmp_path):
    file = written(tmp_path / "r.toml", 'steps = 5\nclip = "none"\nobjective = "causal-lm"\n[run]\nanything = 1\n')
    plan = configs.overridden(
        configs.read(file), ["lr=1", "objective.smoothing = 0.1", "schedule=wsd", "trainable=['*', '!stem:*']"]
    )
    recipe = Recipe.from_dict(plan)
    assert recipe.clip is None and recipe.lr == 1.0 and isinstance(recipe.lr, float) and recipe.schedule == "wsd"
    assert recipe.objective == {"name": "causal-lm", "smoothing": 0.1} and recipe.trainable == ("*", "!stem:*")
    assert Recipe.from_dict(configs.overridden(plan, ["clip=2"])).clip == 2.0


def test_everything_wrong_is_said_at_once_with_its_file_or_word(tmp_path):
    file = written(tmp_path / "r.toml", 'stepz = 5\nlr = "fast"\nbatch = 2.5\ndropout = 1\nbetas = ["a", "b"]\n')
    with pytest.raises(SpecError) as error:
        configs.read(file)
    lines = str(error.value).splitlines()
    assert len(lines) == 5 and all(line.startswith(f"{file}: ") for line in lines)
    for said in ("did you mean 'steps'", "lr='fast' must be a number", "a whole number, or none", "true or false"):
        assert said in str(error.value)
    with pytest.raises(SpecError, match=r"r\.toml: causal-lm: unknown option 'smoothin'; did you mean 'smoothing'"):
        configs.read(written(file, '[objective]\nname = "causal-lm"\nsmoothin = 0.1\n'))
    with pytest.raises(SpecError, match=r"r\.toml: unknown objective 'causal_lm'; did you mean 'causal-lm'"):
        configs.read(written(file, 'objective = "causal_lm"\n'))
    with pytest.raises(SpecError) as error:
        configs.overridden({}, ["lr", "=3", "sched=wsd", "seed=x"])
    assert "'lr' is no setting" in str(error.value) and "did you mean 'schedule'" in str(error.value)
    assert "'seed=x': seed='x' must be a whole number" in str(error.value)
    with pytest.raises(SpecError, match="cannot hold the word 'none'"):
        configs.write(Recipe(steps=1, objective={"name": "x", "kind": "none"}).to_dict(), {})


def old_model():
    return build(
        {
            "stem": {"part": "token-embedding", "vocab": VOCAB, "width": 8},
            "layers": [
                {"part": "attention", "heads": 2, "causal": True, "rotary": {}},
                {"part": "mlp", "hidden": 8},
            ],
            "head": {"part": "lm", "tied": True},
        },
        seed=0,
    )


def test_a_run_of_the_first_format_goes_on(tmp_path):
    """``old/run-1`` was written by the first version of the loop, interrupted after step 4 of 8; its hook ``Stop`` is
    played by one of that name."""
    out, task = tmp_path / "run", Counting()
    shutil.copytree(Path(__file__).with_name("old") / "run-1", out)

    class Stop(Hook):
        pass

    def go(place, **more):
        hooks = [EMA(0.9), Evaluate(task, "select", every=2), Stop()]
        objective = {"name": "causal-lm", "smoothing": 0.1}
        settings = {"steps": 8, "lr": 1e-2, "seed": 3, "keep": 1, "objective": objective, "show": False, "plot": False}
        return train(old_model(), task, out=place, hooks=hooks, **{**settings, **more})

    with pytest.raises(DataError, match=r"started with lr=0\.01, now it is 0\.5"):
        go(out, resume=True, lr=0.5)
    went_on, whole = go(out, resume=True), go(tmp_path / "whole")
    assert RunDirectory(out).checkpoints()[-1] == 8 and [step for step, _ in went_on.losses] == [5, 6, 7, 8]
    assert dict(went_on.losses) == pytest.approx(dict(whole.losses[4:]), rel=1e-5)
    assert len(read_jsonl(out / "results.jsonl")) == 4
    assert {entry.name for entry in fields(Recipe)} >= set(RunDirectory(out).read_recipe()[0])
