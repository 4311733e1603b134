"""The delta rule against what a user would run instead, on this machine's CPU.

    python -m benchmarks.delta_rule [--lengths 512,1024,2048] [--threads 1] [--json]

Training (forward and backward) against the chunked gated delta rule of transformers at a decay of zero, which is the
same function; inference against PyTorch's fused causal attention, which is another one of the same shape. Outputs,
states and gradients are compared with the recurrence in float64 before anything is timed, and lengths in one run show
how time grows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import arguments, race, show
from formwright.ops.attention import attention_reference
from formwright.ops.delta_rule import delta_rule, delta_rule_reference

Run = Callable[..., tuple[Tensor, Tensor]]
#: Heads and their width, batch 1.
HEADS, WIDTH = 4, 64
BAR = 0.999999
#: How many times faster than its peer each was meant to be, from that many tokens up.
LEAST, FROM = {"train": 2, "infer": 1}, 1024


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lengths", default="256,512,1024,2048,4096", help="tokens, each a round of its own")
    given = parser.parse_args()
    torch.set_num_threads(given.threads or torch.get_num_threads())
    lengths = [int(length) for length in given.lengths.split(",")]
    for lines in ([line for length in lengths for line in training(length, given.rounds)], inference(lengths, given)):
        show(lines, given.json)


def drawn(length: int) -> list[Tensor]:
    """q, k of norm 1, v and rates, as a layer gives them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length, HEADS, WIDTH, generator=generator) for _ in range(3))
    beta = torch.rand(1, length, HEADS, generator=generator)
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta]


def peer(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The plain chunked form of transformers, its decay switched off."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(q, k, v, torch.zeros_like(beta), beta, output_final_state=True)


def gradients(run: Run, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """Outputs, last state and the gradients of all inputs."""
    held = [t.detach().requires_grad_() for t in inputs]
    out, last = run(*held)
    return [out.detach(), last.detach(), *torch.autograd.grad(out, held, d_out.to(out))]


def training(length: int, rounds: int) -> list[dict[str, Any]]:
    inputs = drawn(length)
    d_out = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1))
    wanted = gradients(delta_rule_reference, [t.double() for t in inputs], d_out)
    runs: dict[str, Run] = {"formwright": delta_rule, "transformers": peer}
    agreement = {name: agree(gradients(run, inputs, d_out), wanted) for name, run in runs.items()}
    contenders = {name: lambda run=run: gradients(run, inputs, d_out) for name, run in runs.items()}
    least = {"formwright": LEAST["train"]} if length >= FROM else {}
    return race("delta-rule", f"train {length}", contenders, agreement, BAR, "transformers", rounds, least=least)


def inference(lengths: list[int], given: Any) -> list[dict[str, Any]]:
    lines = []
    with torch.inference_mode():
        for length in lengths:
            q, k, v, beta = drawn(length)
            heads = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
            agreement = {
                "formwright": agree(delta_rule(q, k, v, beta), delta_rule_reference(*map(double, (q, k, v, beta)))),
                "causal attention": agree(
                    [F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)], [attended(q, k, v)]
                ),
            }
            contenders: dict[str, Callable[[], Any]] = {
                "formwright": lambda q=q, k=k, v=v, beta=beta: delta_rule(q, k, v, beta),
                "causal attention": lambda heads=heads: F.scaled_dot_product_attention(*heads, is_causal=True),
            }
            least = {"formwright": LEAST["infer"]} if length >= FROM else {}
            shape, peer = f"infer {length}", "causal attention"
            lines += race("delta-rule", shape, contenders, agreement, BAR, peer, given.rounds, least=least)
    return lines


def double(t: Tensor) -> Tensor:
    return t.double()


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by its definition, a stretch of queries at a time."""
    keys = torch.arange(k.shape[1])
    pieces = [
        attention_reference(q[:, rows], k, v, seen=(keys[None] <= keys[rows, None])[None])[0]
        for rows in (slice(start, start + 512) for start in range(0, q.shape[1], 512))
    ]
    return torch.cat(pieces, 1)


def agree(found: Any, wanted: Any) -> float:
    """The least cosine of any pair of tensors."""
    return min(float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0)) for a, b in zip(found, wanted))


if __name__ == "__main__":
    main()
