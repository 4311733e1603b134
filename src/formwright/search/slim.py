"""``slim``: the cheapest model that keeps the quality, found by composing surgeries, with the evidence.

1. Rank moves: what dropping a sublayer does to the outputs, or to the metric on *calibrate*, per share of the cost.
2. Go down the chain (:mod:`formwright.search.chain`): drop a set of them, heal against the original on unlabelled
   *calibrate* texts, apply the precision move, score on *select*.
3. Measure the survivors in one alternating run, score them once on *test*, and write the cheapest that keeps enough
   (:mod:`formwright.search.front`).

The cost is what the target says: measured latency, or bytes, multiply-accumulates, memory in closed form. Works alike
for encoders, decoders and classifiers. A search can be stopped at any moment and resumed. Its candidates may be worked
out by the workers of a Ray cluster (:mod:`formwright.search.crew`).
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formwright.kit.errors import DataError, Refusal, SpecError, unknown
from formwright.measure import alternate
from formwright.measure.workload import Workload, default_shape, workload
from formwright.search import evidence
from formwright.search.bench import Bench
from formwright.search.chain import Chain
from formwright.search.crew import Crew, hire
from formwright.search.front import FINALISTS, Candidate, Front
from formwright.search.moves import cost, options_of, sparing
from formwright.search.workspace import Workspace
from formwright.surgery import surgery
from formwright.surgery.base import Plan

TARGETS = ("latency", "size", "macs", "memory")
#: A precision move must make the target this much cheaper to be worth its error.
WORTH = 1.05


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


class Search:
    """One search, carried out by :meth:`run`; ``say`` gets lines of explanation, ``status`` the state of the search."""

    def __init__(
        self,
        model: Any,
        task: Any,
        space: Workspace,
        crew: Crew,
        say: Callable[[str], None],
        status: Callable[..., None],
    ) -> None:
        self.original, self.task, self.space, self.crew = model, task, space, crew
        self.say, self.status = say, status
        recipe = space.recipe
        self.keep, self.target, self.seed = recipe["keep"], recipe["target"], recipe["seed"]
        self.strict = recipe["strict"]
        self.seconds = recipe["minutes"] * 60.0
        self.load: Workload = workload(model, recipe["shape"], task=task, seed=self.seed)
        self.bench = Bench(model, task, self.seed)
        self.candidates: list[Candidate] = []

    # ------------------------------------------------------------------ pieces

    def score(self, model: Any, split: str, key: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """The score on record; ``known`` is one that the crew has taken already."""
        return self.space.once(f"{split}/{key}", lambda: known or self.bench.score(model, split))

    def kept(self, value: float, split: str = "select") -> float:
        return self.bench.share(value, self.score(self.original, split, "original")["value"])

    def sure(self, key: str) -> bool:
        """Whether a candidate keeps enough on select with 95 % certainty."""
        made, original = (evidence.score_from(self.space.results[f"select/{name}"]) for name in (key, "original"))
        low = evidence.bound(self.task, made, original, self.seed)
        return low is not None and low >= self.keep

    def choose_precision(self) -> list[dict[str, Any]]:
        """The precision moves that make the target cheaper by enough, measured on the original."""

        def work() -> dict[str, Any]:
            chosen: list[dict[str, Any]] = []
            for name in surgeries():
                for options in surgery(name).precision_moves(self.original, self.target):
                    trial = [*chosen, {"surgery": name, "options": options}]
                    before, after = (self.bench.precise(self.original, steps) for steps in (chosen, trial))
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

    def candidate(
        self,
        key: str,
        model: Any,
        drops: list[str],
        healed: int,
        precision: list[dict[str, Any]],
        steps: str | None,
        known: dict[str, Any] | None = None,
    ) -> Candidate:
        """Score the precise form of a float model on select (unless ``known``) and put the candidate on record."""

        def work() -> dict[str, Any]:
            precise = self.bench.precise(model, precision)
            value = self.score(precise, "select", key, known)["value"]
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

        found = Candidate(**{**self.space.once(f"candidate/{key}", work), "key": key})
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
            made = self.candidate("precise", self.original, [], 0, precision, None)
            precision = precision if made.accepted else self.spare(precision)
        if self.bench.texts:
            self.crew.take(self.bench)
            Chain(self, precision).run()
        else:
            self.say("the task has no texts to heal on, so only precision moves were tried")
        return Front(self).run()

    def spare(self, precision: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Precision layer by layer, where all layers together lose too much: as few as keep enough stay as they are.

        Ranked by what the metric on calibrate has back when a layer alone is left out, and tried twice as many each
        time. Where half of them are not enough the moves come back as they were: healing may make up for it.
        """
        items = [item.id for item in self.original.residuals()]
        if not self.bench.texts or sparing(precision, items) == precision:
            return precision
        lost = self.space.once("spared", lambda: {"loss": self.bench.spared(items, precision)})["loss"]
        order = sorted(items, key=lambda item: lost[item])
        count = 1
        while count <= len(order) // 2:
            trial = sparing(precision, order[:count])
            if self.candidate(f"precise/{count}", self.original, [], 0, trial, None).accepted:
                return trial
            count *= 2
        return precision

    def prepare(self) -> None:
        score = self.score(self.original, "select", "original")
        if not score["value"] == score["value"]:
            raise DataError(f"the original scores {score['value']} on select; there is nothing to keep")
        self.kept(score["value"])  # says so when the original is no better than chance

    def reserve(self) -> float:
        """Seconds to keep for the last measurements (finalists on test, timing, writing), at most a third of all."""
        clock = self.space.results.get("select/original", {}).get("clock", 20.0)
        return min(45.0 + clock * (1.0 + 0.6 * FINALISTS), self.seconds / 3)


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
        pieces.append(named.short(Plan(step["surgery"], named.version, options_of(step))))
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
    ray: str | None = None,
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
    in ``OUT.run`` and goes on with ``resume=True``. Without ``out`` nothing stays on disk. ray: a cluster whose workers
    rank, heal and score candidates: ``local``, ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``; a search may be begun
    with it and resumed without, and the other way round.

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
        with hire(ray) as crew, Workspace(place, recipe, resume) as space:
            made.load_state_dict(space.recipe["task"])
            search = Search(model, made, space, crew, say, status)
            say(f"slim {name} · {made.name} · keep {space.recipe['keep']:g} · {space.recipe['target']} · seed {seed}")
            for line in made.describe():
                say(f"  {line}")
            if crew.away:
                say(f"  {crew.words()}")
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
