"""One progress line for everything that takes over two seconds: live on a terminal, silent otherwise.

It writes to standard error only, so machine-readable output on standard output is never broken. Cost: nothing while
silent; redrawn at most ten times a second.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """``with Progress("heal", total=300) as bar: bar.update(step, "loss 0.12")``.

    total: what ``done`` counts up to (steps, or seconds of a budget); None when unknown. show: True prints even
    without a terminal (a plain line every ``every`` seconds), False never prints, None prints on a terminal only.
    """

    def __init__(
        self, title: str, total: float | None = None, *, show: bool | None = None, every: float = 10.0
    ) -> None:
        self.title, self.total, self.every = title, total, every
        terminal = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()
        self.live = terminal and show is not False
        self.plain = bool(show) and not terminal
        self._started = self._printed = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._started = self._printed = time.monotonic()
        if self.live:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, note="")
        return self

    def update(self, done: float, note: str = "") -> None:
        """Say how far it is, in the unit of ``total``, and one short note such as the loss."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif self.plain and time.monotonic() - self._printed >= self.every:
            self._printed = time.monotonic()
            print(self._line(done, note), file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A whole line that stays, above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        elif self.plain:
            print(line, file=sys.stderr, flush=True)

    def _line(self, done: float, note: str) -> str:
        share = f"{100 * done / self.total:3.0f} %" if self.total else f"{done:g}"
        elapsed = int(time.monotonic() - self._started)
        return f"{self.title} {share}  {elapsed // 60:02d}:{elapsed % 60:02d}  {note}".rstrip()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
