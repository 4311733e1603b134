"""Mamba-2 on a CPU: Formwright against transformers, same weights, same ids, one process and thread budget.

Shapes: *forward* and *train* (forward and backward) of a small stack at 512 and 1,024 tokens. Outputs, and gradients of
every parameter where they are made, must agree before a time is shown.

    python -m benchmarks.ssd [--shape forward|train] [--length N] [--rounds N] [--threads N] [--json]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import arguments, race, show

#: Width, layers, ids; heads of 64 with a state of 64, one group.
WIDTH, LAYERS, VOCAB = 128, 2, 256
#: Cosine of outputs and gradients below which a contender is called wrong.
BAR = 0.99999
#: How many times faster than transformers training was meant to be.
LEAST = 3


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=("forward", "train"), action="append", help="default: both")
    parser.add_argument("--length", type=int, action="append", help="tokens; default 512 and 1024")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    for how in options.shape or ("forward", "train"):
        lines = [line for length in options.length or (512, 1024) for line in contest(how, length, options.rounds)]
        show(lines, options.json)


def contest(how: str, length: int, rounds: int) -> list[dict[str, Any]]:
    ids = torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    runs = {name: prepared(made, how, ids) for name, made in models().items()}
    wanted = runs["transformers"]()
    agreement = {name: cosine(run(), wanted) for name, run in runs.items()}
    least = {"formwright": LEAST} if how == "train" else {}
    return race(f"mamba2 {how}", f"{how} {length}", runs, agreement, BAR, "transformers", rounds, least=least)


def models() -> dict[str, Any]:
    """Both stacks with the same tensors, the published one read from the files that ours wrote."""
    from transformers import Mamba2Model

    from formwright import build
    from formwright.hub.huggingface import write
    from formwright.models.recipes import recipe

    spec = recipe("mamba2-130m", vocab=VOCAB, width=WIDTH, layers=LAYERS, state=64)
    ours = build({**spec, "head": {"part": "states"}}, seed=0)
    with torch.no_grad():
        ours.stem.tokens.weight.mul_(50.0)  # values of the size of 1, so that agreement means something
    with tempfile.TemporaryDirectory() as directory:
        write(ours, f"{directory}/model")
        theirs = Mamba2Model.from_pretrained(f"{directory}/model").eval()
    return {"transformers": theirs, "formwright": ours.eval()}


def prepared(made: Any, how: str, ids: Tensor) -> Callable[[], Tensor]:
    """``run()`` gives the outputs, or the gradients of what both hold: table, steps, rates and projections."""

    def outputs() -> Tensor:
        out = made(ids) if hasattr(made, "spec") else made(ids, use_cache=False)
        return out if isinstance(out, Tensor) else out.last_hidden_state

    def forward() -> Tensor:
        with torch.inference_mode():
            return outputs().flatten()

    def train() -> Tensor:
        loss = (outputs() * weights).mean()
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, held)])

    # Squares would not do: behind the last norm their mean hardly depends on anything.
    weights = torch.randn(*ids.shape, WIDTH, generator=torch.Generator().manual_seed(1))
    names = ("embeddings.weight", "tokens.weight", "A_log", "dt_bias", ".D", "in_proj.weight", "out_proj.weight")
    found = [(name, parameter) for name, parameter in made.named_parameters() if name.endswith(names)]
    # Ordered alike in both, whatever the modules are called: by the end of the name, then as they stand.
    held = [parameter for end in names for name, parameter in found if name.endswith(end)]
    return forward if how == "forward" else train


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


if __name__ == "__main__":
    main()
