"""What silent hidden units save where a token comes at a time: a ReLU decoder before and after ``skip-zeros``.

    python -m benchmarks.deft [--density SHARE ...] [--rounds N] [--threads N] [--json]

Width 512, hidden 4,096, 4 layers, random weights, both contenders on this library's engine: 56 tokens are generated
behind a prompt of 8. The hidden biases are set so that each unit is active for the share of tokens that the proof
``deft`` reached by tuning with the density loss; without it, its adapters left 19 %. Both must say the same tokens, and
the same logits, before anything is timed.

``skip-zeros`` alone changes the products behind ReLU. *Everywhere* lays out every linear of the layers so: the others
read no zeros, and what they save is the compiled product against PyTorch's for one token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import formwright as fw
from benchmarks.harness import Line, arguments, race, show
from formwright.models.batch import Batch
from formwright.objectives.density import activation_density

WIDTH, HIDDEN, LAYERS, VOCAB = 512, 4096, 4, 256
#: Shares of active units: with the density loss, and without.
REACHED, WITHOUT = 0.10, 0.19
PROMPT, NEW = 8, 56
#: Cosine of the logits of any token below which a contender is called wrong.
BAR = 0.99999
#: How many times faster than dense decoding was meant to be at the density that was reached.
LEAST = 1.2
PEER, MINE, ALL = "dense", "skip-zeros", "skip-zeros everywhere"


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--density", type=float, action="append", help=f"default: {REACHED} and {WITHOUT}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    for density in options.density or (REACHED, WITHOUT):
        show(contest(density, options.rounds), options.json)


def contest(density: float, rounds: int) -> list[Line]:
    dense = decoder(density)
    models = {
        PEER: dense,
        MINE: fw.apply(fw.copy(dense), "skip-zeros"),
        ALL: fw.apply(fw.copy(dense), "skip-zeros", where="b*"),
    }
    prompt = ids(1, PROMPT, 1)
    runs = {name: partial(continued, model, prompt) for name, model in models.items()}
    said = {name: torch.tensor([prompt[0].tolist() + run()]) for name, run in runs.items()}
    agreement = {name: alike(model, dense, said[PEER]) for name, model in models.items()}
    agreement |= {name: 0.0 for name, tokens in said.items() if not torch.equal(tokens, said[PEER])}
    least = {MINE: LEAST} if density <= REACHED else {}
    lines = race("deft", f"{density:.0%} active", runs, agreement, BAR, PEER, rounds, least=least)
    met = activation_density(dense, Batch(inputs={"tokens": said[PEER]}))
    note = f"Of the hidden units {met:.1%} were active over the tokens of *{density:.0%} active*."
    return [{**line, "note": note} if line["contender"] == MINE else line for line in lines]


def decoder(density: float) -> Any:
    """The model; layer by layer, each unit's bias puts ``density`` of what it sees in random rows above zero."""
    attention = {"part": "attention", "heads": 8, "causal": True, "rotary": {}}
    perceptron = {"part": "mlp", "hidden": HIDDEN, "activation": "relu"}
    spec = {
        "stem": {"part": "token-embedding", "vocab": VOCAB, "width": WIDTH, "std": 0.5},
        "defaults": {"norm": "layernorm", "order": "pre"},
        "layers": [{"repeat": LAYERS, "layers": [attention, perceptron]}],
        "final_norm": "layernorm",
        "head": {"part": "lm", "tied": True},
    }
    model = fw.build(spec, seed=0).eval()
    given = ids(16, PROMPT + NEW, 0)
    for _, part in model.parts():
        if hasattr(part, "up"):
            heard: list[Tensor] = []
            handle = part.up.register_forward_hook(lambda *call, into=heard: into.append(call[-1]))
            with torch.no_grad():
                model(given)
                part.up.bias -= heard[0].flatten(0, 1).quantile(1 - density, dim=0)
            handle.remove()
    return model


def ids(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def continued(model: Any, prompt: Tensor) -> list[int]:
    return fw.generate(model, prompt[0].tolist(), max_new=NEW, end=False)


@torch.inference_mode()
def alike(model: Any, dense: Any, said: Tensor) -> float:
    """The least cosine of the logits of a token to the dense model's, both read one token a call."""
    pairs = zip(streamed(model, said), streamed(dense, said))
    return min(float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)) for a, b in pairs)


def streamed(model: Any, said: Tensor) -> list[Tensor]:
    from formwright.engine.state import State

    state = State(1)
    return [model(token, state=state)[0, 0] for token in said.split(1, 1)]


if __name__ == "__main__":
    main()
