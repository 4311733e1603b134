"""Training on the user's own documents: streamed, packed, in the same order after a resume, nothing held whole."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import formwright as fw
from formwright.kit.errors import DataError
from formwright.models.batch import Batch
from formwright.objectives.base import Gen
from formwright.objectives.causal_lm import CausalLM
from formwright.tasks import _stream, _tokens, task
from formwright.training import train
from formwright.training.hooks import Hook
from formwright.training.sources import source_of
from formwright.training.tokenizer import train_tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i} * {'very ' * (i % 7)}\n" for i in range(60)]


def rows(path: Path, texts: Iterable[str]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def model() -> Any:
    tokenizer = train_tokenizer(TEXTS, 300)
    spec = {
        "stem": {"part": "token-embedding", "vocab": tokenizer.size, "width": 16},
        "layers": [{"part": "attention", "heads": 2, "causal": True, "rotary": {}}, {"part": "mlp", "hidden": 24}],
        "final_norm": "rmsnorm",
        "head": {"part": "lm", "tied": True},
    }
    made = fw.build(spec, seed=0)
    made.tokenizer = tokenizer
    return made


class Break(Hook):
    """Ends the process's run after a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, run: Any) -> None:
        if run.step == self.step:
            raise RuntimeError("crash")


def test_a_resumed_run_draws_what_the_whole_one_drew(tmp_path: Path) -> None:
    data, options = rows(tmp_path / "t.jsonl", TEXTS), {"length": 16, "tokens": 64}
    whole, broken, resumed = model(), model(), model()
    settings: dict[str, Any] = {"steps": 9, "show": False, "save_every": 2}
    train(whole, task("lm", data=data, **options), hooks=[Break(99)], **settings)
    with pytest.raises(RuntimeError, match="crash"):
        train(broken, task("lm", data=data, **options), out=tmp_path / "r", hooks=[Break(5)], **settings)
    with pytest.raises(DataError, match="was started with data"):
        other = task("lm", data=rows(tmp_path / "u.jsonl", TEXTS[1:]), **options)
        train(resumed, other, out=tmp_path / "r", resume=True, hooks=[Break(99)], **settings)
    train(resumed, task("lm", data=data, **options), out=tmp_path / "r", resume=True, hooks=[Break(99)], **settings)
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), resumed.parameters(), strict=True))


def gradients(m: Any, batch: Batch) -> dict[str, Tensor]:
    m.zero_grad()
    CausalLM().loss({"model": m}, batch, Gen())["model"].total.backward()
    return {name: p.grad.clone() for name, p in m.named_parameters()}


def test_gradients_of_a_packed_batch_are_the_sum_of_its_documents(tmp_path: Path) -> None:
    made, m = task("lm", data=rows(tmp_path / "t.jsonl", TEXTS), length=24, tokens=150), model()
    made.bind(m)
    m.double()
    batch = source_of(made, 0).draw(3)
    borders = batch.offsets["tokens"].tolist()
    assert len(borders) > 5
    total = gradients(m, batch)
    alone = [
        gradients(
            m,
            Batch(
                inputs={"tokens": batch.inputs["tokens"][:, start:stop]},
                targets={"tokens": batch.targets["tokens"][:, start:stop]},
            ),
        )
        for start, stop in pairwise(borders)
    ]
    for name, grad in total.items():
        torch.testing.assert_close(grad, sum(own[name] for own in alone), rtol=1e-9, atol=1e-11)


def test_a_large_file_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stream, "HELD", 50_000)
    monkeypatch.setattr(_tokens, "BATCH", 20_000)
    monkeypatch.setattr(_tokens, "sha256", lambda path: "")  # which reads a megabyte at once

    def read(count: int) -> tuple[Any, int]:
        texts = (f"{number} is a number and so on " * 60 for number in range(count))
        data = rows(tmp_path / f"{count}.jsonl", texts)
        tracemalloc.start()
        made = task("lm", data=data, limit=20_000, length=2048)
        made.bind(m)
        assert source_of(made, 0).draw(0).inputs["tokens"].shape[1] > 256
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return made, peak

    m = model()
    read(200)  # what is imported on first use is no memory of the data
    (_, less), (made, more) = read(300), read(1000)
    sizes = [(tmp_path / f"{count}.jsonl").stat().st_size for count in (300, 1000)]
    assert sizes[1] > 1_500_000 and more - less < 0.1 * (sizes[1] - sizes[0])
    assert sum(len(text) for text in made.texts("calibrate")) <= 50_000
