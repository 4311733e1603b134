"""The proof of FinerCut: what is of no use goes first, the search wastes little, and finer cuts lose less.

Zhang et al., 2024 (2405.18218). The paper drops sublayers of Llama models of 8 to 70 billion parameters and compares
with dropping whole blocks. Here language models of bytes with 8 blocks are trained on the standard library, one for
each seed, and 4 of their 16 sublayers are dropped; minutes. ``quick``: what does not need a trained model; seconds.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from formwright.engine.state import State
from formwright.kit.errors import FormwrightError
from formwright.measure.timing import alternate
from formwright.models.build import build
from formwright.parts.base import Shape
from formwright.proofs._bytes import loss, one_thread, rows, spec, trained
from formwright.proofs.base import Claim
from formwright.registry import Paper, register
from formwright.surgery import apply, copy, plan
from formwright.surgery.compress._distances import distance
from formwright.surgery.compress._search import without
from formwright.surgery.compress.finercut import Ranking, ranking

WIDTH, BLOCKS, DROPPED = 64, 8, 4
#: Calibration as in the paper, at the models' own length: 10 rows of consecutive text.
CALIBRATION, LENGTH = 10, 64


@register("proof", "finercut", paper=Paper("Zhang et al.", 2024, "2405.18218"), summary="fewer sublayers, untrained")
def prove(quick: bool, seed: int) -> list[Claim]:
    """The claims in the order of the paper, after those that any implementation must satisfy."""
    with one_thread():
        return _claims(quick, seed)


def _claims(quick: bool, seed: int) -> list[Claim]:
    seeds = [seed] if quick else [seed + number for number in range(5)]
    models = [trained(WIDTH, BLOCKS, 5 if quick else 800, number) for number in seeds]
    model, data, held = models[0]
    calibration = rows(data, 3 if quick else CALIBRATION, LENGTH)
    return [
        planted(seed),
        *masking(model, calibration),
        restarts(model, calibration),
        *([] if quick else finer([(m, rows(d, CALIBRATION, LENGTH), rows(h, 24, 128)) for m, d, h in models], seed)),
        *cheaper(model, calibration, rows(held, 24, 128), quick),
        refusals(model, calibration),
    ]


def planted(seed: int) -> Claim:
    """Three sublayers that give back zero."""
    model = build(spec(WIDTH, BLOCKS), seed=seed)
    useless = ["b1.mlp", "b4.attention", "b6.mlp"]
    with torch.no_grad():
        for id in useless:
            part: Any = model.item(id).part
            for parameter in (part.o if id.endswith("attention") else part.down).parameters():
                parameter.zero_()
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(seed))
    decided = plan(model, "finercut", ids, drop=3, exclude_front=0.0)
    with torch.no_grad():
        before = model(ids)
        same = torch.equal(before, apply(model, decided)(ids))
    found, distances = decided.decisions["drop"], decided.decisions["distances"]
    return Claim(
        "sublayers of no use go first",
        "—",
        "the 3 planted ones, distance exactly 0, logits unchanged",
        f"{', '.join(found)} at {', '.join(f'{d:g}' for d in distances)}, logits {'equal' if same else 'changed'}",
        found == useless and distances == [0.0] * 3 and same,
    )


def masking(model: Any, ids: Tensor) -> list[Claim]:
    """A removal against the same sublayers run and multiplied by zero; then everything removed."""
    dropped = plan(model, "finercut", ids, drop=DROPPED).decisions["drop"]
    with torch.no_grad():
        masked = _masked(model, dropped, ids)
        with without([model.item(id) for id in dropped]):
            apart = float((model(ids) - masked).abs().max())
        with without(model.residuals()):
            bare = model(ids)
        table = model.stem.tokens.weight
        left = torch.equal(bare, model.final_norm(table[ids]) @ table.T)
    return [
        Claim("a removal equals a mask", "masks while searching", "within 1e-6", f"{apart:.1e}", apart <= 1e-6),
        Claim(
            "with every sublayer removed, embedding, final norm and head are left",
            "—",
            "equal",
            "equal" if left else "not equal",
            left,
        ),
    ]


def _masked(model: Any, dropped: list[str], ids: Tensor) -> Tensor:
    with ExitStack() as stack:
        for id in dropped:
            stack.enter_context(model.item(id).part.register_forward_hook(lambda module, given, y: y * 0.0))
        return model(ids)


def restarts(model: Any, ids: Tensor) -> Claim:
    """The whole ranking, searched with a pass for each candidate and with restarts."""
    found = {}
    for rate in (0.4, 0.0):
        ranked = ranking(model, ids, exclude_front=rate, batch=len(ids))
        names, runs = _by_whole_passes(model, ids, rate)
        found[rate] = (runs / ranked.evaluations, names == ranked.names)
    first = _evaluations(model, ids)
    return Claim(
        "restarting at the candidate gives the same ranking with half the work",
        "—",
        ">= 2x fewer sublayer evaluations at the published settings (front 40 % waits, 25 % removed), same ranking",
        f"{first:.2f}x; whole rankings: {found[0.4][0]:.2f}x, and {found[0.0][0]:.2f}x where nothing waits; "
        f"{'same' if all(same for _, same in found.values()) else 'other'} rankings",
        first >= 2.0 and all(same for _, same in found.values()),
    )


def _evaluations(model: Any, ids: Tensor) -> float:
    """Whole passes over restarts, in sublayers, to remove ``DROPPED``."""
    ranked = ranking(model, ids, steps=DROPPED, batch=len(ids))
    return _by_whole_passes(model, ids, 0.4, DROPPED)[1] / ranked.evaluations


def _by_whole_passes(model: Any, ids: Tensor, rate: float, steps: int | None = None) -> tuple[list[str], int]:
    """Greedy removal with one whole pass over what is left for each candidate: the order, the sublayers run."""
    left = [item.id for item in model.residuals()]
    total = len(left)
    waiting = [id for id in left if int(id.split(".")[0][1:]) <= int(BLOCKS * rate)] if rate else []
    sizes = torch.full((len(ids),), ids.shape[1])
    names: list[str] = []
    runs = 0
    with torch.inference_mode():
        z = model(ids).flatten(0, 1)
        while left and (steps is None or len(names) < steps):
            open_ = [id for id in left if id not in waiting] if len(names) < int(total * rate) + 1 else left
            open_ = open_ or left
            found = []
            for id in open_:
                with without([model.item(name) for name in (*names, id)]):
                    measured, count = distance("js", z, model(ids).flatten(0, 1), sizes)
                found.append(measured / count)
                runs += len(left) - 1
            names.append(open_[min(range(len(open_)), key=lambda index: found[index])])
            left.remove(names[-1])
    return names, runs


def finer(models: list[tuple[Any, Tensor, Tensor]], seed: int) -> list[Claim]:
    """Held-out loss after removing 4 of 16 sublayers in several ways, and greedy against one-shot."""
    lost: dict[str, list[float]] = {}
    shots: dict[int, list[tuple[float, float]]] = {4: [], 6: []}
    for number, (model, calibration, held) in enumerate(models):
        before = loss(model, held)
        found = {
            "FinerCut": _loss_without(model, held, ranking(model, calibration, steps=DROPPED).drop(DROPPED)),
            "best 2 blocks of 28 pairs": min(
                _loss_without(model, held, [f"b{block}.{part}" for block in pair for part in ("attention", "mlp")])
                for pair in itertools.combinations(range(BLOCKS), 2)
            ),
            "ShortGPT": _loss_without(model, held, _least_influence(model, calibration)),
            "random": _random(model, held, seed + number),
        }
        for name, value in found.items():
            lost.setdefault(name, []).append(value - before)
        whole = ranking(model, calibration, steps=6, exclude_front=0.0)
        for count in shots:
            shots[count].append(
                (
                    _loss_without(model, held, whole.drop(count)) - before,
                    _loss_without(model, held, _one_shot(whole, count)) - before,
                )
            )
    mean = {name: sum(values) / len(values) for name, values in lost.items()}
    listed = ", ".join(f"{name} +{value:.3f}" for name, value in mean.items())
    ours = lost["FinerCut"]
    wins = {name: sum(a < b for a, b in zip(ours, values)) for name, values in lost.items() if name != "FinerCut"}
    least = max(1, len(models) - 1)
    halved = sum(a <= b / 2 for a, b in zip(ours, lost["random"]))
    ties = {count: sum(a <= b + 1e-9 for a, b in pairs) for count, pairs in shots.items()}
    shown = "; ".join(
        f"{count / 16:.0%}: +{sum(a for a, _ in pairs) / len(pairs):.3f} against "
        f"+{sum(b for _, b in pairs) / len(pairs):.3f}, {ties[count]} of {len(pairs)} seeds"
        for count, pairs in shots.items()
    )
    return [
        Claim(
            f"{DROPPED} sublayers of 16 chosen one by one cost less than 2 whole blocks, ShortGPT's blocks, or chance",
            "Llama3-8B keeps 90 % at 25 %; 0.540 against ShortGPT's 0.369",
            f"lower held-out loss in >= {least} of {len(models)} seeds",
            f"{listed} nats; lower than {', '.join(f'{name}: {won}' for name, won in wins.items())} "
            f"of {len(models)} seeds",
            all(won >= least for won in wins.values()),
            needs="training",
        ),
        Claim(
            "and at most half of what chance costs",
            "—",
            f"in >= {least} of {len(models)} seeds",
            f"{mean['FinerCut'] / mean['random']:.2f} of it on average, {halved} of {len(models)} seeds",
            halved >= least,
            needs="training",
        ),
        Claim(
            "measuring again after each removal beats ranking once",
            "greedy above one-shot",
            f"not worse at 25 % and 38 %, in >= {least} of {len(models)} seeds",
            shown,
            all(count >= least for count in ties.values()),
            needs="training",
        ),
    ]


def _loss_without(model: Any, held: Tensor, dropped: list[str]) -> float:
    with without([model.item(id) for id in dropped]):
        return loss(model, held)


def _one_shot(ranked: Ranking, count: int) -> list[str]:
    """The ``count`` sublayers whose single removal cost least."""
    return sorted(ranked.first, key=lambda name: ranked.first[name])[:count]


def _least_influence(model: Any, ids: Tensor) -> list[str]:
    """Men et al., 2024 (2403.03853): the 2 blocks whose input and output are most alike, 1 - mean cosine."""
    influence = []
    with torch.inference_mode():
        x, ctx = model.embed(ids)
        for block in range(BLOCKS):
            stop = f"b{block + 1}.attention" if block + 1 < BLOCKS else None
            y, ctx = model.run(x, ctx, f"b{block}.attention", stop)
            influence.append(1 - float(torch.cosine_similarity(x, y, dim=-1).mean()))
            x = y
    least = sorted(range(BLOCKS), key=lambda block: influence[block])[:2]
    return [f"b{block}.{part}" for block in least for part in ("attention", "mlp")]


def _random(model: Any, held: Tensor, seed: int) -> float:
    """Mean loss over 20 choices of ``DROPPED`` sublayers."""
    generator = torch.Generator().manual_seed(seed)
    names = [item.id for item in model.residuals()]
    drawn = [torch.randperm(len(names), generator=generator)[:DROPPED].tolist() for _ in range(20)]
    return sum(_loss_without(model, held, [names[index] for index in chosen]) for chosen in drawn) / len(drawn)


def cheaper(model: Any, calibration: Tensor, held: Tensor, quick: bool) -> list[Claim]:
    """What is remembered while decoding, and the time of a pass."""
    cut = apply(copy(model, share=True), "finercut", calibration, drop=DROPPED)
    attentions = sum(id.endswith("attention") for id in cut.history[-1].data["decisions"]["drop"])
    states = []
    for made in (model, cut):
        state = State(len(held))
        with torch.inference_mode():
            made(held, state=state)
        states.append(state.bytes())
    wanted = 1 - attentions / BLOCKS
    share, shape = states[1] / states[0], Shape.full(len(held), held.shape[1])
    with torch.inference_mode():
        times = alternate({"whole": lambda: model(held), "cut": lambda: cut(held)}, rounds=9 if quick else 40, warmup=2)
    faster = times["whole"].best / times["cut"].best
    kept = cut.cost(shape).parameters / model.cost(shape).parameters
    return [
        Claim(
            "the cache shrinks with the attention sublayers removed",
            "keys and values of removed sublayers are not stored",
            f"{attentions} of {BLOCKS} removed: {wanted:.3f} of the bytes",
            f"{share:.3f}",
            abs(share - wanted) < 1e-9,
        ),
        Claim(
            "a quarter of the sublayers less is faster",
            "—",
            ">= 1.15x tokens a second",
            f"{faster:.2f}x; {1 - DROPPED / 16:.0%} of the sublayers, {kept:.0%} of the parameters",
            faster >= 1.15,
            needs="time",
        ),
    ]


def refusals(model: Any, ids: Tensor) -> Claim:
    """Nonsense is refused in words."""
    empty: list[tuple[Any, dict[str, Any]]] = [
        (ids, {"drop": 16}),
        (ids, {"drop": 0}),
        ([], {"drop": 1}),
        (torch.zeros(2, 0, dtype=torch.long), {"drop": 1}),
        (ids, {"drop": 1, "distance": "perplexed"}),
    ]
    sick = copy(model)
    with torch.no_grad():
        sick.slot("b3.mlp:up").weight[0, 0] = torch.nan
    tried = [(model, *case) for case in empty] + [(sick, ids, {"drop": 1})]
    refused = 0
    for made, evidence, options in tried:
        try:
            plan(made, "finercut", evidence, **options)
        except FormwrightError:
            refused += 1
    return Claim(
        "too many removals, empty evidence and logits that are not finite are refused",
        "—",
        f"all {len(tried)}",
        f"{refused} of {len(tried)}",
        refused == len(tried),
    )
