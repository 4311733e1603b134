"""``slim``: the cheapest model that keeps the quality, found by composing surgeries, with the evidence.

1. Rank moves: what dropping a sublayer does to the outputs, or to the metric on *calibrate*, per share of the cost.
2. Go down the chain (:mod:`formwright.search.chain`): drop a set of them, heal against the original on unlabelled
   *calibrate* texts, apply the precision move, score on *select*.
3. Measure the survivors in one alternating run, score them once on *test*, and write the cheapest that keeps enough.

The cost is what the target says: measured latency, or bytes, multiply-accumulates, memory in closed form. Works alike
for encoders, decoders and classifiers. A search can be stopped at any moment and resumed.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from formwright.kit.errors import DataError, Refusal, SpecError, unknown
from formwright.measure import alternate
from formwright.measure.machine import machine
from formwright.measure.report import measured
from formwright.measure.timing import Timing
from formwright.measure.workload import Workload, default_shape, workload
from formwright.search import evidence
from formwright.search.chain import Chain
from formwright.search.moves import cost, drop_plan
from formwright.search.workspace import Workspace
from formwright.surgery import apply, copy, surgery, words
from formwright.surgery.base import Plan

TARGETS = ("latency", "size", "macs", "memory")
#: Calibrate texts that distances are taken on, and that precision moves may run.
PROBES = 64
#: A precision move must make the target this much cheaper to be worth its error.
WORTH = 1.05
#: Most points of the printed front besides the original.
FINALISTS = 3


@dataclass
class Point:
    """One model of the printed front; ``load()`` gives it."""

    name: str
    data: dict[str, Any]
    directory: Path | None = None

    def load(self) -> Any:
        from formwright.hub import load

        if self.directory is None or not self.directory.is_dir():
            raise DataError(f"{self.name} was not kept; give out= so that the search keeps its models")
        return load(self.directory)


@dataclass
class Slimmed:
    """What :func:`slim` gives: the chosen model, the front, and where everything lies."""

    model: Any
    front: list[Point]
    data: dict[str, Any]
    command: str
    found: bool
    out: Path | None = None

    def report(self, path: str | Path) -> list[Path]:
        """Write report.html and pareto.png into a directory."""
        from formwright import report

        return report.write(self.data, path)

    def table(self, width: int = 100, color: bool = False) -> str:
        from formwright import report

        return report.table(self.data, width, color)


@dataclass
class _Candidate:
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


class Search:
    """One search, carried out by :meth:`run`; ``say`` gets lines of explanation, ``status`` the state of the search."""

    def __init__(
        self, model: Any, task: Any, space: Workspace, say: Callable[[str], None], status: Callable[..., None]
    ):
        self.original, self.task, self.space = model, task, space
        self.say, self.status = say, status
        recipe = space.recipe
        self.keep, self.target, self.seed = recipe["keep"], recipe["target"], recipe["seed"]
        self.strict = recipe["strict"]
        self.seconds = recipe["minutes"] * 60.0
        self.load: Workload = workload(model, recipe["shape"], task=task, seed=self.seed)
        self.texts: list[str] = task.texts("calibrate")
        self.probes = self.texts[:: max(1, len(self.texts) // PROBES)][:PROBES]
        self.candidates: list[_Candidate] = []

    # ------------------------------------------------------------------ pieces

    def score(self, model: Any, split: str, key: str) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            started = time.perf_counter()
            found = evidence.record(self.task.score(model, split))
            return {**found, "clock": time.perf_counter() - started}

        return self.space.once(f"{split}/{key}", work)

    def kept(self, value: float, split: str = "select") -> float:
        return self.share(value, self.score(self.original, split, "original")["value"])

    def precise(self, model: Any, precision: list[dict[str, Any]]) -> Any:
        """A copy of a model with the chosen precision moves applied; healing happens before, in float."""
        made = copy(model, share=True)
        for step in precision:
            apply(made, step["surgery"], self.probes or None, **step["options"])
        return made

    def choose_precision(self) -> list[dict[str, Any]]:
        """The precision moves that make the target cheaper by enough, measured on the original."""

        def work() -> dict[str, Any]:
            chosen: list[dict[str, Any]] = []
            for name in surgeries():
                for options in surgery(name).precision_moves(self.original, self.target):
                    trial = [*chosen, {"surgery": name, "options": options}]
                    before, after = self.precise(self.original, chosen), self.precise(self.original, trial)
                    if self.ratio(before, after) >= WORTH:
                        chosen = trial
                    del before, after
            return {"chosen": chosen}

        return self.space.once("precision", work)["chosen"]

    def ratio(self, before: Any, after: Any) -> float:
        """How many times cheaper ``after`` is."""
        if self.target != "latency":
            return cost(before, self.target, self.load) / cost(after, self.target, self.load)
        times = alternate(
            {"before": lambda: self.load.run(before), "after": lambda: self.load.run(after)}, rounds=3, seconds=20
        )
        return times["after"].over(times["before"])

    def candidate(self, key: str, model: Any, drops: list[str], healed: int, precision: list, steps: str | None) -> Any:
        """Score the precise form of a float model on select and put the candidate on record."""

        def work() -> dict[str, Any]:
            precise = self.precise(model, precision)
            value = self.score(precise, "select", key)["value"]
            share = self.kept(value)
            figure = cost(precise, self.target, self.load) if self.target != "latency" else self.quick_cost(precise)
            return {
                "drops": drops,
                "healed": healed,
                "select": value,
                "kept": share,
                "cost": figure,
                "accepted": share >= self.keep,
                "label": label(drops, healed, precision),
                "steps": steps,
                "precision": precision,
            }

        found = _Candidate(**{**self.space.once(f"candidate/{key}", work), "key": key})
        self.candidates.append(found)
        best = max((self.base_cost / c.cost for c in self.candidates if c.accepted), default=1.0)
        self.status(
            tried=len(self.candidates), best=best, elapsed=self.space.elapsed, total=self.seconds, now=found.label
        )
        return found

    def quick_cost(self, model: Any) -> float:
        """Relative time beside the original's, so that drift of the machine falls out: 1 is the original's."""
        times = alternate(
            {"original": lambda: self.load.run(self.original), "candidate": lambda: self.load.run(model)},
            rounds=2,
            warmup=1,
            seconds=10,
        )
        return times["candidate"].best / times["original"].best

    @property
    def base_cost(self) -> float:
        return 1.0 if self.target == "latency" else cost(self.original, self.target, self.load)

    # ------------------------------------------------------------------ the chain

    def run(self) -> dict[str, Any]:
        """The whole search; returns the report's plain data."""
        self.prepare()
        precision = self.choose_precision()
        self.candidate("original", self.original, [], 0, [], None)
        if precision:
            self.candidate("precise", self.original, [], 0, precision, None)
        if self.texts:
            Chain(self, precision).run()
        else:
            self.say("the task has no texts to heal on, so only precision moves were tried")
        return self.finish()

    def prepare(self) -> None:
        score = self.score(self.original, "select", "original")
        if not score["value"] == score["value"]:
            raise DataError(f"the original scores {score['value']} on select; there is nothing to keep")
        self.kept(score["value"])  # says so when the original is no better than chance

    def share(self, value: float, original: float) -> float:
        """What a value of the task's metric keeps of another."""
        return evidence.kept(self.task, value, original)

    def reserve(self) -> float:
        """Seconds to keep for the last measurements (finalists on test, timing, writing), at most a third of all."""
        clock = self.space.results.get("select/original", {}).get("clock", 20.0)
        return min(45.0 + clock * (1.0 + 0.6 * FINALISTS), self.seconds / 3)

    # ------------------------------------------------------------------ the end

    def finalists(self) -> list[_Candidate]:
        """The original and the accepted candidates that nothing both cheaper and better makes pointless."""
        pool = [c for c in self.candidates if c.accepted and c.key != "original"]
        best: list[_Candidate] = []
        for made in sorted(pool, key=lambda c: c.cost):
            if not best or made.kept > max(other.kept for other in best):
                best.append(made)
        # The cheapest may fail on test, so the next cheapest stand behind it whatever they keep.
        for made in sorted(pool, key=lambda c: c.cost)[:2]:
            if made not in best:
                best.append(made)
        best.sort(key=lambda c: c.cost)
        chosen = best if len(best) <= FINALISTS else [*best[: FINALISTS - 1], best[-1]]
        return [next(c for c in self.candidates if c.key == "original"), *reversed(chosen)]

    def rebuild(self, made: _Candidate) -> Any:
        from formwright.hub import load

        base = self.original if made.steps is None else load(self.space.path / made.steps)
        if made.steps is None and made.drops:
            base = copy(self.original, share=True)
            apply(base, drop_plan(base, made.drops))
        return self.precise(base, made.precision)

    def finish(self) -> dict[str, Any]:
        finalists = self.finalists()
        models = {made.key: self.rebuild(made) for made in finalists}
        self.status(now="measuring the front", elapsed=self.space.elapsed)
        times = self.space.once("timing", lambda: {"seconds": self.timed(models)})["seconds"]
        timing = {key: Timing(tuple(values)) for key, values in times.items()}
        scores = {}
        for made in finalists:
            self.status(now=f"test: {made.label}", elapsed=self.space.elapsed)
            scores[made.key] = evidence.score_from(self.score(models[made.key], "test", made.key))
        points = [self.point(made, models, timing, scores) for made in finalists]
        self.choose(points, finalists)
        from formwright.hub import save

        for made, point in zip(finalists[1:], points[1:]):
            directory = self.space.path / "points" / made.key.replace("+", "-")
            if not directory.is_dir():
                save(models[made.key], directory)
            point["_directory"] = str(directory)
        return self.data(points, scores)

    def timed(self, models: dict[str, Any]) -> dict[str, list[float]]:
        contenders = {key: (lambda model=model: self.load.run(model)) for key, model in models.items()}
        found = alternate(contenders, rounds=9, warmup=1, seconds=40)
        return {key: list(timing.seconds) for key, timing in found.items()}

    def point(self, made: _Candidate, models: dict, timing: dict, scores: dict) -> dict[str, Any]:
        model, score, original = models[made.key], scores[made.key], scores["original"]
        figures = measured(model, self.load, timing[made.key])
        first = made.key == "original"
        share = 1.0 if first else evidence.kept(self.task, score.value, original.value)
        low = 1.0 if first else evidence.bound(self.task, score, original, self.seed)
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
            "accepted": share >= self.keep and (not self.strict or (low or 0.0) >= self.keep),
            "reproduce": None if first else self.space.recipe["command"],
        }

    def cosine(self, model: Any) -> float | None:
        """Mean cosine to the original's vectors on the probes; None for models that give no vectors."""
        if not self.probes or not any(head.kind == "vectors" for head in model.heads.values()):
            return None
        mine, theirs = (m.encode(self.probes, as_tensor=True) for m in (model, self.original))
        return float(torch.cosine_similarity(mine.double(), theirs.double()).mean())

    def choose(self, points: list[dict[str, Any]], finalists: list[_Candidate]) -> None:
        """Mark the cheapest accepted point as the one to write, and what lies on the front."""

        def figure(point: dict[str, Any]) -> float:
            if self.target == "latency":
                return 1.0 / point["speed"]
            return {"size": point["bytes"], "memory": point["bytes"], "macs": point["macs"]}[self.target]

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
            min(accepted, key=figure)["written"] = True

    def data(self, points: list[dict[str, Any]], scores: dict) -> dict[str, Any]:
        task = self.task
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
            "keep": self.keep,
            "target": self.target,
            "shape": self.load.name,
            "seed": self.seed,
            "machine": machine(),
            "certifiable": evidence.certifiable(task, scores["original"]),
            "baselines": {name: score.value for name, score in task.baselines("test").items()},
            "seconds": self.space.elapsed,
            "command": self.space.recipe["command"],
            "points": points,
            "candidates": [
                {
                    "quality": c.select,
                    "ms": None if self.target != "latency" else c.cost * points[0]["ms"],
                    "bytes": int(c.cost) if self.target in ("size", "memory") else None,
                    "macs": c.cost if self.target == "macs" else None,
                    "label": c.label,
                    "accepted": c.accepted,
                }
                for c in self.candidates
                if c.key != "original"
            ],
        }


def surgeries() -> list[str]:
    from formwright import registry

    return registry.names("surgery")


def label(drops: list[str], healed: int, precision: list[dict[str, Any]]) -> str:
    """A history in a few words: ``drop b2.mlp, b4.attention · heal 900 steps · int8``."""
    pieces = []
    if drops:
        pieces.append("drop " + ", ".join(drops))
    if healed:
        pieces.append(f"heal {healed} steps")
    for step in precision:
        named = surgery(step["surgery"])
        pieces.append(named.short(Plan(step["surgery"], named.version, step["options"])))
    return " · ".join(pieces) or "original"


def command_of(model: str, task_words: list[str], recipe: dict[str, Any], out: str | None) -> str:
    """The command line that repeats a search."""
    parts = ["formwright", "slim", model, *task_words, "--keep", f"{recipe['keep']:g}", "--target", recipe["target"]]
    parts += ["--shape", recipe["shape"], "--minutes", f"{recipe['minutes']:g}", "--seed", str(recipe["seed"])]
    parts += ["--strict"] if recipe["strict"] else []
    return shlex.join(parts + (["--out", out] if out else []))


def check(keep: float, target: str, minutes: float) -> None:
    problems = []
    if not 0.0 < keep <= 1.0:
        problems.append(f"keep={keep:g} must lie above 0 and up to 1: 0.99 keeps 99 % of the quality")
    if target not in TARGETS:
        problems.append(unknown("target", target, TARGETS))
    if not minutes > 0:
        problems.append(f"minutes={minutes:g} must be above 0")
    if problems:
        raise SpecError("\n".join(problems))


def slim(
    model: Any,
    *,
    task: Any,
    keep: float = 0.99,
    target: str = "latency",
    shape: str | None = None,
    minutes: float = 12.0,
    seed: int = 0,
    strict: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    status: Callable[..., None] = lambda **state: None,
    confirm: Callable[[str], bool] = lambda question: True,
    task_words: list[str] | None = None,
    task_options: dict[str, Any] | None = None,
    model_name: str | None = None,
) -> Slimmed:
    """The cheapest form of ``model`` (a model or a name) that keeps ``keep`` of its quality on ``task``.

    target: ``latency`` (measured on ``shape``), ``size``, ``macs`` or ``memory``. minutes: of search, all included.
    strict: accept only where the one-sided 95 % bound reaches ``keep``. out: directory to write; the search itself lies
    in ``OUT.run`` and goes on with ``resume=True``. Without ``out`` nothing stays on disk.

    Raises: SpecError for options, DataError for data or models that cannot be used, all before any work.
    """
    from formwright.hub import load as load_model
    from formwright.tasks import task as make_task

    check(keep, target, minutes)
    if out is not None and Path(out).exists() and not overwrite and not resume:
        raise DataError(f"{out} already exists; choose another --out, or --overwrite")
    name = model_name or (str(model) if isinstance(model, (str, Path)) else getattr(model, "name", "") or "model")
    model = load_model(model) if isinstance(model, (str, Path)) else model
    if not hasattr(model, "residuals"):
        raise Refusal(f"{name} is a system of several towers; slim one tower at a time")
    task_name = task if isinstance(task, str) else task.name
    made = make_task(task) if isinstance(task, str) else task
    made.bind(model)
    recipe: dict[str, Any] = {
        "model": str(name),
        "task": made.state_dict(),
        "keep": keep,
        "target": target,
        "shape": shape or default_shape(model),
        "minutes": minutes,
        "seed": seed,
        "strict": strict,
        "task_options": task_options or {"task": task_name},
    }
    recipe["command"] = command_of(
        str(name), task_words or ["--task", task_name], recipe, None if out is None else str(out)
    )
    workload(model, recipe["shape"], task=made, seed=seed)  # complains before anything is written
    temporary = None if out is not None else tempfile.mkdtemp(prefix="formwright-")
    place = Path(f"{out}.run") if out is not None else Path(temporary or "", "run")
    try:
        with Workspace(place, recipe, resume) as space:
            made.load_state_dict(space.recipe["task"])
            search = Search(model, made, space, say, status)
            say(f"slim {name} · {made.name} · keep {space.recipe['keep']:g} · {space.recipe['target']} · seed {seed}")
            for line in made.describe():
                say(f"  {line}")
            original = evidence.score_from(search.score(model, "select", "original"))
            smallest = evidence.certifiable(made, original)
            if smallest is not None:
                say(f"  smallest loss this data can certify: {smallest:.1%}")
                loss = 1 - space.recipe["keep"]
                question = f"a loss of {loss:.1%} cannot be certified with this data; the report will say so. Go on?"
                if smallest > loss and not confirm(question):
                    raise Refusal("stopped: give more data, a lower --keep, or --yes")
            data = search.run()
            return conclude(model, data, space, Path(out) if out is not None else None, overwrite or resume)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def conclude(original: Any, data: dict[str, Any], space: Workspace, out: Path | None, overwrite: bool) -> Slimmed:
    """Write the chosen model, its report and its card, and put the result together."""
    import json

    from formwright import report
    from formwright.hub import load, save
    from formwright.report.markdown import model_card

    points = [Point(p["name"], p, Path(p.pop("_directory")) if "_directory" in p else None) for p in data["points"]]
    chosen = next((p for p in points if p.data["written"]), None)
    model = original if chosen is None or chosen.directory is None else load(chosen.directory)
    model.name = out.name if out is not None and chosen is not None else model.name
    data["out"] = None if out is None or chosen is None else str(out)
    data["resume"] = shlex.join(["formwright", "slim", "--resume", str(space.path)]) if out is not None else None
    if out is not None and chosen is not None:

        def extras(directory: Path) -> None:
            report.write(data, directory)
            (directory / "evidence").mkdir(exist_ok=True)
            (directory / "evidence" / "pareto.json").write_text(json.dumps(data, indent=1, ensure_ascii=False))
            (directory / "README.md").write_text(model_card(data))

        save(
            model,
            out,
            overwrite=overwrite,
            beside=extras,
            task=data["task"],
            metric=data["task"]["metric"],
            scores={"test": chosen.data["quality"], "kept": chosen.data["kept"], "bound": chosen.data["bound"]},
            command=data["command"],
        )
    elif out is not None:
        report.write(data, space.path)
    return Slimmed(model, points, data, data["command"], chosen is not None, out)
