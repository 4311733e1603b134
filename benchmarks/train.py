"""Training a causal Transformer of ten million parameters on documents of natural length, against the Trainer.

    python -m benchmarks.train [--steps 4] [--rounds 2] [--threads 2] [--json]

The documents are the standard library's functions with their summaries. Both sides start from the same weights and see
the same documents a step, in one seeded order; the losses of the first steps must be equal before a time is printed.
Tokens are predicted ones, never padding. The Trainer pads to the longest of a batch, as its collators do; beside it
stand its two better settings, batches of like length and its padding-free collator.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch

import formwright as fw
from benchmarks.harness import arguments
from formwright.measure.machine import machine
from formwright.models.batch import Batch, pack
from formwright.tasks import _stdlib
from formwright.training import train
from formwright.training.hooks import Hook
from formwright.training.tokenizer import train_tokenizer

VOCAB, LENGTH, BATCH = 8192, 512, 16
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8}
RATE, BETAS, EPS = 3e-4, (0.9, 0.999), 1e-8
#: Largest relative difference of the losses of a step.
BAR = 1e-4
PEER = "Trainer, padded"


@functools.lru_cache(maxsize=1)
def documents() -> list[list[int]]:
    """Rows of ids, begin and end included, at most ``LENGTH`` + 1 long, in a seeded order."""
    texts = [f'"""{summary}"""\n{source}\n' for _, summary, source in _stdlib.functions()]
    random.Random(0).shuffle(texts)
    tokenizer = train_tokenizer(texts, VOCAB)
    edge = tokenizer.start_id
    rows = [[edge, *row, edge] for row in tokenizer.encode(texts, special=False)]
    return [row[start : start + LENGTH + 1] for row in rows for start in range(0, len(row) - 1, LENGTH)]


@functools.lru_cache(maxsize=1)
def weights() -> str:
    """A directory with a freshly drawn Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tempfile.mkdtemp(prefix="formwright-train-")
    LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=VOCAB, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


class Clock:
    """When each step ended, its loss, and the tokens that were predicted in it."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def rates(self) -> list[float]:
        """Tokens a second of each step but the first."""
        times = [stop - start for start, stop in pairwise(self.ends)]
        return [tokens / seconds for tokens, seconds in zip(self.tokens[1:], times)]


class Steps(Hook):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def batch(self, run: Any, batch: Batch) -> None:
        self.clock.tokens.append(batch.targets["tokens"].numel())

    def stepped(self, run: Any) -> None:
        self.clock.ends.append(time.perf_counter())
        self.clock.losses.append(run.losses["loss"])


def ours(steps: int) -> Clock:
    """The documents of a step packed, none of their tokens padding."""
    rows, clock = documents(), Clock()

    def draw(seed: int, index: int) -> Batch:
        chosen = rows[index * BATCH : (index + 1) * BATCH]
        tokens, offsets = pack([row[:-1] for row in chosen])
        targets, _ = pack([row[1:] for row in chosen])
        return Batch(inputs={"tokens": tokens}, targets={"tokens": targets}, offsets={"tokens": offsets})

    train(
        fw.load(weights()),
        draw,
        steps=steps,
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        clip=1.0,
        hooks=[Steps(clock)],
        show=False,
        lr=RATE,
        betas=BETAS,
        eps=EPS,
    )
    return clock


def theirs(steps: int, sampling: str = "sequential", flat: bool = False) -> Clock:
    """The Trainer on the same rows with its own collators."""
    import transformers

    rows, clock = documents()[: max(steps, 64) * BATCH], Clock()
    ends = transformers.PreTrainedTokenizerFast(tokenizer_object=blank(), pad_token="<pad>", padding_side="right")
    collate: Any = transformers.DataCollatorForSeq2Seq(ends)
    if flat:
        collate = transformers.DataCollatorWithFlattening(return_position_ids=True)

    def counted(features: list[dict]) -> dict:
        clock.tokens.append(sum(len(row["input_ids"]) - 1 for row in features))
        return collate(features)

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            clock.ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if logs and "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy=sampling,
            learning_rate=RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=0.0,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = transformers.Trainer(
            model=transformers.LlamaForCausalLM.from_pretrained(weights()),
            args=settings,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            data_collator=counted,
            callbacks=[Ends()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return clock


def blank() -> Any:
    """A tokenizer that the Trainer's collators can pad with; it reads nothing."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))


CONTENDERS: dict[str, Callable[[int], Clock]] = {
    "formwright, packed": ours,
    PEER: theirs,
    "Trainer, like lengths": functools.partial(theirs, sampling="group_by_length"),
    "Trainer, padding-free": functools.partial(theirs, flat=True),
}
#: Those that see other documents a step, so that their losses do not compare.
ELSEWHERE = ("Trainer, like lengths",)


def agree(names: list[str], steps: int) -> dict[str, float]:
    """Largest relative difference of a step's loss from the peer's."""
    found = {name: CONTENDERS[name](steps).losses for name in names if name not in ELSEWHERE}
    return {
        name: max(abs(one / two - 1.0) for one, two in zip(losses, found[PEER], strict=True))
        for name, losses in found.items()
    }


def lines(names: list[str], steps: int, rounds: int, check: int) -> Iterator[dict[str, Any]]:
    """Contenders in turn, round after round; the median of all steps of each counts."""
    apart = agree(names, check)
    rates: dict[str, list[float]] = {name: [] for name in names if apart.get(name, 0.0) <= BAR}
    for _ in range(rounds):
        for name, held in rates.items():
            held += CONTENDERS[name](steps + 1).rates()
    for name in names:
        line: dict[str, Any] = {"benchmark": "train", "contender": name, "apart": apart.get(name)}
        if name in rates:
            rate = statistics.median(rates[name])
            line |= {"tokens_per_second": rate, "ratio": rate / statistics.median(rates[PEER])}
        yield {**line, "machine": machine()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=4, help="timed steps a round")
    parser.add_argument("--without", default="", help="contenders to leave out, by a part of their name")
    parser.add_argument("--check", type=int, default=3, help="steps whose losses are compared first")
    parser.set_defaults(rounds=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads or torch.get_num_threads())
    sizes = [len(row) - 1 for row in documents()]
    print(f"{len(sizes)} documents, {sum(sizes) / len(sizes):.0f} tokens on average, {BATCH} a step", flush=True)
    left = [part for part in given.without.split(",") if part]
    names = [name for name in CONTENDERS if name == PEER or not any(part in name for part in left)]
    for line in lines(names, given.steps, given.rounds, given.check):
        if given.json:
            print(json.dumps(line))
            continue
        apart = "other batches" if line["apart"] is None else f"losses within {line['apart']:.1e}"
        rate = f"{line['tokens_per_second']:>7.0f} tokens/s {line['ratio']:>5.2f}x" if "ratio" in line else "wrong"
        print(f"  {line['contender']:<24} {rate}  {apart}")


if __name__ == "__main__":
    main()
