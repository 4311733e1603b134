"""The progress line: silent without a terminal unless asked, and never on standard output."""

from __future__ import annotations

import sys

from formwright.kit.progress import Progress


def test_silent_without_a_terminal(capsys):
    with Progress("heal", total=3) as bar:
        bar.update(1, "loss 0.1")
        bar.say("a line")
    assert capsys.readouterr() == ("", "")


def test_plain_lines_when_asked(capsys):
    with Progress("heal", total=4, show=True, every=0.0) as bar:
        bar.update(1, "loss 0.1")
        bar.say("step 2: mrr 0.5")
    with Progress("scan", show=True, every=0.0) as bar:
        bar.update(7)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "heal  25 %  00:00  loss 0.1" and lines[1] == "step 2: mrr 0.5" and lines[2] == "scan 7  00:00"


def test_a_live_bar_on_a_terminal_stays_on_standard_error(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("heal", total=2) as bar:
        bar.update(1, "loss 0.1")
        bar.say("kept [not markup]")
        bar.update(2)
    out, err = capsys.readouterr()
    assert out == "" and "kept [not markup]" in err
    with Progress("heal", total=2, show=False) as bar:
        bar.update(1)
    assert capsys.readouterr() == ("", "")
