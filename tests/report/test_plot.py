"""The picture can be read back, is not empty, and no two of its labels overlap."""

from __future__ import annotations

import io
import itertools
import random
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from formwright.report import plot
from formwright.report.schema import Front

from .sample import sample


def drawn(data: dict[str, Any]) -> np.ndarray:
    png = plot.picture(Front.from_json(data))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def share_of(pixels: np.ndarray, color: str) -> float:
    wanted = np.array(matplotlib.colors.to_rgb(color))
    return float((np.abs(pixels[..., :3] - wanted).max(-1) < 0.03).mean())


def test_decodable_and_not_blank() -> None:
    pixels = drawn(sample())
    assert pixels.shape == (1080, 1800, 4)
    assert 0.8 < share_of(pixels, "white") < 0.98
    for color in (plot.INK, plot.BLUE, plot.ORANGE, plot.GREEN):
        assert share_of(pixels, color) > 0.0002


def test_no_global_state() -> None:
    before = dict(matplotlib.rcParams)
    png = plot.picture(Front.from_json(sample()))
    assert dict(matplotlib.rcParams) == before
    assert plot.picture(Front.from_json(sample())) == png  # the same bytes again


def strange() -> dict[str, dict[str, Any]]:
    bare = sample(points=[{"name": "original"}], candidates=[], keep=None)
    far = sample()
    far["points"][4].update(speed=40.0, kept=0.5, bound=0.4)
    worse = sample(keep=0.999)
    worse["points"][1].update(kept=1.02, bound=1.01)
    names = sample(model="$x_1$ \\alpha 模型 <b>", target="size")
    names["points"][3]["history"] = ["$\\frac$", "x" * 300]
    lower = sample()
    lower["task"].update(higher_is_better=False, metric="bits/byte")
    return {"bare": bare, "far": far, "worse": worse, "names": names, "lower": lower, "macs": sample(target="macs")}


@pytest.mark.parametrize("name", strange())
def test_strange_fronts(name: str) -> None:
    assert share_of(drawn(strange()[name]), "white") < 0.995


def test_labels_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            kept.append(self)

    monkeypatch.setattr(plot, "Figure", Kept)
    rng = random.Random(1)
    data = sample()
    for n in range(12):  # a crowd: what finds no place is left out
        point = dict(data["points"][2], name=f"crowd {n}", speed=2.4 + rng.random(), kept=0.99 + 0.004 * rng.random())
        data["points"].append(point)
    for crowd in (sample(), data):
        plot.picture(Front.from_json(crowd))
        figure = kept[-1]
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        texts = [t for t in [*figure.axes[0].texts, *figure.texts] if t.get_text().strip()]
        boxes = [t.get_window_extent(renderer).padded(-1) for t in texts]  # neighbours of the legend touch
        assert "keep 99 %" in [t.get_text() for t in texts] and "original" in [t.get_text() for t in texts]
        assert any(t.get_text().replace("\n", " · ") == " · ".join(sample()["points"][3]["history"]) for t in texts)
        for (one, a), (two, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
            assert not a.overlaps(b), (one.get_text(), two.get_text())
        assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 for b in boxes)


def test_candidates_beyond_the_picture_stay_visible() -> None:
    inside = sample()
    inside["candidates"] = []
    below = sample()
    below["candidates"] = [{"ms": 1.0, "quality": 0.1}]
    assert share_of(drawn(below), plot.FAINT) > share_of(drawn(inside), plot.FAINT)
