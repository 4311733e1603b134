"""One frozen model, two adapters: train each on its own task, then let every row of a batch choose.

python examples/lora_two_adapters.py
"""

import tempfile

import numpy as np
import torch

import formwright as fw
from formwright.surgery.adapt.switch import choose, use

LENGTH = 6
SPEC = {
    "stem": {"part": "token-embedding", "vocab": 3, "width": 32, "positions": {"kind": "learned", "max": LENGTH}},
    "layers": [{"repeat": 2, "layers": [{"part": "attention", "heads": 4}, {"part": "mlp", "hidden": 64}]}],
    "head": {"part": "sequence-classifier", "classes": 2, "pool": "mean"},
}


@fw.task.generated("majority", vocabulary=3, classes=2)
def majority(rng: np.random.Generator, length: int) -> tuple[np.ndarray, int]:
    """Are there more 2s than 1s?"""
    tokens = rng.integers(1, 3, length)
    return tokens, int((tokens == 2).sum() > length / 2)


@fw.task.generated("minority", vocabulary=3, classes=2)
def minority(rng: np.random.Generator, length: int) -> tuple[np.ndarray, int]:
    """The opposite question, so that no single set of weights answers both."""
    tokens, label = majority.sample(rng, length)
    return tokens, 1 - label


def main() -> None:
    torch.set_num_threads(1)
    model = fw.build(SPEC, seed=0)
    tasks = {"majority": majority(length=LENGTH, size=100), "minority": minority(length=LENGTH, size=100)}
    before = {name: value.clone() for name, value in model.state_dict().items()}

    for name, task in tasks.items():
        fw.apply(model, "lora", rank=4, where=["q", "v", "up", "down"], name=name)
        use(model, name)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        fw.train(model, task, objective="classification", steps=50, lr=2e-2, weight_decay=0.0)
        print(f"{name}: trained {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters")

    for name, task in tasks.items():
        use(model, name)
        print(f"{name}: accuracy {task.score(model, 'test').value:.2f}")

    # Rows of one batch choose their adapter; None is the model without any.
    row = torch.tensor([[2, 2, 1, 2, 2, 1]])
    said = model(row.expand(3, -1), adapters=choose(model, ["majority", "minority", None])).argmax(-1).tolist()
    print("more 2s than 1s?  majority says", said[0], "and minority says", said[1])
    assert said[0] == 1 and said[1] == 0

    # The base has not moved.
    for name, value in before.items():
        held = model.state_dict()
        slot, _, tensor = name.rpartition(".")
        assert torch.equal(held.get(name, held.get(f"{slot}.base.{tensor}")), value)

    # One adapter can be folded in for good. The other is then gone.
    fw.apply(model, "merge", adapter="majority")
    with tempfile.TemporaryDirectory() as folder:
        fw.save(model, f"{folder}/merged")
        print("merged:", [entry.name for entry in fw.load(f"{folder}/merged").history if entry.kind == "surgery"])
    assert int(model(row).argmax()) == 1


if __name__ == "__main__":
    main()
