"""How a run may end before its last step: a loss that is no number, and Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from formwright.kit.errors import FormwrightError


class Diverged(FormwrightError):
    """The loss or its gradient is no number any more; the sentence names the step and what is kept."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the step was finished and, given a run directory, a checkpoint written; ``str()`` says how to go on."""


@contextlib.contextmanager
def held_interrupt() -> Iterator[Any]:
    """Within, a first Ctrl-C is noted (ask the yielded function) so that a step can be finished; a second is raised."""
    asked = False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
