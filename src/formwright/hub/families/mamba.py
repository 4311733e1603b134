"""Mamba: a causal recurrence in every layer whose step, B and C depend on the token (Gu and Dao, 2023, 2312.00752)."""

from __future__ import annotations

from typing import Any

from formwright.hub.families._family import Config, Data, Maybe
from formwright.hub.families._mamba import DEFAULTS, Stack, stack_heads, stack_rows
from formwright.kit.errors import Refusal
from formwright.registry import Paper, register


@register("family", "mamba", paper=Paper("Gu and Dao", 2023, "2312.00752"))
class Mamba(Stack):
    """Mamba, with its language head."""

    name = "mamba"
    title = "Mamba"
    base = "MambaModel"
    spellings = {"d_model": "hidden_size", "n_layer": "num_hidden_layers"}
    defaults = {
        **DEFAULTS,
        "vocab_size": 50280,
        "hidden_size": 768,
        "state_size": 16,
        "num_hidden_layers": 32,
        "time_step_rank": Maybe(int),
        "tie_word_embeddings": True,
    }
    rows = stack_rows(
        "mamba",
        ("x_proj.weight", "x_proj.weight"),
        ("dt_proj.weight", "dt_proj.weight"),
        ("dt_bias", "dt_proj.bias"),
    )
    heads = stack_heads("Mamba")

    def mixer(self, c: Config) -> Data:
        made: Data = {"part": "mamba", "state": c.state_size, "expand": c.expand, "conv": c.conv_kernel}
        if c.get("time_step_rank"):
            made["rank"] = c.time_step_rank
        return {**made, "bias": c.use_bias, "conv_bias": c.use_conv_bias}

    def told(self, mixer: Any) -> Data:
        if mixer.x_proj is None or mixer.dt_proj is None:
            raise Refusal("Mamba's step, B and C depend on the token")
        inner, state = mixer.A_log.shape
        return {"state_size": state, "intermediate_size": inner, "time_step_rank": mixer.dt_proj.in_features}

    def examples(self) -> list[tuple[str, Data]]:
        small = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
        other = {"expand": 1, "use_bias": True, "use_conv_bias": False, "time_step_rank": 3, "conv_kernel": 3}
        return [
            *((name, small) for name in self.heads),
            ("MambaForCausalLM", {**small, **other, "tie_word_embeddings": False}),
        ]
