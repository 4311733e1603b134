"""A training step with LoRA against ``peft`` on the same model: time, saved activations, peak memory.

    python -m benchmarks.peft [--model minilm] [--shape full] [--shape natural] [--method dora] [--threads 1] [--json]

Both sides read one random checkpoint and one adapter, written by ``peft`` and read here, and take the same step:
forward, backward, AdamW on the adapter alone, no dropout. Rows are of one length, or of natural ones, which peft pads
and Formwright packs; the loss is over real tokens. Gradients are compared before anything is timed.
Saved is what autograd keeps between forward and backward, parameters left out; peak is the process's, above what it
held before the step, measured after the times since it makes the allocator give every block back at once.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import formwright as fw
from benchmarks.harness import arguments, race, show
from formwright.hub import load_adapter
from formwright.models.batch import pad
from formwright.models.text import packed

#: rows and tokens a row of a step; the published class and its configuration; the linears that peft adapts.
MODELS: dict[str, tuple[tuple[int, int], str, dict[str, Any], list[str]]] = {
    "minilm": (
        (16, 64),
        "BertModel",
        {
            "vocab_size": 30522,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        ["query", "value"],
    ),
    "causal": (
        (8, 128),
        "LlamaForCausalLM",
        {
            "vocab_size": 2048,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "intermediate_size": 688,
        },
        ["q_proj", "v_proj"],
    ),
}
#: glibc's parameter of that name: blocks from this size on are mapped one by one.
MMAP_THRESHOLD = -3
#: The least cosine of the gradients of all adapter parameters.
BAR = 0.99999


class Side:
    """One contender: ``step()`` is a whole training step."""

    def __init__(self, model: nn.Module, answer: Callable[[], Tensor], tokens: int) -> None:
        """``answer()`` gives what is said of each real token, (tokens, classes)."""
        self.model, self.answer = model.train(), answer
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-4)
        self.target = torch.randint(0, 100, (tokens,), generator=torch.Generator().manual_seed(1))

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.answer(), self.target)

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> Tensor:
        """Of A and B of every slot, layer by layer, as one vector."""
        self.loss().backward()
        ordered = sorted(self.trained.items(), key=lambda pair: _place(pair[0]))
        found = torch.cat([p.grad.flatten().clone() for _, p in ordered if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def saved(self) -> int:
        """Bytes that autograd keeps between the forward and the backward pass, each storage once."""
        fixed = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in fixed:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(kept.values())

    def peak(self) -> int | None:
        """Bytes of the process at the worst moment of a step above those before it; None where it cannot be told."""
        with peak_memory() as told:
            self.step()
        return told[0] if told else None


def _place(name: str) -> tuple[int, str, str]:
    """Layer, role and factor of a parameter, as both sides name them."""
    layer = next(int(piece) for piece in re.split(r"[.]b?", name) + [name[1:].partition(".")[0]] if piece.isdigit())
    role = next(letter for word, letter in _ROLES.items() if f".{word}." in name)
    return layer, role, "A" if "lora_A" in name or name.endswith(".A") else name.rpartition(".")[2]


_ROLES = {"query": "q", "q_proj": "q", "q": "q", "value": "v", "v_proj": "v", "v": "v"}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The growth of the process's resident memory within, at its highest (Linux)."""
    told: list[int] = []
    try:
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        yield told
        return
    yield told
    told.append(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def drawn(name: str, shape: str) -> list[list[int]]:
    """Rows of ids: all of the full length, or of lengths spread evenly from an eighth of it."""
    (rows, length), _, options, _ = MODELS[name]
    generator = torch.Generator().manual_seed(2)
    sizes = [length] * rows if shape == "full" else torch.linspace(length // 8, length, rows).int().tolist()
    return [torch.randint(1, options["vocab_size"], (size,), generator=generator).tolist() for size in sizes]


def sides(name: str, shape: str, method: str, rank: int) -> dict[str, Side]:
    """Both contenders on the same values."""
    import peft
    import transformers

    _, kind, options, targets = MODELS[name]
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    config = made.config_class(**options)
    rows = drawn(name, shape)
    ids, lengths = pad(rows)
    real = torch.arange(ids.shape[1])[None] < lengths[:, None]
    given: dict[str, Any] = {"use_cache": False} if kind.endswith("LM") else {}
    given |= {} if shape == "full" else {"attention_mask": real.long()}
    with tempfile.TemporaryDirectory() as folder:
        base = made(config)
        base.save_pretrained(f"{folder}/base")
        own: dict[str, Any] = {"use_dora": method == "dora"}
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **own)
        theirs = peft.get_peft_model(base, settings)
        with torch.no_grad():
            for parameter_name, parameter in theirs.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.02)
        theirs.save_pretrained(f"{folder}/adapter")
        ours = load_adapter(fw.load(f"{folder}/base"), f"{folder}/adapter")

    def published() -> Tensor:
        said = theirs(input_ids=ids, **given)
        states = said.logits if kind.endswith("LM") else said.last_hidden_state
        return states.flatten(0, 1) if shape == "full" else states[real]

    batch = ids if shape == "full" else packed(ours, rows)
    tokens = int(lengths.sum())
    return {
        "formwright": Side(ours, lambda: ours(batch).flatten(0, 1), tokens),
        "peft": Side(theirs, published, tokens),
    }


def agreement(found: Tensor, wanted: Tensor) -> float:
    return float(nn.functional.cosine_similarity(found.double(), wanted.double(), dim=0))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--shape", choices=("full", "natural"), action="append")
    parser.add_argument("--method", choices=("lora", "dora"), default="lora")
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(given.threads or torch.get_num_threads())
    warnings.simplefilter("ignore")
    for name, shape in itertools.product(given.model or MODELS, given.shape or ("full", "natural")):
        held = sides(name, shape, given.method, given.rank)
        what = f"{name} {shape}"
        wanted = held["peft"].gradients()
        agree = {key: agreement(side.gradients(), wanted) for key, side in held.items()}
        contenders: dict[str, Callable[[], Any]] = {key: side.step for key, side in held.items()}
        lines = race(f"peft {given.method}", what, contenders, agree, BAR, "peft", given.rounds)
        for line in lines:
            side = held[line["contender"]]
            side.peak()  # what is made once stays
            saved, peak = side.saved(), side.peak()
            line |= {"saved_mib": saved / 2**20, "peak_mib": None if peak is None else peak / 2**20}
        show(lines, given.json)
        if not given.json:
            for line in lines:
                peak = "" if line["peak_mib"] is None else f", peak {line['peak_mib']:.0f} MiB"
                print(f"  {what:<10} {line['contender']:<34} saved {line['saved_mib']:.1f} MiB{peak}")


if __name__ == "__main__":
    main()
