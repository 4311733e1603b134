"""A search's directory: what was asked, every result as a line, and the models that further steps start from.

    RUN/  recipe.json · results.jsonl · events.jsonl · lock · steps/NN (models) · points/NAME (models of the front)

Everything that took time is a line of ``results.jsonl`` under a key of its own; a resumed search reads the line instead
of doing the work again. Time spent is added up over all sessions, so a budget of minutes holds across a Ctrl-C.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from formwright.kit.errors import DataError
from formwright.kit.files import write_atomic
from formwright.kit.journal import Lock, append_jsonl, read_jsonl


class Workspace:
    """Opened once a session; use as a context manager so that the lock is given back."""

    def __init__(self, path: str | Path, recipe: dict[str, Any] | None, resume: bool) -> None:
        self.path = Path(path)
        known = self.path / "recipe.json"
        if resume:
            if not known.is_file():
                raise DataError(f"{self.path} holds no search to resume (no recipe.json)")
            self.recipe = json.loads(known.read_text(encoding="utf-8"))
        else:
            if known.exists():
                raise DataError(
                    f"{self.path} already holds a search; go on with --resume {self.path}, or choose another --out"
                )
            if self.path.exists() and any(self.path.iterdir()):
                raise DataError(f"{self.path} exists and is not a search; choose another --out")
            self.recipe = recipe or {}
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(known, json.dumps(self.recipe, indent=1, ensure_ascii=False) + "\n")
        self.lock = Lock(self.path / "lock")
        self.results = {line["key"]: line for line in read_jsonl(self.path / "results.jsonl")}
        self.before = sum(line.get("seconds", 0.0) for line in read_jsonl(self.path / "events.jsonl"))
        self.started = time.perf_counter()
        self.marked = self.started

    def __enter__(self) -> Workspace:
        self.lock.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self.event("session ended")
        self.lock.__exit__(*reason)

    @property
    def elapsed(self) -> float:
        """Seconds spent on this search, earlier sessions included."""
        return self.before + time.perf_counter() - self.started

    def event(self, what: str, **more: Any) -> None:
        """A line of the log, with the seconds since the line before it."""
        now = time.perf_counter()
        append_jsonl(self.path / "events.jsonl", {"event": what, "seconds": round(now - self.marked, 3), **more})
        self.marked = now

    def once(self, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result under ``key``: read if an earlier session has it, else worked out and written."""
        if key not in self.results:
            record = {"key": key, **work()}
            append_jsonl(self.path / "results.jsonl", record)
            self.results[key] = record
            self.event(key)
        return self.results[key]
