"""The schema says everything that is wrong at once, and lets only finite numbers through."""

from __future__ import annotations

import json

import numpy as np
import pytest

from formwright.kit.errors import SpecError
from formwright.report import words
from formwright.report.schema import Front

from .sample import sample


def test_round_trip() -> None:
    front = Front.from_json(sample())
    assert Front.from_json(front) is front
    data = front.to_json()
    assert Front.from_json(json.loads(json.dumps(data, allow_nan=False))) == front
    for key, value in sample().items():
        if key not in ("points", "candidates"):
            assert data[key] == value
    assert data["points"][3]["history"] == sample()["points"][3]["history"]


def test_numbers_that_are_none() -> None:
    data = sample(certifiable=float("nan"), seconds=float("inf"))
    data["points"][1].update(quality=np.float32(0.5), ms=np.float64("nan"), bytes=np.int64(7), speed=None)
    front = Front.from_json(data)
    assert front.certifiable is None and front.seconds is None
    assert front.points[1].ms is None and front.points[1].bytes == 7 and front.points[1].quality == 0.5
    json.dumps(front.to_json(), allow_nan=False)


def test_every_problem_at_once() -> None:
    data = sample(sead=1)
    data["points"][2].update(ms="fast", bount=0.9)
    data["points"][3]["noisy"] = "no"
    data["task"].pop("metric")
    data["candidates"][0]["quality"] = True
    with pytest.raises(SpecError) as caught:
        Front.from_json(data)
    lines = str(caught.value).splitlines()
    assert "sead: unknown key 'sead'; did you mean 'seed'?" in lines[-1] or any("'seed'" in line for line in lines)
    assert any(line.startswith("points[2].bount: unknown key 'bount'; did you mean 'bound'?") for line in lines)
    assert "points[2].ms: a number or null is wanted, not 'fast'" in lines
    assert any(line.startswith("points[3].noisy: ") for line in lines)
    assert any(line.startswith("task.metric: ") for line in lines)
    assert "candidates[0].quality: a number or null is wanted, not True" in lines


def test_what_does_not_fit_together() -> None:
    data = sample(target="sise")
    data["points"][0]["name"] = "first"
    data["points"][1]["written"] = True
    with pytest.raises(SpecError) as caught:
        Front.from_json(data)
    text = str(caught.value)
    assert "unknown target 'sise'; did you mean 'size'?" in text
    assert "exactly one must be named 'original'" in text and "at most one" in text


@pytest.mark.parametrize("bad", [None, [], "text", {}])
def test_not_even_a_report(bad: object) -> None:
    with pytest.raises(SpecError):
        Front.from_json(bad)  # type: ignore[arg-type]


def test_order_is_the_fronts() -> None:
    data = sample()
    data["points"].reverse()
    front = Front.from_json(data)
    assert [p.name for p in front.ordered()] == ["original", "front 1", "front 2", "front 3", "front 4", "also 1"]
    gains = [front.gain(p) for p in front.front()]
    kept = [p.kept for p in front.front()]
    assert gains == sorted(gains) and kept == sorted(kept, reverse=True)


def test_kept_of_candidates() -> None:
    front = Front.from_json(sample())
    candidate = front.candidates[0]
    assert front.kept(candidate) == pytest.approx(candidate.quality / 0.6243)
    front.task.chance = 0.1
    assert front.kept(candidate) == pytest.approx((candidate.quality - 0.1) / 0.5243)
    front.task.higher_is_better = False
    assert front.kept(candidate) == pytest.approx(0.6243 / candidate.quality)
    candidate.quality = None
    assert front.kept(candidate) is None


def test_targets() -> None:
    front = Front.from_json(sample(target="size"))
    assert front.gain(front.points[3]) == pytest.approx(90.9 / 37.3)
    front.points[3].bytes = None
    assert front.gain(front.points[3]) is None
    assert Front.from_json(sample(target="macs")).gain(front.original) == 1.0


def test_headlines() -> None:
    front = Front.from_json(sample())
    assert words.headline(front) == "3.1x faster, 99.4 % of the quality kept, 41 % of the bytes"
    front.points[3].speed = 1.01
    assert words.headline(front).startswith("As fast, ")
    front.points[3].speed = 0.5
    assert words.headline(front).startswith("2.0x slower, ")
    front.target = "macs"
    assert ", 1.6x fewer multiply-adds, " in words.headline(front)
    front.points[3].written = False
    assert words.headline(front) == "Nothing cheaper kept 99 % of the quality"


def test_rounding_never_flatters() -> None:
    assert words.share(0.99996) == "0.999" and words.percent(0.99996) == "99.9 %"
    assert words.share(0.98999, down=True) == "0.989" and words.share(0.985, down=True) == "0.985"
    assert words.share(1.0) == "1" and words.share(1.0023) == "1.002" and words.percent(1.0023) == "100.2 %"
    assert words.share(None) == words.percent(None) == words.digits(None) == words.times(None) == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.31, "2.31"), (0.745, "0.745"), (38.12, "38.1"), (1340, "1,340"), (0, "0"), (0.00213, "0.00213")],
)
def test_digits(value: float, text: str) -> None:
    assert words.digits(value) == text


def test_units_and_sizes() -> None:
    assert [words.big(v) for v in (22_713_216, 1.41e9, 12, 2000, None)] == ["22.7M", "1.41G", "12", "2.00k", "–"]
    assert [words.megabytes(v) for v in (90_900_000, 1_340_200_000, 400_000)] == ["90.9", "1,340", "0.400"]
    assert [words.duration(v) for v in (540.2, 7261, 3, None)] == ["9 min 00 s", "2 h 01 min", "3 s", "–"]
    assert words.unit(Front.from_json(sample(shape="decode:1x512"))) == "ms/token"


def test_certificate_and_verdict() -> None:
    front = Front.from_json(sample())
    assert words.certificate(front).endswith("is 0.6 %, within the 1 % allowed.")
    front.certifiable = 0.04
    assert "more than the 1 % allowed" in words.certificate(front)
    found = [words.verdict(front, p) for p in front.ordered()]
    assert found == ["original", "certified", "certified", "accepted", "below keep", "below keep"]
    assert words.noise(front).endswith("noisy (above 10 %): front 4")
