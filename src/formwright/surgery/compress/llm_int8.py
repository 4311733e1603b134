"""LLM.int8(): the linears of the layers in 8 bits, with the few outlier columns of their inputs in float.

Dettmers, Lewis, Belkada, Zettlemoyer, 2022 (2208.07339). Above some size, and in some small models too, a few columns
of the stream reach magnitudes 20 times those of the others; one step for a whole row then rounds the rest away. Columns
with an entry of at least ``threshold`` are multiplied in float. The paper finds them afresh in every batch, which makes
a result depend on its batch mates; here they are found once, by running evidence, unless asked otherwise.

Cost: one pass over the evidence; then a quarter of the bytes of float32 for each slot. Weights are frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from formwright.kit.errors import DataError, Refusal, SpecError, all_of, unknown
from formwright.ops.int8_linear import SCHEMES, outlier_columns
from formwright.parts.base import LinearLike, TableLike, kind_of, linears
from formwright.parts.linears.dense import Dense, Table
from formwright.parts.linears.int8 import Int8Linear, Int8Table
from formwright.registry import Paper, register
from formwright.surgery.base import Displaced, Plan, Promises, Surgery, check_options, chosen_slots, on
from formwright.surgery.evidence import batches, evaluating

OPTIONS = ("threshold", "scheme", "where", "keep", "outliers", "embeddings", "batch", "max_length")
OUTLIERS = ("calibrated", "batch", "none")


@register("surgery", "llm-int8", paper=Paper("Dettmers et al.", 2022, "2208.07339"), summary="8-bit linears")
class LLMInt8(Surgery):
    """Options:

    threshold: magnitude from which a column of an input is an outlier, default 6.0; 0 has none. outliers:
    "calibrated" (default: those that occur in the evidence), "batch" (found at every call) or "none". scheme: where
    steps are shared, default "vector". where: roles, items or addresses, default every linear of the layers (heads and
    stems stay). keep: of those, the ones left as they are. embeddings: "int8" for the stem's tables too. batch,
    max_length: how evidence is run.

    Wrapped slots are quantised below their wrappers, and both factors of a low-rank slot.
    ``decisions["slots"]`` holds each slot's fixed outlier columns and may be edited.
    """

    family = "compress"
    examples = (
        {"outliers": "batch", "threshold": 2.0},
        {"outliers": "none", "scheme": "zeropoint-vector", "where": ["up", "down", "q"], "embeddings": "int8"},
        {"threshold": 2.5},
    )

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        threshold, scheme, outliers = _checked(options)
        slots = _chosen(model, options.get("where"), options.get("keep", ()))
        tables = _tables(model) if options.get("embeddings") else []
        found: dict[str, list[int]] = {address: [] for address in slots}
        if outliers == "calibrated":
            if evidence is None:
                raise DataError(
                    "llm-int8: outlier columns are found by running texts: give evidence=[texts], "
                    'or outliers="batch" (found at every call) or outliers="none"'
                )
            found = calibrate(
                model, evidence, slots, threshold, options.get("batch", 8), options.get("max_length", 256)
            )
        decisions = {
            "scheme": scheme,
            "threshold": threshold if outliers == "batch" else 0.0,
            "slots": found,
            "tables": tables,
            "bytes": _bytes(model, slots, tables),
        }
        return self.made(model, dict(options), decisions)

    def precision_moves(self, model: Any, target: str) -> list[dict[str, Any]]:
        return [{"embeddings": "int8"}] if target in ("size", "memory") else [{}]

    def short(self, plan: Plan) -> str:
        kept = plan.options.get("keep")
        name = "int8 and embeddings" if plan.options.get("embeddings") else "int8"
        return f"{name} but {', '.join(kept)}" if kept else name

    def sparing(self, options: dict[str, Any], items: list[str]) -> dict[str, Any]:
        return {**options, "keep": [*options.get("keep", ()), *items]}

    def promises(self, plan: Plan) -> Promises:
        calibrated = plan.options.get("outliers", "calibrated") == "calibrated" and plan.options.get("threshold", 6.0)
        return Promises(preserves_function=0.1, needs=("evidence",) if calibrated else ())

    def check(self, model: Any, plan: Plan) -> None:
        held, known, problems = dict(_leaves(model)), model.tables(), []
        for address, columns in plan.decisions["slots"].items():
            if address not in held:
                problems.append(f"llm-int8: {unknown('slot', address, held)}")
            elif type(held[address]) is not Dense:
                problems.append(_why_not(address, held[address]))
            elif any(not 0 <= column < held[address].in_features for column in columns):
                problems.append(
                    f"llm-int8: outliers {columns} of {address} lie outside its {held[address].in_features} columns"
                )
        for address in plan.decisions["tables"]:
            if type(known.get(address)) is not Table:
                problems.append(
                    f"llm-int8: {address} is no float table" if address in known else unknown("table", address, known)
                )
        all_of(Refusal, problems)

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        decided, displaced = plan.decisions, {}
        held, known = dict(_leaves(model)), model.tables()
        for address, columns in decided["slots"].items():
            old = held[address]
            with torch.device("meta"):
                made = Int8Linear(
                    old.in_features,
                    old.out_features,
                    old.dense_bias() is not None,
                    old.role,
                    scheme=decided["scheme"],
                    threshold=decided["threshold"],
                    outliers=bool(columns),
                )
            bias = old.dense_bias()
            if bias is not None and made.bias is not None:
                made.to(bias.dtype).bias.requires_grad_(bias.requires_grad)  # type: ignore[union-attr]
            displaced[address] = model.set_slot(address, on(made.train(old.training), old))
        for address in decided["tables"]:
            old = known[address]
            with torch.device("meta"):
                table = Int8Table(old.rows, old.width).to(next(old.parameters()).dtype)
            displaced[address] = model.set_slot(address, on(table.train(old.training), old))
        return displaced

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        held, known = dict(_leaves(model)), model.tables()
        for address, columns in plan.decisions["slots"].items():
            old = displaced.pop(address)  # one at a time, so that both forms of one slot at most are in memory
            held[address].quantize(old.weight, old.bias, columns)  # type: ignore[operator]
        for address in plan.decisions["tables"]:
            known[address].quantize(displaced.pop(address).weight)

    def words(self, plan: Plan) -> str:
        decided = plan.decisions
        before, after = decided.get("bytes", (0, 0))
        columns = sum(len(each) for each in decided["slots"].values())
        how = {"batch": f"outliers from {decided['threshold']:g} found at every call", "none": "no outliers"}
        kind = plan.options.get("outliers", "calibrated") if plan.options.get("threshold", 6.0) else "none"
        size = f", {after / before:.0%} of their bytes" if before else ""
        tables = f" and {len(decided['tables'])} tables" if decided["tables"] else ""
        return (
            f"Quantised {len(decided['slots'])} weights{tables} to 8 bits "
            f"({decided['scheme']}, {how.get(kind, f'{columns} outlier columns in float')}{size})."
        )


def calibrate(
    model: Any, evidence: Any, slots: Sequence[str], threshold: float, rows: int = 8, max_length: int | None = 256
) -> dict[str, list[int]]:
    """The columns of each slot's input that reach ``threshold`` anywhere in the evidence. Padding is not looked at."""
    if not hasattr(model, "stem"):
        raise Refusal(
            'llm-int8 runs one tower at a time to find outliers: plan for model.tower(NAME), or outliers="batch"'
        )
    given = batches(model, evidence, rows, max_length, "llm-int8")
    held = dict(_leaves(model))
    found: dict[str, set[int]] = {address: set() for address in slots}

    def watch(address: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            found[address].update(outlier_columns(x.reshape(-1, x.shape[-1]), threshold).tolist())

        return held[address].register_forward_pre_hook(look)

    with ExitStack() as stack, evaluating(model):
        for address in slots:
            stack.enter_context(watch(address))
        for batch in given:
            for piece in _unpadded(batch):
                model.run(*model.embed(piece))
    return {address: sorted(columns) for address, columns in found.items()}


def _unpadded(batch: Any) -> Iterator[Any]:
    """The batch, or each row by itself where rows are padded."""
    if not batch.lengths:
        yield batch
        return
    count = len(next(iter(batch.lengths.values())))
    for row in range(count):
        own = {name: value[row : row + 1] for name, value in batch.inputs.items()}
        own = {
            name: value[:, : int(batch.lengths[name][row])] if name in batch.lengths else value
            for name, value in own.items()
        }
        yield batch.replace(inputs=own, lengths={})


def _checked(options: dict[str, Any]) -> tuple[float, str, str]:
    """(threshold, scheme, outliers); every complaint about the options at once."""
    check_options("llm-int8", options, OPTIONS)
    threshold, scheme = options.get("threshold", 6.0), options.get("scheme", "vector")
    outliers, embeddings = options.get("outliers", "calibrated"), options.get("embeddings")
    problems = []
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
        problems.append(f"llm-int8: threshold={threshold!r} must be a number of at least 0 (0: no outliers)")
    if scheme not in SCHEMES:
        problems.append(f"llm-int8: {unknown('scheme', str(scheme), SCHEMES)}")
    if outliers not in OUTLIERS:
        problems.append(f"llm-int8: {unknown('outliers', str(outliers), OUTLIERS)}")
    if embeddings not in (None, "int8"):
        problems.append(f'llm-int8: embeddings={embeddings!r} must be "int8" or left out')
    all_of(SpecError, problems)
    return float(threshold), scheme, outliers if threshold else "none"


def _leaves(model: Any) -> Iterator[tuple[str, LinearLike]]:
    """(address, linear) of what the slots are made of: below wrappers, and each factor of a factorised slot."""

    def below(address: str, slot: LinearLike) -> Iterator[tuple[str, LinearLike]]:
        base = getattr(slot, "base", None)
        inner = [("base", base)] if isinstance(base, LinearLike) else list(linears(slot))
        if not inner:
            yield address, slot
        for name, child in inner:
            yield from below(f"{address}.{name}", child)

    for address, slot in model.slots().items():
        yield from below(address, slot)


def _chosen(model: Any, where: Any, keep: Any) -> list[str]:
    """The plain linears to quantise; a Refusal with every one that was meant and cannot be."""
    layers = {item.id for item in model.walk()}
    inside = [a for a in model.slots() if a.rpartition("/")[2].partition(":")[0] in layers]
    chosen = inside if where is None else chosen_slots(model, where, (), "llm-int8: where")
    left = set(chosen_slots(model, keep, (), "llm-int8: keep")) if keep else set()
    meant = [address for address in chosen if address not in left]
    held = {a: slot for a, slot in _leaves(model) if any(a == top or a.startswith(f"{top}.") for top in meant)}
    all_of(Refusal, [_why_not(address, slot) for address, slot in held.items() if type(slot) is not Dense])
    if not held:
        raise Refusal("llm-int8: no linear was chosen")
    return list(held)


def _why_not(address: str, slot: LinearLike) -> str:
    if isinstance(slot, Int8Linear):
        return f"llm-int8: {address} is already int8"
    return f"llm-int8: {address} is {kind_of(slot)}, which holds no plain weight to quantise"


def _tables(model: Any) -> list[str]:
    held: dict[str, TableLike] = model.tables()
    all_of(Refusal, [f"llm-int8: {a} is already int8" for a, table in held.items() if isinstance(table, Int8Table)])
    found = [address for address, table in held.items() if type(table) is Table]
    if not found:
        raise Refusal("llm-int8: embeddings='int8', but this model has no lookup table")
    return found


def _bytes(model: Any, slots: Sequence[str], tables: Sequence[str]) -> list[int]:
    """[before, after]: bytes of the chosen weights, with their steps."""
    held, known = dict(_leaves(model)), model.tables()
    weights = [held[address].weight for address in slots] + [known[address].weight for address in tables]
    return [sum(w.numel() * w.element_size() for w in weights), sum(w.numel() + 4 * len(w) for w in weights)]
