"""FinerCut: drop the sublayers whose removal changes the output least, one at a time, without training.

Zhang et al., 2024 (2405.18218). Every attention or channel sublayer is a candidate by itself. Greedy: with D dropped,
drop next argmin_c distance(model, model without D and c), always against the original, so errors do not drift; the
order of removal ranks the sublayers. Front blocks of causal models are kept out at first: with rate x, B blocks and n
sublayers, blocks 0 .. floor(B x) wait until floor(n x) + 1 sublayers are gone. Ties go to the shallower one.

Cost: each step runs about half of every candidate's pass (:mod:`formwright.surgery.compress._search`); no gradients.
What is gained is the sublayer's parameters, products and state; three different shares, all in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from formwright.kit.errors import Refusal, SpecError, all_of, unknown
from formwright.models.items import Residual
from formwright.parts.base import Shape
from formwright.registry import Paper, register
from formwright.surgery.base import Displaced, Plan, Promises, Surgery, check_options, surgery
from formwright.surgery.compress._search import Candidate, Search, block_of, candidates, without
from formwright.surgery.evidence import batches

#: Share of the front that waits, for causal models (the published runs).
FRONT = 0.4


@dataclass(frozen=True)
class Ranking:
    """The order of removal, as plain data: every smaller count is a prefix.

    names: candidates, first removed first. drops: the item ids of each. distances: to the original after each removal.
    first: every candidate's distance when removed alone (the one-shot ranking); those that waited are missing.
    evaluations: sublayers run to find it.
    """

    level: str
    distance: str
    names: list[str]
    drops: list[list[str]]
    distances: list[float]
    first: dict[str, float]
    evaluations: int

    def drop(self, count: int) -> list[str]:
        """Ids of the items that are gone after ``count`` removals."""
        if not 0 <= count <= len(self.names):
            raise SpecError(f"this ranking holds {len(self.names)} removals, not {count}")
        return [id for ids in self.drops[:count] for id in ids]

    def plan(self, model: Any, count: int) -> Plan:
        """The plan that removes the first ``count``, without running anything again."""
        decisions = _decisions(model, self, count)
        return surgery("finercut").made(
            model, {"drop": count, "level": self.level, "distance": self.distance}, decisions
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Ranking:
        return cls(**data)


def ranking(
    model: Any,
    evidence: Any,
    *,
    steps: int | None = None,
    enough: Callable[[list[str]], bool] | None = None,
    distance: str = "auto",
    level: str = "sublayer",
    exclude_front: float | None = None,
    head: str | None = None,
    batch: int = 8,
    max_length: int | None = 256,
) -> Ranking:
    """Rank by greedy removal: ``steps`` of them (default all), or until ``enough(ids dropped)``.

    Raises DataError for empty evidence or numbers that are not finite (naming the candidate), SpecError for options.
    """
    left = candidates(model, level)
    search = Search(model, batches(model, evidence, batch, max_length, "finercut"), distance, head)
    waiting, back = _front(model, exclude_front)
    names: list[Candidate] = []
    distances: list[float] = []
    first: dict[str, float] = {}
    while left and (steps is None or len(names) < steps):
        open_ = [c for c in left if c.block not in waiting] if sum(len(c.items) for c in names) < back else left
        open_ = open_ or left
        measured = search.step(names, open_)
        if not names:
            first = {candidate.name: value for candidate, value in zip(open_, measured)}
        best = min(range(len(open_)), key=lambda index: measured[index])
        names.append(open_[best])
        distances.append(measured[best])
        left = [candidate for candidate in left if candidate is not open_[best]]
        if enough is not None and enough([id for candidate in names for id in candidate.ids]):
            break
    return Ranking(
        level,
        search.distance,
        [candidate.name for candidate in names],
        [candidate.ids for candidate in names],
        distances,
        first,
        search.evaluations,
    )


def candidate_distances(
    model: Any,
    dropped: Sequence[str],
    evidence: Any,
    *,
    reference: Any = None,
    distance: str = "auto",
    level: str = "sublayer",
    head: str | None = None,
    batch: int = 8,
    max_length: int | None = 256,
) -> dict[str, float]:
    """One greedy step: what each remaining candidate's removal would make of the distance to the original.

    dropped: ids taken out of ``model`` for the comparison (those that it already lacks count as well). reference: the
    original; default ``model`` with nothing dropped.
    """
    for id in dropped:
        model.item(id)
    gone = [c for c in candidates(model) if c.items[0].id in dropped]
    left = [c for c in candidates(model, level) if not any(id in dropped for id in c.ids)]
    if not left:
        return {}
    made = batches(model, evidence, batch, max_length, "finercut")
    search = Search(model, made, distance, head, reference)
    return {candidate.name: value for candidate, value in zip(left, search.step(gone, left))}


def _front(model: Any, rate: float | None) -> tuple[set[str], int]:
    """Blocks that wait, and how many sublayers must be gone until they no longer do."""
    rate = (FRONT if model.causal else 0.0) if rate is None else rate
    if not 0.0 <= rate < 1.0:
        raise SpecError(f"finercut: exclude_front={rate} must be at least 0 and below 1")
    if rate == 0.0:
        return set(), 0
    items = model.residuals()
    blocks = list(dict.fromkeys(block_of(item) for item in items))
    return set(blocks[: int(len(blocks) * rate + 1e-9) + 1]), int(len(items) * rate + 1e-9) + 1


def _parameters(model: Any) -> int:
    return model.cost(Shape.full(1, 1)).parameters


def _decisions(model: Any, ranked: Ranking, count: int) -> dict[str, Any]:
    """The plan's decisions; "drop" alone matters to ``reshape``, the rest explains it."""
    dropped = ranked.drop(count)
    before = _parameters(model)
    with without([model.item(id) for id in dropped]):
        after = _parameters(model)
    return {
        "drop": dropped,
        "distances": ranked.distances[:count],
        "ranking": ranked.names,
        "distance": ranked.distance,
        "sublayers": [len(model.residuals()), len(model.residuals()) - len(dropped)],
        "parameters": [before, after],
    }


OPTIONS = (
    "drop",
    "ratio",
    "max_params",
    "distance",
    "level",
    "exclude_front",
    "head",
    "batch",
    "max_length",
)


@register("surgery", "finercut", paper=Paper("Zhang et al.", 2024, "2405.18218"), summary="drop whole sublayers")
class FinerCut(Surgery):
    """Options: one of ``drop`` (how many candidates), ``ratio`` (share of them) or ``max_params`` (parameters left).

    distance: "auto" (js for heads that give logits, cosine for pooled vectors), "js", "kl", "angular", "norm",
    "cosine" or "published-js". level: "sublayer", "attention" (any mixer), "channel" or "block". exclude_front:
    share of front blocks that wait, default 0.4 for causal models and 0 otherwise. head: whose output is compared,
    default the first. batch: sequences run at once. max_length: tokens a text is cut to.

    ``decisions["drop"]`` may be edited.
    """

    family = "compress"
    examples = ({"drop": 1}, {"ratio": 0.5, "level": "block", "distance": "angular"})

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options("finercut", options, OPTIONS)
        level = options.get("level", "sublayer")
        left = candidates(model, level)
        steps, limit = self._wanted(model, left, level, options)
        ranked = ranking(
            model,
            evidence,
            steps=steps,
            enough=None if limit is None else _enough(model, limit),
            **{key: value for key, value in options.items() if key not in ("drop", "ratio", "max_params")},
        )
        return self.made(model, dict(options), _decisions(model, ranked, len(ranked.names)))

    def _wanted(
        self, model: Any, left: list[Candidate], level: str, options: dict[str, Any]
    ) -> tuple[int | None, int | None]:
        """(steps, parameters left): one of them."""
        given = [key for key in ("drop", "ratio", "max_params") if options.get(key) is not None]
        if len(given) != 1:
            raise SpecError(
                "finercut: give one of drop (how many sublayers), ratio (share of them) or max_params (parameters left)"
                + (f", not {' and '.join(given)}" if given else "")
            )
        if not left:
            raise Refusal(f"finercut: this model has no {level} left to remove")
        value = options[given[0]]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SpecError(f"finercut: {given[0]}={value!r} must be a number")
        if given[0] == "max_params":
            return None, self._reachable(model, left, int(value))
        if given[0] == "ratio" and not 0.0 < value < 1.0:
            raise SpecError(f"finercut: ratio={value} must lie between 0 and 1")
        if given[0] == "drop" and (value != int(value) or value < 1):
            raise SpecError(f"finercut: drop={value} must be a whole number of at least 1")
        count = int(value * len(left) + 1e-9) if given[0] == "ratio" else int(value)
        if count >= len(left):
            raise SpecError(
                f"finercut: drop={count} leaves nothing of the {len(left)} candidates at level {level!r}; "
                f"drop at most {len(left) - 1}"
            )
        if count < 1:
            raise SpecError(f"finercut: ratio={value} of {len(left)} candidates is less than one of them")
        return count, None

    @staticmethod
    def _reachable(model: Any, left: list[Candidate], limit: int) -> int:
        now = _parameters(model)
        with without([item for candidate in left for item in candidate.items]):
            least = _parameters(model)
        if not least <= limit < now:
            raise SpecError(
                f"finercut: max_params={limit:,} is out of reach: the model has {now:,} parameters, "
                f"and {least:,} when every candidate is gone"
            )
        return limit

    def promises(self, plan: Plan) -> Promises:
        return Promises(needs=("evidence",))

    def check(self, model: Any, plan: Plan) -> None:
        known = {item.id: item for item in model.walk()}
        problems = []
        listed = plan.decisions.get("drop")
        if not isinstance(listed, list):
            raise SpecError("finercut: the plan's decisions need 'drop', a list of item ids")
        for id in listed:
            if id not in known:
                problems.append(f"finercut: {unknown('item', str(id), known)}")
            elif not isinstance(known[id], Residual):
                problems.append(f"finercut: {id} is no residual sublayer, so it cannot be left out")
            elif known[id].dropped:
                problems.append(f"finercut: {id} is already dropped")
        problems += [f"finercut: {id} is listed twice" for id in dict.fromkeys(listed) if listed.count(id) > 1]
        all_of(SpecError, problems)

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        self.check(model, plan)
        return {id: model.item(id).drop() for id in plan.decisions["drop"]}

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        for id, removed in reversed(displaced.items()):
            model.item(id).restore(removed)

    def words(self, plan: Plan) -> str:
        dropped = plan.decisions.get("drop", [])
        if not dropped:
            return "Removed nothing."
        listed = [_named(id) for id in dropped]
        joined = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
        what = "the sublayer" if len(listed) == 1 else "the sublayers"
        return f"Removed {joined}: {what} whose removal changed the output least."


_WORDS = {"mlp": "MLP", "gated-mlp": "gated MLP"}


def _named(id: str) -> str:
    """``b2.mlp`` in words: "the MLP of block 2"."""
    block, _, name = id.rpartition(".")
    number = block.removeprefix("b")
    where = f"block {number}" if number.isdigit() else block
    return f"the {_WORDS.get(name, name)} of {where}"


def _enough(model: Any, limit: int) -> Callable[[list[str]], bool]:
    def reached(dropped: list[str]) -> bool:
        with without([model.item(id) for id in dropped]):
            return _parameters(model) <= limit

    return reached
