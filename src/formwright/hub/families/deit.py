"""DeiT: ViT with a second token that learns from a teacher (Touvron et al., 2020, 2012.12877)."""

from __future__ import annotations

from formwright.hub.families._family import HeadForm, labelled, states
from formwright.hub.families._table import table
from formwright.hub.families.vit import IMAGES, ViT
from formwright.registry import Paper, register


@register("family", "deit", paper=Paper("Touvron et al.", 2020, "2012.12877"))
class DeiT(ViT):
    """DeiT, with its image classifiers of one and of two heads."""

    name = "deit"
    title = "DeiT"
    base = "DeiTModel"
    prefix = "deit."
    special = ("embeddings.cls_token", "embeddings.distillation_token")
    heads = {
        "DeiTModel": HeadForm(states),
        "DeiTForImageClassification": IMAGES,
        "DeiTForImageClassificationWithTeacher": HeadForm(
            lambda c: {"part": "distilled-classifier", **labelled(c)},
            table(("heads.out.out.*", "cls_classifier.*"), ("heads.out.taught.*", "distillation_classifier.*")),
        ),
    }
