"""The end of a search: its best candidates measured in one alternating run, scored once on *test*, and one chosen.

Timing them together lets drift of the machine hit all alike. Cost: at most ``FINALISTS`` models besides the original,
each scored on *test* once; 40 seconds of timing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from formwright.measure import alternate
from formwright.measure.machine import machine
from formwright.measure.report import measured
from formwright.measure.timing import Timing
from formwright.search import evidence
from formwright.surgery import words

if TYPE_CHECKING:
    from formwright.search.slim import Search

#: Most points of the printed front besides the original.
FINALISTS = 3
#: Rounds of the alternating run that times them.
ROUNDS = 9


@dataclass
class Candidate:
    """A model of the chain as plain data; ``steps`` is the directory of its float form, None for the original."""

    key: str
    drops: list[str]
    healed: int
    select: float
    kept: float
    cost: float
    accepted: bool
    label: str
    steps: str | None = None
    precision: list[dict[str, Any]] = field(default_factory=list)


class Front:
    """Carried out by :meth:`run` on behalf of a search, when its chain has ended."""

    def __init__(self, search: Search) -> None:
        self.search, self.space, self.bench = search, search.space, search.bench
        self.original, self.task = search.original, search.task

    def run(self) -> dict[str, Any]:
        """The report's plain data; the models of the front lie in ``points`` of the search's directory."""
        from formwright.hub import save

        finalists = self.finalists()
        models = {made.key: self.rebuild(made) for made in finalists}
        self.search.status(now="measuring the front", elapsed=self.space.elapsed)
        times = self.space.once("timing", lambda: {"seconds": self.timed(models)})["seconds"]
        timing = {key: Timing(tuple(values)) for key, values in times.items()}
        scores = {}
        for made in finalists:
            self.search.status(now=f"test: {made.label}", elapsed=self.space.elapsed)
            scores[made.key] = evidence.score_from(self.search.score(models[made.key], "test", made.key))
        points = [self.point(made, models, timing, scores) for made in finalists]
        self.choose(points)
        for made, point in zip(finalists[1:], points[1:]):
            directory = self.space.path / "points" / made.key
            if not directory.is_dir():
                save(models[made.key], directory)
            point["_directory"] = str(directory)
        return self.data(points, scores)

    def finalists(self) -> list[Candidate]:
        """The original and the accepted candidates that nothing both cheaper and better makes pointless."""
        pool = [c for c in self.search.candidates if c.accepted and c.key != "original"]
        best: list[Candidate] = []
        for made in sorted(pool, key=lambda c: c.cost):
            if not best or made.kept > max(other.kept for other in best):
                best.append(made)
        # The cheapest may fail on test, so the next cheapest stand behind it whatever they keep.
        for made in sorted(pool, key=lambda c: c.cost)[:2]:
            if made not in best:
                best.append(made)
        best.sort(key=lambda c: c.cost)
        chosen = best if len(best) <= FINALISTS else [*best[: FINALISTS - 1], best[-1]]
        return [next(c for c in self.search.candidates if c.key == "original"), *reversed(chosen)]

    def rebuild(self, made: Candidate) -> Any:
        from formwright.hub import load

        if made.steps is None:
            return self.bench.precise(self.bench.cut(made.drops, share=True), made.precision)
        return self.bench.precise(load(self.space.path / made.steps), made.precision)

    def timed(self, models: dict[str, Any]) -> dict[str, list[float]]:
        contenders = {key: (lambda model=model: self.search.load.run(model)) for key, model in models.items()}
        found = alternate(contenders, rounds=ROUNDS, warmup=1, seconds=40)
        return {key: list(timing.seconds) for key, timing in found.items()}

    def point(self, made: Candidate, models: dict, timing: dict, scores: dict) -> dict[str, Any]:
        """One line of the table."""
        search = self.search
        model, score, original = models[made.key], scores[made.key], scores["original"]
        figures = measured(model, search.load, timing[made.key])
        first = made.key == "original"
        share = 1.0 if first else evidence.kept(self.task, score.value, original.value)
        low = 1.0 if first else evidence.bound(self.task, score, original, search.seed)
        return {
            "name": "original" if first else made.label,
            "quality": score.value,
            "kept": share,
            "bound": low,
            "select": made.select,
            "ms": figures["ms_item"],
            "ms_spread": figures["spread"],
            "noisy": figures["noisy"],
            "speed": timing[made.key].over(timing["original"]),
            "bytes": figures["bytes"],
            "parameters": figures["parameters"],
            "macs": figures["macs"],
            "cosine": 1.0 if first else self.cosine(model),
            "history": [] if first else made.label.split(" · "),
            "history_words": [words(entry) for entry in model.history],
            "on_front": True,
            "written": False,
            "accepted": share >= search.keep and (not search.strict or (low or 0.0) >= search.keep),
            "reproduce": None if first else self.space.recipe["command"],
        }

    def cosine(self, model: Any) -> float | None:
        """Mean cosine to the original's vectors on the probes; None for models that give no vectors."""
        probes = self.bench.probes
        if not probes or not any(head.kind == "vectors" for head in model.heads.values()):
            return None
        mine, theirs = (m.encode(probes, as_tensor=True) for m in (model, self.original))
        return float(torch.cosine_similarity(mine.double(), theirs.double()).mean())

    def choose(self, points: list[dict[str, Any]]) -> None:
        """Mark the cheapest accepted point as the one to write, and what lies on the front.

        Times that differ by less than the error of their medians are one time: of those, the better on select.
        """

        def figure(point: dict[str, Any]) -> float:
            if self.search.target == "latency":
                return 1.0 / point["speed"]
            return {"size": point["bytes"], "memory": point["bytes"], "macs": point["macs"]}[self.search.target]

        for point in points:
            better = [
                p
                for p in points
                if p is not point
                and figure(p) <= figure(point)
                and p["kept"] >= point["kept"]
                and (figure(p) < figure(point) or p["kept"] > point["kept"])
            ]
            point["on_front"] = not better
        accepted = [p for p in points[1:] if p["accepted"] and figure(p) < figure(points[0])]
        if accepted:
            least = min(accepted, key=figure)
            noise = 0.0
            if self.search.target == "latency":
                noise = max(p["ms_spread"] for p in accepted) / ROUNDS**0.5
            equal = [p for p in accepted if figure(p) <= figure(least) * (1 + noise)]
            sign = 1 if self.task.higher_is_better else -1
            max(equal, key=lambda p: sign * p["select"])["written"] = True

    def data(self, points: list[dict[str, Any]], scores: dict) -> dict[str, Any]:
        """Everything that the report shows, as plain data."""
        task, search = self.task, self.search
        sizes = {split: len(task.texts(split)) for split in task.splits}
        return {
            "verb": "slim",
            "model": self.original.name or "model",
            "task": {
                "name": task.name,
                "metric": task.metric,
                "higher_is_better": task.higher_is_better,
                "fingerprint": task.fingerprint(),
                "splits": sizes,
                "chance": task.chance,
            },
            "keep": search.keep,
            "target": search.target,
            "shape": search.load.name,
            "seed": search.seed,
            "machine": machine(),
            "certifiable": evidence.certifiable(task, scores["original"]),
            "baselines": {name: score.value for name, score in task.baselines("test").items()},
            "seconds": self.space.elapsed,
            "command": self.space.recipe["command"],
            "points": points,
            "candidates": [
                {
                    "quality": c.select,
                    "ms": None if search.target != "latency" else c.cost * points[0]["ms"],
                    "bytes": int(c.cost) if search.target in ("size", "memory") else None,
                    "macs": c.cost if search.target == "macs" else None,
                    "label": c.label,
                    "accepted": c.accepted,
                }
                for c in search.candidates
                if c.key != "original"
            ],
        }
