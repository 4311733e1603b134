"""The pages are true: their Python runs, their commands parse, their links lead somewhere, generated ones are fresh."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

from formwright import registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
#: Written by programs from measurements; their commands and links are checked, but they hold no code to run.
PAGES = [
    *sorted(DOCS.glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md") if (ROOT / name).exists()),
]
FENCE = re.compile(r"^(?P<mark>```+)(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=mark)\s*$", re.S | re.M)
NO_RUN = re.compile(r"<!--\s*no-run:\s*(?P<reason>[^>]+?)\s*-->\s*\Z")
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
#: Where a command line ends for the shell.
SHELL = ("|", ">", ">>", "<", "&&", "||", ";", "&", "2>")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    body: str
    #: why it is not run; empty for one that is
    reason: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        marked = NO_RUN.search(text[: match.start()])
        line = text.count("\n", 0, match.start("body")) + 1
        found.append(Block(page, line, match["language"], match["body"], marked["reason"] if marked else ""))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------- Python


def with_python() -> list[Path]:
    """Pages whose blocks run here; CONTRIBUTING.md, whose blocks are files, and cheaper.md, whose Python and commands
    work on one another's files, have tests of their own."""
    pages = [page for page in PAGES if page.name not in ("CONTRIBUTING.md", "cheaper.md")]
    return [page for page in pages if any(b.language == "python" and not b.reason for b in blocks(page))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.parametrize("page", with_python(), ids=name_of)
def test_python_runs(page: Path, folder: Path) -> None:
    """The blocks of a page, in order, in one namespace: a reader may type them one after another."""
    space: dict[str, Any] = {"__name__": f"page_{page.stem}"}
    module = ModuleType(space["__name__"])
    sys.modules[module.__name__] = module  # annotations of a page's functions are looked up there
    module.__dict__.update(space)
    try:
        for block in blocks(page):
            if block.language == "python" and not block.reason:
                # Padded with lines so that a traceback names the page's own line.
                source = "\n" * (block.line - 1) + block.body
                exec(compile(source, str(page), "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
        torch.set_num_threads(1)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_that_does_not_run_says_why_and_compiles(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile("\n" * (block.line - 1) + block.body, str(page), "exec")
            assert not block.reason or len(block.reason) > 5


# ---------------------------------------------------------------------- commands


@functools.cache
def parser(verb: str) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name=verb)(registry.resolve("verb", verb))
    return typer.main.get_command(app)


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """(line, words) of every ``formwright`` command line in the page's shell blocks, up to the shell's own signs."""
    found = []
    for block in blocks(page):
        if block.language not in ("sh", "bash", "console"):
            continue
        body = re.sub(r"\\\n\s*", " ", block.body)
        for offset, line in enumerate(body.splitlines()):
            line = line.removeprefix("$ ").strip()
            if not line.startswith("formwright"):
                continue
            words = shlex.split(line, comments=True)
            stop = next((index for index, word in enumerate(words) if word in SHELL), len(words))
            found.append((block.line + offset, words[1:stop]))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_parse(page: Path) -> None:
    """The verb exists and takes these arguments and options; nothing is run."""
    problems = []
    for line, words in commands(page):
        if not words or words[0] in ("--help", "--version"):
            continue
        if words[0] not in registry.names("verb"):
            problems.append(f"{page.name}:{line}: there is no verb {words[0]!r}")
            continue
        if "--help" in words:
            continue
        try:
            parser(words[0]).make_context(words[0], list(words[1:]))
        except Exception as error:
            said = error.format_message() if hasattr(error, "format_message") else repr(error)
            problems.append(f"{page.name}:{line}: formwright {shlex.join(words)}: {said}")
    assert not problems, "\n".join(problems)


def test_the_check_of_commands_would_notice(tmp_path: Path) -> None:
    """What it rests on: the parser refuses an unknown option, and a good line parses."""
    parser("slim").make_context("slim", ["m", "--task", "lm/stdlib"])
    with pytest.raises(Exception, match="No such option"):
        parser("slim").make_context("slim", ["m", "--tsak", "lm/stdlib"])


#: Option -> the kind of the names it takes.
NAMED = {"--task": "task", "--recipe": "recipe", "--format": "export"}
#: Verb -> (the kind, the place) of an argument that is a registered name.
PLACES = {"plan": ("surgery", 1), "apply": ("surgery", 2), "prove": ("proof", 1)}


def test_names_in_commands_exist() -> None:
    problems = []
    for page in PAGES:
        for line, words in commands(page):
            named = [(NAMED[word], value) for word, value in itertools.pairwise(words) if word in NAMED]
            kind, place = PLACES.get(words[0] if words else "", ("", 0))
            if place and len(words) > place and not words[place].startswith("-"):
                named.append((kind, words[place]))
            problems += [
                f"{page.name}:{line}: there is no {kind} {name!r}"
                for kind, name in named
                if not registry.is_path(name) and name not in registry.names(kind)
            ]
    assert not problems, "\n".join(problems)


# ---------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the common renderers make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(re.sub(r" ", "-", plain))
    return found


#: Generated from measurements, which a fresh checkout need not hold.
MEASURED = {"proofs.md", "benchmarks.md", "composition.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    problems = []
    for match in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target, _, anchor = match["target"].partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        there = page if not target else (page.parent / target).resolve()
        if there.name in MEASURED and there.parent == DOCS:
            continue
        if not there.exists():
            problems.append(f"{page.name} links to {target}, which does not exist")
        elif anchor and there.suffix == ".md" and anchor not in anchors(there):
            problems.append(f"{page.name} links to {target}#{anchor}, which has no such heading")
    assert not problems, "\n".join(problems)


def test_every_page_is_reached_from_the_index() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in DOCS.glob("*.md") if page.name != "index.md" and f"({page.name})" not in text]
    assert not missing, f"docs/index.md does not link to {', '.join(missing)}"


# ---------------------------------------------------------------------- generated pages


@functools.cache
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_build"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "catalog.md", "../CONTRIBUTING.md"])
def test_generated_pages_are_fresh(name: str) -> None:
    made = builder().PAGES[name]()
    assert (DOCS / name).read_text(encoding="utf-8") == made, f"{name} is stale; run python docs/build.py"


def test_lines_of_benchmarks_become_a_page(tmp_path: Path) -> None:
    """A race that met one bar and missed another, a contender that was wrong, and growth over two lengths."""
    here = {"cpu": "one", "threads": 2, "flags": ["avx2"], "torch": "2", "load": 0.1}
    raced = {"benchmark": "delta-rule", "shape": "train 1024", "machine": here, "agreement": 1.0, "rounds": 3}
    raced |= {"spread": 0.0, "noisy": False, "peer": "transformers"}
    found = "5.00x transformers"
    bars = [{"bar": f"at least {bar}x", "held": bar < 5, "found": found} for bar in (2, 9)]
    mixer = {"benchmark": "length growth", "agreement": 1.0, "machine": here, "ms": {"4096": 1.0, "8192": 2.5}}
    mixer |= {"rounds": 5, "spread": 0.2, "noisy": True}
    lines = [
        {**raced, "contender": "transformers", "ms": 50.0, "ratio": 1.0, "ratio_of_best": 1.0},
        {**raced, "contender": "formwright", "ms": 10.0, "ratio": 5.0, "ratio_of_best": 4.0, "bars": bars},
        {"benchmark": "delta-rule", "shape": "train 1024", "contender": "other", "machine": here, "wrong": "not it"},
        {**mixer, "contender": "reformer", "exponent": 1.32, "bars": [{**bars[1], "bar": "at most 1.1"}]},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    page = builder().benchmarks_page([str(file)])
    for row in (
        "| DeltaNet, train 1024 | 5.00x transformers | at least 9x | **not held** |",
        "| Growth of time, 1 mixers | exponents 1.32 to 1.32 | at most 1.1 | **not held** |",
        "| 10.0 ms | transformers | 50.0 ms | 5.00x | 4.00x | – | at least 2x: held; at least 9x: not held |",
        "| train 1024 | other | wrong: not it |",
        "| reformer | 1.0 | 2.5 | 1.32 | 20% (noisy) | at most 1.1: not held |",
    ):
        assert row in page, page


def test_cli_page_names_every_option() -> None:
    """Against the parser itself, which the page is not made from."""
    for verb in registry.names("verb"):
        section = builder().verb_section(verb)
        for parameter in parser(verb).params:
            if parameter.name == "help":
                continue
            for word in parameter.opts:
                spelled = word if word.startswith("-") else word.upper()
                assert spelled in section, f"formwright {verb}: {spelled} is not in its section"


def test_check_tells_stale_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = builder()
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "PAGES", {"a.md": lambda: "new\n", "b.md": lambda: "same\n"})
    (tmp_path / "a.md").write_text("old\n")
    (tmp_path / "b.md").write_text("same\n")
    assert module.main(["--check"]) == 1
    assert "a.md" in (said := capsys.readouterr().out) and "b.md" not in said
    assert (tmp_path / "a.md").read_text() == "old\n"
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0


def test_proofs_page_holds_every_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    from formwright.proofs import base

    claims = [base.Claim("a | b", "1", ">= 1", "2", True), base.Claim("c", "3", ">= 3", "2", False)]
    entry = registry.Entry(
        "proof", "made-up", "nowhere", "prove", "what it shows", registry.Paper("X", 2020, "2001.00001")
    )
    monkeypatch.setattr(registry, "names", lambda kind: ["made-up", "standing"] if kind == "proof" else [])
    monkeypatch.setattr(registry, "find", lambda kind, name: entry)
    monkeypatch.setattr(registry, "resolve", lambda kind, name: lambda quick, seed: claims)
    standing = "# Proofs\n\n## made-up\n\nold\n\n## standing\n\nas it was\n"
    page = builder().proofs_page(["made-up"], standing, quick=True)
    assert "\n\nold\n" not in page and page.endswith("\n\n## standing\n\nas it was\n")
    assert "## made-up" in page and "arxiv.org/abs/2001.00001" in page
    assert "| a \\| b | 1 | >= 1 | 2 | holds |" in page
    assert "| c | 3 | >= 3 | 2 | **not held** |" in page


def test_readme_and_pages_mention_no_local_paths() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert os.path.sep + "work" + os.path.sep not in text and "file://" not in text, page.name
