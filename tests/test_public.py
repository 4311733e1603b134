"""The public face: every name loads, is documented by one line of docs/api.md, and importing it costs nothing heavy."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import formwright

API = Path(__file__).parent.parent / "docs" / "api.md"


def documented() -> dict[str, str]:
    """name -> its line, from the table of docs/api.md."""
    rows = re.findall(r"^\| `([A-Za-z_]+)` \| (.+?) \|$", API.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows)


def test_the_documentation_lists_every_public_name() -> None:
    assert sorted(documented()) == sorted(formwright.__all__)
    assert all(len(line.split()) > 2 for line in documented().values())


@pytest.mark.parametrize("name", sorted(formwright._PUBLIC))
def test_every_public_name_loads(name: str) -> None:
    module, attribute = formwright._PUBLIC[name]
    assert getattr(formwright, name) is getattr(importlib.import_module(module), attribute)
    assert getattr(formwright, name).__doc__


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'biuld'"):
        _ = formwright.biuld
    assert set(formwright.__all__) <= set(dir(formwright))


def test_importing_is_light() -> None:
    code = (
        "import sys, formwright\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'typer', 'rich', 'matplotlib', 'tokenizers', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_errors_are_one_family() -> None:
    from formwright.kit.errors import DataError, FormwrightError, Refusal, SpecError, all_of, nearest, unknown

    assert all(issubclass(kind, FormwrightError) for kind in (DataError, Refusal, SpecError))
    assert formwright.Refusal is Refusal
    all_of(SpecError, [])
    with pytest.raises(SpecError, match=r"^one\ntwo$"):
        all_of(SpecError, ["one", "two", "one"])
    assert nearest("bodi", ["body", "head"]) == "; did you mean 'body'?"
    assert nearest("zzz", ["body"]) == ""
    assert unknown("column", "bodi", ["head", "body"]) == (
        "unknown column 'bodi'; did you mean 'body'? (known: body, head)"
    )
