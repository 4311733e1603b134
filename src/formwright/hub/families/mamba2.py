"""Mamba-2: a state-space dual in every layer (Dao and Gu, 2024, 2405.21060). The published class normalises all
channels of a layer at once, however many groups share B and C."""

from __future__ import annotations

from typing import Any

from formwright.hub.families._family import Config, Data, wrong
from formwright.hub.families._mamba import DEFAULTS, Stack, stack_heads, stack_rows
from formwright.kit.errors import Refusal
from formwright.registry import Paper, register

#: How published configurations write infinity, which JSON cannot say.
UNBOUNDED = {"__float__": "Infinity"}


@register("family", "mamba2", paper=Paper("Dao and Gu", 2024, "2405.21060"))
class Mamba2(Stack):
    """Mamba-2, with its language head."""

    name = "mamba2"
    title = "Mamba-2"
    base = "Mamba2Model"
    defaults = {
        **DEFAULTS,
        "vocab_size": 32768,
        "hidden_size": 4096,
        "state_size": 128,
        "num_hidden_layers": 64,
        "num_heads": 128,
        "head_dim": 64,
        "n_groups": 8,
        "time_step_limit": [0.0, UNBOUNDED],
        "tie_word_embeddings": False,
    }
    rows = stack_rows("mamba2", ("dt_bias", "dt_bias"), ("norm.weight", "norm.weight"))
    heads = stack_heads("Mamba2")

    def check(self, c: Config) -> list[str]:
        found = super().check(c)
        if c.hidden_size * c.expand != c.num_heads * c.head_dim:
            found.append(
                f"hidden_size {c.hidden_size} times expand {c.expand} must be num_heads {c.num_heads} times head_dim "
                f"{c.head_dim}"
            )
        limits = c.time_step_limit
        said = [limit for limit in limits if limit not in (UNBOUNDED, float("inf"))]
        if len(limits) != 2 or any(wrong("time_step_limit", limit, float) for limit in said):
            found.append(f"time_step_limit must be a least and a greatest step, not {limits!r}")
        return found

    def mixer(self, c: Config) -> Data:
        least, most = (limit if isinstance(limit, (int, float)) else float("inf") for limit in c.time_step_limit)
        return {
            "part": "mamba2",
            "state": c.state_size,
            "head_width": c.head_dim,
            "expand": c.expand,
            "groups": c.n_groups,
            "kernel": c.conv_kernel,
            "conv_bias": c.use_conv_bias,
            "bias": c.use_bias,
            "step_range": [least or None, None if most == float("inf") else most],
            "norm_groups": 1,
            "eps": c.layer_norm_epsilon,
        }

    def told(self, mixer: Any) -> Data:
        if mixer.norm.groups != 1:
            raise Refusal("Mamba-2 configurations normalise all channels of a layer at once")
        return {
            "state_size": mixer.state,
            "num_heads": mixer.heads,
            "head_dim": mixer.inner // mixer.heads,
            "n_groups": mixer.groups,
            "time_step_limit": [mixer.least or 0.0, UNBOUNDED if mixer.most is None else mixer.most],
        }

    def examples(self) -> list[tuple[str, Data]]:
        small = {
            "vocab_size": 90,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
        }
        other = {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "time_step_limit": [0.01, 1.0]}
        return [
            *((name, small) for name in self.heads),
            ("Mamba2ForCausalLM", {**small, **other, "n_groups": 8, "tie_word_embeddings": True}),
        ]
