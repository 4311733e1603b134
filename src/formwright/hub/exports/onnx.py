"""ONNX: a model of texts as one file that ONNX Runtime runs without Python or PyTorch.

The graph reads ``input_ids`` and ``attention_mask`` (batch, length), both open, padded on the right, and gives what the
head says. The context is built inside: a row's length is the sum of its mask. Labels and the length limit stand in the
file's metadata; the tokenizer does not. Floats are written as float32. Cost: the weights, and seconds of tracing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formwright import __version__
from formwright.hub.exports._dense import as_dense, integers, not_plain
from formwright.hub.tensors import listing
from formwright.kit.errors import DataError, Refusal, SpecError, unknown
from formwright.kit.files import write_atomic
from formwright.models.batch import Batch
from formwright.models.model import Model
from formwright.registry import register
from formwright.surgery.base import copy

#: The most that one file of this format can hold, less what the graph itself takes.
MOST = 2**31 - 2**24
#: Name of the output by what a head is.
OUTPUTS = {"vectors": "embeddings", "states": "last_hidden_state"}


@register("export", "onnx", summary="one file for ONNX Runtime")
def onnx(
    model: Any,
    path: Path,
    *,
    dequantize: bool = False,
    overwrite: bool = False,
    head: str | None = None,
    types: bool = False,
) -> Path:
    """Write the ONNX file ``path``.

    Args:
        dequantize: int8, low-rank and adapted slots as plain floats; outputs then differ by what rounding cost.
        overwrite: replace an existing file.
        head: which one, where the model has several.
        types: also read ``token_type_ids``, for models that tell the two texts of a pair apart.

    Raises Refusal for a model that is not one of tokens, integer slots without ``dequantize``, more than 2 GB, or
    operations that the exporter cannot trace; DataError where the exporter is not installed.
    """
    _check(model, path, overwrite, dequantize, types)
    name = _head_name(model, head)
    plain = (as_dense(model) if dequantize else copy(model, share=True)).cpu().float().eval()
    size = sum(t.nbytes for t in (*plain.parameters(), *plain.buffers()))
    if size > MOST:
        raise Refusal(f"an ONNX file holds at most 2 GB; this model has {size:,} bytes of weights")
    output = OUTPUTS.get(plain.heads[name].kind, "logits")
    content = _trace(Padded(plain, name), plain.limit, output, types, _metadata(model))
    write_atomic(path, content)
    return path


class Padded(nn.Module):
    """The model as a function of padded ids and their mask."""

    def __init__(self, model: Model, head: str) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        inputs = {"tokens": input_ids}
        if token_type_ids is not None:
            inputs["types"] = token_type_ids
        return self.model(Batch(inputs=inputs, lengths={"tokens": attention_mask.sum(1)}), head=self.head)


def _check(model: Any, path: Path, overwrite: bool, dequantize: bool, types: bool) -> None:
    """Everything that can be said before work."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise DataError('ONNX export needs onnx and onnxscript: pip install "formwright[onnx]"') from None
    if not isinstance(model, Model) or model.stem.field() != "tokens":
        raise Refusal("ONNX export writes models of tokens; this one reads something else or is a system of towers")
    if types and getattr(model.stem, "types", None) is None:
        raise Refusal("types: this model has no token types")
    if path.exists() and (path.is_dir() or not overwrite):
        raise DataError(f"{path} exists; choose another name" + ("" if path.is_dir() else " or pass overwrite"))
    whole = [address for address, slot in not_plain(model).items() if integers(slot)]
    if whole and not dequantize:
        raise Refusal(
            f"ONNX export cannot say int8 slots {listing(whole, 4)}; --dequantize exports their float equivalents"
        )


def _head_name(model: Model, head: str | None) -> str:
    if head is None and len(model.heads) == 1:
        return next(iter(model.heads))
    if head is None or head not in model.heads:
        raise SpecError(f"this model has several heads: {unknown('head', str(head), model.heads)}")
    return head


def _metadata(model: Model) -> dict[str, str]:
    found = {"formwright": __version__, "name": model.name}
    if model.labels:
        found["labels"] = json.dumps(model.labels, ensure_ascii=False)
    if model.limit is not None:
        found["max_length"] = str(model.limit)
    return found


def _trace(padded: Padded, limit: int | None, output: str, types: bool, metadata: dict[str, str]) -> bytes:
    ids = torch.ones(2, min(8, limit or 8), dtype=torch.long)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    inputs = (ids, torch.ones_like(ids), *([torch.zeros_like(ids)] if types else []))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=1, max=limit)
    shapes = tuple({0: batch, 1: length} for _ in names)
    try:
        with _quiet(), torch.no_grad():
            graph = torch.export.export(padded, inputs, dynamic_shapes=shapes, strict=False)
            made = torch.onnx.export(
                graph,
                inputs,
                dynamo=True,
                input_names=names,
                output_names=[output],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:  # the exporter's errors have no common kind
        reason = str(error).strip().split("\n")[0]
        raise Refusal(f"the ONNX exporter cannot trace this model: {type(error).__name__}: {reason}") from error
    assert made is not None
    proto = made.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString(deterministic=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on itself and on libraries that it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
