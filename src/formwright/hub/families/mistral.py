"""Mistral: Llama whose attention sees a window of the last tokens (Jiang et al., 2023, 2310.06825)."""

from __future__ import annotations

from formwright.hub.families._family import Config, Data, Facts, Maybe
from formwright.hub.families.llama import SMALL, Llama, decoder_heads
from formwright.registry import Paper, register


@register("family", "mistral", paper=Paper("Jiang et al.", 2023, "2310.06825"))
class Mistral(Llama):
    """Mistral, with its language, sequence (last token) and token heads."""

    name = "mistral"
    title = "Mistral"
    base = "MistralModel"
    defaults = {
        **{key: value for key, value in Llama.defaults.items() if not key.endswith("_bias")},
        "intermediate_size": 14336,
        "num_key_value_heads": Maybe(int, 8),
        "max_position_embeddings": 131072,
        "sliding_window": Maybe(int, 4096),
    }
    heads = decoder_heads("Mistral")

    def biases(self, c: Config) -> Data:
        return {"bias": False}

    def windows(self, c: Config) -> list[int | None]:
        return [c.sliding_window] * c.num_hidden_layers

    def config_of(self, facts: Facts) -> Data:
        told = super().config_of(facts)
        del told["attention_bias"], told["mlp_bias"]
        return {**told, "sliding_window": facts.attention.rule.window}

    def examples(self) -> list[tuple[str, Data]]:
        return [
            *((name, {**SMALL, "sliding_window": 6}) for name in self.heads),
            ("MistralForCausalLM", {**SMALL, "sliding_window": None, "head_dim": 12}),
        ]
