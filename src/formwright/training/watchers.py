"""Hooks that only look on: the journal of a run, its progress line, TensorBoard's files, and its picture.

They change nothing that a run makes, so a resumed run may have others. Where several processes train one model, only
the main one has them.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

from formwright.kit.errors import DataError, SpecError
from formwright.kit.files import write_atomic
from formwright.kit.journal import append_jsonl, read_jsonl
from formwright.kit.progress import Progress
from formwright.models.batch import Score
from formwright.training.hooks import Hook, positive

if TYPE_CHECKING:
    from formwright.training.run import Run

#: Steps over which the speed is averaged.
WINDOW = 20


class Watcher(Hook):
    """A hook without state, which a checkpoint does not know."""

    watches = True


class JsonLog(Watcher):
    """Every ``every`` steps a line in RUN/events.jsonl: step, loss per item, parts, lr, gradient norm, tokens, seconds;
    every score in RUN/results.jsonl."""

    def __init__(self, every: int = 10) -> None:
        self.every = positive("every", every)

    def stepped(self, run: Run) -> None:
        if run.directory is None or (run.step % self.every and not run.last):
            return
        line = {"step": run.step, "lr": run.lr, "gradient": run.gradient, "tokens": run.tokens}
        append_jsonl(run.directory.events, {**line, "seconds": round(run.seconds, 3), **run.losses})

    def scored(self, run: Run, name: str, score: Score) -> None:
        if run.directory is not None:
            line = {"step": run.step, "task": name, "value": score.value, **dict(score.extra)}
            append_jsonl(run.directory.results, line)


class Speed:
    """Tokens a second over the last steps."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=WINDOW + 1)

    def at(self, seconds: float, tokens: int) -> float:
        self._seen.append((seconds, tokens))
        (since, before), (now, after) = self._seen[0], self._seen[-1]
        return (after - before) / (now - since) if now > since else 0.0


class Live(Watcher):
    """A progress line on standard error; see :class:`~formwright.kit.progress.Progress`."""

    def __init__(self, title: str = "train", show: bool | None = None) -> None:
        self.title, self.show = title, show
        self._bar: Progress | None = None
        self._speed = Speed()

    def stage_start(self, run: Run) -> None:
        self._bar, self._speed = Progress(self.title, total=1.0, show=self.show).__enter__(), Speed()

    def stepped(self, run: Run) -> None:
        if self._bar is not None:
            told = [f"{name} {value:.4g}" for name, value in run.losses.items()]
            told.append(f"{self._speed.at(run.seconds, run.tokens):,.0f} tokens/s")
            self._bar.update(min(1.0, run.progress), "  ".join((f"step {run.step}", *told)))

    def scored(self, run: Run, name: str, score: Score) -> None:
        if self._bar is not None:
            self._bar.say(f"step {run.step}: {name} {score.value:.4f}")

    def stage_end(self, run: Run) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


class TensorBoard(Watcher):
    """Every ``every`` steps and at every score, scalars under RUN/tensorboard; look with ``tensorboard --logdir``."""

    def __init__(self, every: int = 10) -> None:
        self.every = positive("every", every)
        self._speed = Speed()
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SpecError("TensorBoard logs need the package tensorboard: pip install 'formwright[train]'") from None
        self._make = SummaryWriter

    def stage_start(self, run: Run) -> None:
        if run.directory is not None:
            # What an earlier process wrote after the checkpoint is hidden: a resumed run writes it again.
            self._writer = self._make(str(run.directory.path / "tensorboard"), purge_step=run.step + 1)

    def stepped(self, run: Run) -> None:
        speed = self._speed.at(run.seconds, run.tokens)
        if run.step % self.every and not run.last:
            return
        values = {f"loss/{name}": value for name, value in run.losses.items()}
        self._write(run, {**values, "lr": run.lr, "gradient": run.gradient, "tokens a second": speed})

    def scored(self, run: Run, name: str, score: Score) -> None:
        self._write(run, {f"score/{name}": score.value})

    def _write(self, run: Run, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, run.step)

    def stage_end(self, run: Run) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Picture(Watcher):
    """At the end, at Ctrl-C too, RUN/run.png: loss, learning rate, tokens a second and scores from the journals."""

    def __init__(self, title: str = "") -> None:
        self.title = title

    def stage_end(self, run: Run) -> None:
        if run.directory is None:
            return
        from formwright.report.curves import picture

        events, results = read_jsonl(run.directory.events), read_jsonl(run.directory.results)
        if events:
            with contextlib.suppress(DataError):  # a disk that is full is somebody else's complaint
                write_atomic(run.directory.path / "run.png", picture(events, results, self.title or run.why))
