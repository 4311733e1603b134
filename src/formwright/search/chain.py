"""The chain: how far a model can be cut, first as it is, then healed.

Moves stand in an order, the cheapest loss of quality per share of cost first. First they are added one after another
without any training: some sublayers are hardly missed, and a short healing moves a model further than it repairs. Then
one set of moves is healed for long. How bold it may be is guessed from the steps there is time for: a healed model is
taken to lose about ``LOSS * cut / sqrt(steps)``, where ``cut`` is the share of the cost that was dropped. A
set that falls short loses its dearer part, which is put back while everything else stays as healed; one that keeps
enough is followed by more. But what only just keeps enough on select falls short on test as often as not, and then all
its healing was for nothing; so a more careful set is healed first, from where that one was left.

A crew of several (:mod:`formwright.search.crew`) shares the ranking, scores the next few unhealed candidates before it
is known whether those before them are accepted, and heals as many sets at once as it has workers, for the same time:
the guessed one, and bolder and more careful ones; the boldest accepted goes on. All decisions and times are taken here.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from formwright.search.bench import Bench
from formwright.search.crew import Lost
from formwright.search.moves import item_gains, price
from formwright.surgery import copy

if TYPE_CHECKING:
    from formwright.search.slim import Search

#: Loss of quality of a healed model times the root of its steps over the share of the cost dropped. A guess: MiniLM on
#: retrieval gave 1.0 to 1.2 three times and 2.3 once, all with only the layers after the first cut trained; a single
#: figure is uncertain by about as much.
LOSS = 1.1
#: Share of the permitted loss that a set is aimed at, most of the cost that a first set may be worth, and each further.
AIM, MOST, STEP = 0.8, 0.6, 0.12
#: Unhealed candidates that may fall short, one after another, before the rest is left to healing.
MISSES = 2
#: Share of the time left that one healing may take, and seconds beyond the time left that a crew is waited for.
SHARE, GRACE = 0.85, 60.0
#: Steps below which healing does more harm than good to a model that still works, and beyond which one no longer helps.
LEAST, ENOUGH = 300, 6000
#: Moves whose loss of quality is measured by the task's own metric on calibrate, the nearest in distance first.
MEASURED = 12
#: Share of its moves that stay in the more careful set behind one that is accepted.
CAREFUL = 2 / 3
#: Sets healed beside the guessed one are worth it times two to the power of these: it is uncertain by about that.
BOLDNESS = (-0.5, 0.5, -1.0, 1.0, -0.25, 0.25, -0.75, 0.75)


class Chain:
    """Carried out by :meth:`run` on behalf of a search; every step that took time is on the search's record."""

    def __init__(self, search: Search, precision: list[dict[str, Any]]) -> None:
        self.search, self.precision = search, precision
        self.space, self.bench, self.crew = search.space, search.bench, search.crew
        #: Scores that the crew took of what it healed.
        self.scores: dict[str, Any] = {}

    def run(self) -> None:
        order, gains = self.order()
        kept = self.unhealed(order)
        self.healed(order, gains, kept)

    def unhealed(self, order: list[str]) -> list[str]:
        """Add moves while the model keeps enough as it is -> the items that can go."""
        drops: list[str] = []
        misses = 0
        ahead: list[Any] = []
        for number, item in enumerate(order[:-1]):
            key = f"u{number + 1}"
            if misses >= MISSES or not self.due(f"candidate/{key}"):
                break
            self.search.status(now=f"drop {', '.join([*drops, item])}", elapsed=self.space.elapsed)
            if not ahead:
                ahead = self.ahead(key, drops, order[number:-1])
            scored = ahead.pop(0)
            accepted = False
            if isinstance(scored, Lost):
                self.search.say(f"drop {', '.join([*drops, item])}: {scored.why}; skipped")
            else:
                trial = self.bench.cut([*drops, item], share=True)
                accepted = self.search.candidate(key, trial, [*drops, item], 0, self.precision, None, scored).accepted
            if accepted:
                drops, misses = [*drops, item], 0
            else:
                misses, ahead = misses + 1, []  # those ahead lack this item too
        return drops

    def ahead(self, key: str, drops: list[str], items: list[str]) -> list[Any]:
        """What the crew finds about the candidates from ``key`` on, should each but the last be accepted."""
        if f"candidate/{key}" in self.space.results:
            return [None]
        trials = [[*drops, *items[: count + 1]] for count in range(min(self.crew.size, len(items)))]
        return self.crew.ahead(Bench.judged, [(trial, self.precision) for trial in trials], self.patience())

    def healed(self, order: list[str], gains: dict[str, float], kept: list[str]) -> None:
        """Heal sets bolder than what goes unhealed, while there is time for healings that are long enough."""
        drops: list[str] = []
        weights, healed, number = None, 0, 0
        rung = self.take(order, gains, self.bold(order, gains))
        if len(rung) <= len(kept):  # what goes unhealed is bolder than the guess, so healing starts a step beyond it
            rung = kept + self.take([item for item in order if item not in kept], gains, STEP)
        while len(rung) + len(drops) > len(kept) and len(drops) + len(rung) < len(order):
            number += 1
            if f"heal/{number}" not in self.space.results and self.steps([*drops, *rung]) < LEAST:
                self.search.say("no time is left for a healing that helps; more --minutes may find more")
                break
            self.search.status(now=f"drop {', '.join([*drops, *rung])} and heal", elapsed=self.space.elapsed)
            rest = [item for item in order if item not in drops]
            rungs = [r for r in self.around(rung, rest, gains) if len(kept) < len(drops) + len(r) < len(order)]
            sets = self.heal(number, drops, rungs, weights)
            if not sets:
                break
            best = None
            for made in sorted(sets, key=lambda made: -len(made["rung"])):
                if self.judge(made, drops, healed) and best is None:
                    best = made
            chosen = best or min(sets, key=lambda made: len(made["rung"]))
            weights, healed, rung = self.model(chosen["key"]), healed + chosen["steps"], chosen["rung"]
            if best is not None:
                drops += rung
                self.insure(best["key"], drops, weights, healed, len(kept) + 1)
                rung = self.take([m for m in order if m not in drops], gains, STEP)
            else:
                fewer = max(len(rung) * 2 // 3, len(kept) + 1 - len(drops))
                if not 0 < fewer < len(rung):
                    break
                rung = rung[:fewer]

    def insure(self, made: str, drops: list[str], weights: Any, healed: int, least: int) -> None:
        """Behind the accepted set ``made`` of which select is not sure: fewer of its moves, at least ``least``, healed
        from where it was left."""
        careful = drops[: max(least, round(len(drops) * CAREFUL))]
        if len(careful) == len(drops) or self.search.sure(made):
            return
        key = f"{made}.careful"
        if f"heal/{key}" not in self.space.results and self.steps(careful) < LEAST:
            return
        self.search.status(now=f"drop {', '.join(careful)} and heal", elapsed=self.space.elapsed)
        for found in self.heal(key, [], [careful], weights):
            self.judge(found, [], healed)

    # ------------------------------------------------------------------ the order of moves

    def order(self) -> tuple[list[str], dict[str, float]]:
        """Items from the cheapest to drop to the dearest, and each one's share of the cost."""
        search = self.search

        def shares() -> dict[str, Any]:
            precise = self.bench.precise(search.original, self.precision)
            return {"share": item_gains(precise, search.target, search.load, self.bench.probes)}

        gains = self.space.once("gains", shares)["share"]
        found = self.space.once("order", functools.partial(self.ranked, gains))
        return [item for item in found["items"] if gains.get(item, 0.0) > 0], gains

    def ranked(self, gains: dict[str, float]) -> dict[str, Any]:
        """By distance of the outputs; where the outputs are vectors, whose distance says little about ranks, the best
        of them by the loss of the task's metric on calibrate."""
        original = self.search.original
        moves = price(original, copy(original, share=True), gains, self.bench.probes, set())
        record: dict[str, Any] = {"distance": {m.item: m.distance for m in moves}, "items": [m.item for m in moves]}
        if any(head.kind == "vectors" for head in original.heads.values()):
            lost = self.losses([m.item for m in moves[:MEASURED]])
            record["loss"] = lost
            rest = [item for item in record["items"] if item not in lost]
            record["items"] = sorted(lost, key=lambda item: lost[item] / gains[item]) + rest
        return record

    def losses(self, items: list[str]) -> dict[str, float]:
        """Item -> loss of the metric without it, the items dealt out to the crew."""
        parts = [items[first :: self.crew.size] for first in range(min(self.crew.size, len(items)))]
        found: dict[str, float] = {}
        answers = self.crew.run(Bench.losses, [(part, self.precision) for part in parts], self.patience())
        for lost, part in zip(answers, parts):
            if isinstance(lost, Lost):
                self.search.say(f"{', '.join(part)}: {lost.why}; ranked by distance, behind those that were measured")
            else:
                found |= lost
        return {item: found[item] for item in items if item in found}

    @staticmethod
    def take(order: list[str], gains: dict[str, float], worth: float) -> list[str]:
        """The first moves of the order that are worth about that share together; at least one where there is one."""
        chosen: list[str] = []
        for item in order:
            if chosen and sum(gains[i] for i in chosen) + gains[item] / 2 > worth:
                break
            chosen.append(item)
        return chosen

    def around(self, rung: list[str], rest: list[str], gains: dict[str, float]) -> list[list[str]]:
        """As many sets as the crew can heal at once: ``rung``, then shorter and longer ones as ``BOLDNESS`` says."""
        line = [*rung, *(item for item in rest if item not in rung)]
        worth = sum(gains[item] for item in rung)
        lengths = [len(self.take(line, gains, worth * 2**power)) for power in BOLDNESS]
        return [line[:length] for length in dict.fromkeys([len(rung), *lengths])][: self.crew.size]

    def bold(self, order: list[str], gains: dict[str, float]) -> float:
        """The share of the cost that a healing of all the time there is can be expected to make up for."""

        def work() -> dict[str, Any]:
            steps = self.steps(self.take(order, gains, MOST / 2))
            return {"worth": min(MOST, AIM * (1 - self.search.keep) / LOSS * steps**0.5)}

        return self.space.once("bold", work)["worth"]

    # ------------------------------------------------------------------ healing

    def heal(self, number: int | str, drops: list[str], rungs: list[list[str]], weights: Any) -> list[dict[str, Any]]:
        """Heal each of ``rungs`` on top of ``drops`` for a share of the time left -> ``key``, ``rung`` and ``steps`` of
        those that came of it. The healed models are kept on disk."""
        from formwright.hub import save

        key = f"heal/{number}"
        if key in self.space.results:
            return self.space.results[key]["sets"]
        products = self.products()
        if self.crew.away:
            # By the clock, since other machines are faster or slower than the one that was timed. They score at once
            # what they healed; here the model is on disk first, so that a stop does not lose it.
            effort: tuple = (ENOUGH, SHARE * max(self.left(), 0.0) / 60, products, self.precision)
        else:
            effort = (self.steps([*drops, *rungs[0]]), None, products, None)
        calls = [([*drops, *rung], weights, *effort) for rung in rungs]
        sets: list[dict[str, Any]] = []
        for found, rung in zip(self.crew.run(Bench.healed, calls, self.patience()), rungs):
            if isinstance(found, Lost):
                self.search.say(f"drop {', '.join([*drops, *rung])} and heal: {found.why}; skipped")
                continue
            model, score = found
            name = f"{number}.{len(sets) + 1}" if sets else f"{number}"
            save(model, self.space.path / "steps" / name, overwrite=True)
            self.scores[name] = score
            sets.append({"key": name, "rung": rung, "steps": model.history[-1].data["steps"]})
        return self.space.once(key, lambda: {"sets": sets})["sets"] if sets else []

    def judge(self, made: dict[str, Any], drops: list[str], healed: int) -> bool:
        """Put a healed set on record as a candidate -> whether it keeps enough."""
        key, rung, steps = made["key"], [*drops, *made["rung"]], healed + made["steps"]
        score = self.scores.get(key)
        found = self.search.candidate(key, self.model(key), rung, steps, self.precision, f"steps/{key}", score)
        return found.accepted

    def model(self, key: str) -> Any:
        from formwright.hub import load

        return load(self.space.path / "steps" / key)

    def due(self, key: str) -> bool:
        """Whether a step was done in an earlier session, or there is time for it."""
        return key in self.space.results or self.left() > 0

    def left(self) -> float:
        return self.search.seconds - self.search.reserve() - self.space.elapsed

    def patience(self) -> float:
        """Seconds that a crew is waited for."""
        return max(self.left(), 0.0) + GRACE

    def steps(self, drops: list[str]) -> int:
        """How many steps of healing there is time for."""
        return min(ENOUGH, int(SHARE * max(self.left(), 0.0) * self.pace(drops)))

    def pace(self, drops: list[str]) -> float:
        """Healing steps a second where healing is done, timed once."""

        def work() -> dict[str, Any]:
            return {"steps_per_second": self.asked(Bench.pace, drops, self.products())}

        return self.space.once("rate/away" if self.crew.away else "rate", work)["steps_per_second"]

    def products(self) -> str:
        """The number format of healing, for all of it the same."""
        return self.space.once("healing", lambda: {"precision": self.asked(Bench.products)})["precision"]

    def asked(self, function: Any, *call: Any) -> Any:
        """One call of the crew, carried out here where its worker is lost."""
        [found] = self.crew.run(function, [call], self.patience())
        return function(self.bench, *call) if isinstance(found, Lost) else found
