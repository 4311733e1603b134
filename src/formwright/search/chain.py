"""The chain: how far a model can be cut, first as it is, then healed.

Moves stand in an order, the cheapest loss of quality per share of cost first. First they are added one after another
without any training: some sublayers are hardly missed, and a short healing moves a model further than it repairs. Then
one set of moves is healed for long. How bold it may be is guessed from the steps there is time for: a healed model is
taken to lose about ``LOSS * cut / sqrt(steps)``, where ``cut`` is the share of the cost that was dropped. A
set that falls short loses its dearer part, which is put back while everything else stays as healed; one that keeps
enough is followed by more.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import torch

from formwright.search.moves import drop_plan, item_gains, losses, price
from formwright.surgery import apply, copy

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
#: Share of the time left that one healing may take.
SHARE = 0.85
#: Steps below which healing does more harm than good to a model that still works, and beyond which one no longer helps.
LEAST, ENOUGH = 300, 6000
#: Steps that find out how fast healing is here.
PILOT = 10
#: Peak learning rate of healing: short trainings do not forgive the default of long ones.
RATE = 4e-4
#: Moves whose loss of quality is measured by the task's own metric on calibrate, the nearest in distance first.
MEASURED = 12


class Chain:
    """Carried out by :meth:`run` on behalf of a search; every step that took time is on the search's record."""

    def __init__(self, search: Search, precision: list[dict[str, Any]]) -> None:
        self.search, self.precision = search, precision
        self.space, self.original = search.space, search.original

    def run(self) -> None:
        order, gains = self.order()
        kept = self.unhealed(order)
        self.healed(order, gains, kept)

    def unhealed(self, order: list[str]) -> list[str]:
        """Add moves while the model keeps enough as it is -> the items that can go."""
        drops: list[str] = []
        misses = 0
        for number, item in enumerate(order[:-1]):
            key = f"u{number + 1}"
            if misses >= MISSES or not self.due(f"candidate/{key}"):
                break
            self.search.status(now=f"drop {', '.join([*drops, item])}", elapsed=self.space.elapsed)
            trial = self.cut(self.original, [*drops, item])
            made = self.search.candidate(key, trial, [*drops, item], 0, self.precision, None)
            if made.accepted:
                drops, misses = [*drops, item], 0
            else:
                misses += 1
        return drops

    def healed(self, order: list[str], gains: dict[str, float], kept: list[str]) -> None:
        """Heal sets bolder than what goes unhealed, while there is time for healings that are long enough."""
        drops: list[str] = []
        weights, healed, number = self.original, 0, 0
        rung = self.take(order, gains, self.bold(order, gains))
        while len(rung) + len(drops) > len(kept) and len(drops) + len(rung) < len(order):
            number += 1
            trial = self.cut(weights, [*drops, *rung])
            if f"heal/{number}" not in self.space.results and self.steps(trial) < LEAST:
                self.search.say("no time is left for a healing that helps; more --minutes may find more")
                break
            self.search.status(now=f"drop {', '.join([*drops, *rung])} and heal", elapsed=self.space.elapsed)
            healed += self.heal(trial, f"{number}")
            weights = trial
            made = self.search.candidate(f"{number}", trial, [*drops, *rung], healed, self.precision, f"steps/{number}")
            if made.accepted:
                drops += rung
                rung = self.take([m for m in order if m not in drops], gains, STEP)
            else:
                rung = rung[: len(rung) * 2 // 3]
                if not rung:
                    break

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
        """The first moves of the order that are worth about that share together; at least one where there is one."""
        chosen: list[str] = []
        for item in order:
            if chosen and sum(gains[i] for i in chosen) + gains[item] / 2 > worth:
                break
            chosen.append(item)
        return chosen

    def bold(self, order: list[str], gains: dict[str, float]) -> float:
        """The share of the cost that a healing of all the time there is can be expected to make up for."""

        def work() -> dict[str, Any]:
            steps = self.steps(self.cut(self.original, self.take(order, gains, MOST / 2)))
            return {"worth": min(MOST, AIM * (1 - self.search.keep) / LOSS * steps**0.5)}

        return self.space.once("bold", work)["worth"]

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

        directory = self.space.path / "steps" / key
        known = self.space.results.get(f"heal/{key}")
        if known is not None and directory.is_dir():
            healed = load(directory)
            trial.load_state_dict(healed.state_dict())
            trial.history[:] = healed.history
            return known["steps"]

        def work() -> dict[str, Any]:
            steps = self.steps(trial)
            self.train(trial, steps)
            save(trial, directory, overwrite=True)
            return {"steps": steps}

        return self.space.once(f"heal/{key}", work)["steps"]

    def steps(self, trial: Any) -> int:
        """How many steps of healing there is time for."""
        return min(ENOUGH, int(SHARE * max(self.left(), 0.0) * self.rate(trial)))

    def rate(self, trial: Any) -> float:
        """Healing steps a second on this machine, timed once on a copy."""

        def work() -> dict[str, Any]:
            scratch = copy(trial)
            self.train(scratch, 2)
            started = time.perf_counter()
            self.train(scratch, PILOT)
            return {"steps_per_second": PILOT / (time.perf_counter() - started)}

        return self.space.once("rate", work)["steps_per_second"]

    def train(self, trial: Any, steps: int) -> None:
        from formwright.training import heal

        precision = self.space.once("healing", lambda: {"precision": fast_precision()})["precision"]
        texts, seed = self.search.texts, self.search.seed
        # The layers before the first cut make up for it too: worth more than the faster steps without them.
        heal(trial, self.original, texts, steps=steps, lr=RATE, seed=seed, precision=precision, whole=True)


def fast_precision() -> str:
    """bfloat16 where the processor multiplies it, float32 elsewhere."""
    return "bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"
