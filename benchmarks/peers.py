"""The contenders of ``benchmarks.encode``: each loads the model and gives ``prepare(rows)``, which gives ``run()``.

``rows`` are batches of rows of ids, the same for all; ``run()`` encodes them into vectors (texts, width). All get the
same number of threads. CTranslate2 and Formwright remove padding by themselves; the others get every batch padded to
its longest row, which costs little where rows are sorted. Conversions, compilations and padding happen before anything
is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Rows = list[list[list[int]]]
Run = Callable[[], Any]
Prepare = Callable[[Rows], Run]


def place(model: str) -> str:
    from formwright.hub.locate import locate

    return str(locate(model))


def padded(rows: Rows) -> list[tuple[Tensor, Tensor]]:
    """(ids, mask) of every batch, padded to its longest row."""
    from formwright.models.batch import pad

    made = []
    for batch in rows:
        ids, lengths = pad(batch)
        made.append((ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()))
    return made


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    weight = mask[..., None].float()
    return torch.nn.functional.normalize((states.float() * weight).sum(1) / weight.sum(1), dim=-1)


# ---------------------------------------------------------------------- Formwright


def formwright(model: str, threads: int, int8: bool = False) -> Prepare:
    import formwright as fw
    from formwright.models.text import packed

    made = fw.load(model)
    if int8:
        made = fw.apply(made, "llm-int8", evidence=fw.task("retrieval/stdlib").texts("calibrate")[:64])

    def prepare(rows: Rows) -> Run:
        batches = [packed(made, batch) for batch in rows]
        return lambda: torch.cat([made.vectors(batch) for batch in batches])

    return prepare


# ---------------------------------------------------------------------- PyTorch


def batchwise(encode: Callable[[Tensor, Tensor], Tensor]) -> Prepare:
    """``encode(ids, mask) -> vectors`` over padded batches."""

    def prepare(rows: Rows) -> Run:
        batches = padded(rows)

        def run() -> Tensor:
            with torch.inference_mode():
                return torch.cat([encode(ids, mask) for ids, mask in batches])

        return run

    return prepare


def torch_module(model: Any) -> Prepare:
    return batchwise(lambda ids, mask: pooled(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask))


def transformers(model: str, threads: int, dtype: str = "float32") -> Prepare:
    from transformers import AutoModel

    return torch_module(AutoModel.from_pretrained(place(model), dtype=getattr(torch, dtype)).eval())


def sentence_transformers(model: str, threads: int) -> Prepare:
    from sentence_transformers import SentenceTransformer

    made = SentenceTransformer(place(model), device="cpu")
    return batchwise(lambda ids, mask: made({"input_ids": ids, "attention_mask": mask})["sentence_embedding"])


def torch_dynamic(model: str, threads: int, channels: bool = False) -> Prepare:
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    from transformers import AutoModel

    made = AutoModel.from_pretrained(place(model)).eval()
    how: Any = {torch.nn.Linear: per_channel_dynamic_qconfig} if channels else {torch.nn.Linear}
    return torch_module(quantize_dynamic(made, how, dtype=torch.qint8))


def torchao(model: str, threads: int) -> Prepare:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from transformers import AutoModel

    made = AutoModel.from_pretrained(place(model)).eval()
    quantize_(made, Int8DynamicActivationInt8WeightConfig())
    return torch_module(made)


# ---------------------------------------------------------------------- CTranslate2


def ctranslate2(model: str, threads: int, compute: str = "float32") -> Prepare:
    import ctranslate2 as library

    directory = tempfile.mkdtemp() + "/model"
    library.converters.TransformersConverter(place(model)).convert(directory, quantization=compute)
    made = library.Encoder(directory, device="cpu", compute_type=compute, inter_threads=1, intra_threads=threads)

    def prepare(rows: Rows) -> Run:
        masks = [mask for _, mask in padded(rows)]

        def run() -> Tensor:
            found = []
            for batch, mask in zip(rows, masks):
                states = torch.from_numpy(np.array(made.forward_batch(batch).last_hidden_state))
                found.append(pooled(states, mask))
            return torch.cat(found)

        return run

    return prepare


# ---------------------------------------------------------------------- ONNX Runtime and OpenVINO, one exported graph


def exported(model: str) -> Path:
    """The last states as an ONNX graph with open batch and length."""
    from transformers import AutoModel

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = AutoModel.from_pretrained(place(model), attn_implementation="eager").eval()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    path = Path(tempfile.mkdtemp(), "model.onnx")
    ids = torch.randint(1000, 2000, (2, 9))
    torch.onnx.export(
        States().eval(),
        (ids, torch.ones_like(ids)),
        str(path),
        input_names=["input_ids", "attention_mask"],
        output_names=["states"],
        dynamic_axes={name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask", "states")},
        dynamo=False,
    )
    return path


def onnxruntime(model: str, threads: int, int8: bool = False, channels: bool = False) -> Prepare:
    import onnxruntime as library

    path = exported(model)
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        small = path.with_name("int8.onnx")
        quantize_dynamic(str(path), str(small), weight_type=QuantType.QInt8, per_channel=channels)
        path = small
    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = library.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        states = session.run(["states"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        return pooled(torch.from_numpy(states), mask)

    return batchwise(encode)


def openvino(model: str, threads: int, precision: str = "") -> Prepare:
    import openvino as library

    core = library.Core()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    made = core.compile_model(library.convert_model(str(exported(model))), "CPU", settings)
    request = made.create_infer_request()

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        result = request.infer({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        return pooled(torch.from_numpy(np.array(result[0])), mask)

    return batchwise(encode)
