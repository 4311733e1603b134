"""A recurrent part of your own, windowed and full attention in one stack, streamed with rows of unequal length.

The part is registered here in a dozen lines; that it streams, next to attention, needs no code anywhere else.

python examples/stream_a_hybrid_stack.py
"""

import torch
from torch import Tensor, nn

import formwright as fw
from formwright.parts.base import Part, Slot, Traits
from formwright.parts.linears.dense import Dense
from formwright.registry import register


@register("mixer", "running-mean", summary="a decaying mean of all tokens so far")
class RunningMean(Part):
    """m_t = decay m_{t-1} + (1 - decay) x_t,  y_t = out(m_t). Padded layout; state: m, one vector a row."""

    traits = Traits(causal=True, streams=True, packed=False)

    def __init__(self, width: int, *, decay: float = 0.9) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty(width))
        self.start = decay
        self.out = Dense(width, width, False, "out")

    def reset(self, generator: torch.Generator) -> None:
        self.logit.fill_(torch.logit(torch.tensor(self.start)).item())

    def slots(self) -> dict[str, Slot]:
        return {"mean": Slot("fixed", tuple(self.logit.shape))}

    def forward(self, x: Tensor, ctx: fw.Context) -> Tensor:
        decay, valid = torch.sigmoid(self.logit), ctx.valid(x)
        mean = ctx.slot("mean", lambda: x.new_zeros(len(x), x.shape[2]))
        means = []
        for step in range(x.shape[1]):
            new = decay * mean + (1 - decay) * x[:, step]
            mean = torch.where(valid[:, step, None], new, mean)  # padding changes nothing
            means.append(mean)
        ctx.keep("mean", mean)
        return self.out(torch.stack(means, 1) if means else x, ctx)


MLP = {"part": "gated-mlp", "hidden": 64}
SPEC = {
    "stem": {"part": "token-embedding", "vocab": 100, "width": 32},
    "defaults": {"norm": "rmsnorm"},
    "layers": [
        {"repeat": 2, "layers": [{"part": "running-mean"}, MLP]},
        {"part": "attention", "heads": 4, "causal": True, "window": 8, "rotary": {}},
        MLP,
        {"part": "attention", "heads": 4, "kv_heads": 1, "causal": True, "rotary": {}},
        MLP,
    ],
    "final_norm": "rmsnorm",
    "head": {"part": "lm", "tied": True},
}


def main() -> None:
    torch.set_num_threads(1)
    model = fw.build(SPEC, seed=0)
    assert model.causal and model.streams
    for name, slot in model.state_slots().items():
        print(f"remembers {name:<22} {slot.kind:<7} {slot.shape}")

    tokens = torch.randint(0, 100, (3, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model(tokens)

        # Each call brings any number of new tokens to each row, none included.
        state = fw.State(rows=3)
        done = torch.zeros(3, dtype=torch.long)
        for new in ([5, 0, 12], [1, 7, 0], [10, 3, 18], [14, 20, 0]):
            lengths = torch.tensor(new)
            call = torch.zeros(3, int(lengths.max()), dtype=torch.long)
            for row in range(3):
                call[row, : new[row]] = tokens[row, done[row] : done[row] + new[row]]
            out = model(fw.Batch(inputs={"tokens": call}, lengths={"tokens": lengths}), state=state)
            for row in range(3):
                wanted = whole[row, done[row] : done[row] + new[row]]
                assert torch.allclose(out[row, : new[row]], wanted, atol=1e-4)
            done += lengths
        print(f"30 tokens in ragged pieces equal one pass; the state is {state.bytes():,} bytes")

        # A fork costs nothing, so two continuations share what they have in common.
        fork = state.fork()
        one, other = model(torch.full((3, 1), 7), state=state), model(torch.full((3, 1), 8), state=fork)
        assert not torch.equal(one, other)

    print("generated:", fw.generate(model, [[1, 2, 3], [4]], max_new=8))


if __name__ == "__main__":
    main()
