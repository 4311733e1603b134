"""The chain: how far a model can be cut when it is healed between cuts.

Moves stand in an order, the cheapest loss of quality per share of cost first. The chain begins boldly, with a set of
moves worth ``BOLD`` of the cost, because many cuts healed once for long keep more than single cuts healed briefly. A
set that keeps enough is followed by smaller steps. One that does not is healed further, then halved: the dearer half of
its parts is put back, while everything else stays as healed.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

from formwright.search.moves import drop_plan, item_gains, losses, price
from formwright.surgery import apply, copy

if TYPE_CHECKING:
    from formwright.search.slim import Search

#: Share of the original's cost that the first set of moves is worth, and each further one.
BOLD, STEP = 0.38, 0.12
#: How often a set that falls short is healed further before it is halved.
SECOND_CHANCES = 1
#: Share of the time left that one healing may take, and the steps beyond which it no longer helps.
SHARE, MOST = 0.5, 500
#: Steps that find out how fast healing is here; no healing is shorter.
PILOT = 10
#: Peak learning rate of healing: short trainings do not forgive the default of long ones.
RATE = 4e-4
#: Moves whose loss of quality is measured by the task's own metric on calibrate, the nearest in distance first.
MEASURED = 8


class Chain:
    """Carried out by :meth:`run` on behalf of a search; every step that took time is on the search's record."""

    def __init__(self, search: Search, precision: list[dict[str, Any]]) -> None:
        self.search, self.precision = search, precision
        self.space, self.original = search.space, search.original

    def run(self) -> None:
        order, gains = self.order()
        weights = self.original  # where the values of the next trial come from: the original, or the last healed model
        drops: list[str] = []
        healed = number = failures = 0
        stride = BOLD
        rung = self.take(order, gains, stride)
        while rung and failures < 3 and len(self.original.residuals()) - len(drops) - len(rung) > 0:
            number += 1
            if not self.due(f"candidate/{number}"):
                break
            trial = self.cut(weights, [*drops, *rung])
            accepted, spent = self.attempt(trial, number, [*drops, *rung], healed)
            healed += spent
            weights = trial
            if accepted:
                drops += rung
                stride = STEP
                rung = self.take([m for m in order if m not in drops], gains, stride)
            else:
                failures += 1
                if len(rung) == 1:
                    order = [m for m in order if m not in rung]
                    rung = self.take([m for m in order if m not in drops], gains, 0.0)
                else:
                    rung = rung[: len(rung) // 2]

    def attempt(self, trial: Any, number: int, drops: list[str], healed: int) -> tuple[bool, int]:
        """Heal and score one trial, again where it falls short and time is left -> (kept enough, steps)."""
        spent = 0
        for chance in range(1 + SECOND_CHANCES):
            key = f"{number}" if chance == 0 else f"{number}+{chance}"
            if chance and not self.due(f"candidate/{key}"):
                break
            self.search.status(now=f"drop {', '.join(drops)} and heal", elapsed=self.space.elapsed)
            spent += self.heal(trial, key)
            made = self.search.candidate(key, trial, drops, healed + spent, self.precision, f"steps/{key}")
            if made.accepted:
                return True, spent
        return False, spent

    # ------------------------------------------------------------------ the order of moves

    def order(self) -> tuple[list[str], dict[str, float]]:
        """Items from the cheapest to drop to the dearest, and each one's share of the cost."""
        search = self.search

        def shares() -> dict[str, Any]:
            precise = search.precise(self.original, self.precision)
            return {"share": item_gains(precise, search.target, search.load, search.probes)}

        gains = self.space.once("gains", shares)["share"]
        found = self.space.once("order", functools.partial(self.ranked, gains))
        return [item for item in found["items"] if gains.get(item, 0.0) > 0], gains

    def ranked(self, gains: dict[str, float]) -> dict[str, Any]:
        """By distance of the outputs; where the outputs are vectors, whose distance says little about ranks, the best
        of them by the loss of the task's metric on calibrate."""
        search = self.search
        moves = price(self.original, copy(self.original, share=True), gains, search.probes, set())
        record: dict[str, Any] = {"distance": {m.item: m.distance for m in moves}, "items": [m.item for m in moves]}
        if any(head.kind == "vectors" for head in self.original.heads.values()):
            near = [m.item for m in moves[:MEASURED]]
            model = search.precise(self.original, self.precision)
            lost = losses(model, near, lambda made: search.task.score(made, "calibrate").value, search.share)
            rest = [m.item for m in moves[MEASURED:]]
            record["loss"] = lost
            record["items"] = sorted(near, key=lambda item: lost[item] / gains[item]) + rest
        return record

    @staticmethod
    def take(order: list[str], gains: dict[str, float], worth: float) -> list[str]:
        """The first moves of the order that are worth that share together; at least one where there is one."""
        chosen: list[str] = []
        for item in order:
            chosen.append(item)
            if sum(gains[i] for i in chosen) >= worth:
                break
        return chosen

    # ------------------------------------------------------------------ models

    def cut(self, weights: Any, drops: list[str]) -> Any:
        """The original without ``drops``, with the values of ``weights`` wherever it has them."""
        made = copy(self.original)
        apply(made, drop_plan(made, drops))
        if weights is not self.original:
            known = weights.state_dict()
            made.load_state_dict({name: known.get(name, value) for name, value in made.state_dict().items()})
            made.history += [entry for entry in weights.history if entry.kind == "event"]
        return made

    def due(self, key: str) -> bool:
        """Whether a step was done in an earlier session, or there is time for it."""
        return key in self.space.results or self.left() > 0

    def left(self) -> float:
        return self.search.seconds - self.search.reserve() - self.space.elapsed

    def heal(self, trial: Any, key: str) -> int:
        """Heal in place for a share of the time left -> steps. The healed model is kept on disk."""
        from formwright.hub import load, save
        from formwright.training import heal

        directory = self.space.path / "steps" / key
        known = self.space.results.get(f"heal/{key}")
        if known is not None and directory.is_dir():
            healed = load(directory)
            trial.load_state_dict(healed.state_dict())
            trial.history[:] = healed.history
            return known["steps"]

        def work() -> dict[str, Any]:
            rate = self.rate(trial)
            steps = min(MOST, max(PILOT, int(SHARE * max(self.left(), 0.0) * rate)))
            heal(trial, self.original, self.search.texts, steps=steps, lr=RATE, seed=self.search.seed)
            save(trial, directory, overwrite=True)
            return {"steps": steps}

        return self.space.once(f"heal/{key}", work)["steps"]

    def rate(self, trial: Any) -> float:
        """Healing steps a second on this machine, timed once on a copy."""
        from formwright.training import heal

        def work() -> dict[str, Any]:
            scratch = copy(trial)
            heal(scratch, self.original, self.search.texts, steps=2, lr=RATE, seed=self.search.seed)
            started = time.perf_counter()
            heal(scratch, self.original, self.search.texts, steps=PILOT, lr=RATE, seed=self.search.seed)
            return {"steps_per_second": PILOT / (time.perf_counter() - started)}

        return self.space.once("rate", work)["steps_per_second"]
