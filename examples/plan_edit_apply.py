"""Change a model step by step: decide, read and edit the plan, apply it, undo it.

python examples/plan_edit_apply.py
"""

import torch

import formwright as fw
from formwright.surgery import Plan

SPEC = {
    "stem": {"part": "token-embedding", "vocab": 200, "width": 48},
    "layers": [{"repeat": 4, "layers": [{"part": "attention", "heads": 4}, {"part": "mlp", "hidden": 96}]}],
    "head": {"part": "mean-pool", "normalize": True},
}


def main() -> None:
    torch.set_num_threads(1)
    model = fw.build(SPEC, seed=0)
    generator = torch.Generator().manual_seed(0)
    evidence = torch.randint(0, 200, (16, 20), generator=generator)

    # Decide. Nothing is changed; a model with a tokenizer would take texts as evidence.
    plan = fw.plan(model, "finercut", evidence=evidence, drop=2)
    print("would drop", plan.decisions["drop"], "at distances", [round(d, 4) for d in plan.decisions["distances"]])

    # A plan is plain data. Here somebody knows better and keeps the last block whole.
    edited = Plan.from_json(plan.to_json())
    edited.decisions["drop"] = ["b1.mlp", "b2.mlp"]
    print("will drop", edited.decisions["drop"])

    smaller = fw.apply(fw.copy(model), edited, keep_undo=True)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} -> {sum(p.numel() for p in smaller.parameters()):,} parameters"
    )
    similar = torch.cosine_similarity(model(evidence), smaller(evidence)).mean()
    print(f"mean cosine of the outputs to the original's: {similar:.3f}")

    # Surgeries go together: two thin weights for one, adapters around them.
    fw.apply(smaller, "low-rank", rank=12, where=["up", "down"])
    fw.apply(smaller, "lora", rank=2, where="up")
    for entry in smaller.history:
        print(f"{entry.name:<9} {entry.data['options']}")

    # Adapters are only added, so they can always be undone.
    fw.undo(smaller)
    assert [entry.name for entry in smaller.history] == ["finercut", "low-rank"]


if __name__ == "__main__":
    main()
