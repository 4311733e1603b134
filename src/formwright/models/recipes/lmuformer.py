"""LMUFormer (Liu, Datta, Li and Beerel, 2024): streaming classifiers on a fixed Legendre memory, plain and spiking.

For Speech Commands (128 log-mel bands, 35 words) 1,621,796 parameters, spiking 1,689,894; its convolutions take
188,743,680 multiply-accumulates for 128 frames. For permuted pixels of MNIST 166,798, spiking 166,092.
"""

from __future__ import annotations

from typing import Any, Literal

from formwright.registry import Paper, register

PAPER = Paper("Liu, Datta, Li and Beerel", 2024, "2402.04882")


def _spec(stem: dict[str, Any], mixer: dict[str, Any], channel: dict[str, Any], blocks: int, head: dict[str, Any]):
    return {
        "stem": stem,
        "defaults": {"norm": None},
        "layers": [{"repeat": blocks, "layers": [mixer, channel]}],
        "head": head,
    }


@register("recipe", "lmuformer", paper=PAPER, summary="streaming classifier with 1.6 million parameters")
def lmuformer(
    features: int = 128, classes: int = 35, width: int = 256, blocks: int = 1, theta: float = 128
) -> dict[str, Any]:
    """LMUFormer for rows of ``features`` values a frame, or any other size."""
    return _spec(
        {"part": "conv-frames", "width": width, "features": features},
        {"part": "lmu", "theta": theta},
        {"part": "conv-mlp", "hidden": 4 * width},
        blocks,
        {"part": "running-classifier", "classes": classes},
    )


@register("recipe", "spiking-lmuformer", paper=PAPER, summary="LMUFormer of spiking neurons")
def spiking_lmuformer(
    features: int = 128,
    classes: int = 35,
    width: int = 256,
    blocks: int = 1,
    theta: float = 128,
    form: Literal["pre", "post"] = "pre",
) -> dict[str, Any]:
    """The same with neurons; ``form``: where they fire, before each linear or behind it."""
    return _spec(
        {"part": "conv-frames", "width": width, "features": features, "spiking": form},
        {"part": "spiking-lmu", "theta": theta, "form": form},
        {"part": "spiking-mlp", "hidden": 4 * width, "form": form},
        blocks,
        {"part": "spiking-classifier" if form == "pre" else "running-classifier", "classes": classes},
    )


@register("recipe", "lmu-psmnist", paper=PAPER, summary="784 pixels one by one, 167 thousand parameters")
def lmu_psmnist(width: int = 346, memory: int = 468, theta: float = 784, classes: int = 10) -> dict[str, Any]:
    """One Legendre memory unit, the mean of its states."""
    return {
        "stem": {"part": "lmu-values", "width": width, "memory": memory, "theta": theta, "lift": 3},
        "layers": [],
        "head": {"part": "running-classifier", "classes": classes, "dropout": 0.4},
    }


@register("recipe", "spiking-lmu-psmnist", paper=PAPER, summary="the same of spiking neurons")
def spiking_lmu_psmnist(width: int = 346, memory: int = 468, theta: float = 784, classes: int = 10) -> dict[str, Any]:
    """One spiking Legendre memory unit, what it fires at the last pixel."""
    return {
        "stem": {"part": "lmu-values", "width": width, "memory": memory, "theta": theta, "spiking": True},
        "layers": [],
        "head": {"part": "sequence-classifier", "classes": classes, "pool": "last", "dropout": 0.5},
    }
