"""A contender in a process of its own: thread pools and memory of one library do not disturb the next.

The parent alternates between workers; one that is not running sleeps on its pipe. A call costs about 0.1 ms for the
pipe, the same for all.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np


class Unavailable(Exception):
    """A contender that cannot run here, with its own error in a sentence."""


class Worker:
    """``target`` is ``module:function``; the function gets ``arguments`` and returns ``prepare(input) -> run``.

    :meth:`prepare` hands it an input; calling the worker runs that and waits, :meth:`vectors` gives what a run returns.
    ``ready`` is the seconds that imports and loading took.
    """

    def __init__(self, target: str, threads: int, arguments: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, target, threads, arguments), daemon=True)
        started = time.perf_counter()
        self.process.start()
        theirs.close()
        self._answer()
        self.ready = time.perf_counter() - started

    def prepare(self, given: Any) -> None:
        self._ask("prepare", given)

    def __call__(self) -> None:
        self._ask("run")

    def vectors(self) -> np.ndarray:
        return self._ask("vectors")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(("end", None))
        self.process.join(timeout=10)
        self.process.kill()

    def _ask(self, what: str, given: Any = None) -> Any:
        self.pipe.send((what, given))
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            raise Unavailable("the process ended") from None
        if kind == "error":
            self.close()
            raise Unavailable(value)
        return value


def _serve(pipe: Connection, target: str, threads: int, arguments: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(threads)
    run: Any = None
    try:
        module, _, name = target.partition(":")
        prepare = getattr(importlib.import_module(module), name)(threads=threads, **arguments)
        pipe.send(("ready", None))
        while (wanted := pipe.recv())[0] != "end":
            if wanted[0] == "prepare":
                run = prepare(wanted[1])
                pipe.send(("done", None))
            else:
                found = run()
                pipe.send(("done", np.asarray(found, dtype=np.float64) if wanted[0] == "vectors" else None))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:160]
        pipe.send(("error", f"{type(error).__name__}: {text} ({last.name})"))
