"""How a run may end before its last step: a loss that is no number, Ctrl-C, and a scheduler that wants its machine."""

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
    """Ctrl-C or SIGTERM: the step was finished and, given a run directory, a checkpoint written.

    ``str()`` says how to go on.
    """


@contextlib.contextmanager
def held_interrupt() -> Iterator[Any]:
    """Within, Ctrl-C and SIGTERM are noted (ask the yielded function) so that a step can be finished; a second Ctrl-C
    is raised. ``torchrun`` answers Ctrl-C with SIGTERM to every process, so that one is never raised."""
    asked = False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
