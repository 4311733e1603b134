"""Imports go down one list of packages only, and every package stands in that list."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / ".importlinter"


def test_the_import_contract_holds() -> None:
    code = (
        "import sys\n"
        "from importlinter.cli import lint_imports\n"
        f"sys.exit(lint_imports(config_filename={str(CONFIG)!r}, no_cache=True))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_stands_in_the_contract() -> None:
    config = configparser.ConfigParser()
    config.read(CONFIG, encoding="utf-8")
    listed = config["importlinter:contract:layers"]["layers"]
    known = {name.strip("() ") for name in listed.replace("|", "\n").split()}
    known.add("formwright.report")  # has a contract of its own
    folders = {path.parent.name for path in (ROOT / "src/formwright").glob("*/__init__.py")}
    assert {f"formwright.{name}" for name in folders} <= known
