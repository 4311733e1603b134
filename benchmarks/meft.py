"""MEFT on a CPU: bytes kept for the backward pass and time of a training step, against LoRA and full fine-tuning.

One encoder of 24 layers without a head, four rows of 64 tokens. What is kept comes from the accountant
(:mod:`formwright.measure.memory`), measured, in MB beside each name; a step is a forward and a backward pass. Gradients
of the reversible runs must agree with those of plain autograd of the same function before a time is shown.

    python -m benchmarks.meft [--layers N] [--width N] [--rounds N] [--threads N] [--json]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import arguments, race, show

ROWS, LENGTH, VOCAB = 4, 64, 512
#: Cosine of all gradients with those of plain autograd.
BAR = 1.0 - 1e-6
WAYS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "lora": ("lora", {"rank": 8}),
    "meft, kind 1": ("meft", {"kind": 1}),
    "meft, kind 3": ("meft", {"kind": 3}),
    "full": None,
}


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    show(steps(options.layers, options.width, options.rounds), options.json)


def steps(layers: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """Lines of plain data; ``saved_mb`` and ``saved_share`` (of LoRA's) beside the times."""
    from formwright.measure.memory import measured

    models = {name: made(layers, width, way) for name, way in WAYS.items()}
    saved = {name: measured(model, ROWS, LENGTH, loss="states").saved for name, model in models.items()}
    agreement = {name: agrees(model) if name.startswith("meft") else 1.0 for name, model in models.items()}
    contenders: dict[str, Callable[[], Any]] = {name: step(model) for name, model in models.items()}
    lines = race("meft", f"{layers}x{width}", contenders, agreement, BAR, "lora", rounds)
    told = {name: f"{name} ({kept / 1e6:.1f} MB, {kept / saved['lora']:.3f})" for name, kept in saved.items()}
    for line in lines:
        name = line["contender"]
        line |= {"saved_mb": saved[name] / 1e6, "saved_share": saved[name] / saved["lora"]}
        line |= {"contender": told[name], "peer": told[line["peer"]]}
    return lines


def made(layers: int, width: int, way: tuple[str, dict[str, Any]] | None) -> Any:
    import formwright as fw

    pair = [{"part": "attention", "heads": width // 32}, {"part": "mlp", "hidden": 4 * width}]
    spec = {
        "stem": {"part": "token-embedding", "vocab": VOCAB, "width": width, "norm": "layernorm"},
        "defaults": {"norm": "layernorm", "order": "post"},
        "layers": [{"repeat": layers, "layers": pair}],
        "head": {"part": "states"},
    }
    model = fw.build(spec, seed=0)
    if way is not None:
        fw.apply(model, way[0], **way[1])
        generator = torch.Generator().manual_seed(1)
        for parameter in trained(model):
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def trained(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model: Any, **context: Any) -> Callable[[], list[Tensor]]:
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    wanted = torch.randn(ROWS, LENGTH, model.width, generator=torch.Generator().manual_seed(2))

    def once() -> list[Tensor]:
        loss = F.mse_loss(model(ids, seed=0, **context), wanted)
        return list(torch.autograd.grad(loss, trained(model), allow_unused=True, materialize_grads=True))

    return once


def agrees(model: Any) -> float:
    """Cosine of the gradients of a reversible run with those of plain autograd."""
    found, plain = (
        torch.cat([grad.flatten().double() for grad in step(model, knobs={"reversible": knob})()])
        for knob in (True, False)
    )
    return float(F.cosine_similarity(found, plain, dim=0))


if __name__ == "__main__":
    main()
