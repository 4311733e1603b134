"""Lanes: work that overlaps, kept in order by the data it touches.

A lane does one thing at a time, in the order asked: the host's arithmetic, the device's, the link up, the link down.
Work names the cells (buffers) it reads and writes, and the waits follow from that: a reader waits for the last writer,
a writer for the last writer and every reader since. No wait is written by hand, so none can be forgotten; and a cell
carries its version and its owner, so that a lane which does not wait is caught. The same work runs on threads
(:class:`Threads`, with CUDA streams where there is a GPU, or throttled to given speeds) and on a clock that is only
counted (:class:`Clock`), which is how a step's time is known before it is run.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from formwright.kit.errors import FormwrightError

LANES = ("host", "device", "up", "down")
#: Seconds slept short of a deadline and then spun: sleeping wakes late by about this much.
SPIN = 5e-4


class Race(FormwrightError):
    """Two lanes were at one buffer, or one came before the value it was to read."""


@dataclass(eq=False)
class Mark:
    """The end of a piece of work: ``done`` once it has run (on a GPU: was launched), ``event`` when it ends there.

    ``end``: seconds on a counted clock.
    """

    lane: str
    done: threading.Event = field(default_factory=threading.Event)
    event: Any = None
    end: float = 0.0

    def wait(self, stream: Any = None) -> None:
        """Until the work is over: for a CUDA ``stream`` without holding up the caller, else for the caller itself."""
        self.done.wait()
        if self.event is not None:
            if stream is not None:
                stream.wait_event(self.event)
            else:
                self.event.synchronize()


@dataclass(eq=False)
class Cell:
    """A buffer as work sees it. ``planned`` counts the writes asked for, ``version`` those that were made."""

    name: str
    version: int = 0
    planned: int = 0
    writer: Mark | None = None
    readers: list[Mark] = field(default_factory=list)
    owner: str = ""
    inside: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def held(self, lane: str, version: int, writes: bool) -> Iterator[None]:
        """Within, ``lane`` is at this buffer; Race where another is in its way or the value is not yet ``version``."""
        with self.lock:
            if self.version != version:
                raise Race(f"{lane} came to {self.name} at version {self.version}, it was to find {version}")
            if self.owner and (writes or self.owner != "readers"):
                raise Race(f"{lane} came to {self.name} while {self.owner} was at it")
            self.owner, self.inside = (lane if writes else "readers"), self.inside + 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                self.version += writes
                self.owner = self.owner if self.inside else ""


@dataclass(eq=False)
class Work:
    """``run`` on ``lane``, once ``after`` are over; ``reads`` and ``writes`` are cells with the versions to find."""

    run: Callable[[], None]
    lane: str
    seconds: float
    after: list[Mark]
    reads: list[tuple[Cell, int]]
    writes: list[tuple[Cell, int]]
    mark: Mark


class Lanes:
    """Takes work and derives its waits; subclasses carry it out. ``forget`` drops one derived wait, by the number of
    the work that should have had it: how the tests know that a missing wait is noticed."""

    def __init__(self, forget: int | None = None) -> None:
        self.forget, self._asked = forget, 0

    def ask(
        self,
        lane: str,
        run: Callable[[], None],
        seconds: float,
        reads: Iterable[Cell] = (),
        writes: Iterable[Cell] = (),
    ) -> Mark:
        """Queue ``run`` on ``lane``. seconds: what it takes by the rates, for lanes that are throttled or counted."""
        reads, writes, mark = list(reads), list(writes), Mark(lane)
        after = [cell.writer for cell in (*reads, *writes) if cell.writer is not None]
        after += [reader for cell in writes for reader in cell.readers]
        after = [other for other in dict.fromkeys(after) if other.lane != lane]  # a lane is in order by itself
        if self._asked == self.forget:
            after = []
        self._asked += 1
        work = Work(run, lane, seconds, after, [(c, c.planned) for c in reads], [(c, c.planned) for c in writes], mark)
        for cell in reads:
            cell.readers.append(mark)
        for cell in writes:
            cell.writer, cell.readers, cell.planned = mark, [], cell.planned + 1
        self._take(work)
        return mark

    def _take(self, work: Work) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Until everything asked for is over; raises what went wrong."""


class Clock(Lanes):
    """Nothing runs; ``seconds`` is when everything would be over, ``busy`` how long each lane would have worked."""

    def __init__(self) -> None:
        super().__init__()
        self.free = dict.fromkeys(LANES, 0.0)
        self.busy = dict.fromkeys(LANES, 0.0)

    def _take(self, work: Work) -> None:
        start = max([self.free[work.lane], *(mark.end for mark in work.after)])
        work.mark.end = self.free[work.lane] = start + work.seconds
        self.busy[work.lane] += work.seconds

    @property
    def seconds(self) -> float:
        return max(self.free.values())


class Threads(Lanes):
    """A thread a lane. With ``device`` a CUDA device, all but the host's own work goes to a stream of its own; with
    ``throttled``, work takes no less than its seconds, as a slower link or processor would."""

    def __init__(
        self, device: torch.device | None = None, *, throttled: bool = False, forget: int | None = None
    ) -> None:
        super().__init__(forget)
        self.throttled = throttled
        self._failed: list[BaseException] = []
        self._queues: dict[str, queue.SimpleQueue[Work | None]] = {lane: queue.SimpleQueue() for lane in LANES}
        on_gpu = device is not None and device.type == "cuda"
        self._streams = {lane: torch.cuda.Stream(device) if on_gpu and lane != "host" else None for lane in LANES}
        self._last: dict[str, Mark] = {}
        self._threads = [threading.Thread(target=self._serve, args=(lane,), daemon=True) for lane in LANES]
        self._until = dict.fromkeys(LANES, 0.0)
        for thread in self._threads:
            thread.start()

    def _take(self, work: Work) -> None:
        self._last[work.lane] = work.mark
        self._queues[work.lane].put(work)

    def _serve(self, lane: str) -> None:
        while (work := self._queues[lane].get()) is not None:
            try:
                self._do(work)
            except BaseException as error:  # it is raised again where finish() is called
                self._failed.append(error)
            finally:
                work.mark.done.set()

    def _do(self, work: Work) -> None:
        stream = self._streams[work.lane]
        for mark in work.after:
            mark.wait(stream)
        if self._failed:
            return  # what others wrote cannot be trusted any more
        with contextlib.ExitStack() as stack:
            for cell, version in work.reads:
                stack.enter_context(cell.held(work.lane, version, writes=False))
            for cell, version in work.writes:
                stack.enter_context(cell.held(work.lane, version, writes=True))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            started = time.perf_counter()
            with torch.no_grad():
                work.run()
            if stream is not None:
                work.mark.event = stream.record_event()
            if self.throttled:
                self._hold(work.lane, started, work.seconds)

    def _hold(self, lane: str, started: float, seconds: float) -> None:
        """Keep the lane busy until its share is over; what an earlier wake-up was late by is given back."""
        begun = self._until[lane] if started - self._until[lane] < 2 * SPIN else started
        self._until[lane] = begun + seconds
        while (left := self._until[lane] - time.perf_counter()) > 0:
            time.sleep(left - SPIN if left > SPIN else 0)

    def finish(self) -> None:
        for mark in list(self._last.values()):
            mark.wait()
        if self._failed:
            first, self._failed = self._failed[0], []
            raise first

    def close(self) -> None:
        """End the threads; the lanes take no more work."""
        for waiting in self._queues.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join()
