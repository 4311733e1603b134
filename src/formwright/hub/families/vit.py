"""ViT: an encoder over patches of a picture with a class token in front (Dosovitskiy et al., 2020, 2010.11929)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from formwright.hub.families._family import (
    Config,
    Data,
    Facts,
    Family,
    HeadForm,
    layernorm,
    lean,
    sequence_head,
    states,
    wrong,
)
from formwright.hub.families._table import LIFTED, Row, convolved, stacked, table
from formwright.kit.errors import Refusal
from formwright.registry import Paper, register

IMAGES = HeadForm(lambda c: sequence_head(c, pool="first"), table(("heads.out.out.*", "classifier.*")))


@register("family", "vit", paper=Paper("Dosovitskiy et al.", 2020, "2010.11929"))
class ViT(Family):
    """ViT, with its image classifier."""

    name = "vit"
    title = "ViT"
    base = "ViTModel"
    prefix = "vit."
    #: Published names of the tokens in front of the patches.
    special: ClassVar[tuple[str, ...]] = ("embeddings.cls_token",)
    defaults: ClassVar[Data] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "num_channels": 3,
        "qkv_bias": True,
    }
    rows = table(
        ("stem.patch.bias", "embeddings.patch_embeddings.projection.bias"),
        ("stem.places", "embeddings.position_embeddings", LIFTED),
        ("b{i}.attention.norm.*", "encoder.layer.{i}.layernorm_before.*"),
        ("b{i}.attention.part.q.*", "encoder.layer.{i}.attention.attention.query.*"),
        ("b{i}.attention.part.k.*", "encoder.layer.{i}.attention.attention.key.*"),
        ("b{i}.attention.part.v.*", "encoder.layer.{i}.attention.attention.value.*"),
        ("b{i}.attention.part.o.*", "encoder.layer.{i}.attention.output.dense.*"),
        ("b{i}.mlp.norm.*", "encoder.layer.{i}.layernorm_after.*"),
        ("b{i}.mlp.part.up.*", "encoder.layer.{i}.intermediate.dense.*"),
        ("b{i}.mlp.part.down.*", "encoder.layer.{i}.output.dense.*"),
        ("final_norm.*", "layernorm.*"),
    )
    kept = ("{p}pooler.dense.*", "{p}embeddings.mask_token")
    heads: ClassVar[Mapping[str, HeadForm]] = {"ViTModel": HeadForm(states), "ViTForImageClassification": IMAGES}

    def sides(self, c: Config) -> tuple[list[int], int]:
        """[height, width] of a picture and the side of a patch."""
        image, patch = c.get("image_size", 224), c.get("patch_size", 16)
        image = [image, image] if isinstance(image, int) else list(image)
        patch = patch if isinstance(patch, int) else (patch[0] if len(set(patch)) == 1 else 0)
        return image, patch

    def check(self, c: Config) -> list[str]:
        problems = []
        for key in ("image_size", "patch_size"):
            value = c.values.get(key)
            sides = value if isinstance(value, list) else [1 if value is None else value]
            if len(sides) not in (1, 2) or any(wrong(key, side, int, 1) for side in sides):
                problems.append(f"{key} must be one or two positive whole numbers, not {value!r}")
        if not problems and not self.sides(c)[1]:
            problems.append(f"patch_size {c.patch_size!r} is not square")
        return problems

    def all_rows(self, given: Mapping[str, Any], architecture: str) -> tuple[Row, ...]:
        c = self.config(given)
        special = tuple("{p}" + name for name in self.special)
        patch = "{p}embeddings.patch_embeddings.projection.weight"
        return (
            *super().all_rows(given, architecture),
            *table(
                ("stem.special", special, stacked(len(special))),
                ("stem.patch.weight", patch, convolved(c.num_channels, self.sides(c)[1])),
            ),
        )

    def body(self, c: Config) -> Data:
        image, patch = self.sides(c)
        rate = c.hidden_dropout_prob
        attention = lean({"part": "attention", "heads": c.num_attention_heads, "dropout": rate})
        if not c.qkv_bias:
            attention.update(bias=False, out_bias=True)
        mlp = lean({"part": "mlp", "hidden": c.intermediate_size, "activation": c.hidden_act, "dropout": rate})
        return {
            "stem": {
                "part": "patches",
                "width": c.hidden_size,
                "image": image[0] if image[0] == image[-1] else image,
                "patch": patch,
                "channels": c.num_channels,
                "special": len(self.special),
            },
            "defaults": {"norm": layernorm(c.layer_norm_eps), "order": "pre"},
            "layers": [{"repeat": c.num_hidden_layers, "layers": [attention, mlp]}],
            "final_norm": layernorm(c.layer_norm_eps),
        }

    def config_of(self, facts: Facts) -> Data:
        stem = facts.stem
        if not hasattr(stem, "patch") or facts.order != "pre":
            raise Refusal(f"{self.title} reads patches and normalises before each sublayer")
        height, width = (side * stem.side for side in stem.grid)
        return {
            "model_type": self.name,
            "hidden_size": facts.width,
            "num_hidden_layers": facts.layers,
            "num_attention_heads": facts.attention.heads,
            "intermediate_size": facts.hidden,
            "hidden_act": facts.act("gelu"),
            "hidden_dropout_prob": facts.mlp.rate,
            "layer_norm_eps": facts.eps,
            "image_size": height if height == width else [height, width],
            "patch_size": stem.side,
            "num_channels": stem.channels,
            "qkv_bias": facts.attention.q.dense_bias() is not None,
        }

    def examples(self) -> list[tuple[str, Data]]:
        small = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 12,
            "patch_size": 4,
            "num_labels": 3,
        }
        other = {**small, "image_size": [8, 12], "num_channels": 1, "qkv_bias": False, "layer_norm_eps": 1e-6}
        return [*((name, small) for name in self.heads), (list(self.heads)[1], other)]
