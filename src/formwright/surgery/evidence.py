"""Evidence: what a surgery may run while it decides, in whatever form the user has it.

Texts, rows of ids, tensors of a stem's field and batches all become batches of the model's own input, ``rows`` at a
time. Texts and rows of ids are packed, so no product is spent on padding and nothing has to be masked afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import DataError, Refusal
from formwright.models.batch import Batch
from formwright.models.text import packed


def batches(model: Any, evidence: Any, rows: int = 8, max_length: int | None = 256, what: str = "") -> list[Batch]:
    """``evidence`` as batches on the model's device.

    evidence: a text or several, rows of ids, a tensor (B, L) of ids (or of what the stem reads), batches, or a mixture.
    rows: sequences run at once; batches are taken as they are. max_length: texts are cut to so many tokens.
    Raises DataError for what is none of these, and where nothing is left to run.
    """
    what = what or "this surgery"
    if model.device.type == "meta":
        raise Refusal(f"{what} runs the model to decide, and this one is laid out without weights; load it first")
    if evidence is None:
        raise DataError(f"{what} decides from evidence: give evidence=[texts] (or batches, or a tensor of ids)")
    given = [evidence] if isinstance(evidence, (str, Batch, Tensor, Mapping)) else evidence
    if not isinstance(given, Iterable):
        raise DataError(f"{what}: evidence must be texts, batches or ids, not a {type(evidence).__name__}")
    given = list(given)
    if given and all(isinstance(number, int) for number in given):
        given = [given]  # one row of ids
    found: list[Batch] = []
    texts: list[str] = []
    ids: list[list[int]] = []
    for index, entry in enumerate(given):
        if isinstance(entry, str):
            texts.append(entry)
        elif isinstance(entry, Batch):
            found.append(entry)
        elif isinstance(entry, Mapping):
            found.append(Batch(inputs=entry))
        elif isinstance(entry, Tensor):
            found += _split(model, entry, rows)
        elif isinstance(entry, Sequence) and all(isinstance(number, int) for number in entry):
            ids.append([int(number) for number in entry])
        else:
            raise DataError(f"{what}: evidence {index} is a {type(entry).__name__}, not a text, a batch or ids")
    if texts:
        ids = _tokens(model, texts, max_length, what) + ids
    found += [packed(model, ids[first : first + rows]) for first in range(0, len(ids), rows)]
    found = [batch.to(model.device) for batch in found if _filled(batch)]
    if not found:
        raise DataError(f"{what}: the evidence holds no token" + (", only padding" if given else "; it is empty"))
    return found


def _tokens(model: Any, texts: list[str], max_length: int | None, what: str) -> list[list[int]]:
    if model.tokenizer is None:
        raise DataError(f"{what}: this model carries no tokenizer; give ids or batches as evidence, not texts")
    limits = [length for length in (max_length, model.limit) if length is not None]
    return model.tokenizer.encode(texts, max_length=min(limits) if limits else None)


def _split(model: Any, tensor: Tensor, rows: int) -> list[Batch]:
    tensor = tensor[None] if tensor.dim() == 1 else tensor
    return [Batch(inputs={model.stem.field(): piece}) for piece in tensor.split(rows)] if len(tensor) else []


def _filled(batch: Batch) -> bool:
    """Whether a batch has anything but padding."""
    if batch.offsets:
        return all(int(borders[-1]) > 0 for borders in batch.offsets.values())
    if batch.lengths:
        return any(int(lengths.sum()) > 0 for lengths in batch.lengths.values())
    return all(tensor.numel() > 0 for tensor in batch.inputs.values())


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and nothing is differentiated; afterwards it is as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
