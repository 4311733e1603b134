"""Build a model from plain data, look at what it is, save it and load it again.

python examples/build_from_spec.py
"""

import tempfile

import torch

import formwright as fw
from formwright.parts.base import Shape

SPEC = {
    "stem": {"part": "token-embedding", "vocab": 500, "width": 64, "positions": {"kind": "learned", "max": 128}},
    "defaults": {"norm": "rmsnorm"},
    "layers": [
        # Two ordinary blocks, and one whose attention and MLP read the same input.
        {"repeat": 2, "layers": [{"part": "attention", "heads": 4}, {"part": "gated-mlp", "hidden": 128}]},
        {"part": "parallel", "parts": [{"part": "attention", "heads": 4}, {"part": "gated-mlp", "hidden": 128}]},
    ],
    "final_norm": "rmsnorm",
    "head": {"part": "mean-pool", "normalize": True},
}


def main() -> None:
    torch.set_num_threads(1)
    model = fw.build(SPEC, seed=0)
    for item in model.layout():
        print(f"{item['id']:<14} {item['is']:<10} {', '.join(item['slots'])}")

    cost = model.cost(Shape.full(batch=1, length=64))
    print(f"{cost.parameters:,} parameters, {cost.macs / 1e6:.1f} M multiply-accumulates for 64 tokens")

    # Texts of unequal length are one padded batch; their vectors are what each gives alone.
    tokens = torch.tensor([[7, 8, 9, 10], [11, 12, 0, 0]])
    batch = fw.Batch(inputs={"tokens": tokens}, lengths={"tokens": torch.tensor([4, 2])})
    vectors = model(batch)
    assert torch.allclose(vectors[1], model(tokens[1:, :2])[0], atol=1e-5)

    with tempfile.TemporaryDirectory() as folder:
        fw.save(model, f"{folder}/model")
        again = fw.load(f"{folder}/model")
    assert again.spec == model.spec
    assert torch.equal(again(batch), vectors)
    print("saved, loaded, and equal to the last bit")


if __name__ == "__main__":
    main()
