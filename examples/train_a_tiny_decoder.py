"""Train a decoder from nothing on a little text, resume the run, and let it write.

python examples/train_a_tiny_decoder.py
"""

import tempfile
from pathlib import Path

import torch

import formwright as fw
from formwright.training.tokenizer import train_tokenizer

ANIMALS = ("cat", "dog", "hen", "owl")
DOINGS = ("sleeps", "eats", "sings", "runs")
TEXT = "".join(f"the {animal} {doing}.\n" for _ in range(30) for animal, doing in zip(ANIMALS, DOINGS))


def decoder(tokenizer):
    model = fw.build(
        {
            "stem": {"part": "token-embedding", "vocab": tokenizer.size, "width": 48},
            "defaults": {"norm": "rmsnorm"},
            "layers": [
                {
                    "repeat": 2,
                    "layers": [
                        {"part": "attention", "heads": 4, "causal": True, "rotary": {}},
                        {"part": "gated-mlp", "hidden": 96},
                    ],
                }
            ],
            "final_norm": "rmsnorm",
            "head": {"part": "lm", "tied": True},
        },
        seed=0,
    )
    model.tokenizer = tokenizer
    return model


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = train_tokenizer([TEXT], vocab=300)
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder, "texts")
        texts.mkdir()
        for number in range(6):  # a few files, so that each split of the task has some
            (texts / f"{number}.txt").write_text(f"story {number}.\n{TEXT}")
        task = fw.task("lm", data=texts, length=32)
        model = decoder(tokenizer)
        task.bind(model)
        print(f"before: {task.score(model, 'test').value:.2f} bits a byte")
        settings = {"steps": 60, "lr": 1e-2, "out": f"{folder}/run"}
        run = fw.train(model, task, **settings)
        print(f"{run.steps} steps: loss {run.losses[0][1]:.2f} -> {run.losses[-1][1]:.2f}")
        print(f"after: {task.score(model, 'test').value:.2f} bits a byte")

        # The run is a directory, from which another process goes on, or has what came out, to the last bit.
        again = decoder(tokenizer)
        fw.train(again, task, **settings, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    print("the owl", fw.generate(model, "the owl", max_new=12, stop="\n"))


if __name__ == "__main__":
    main()
