"""Small published models with random weights, and what they say of a ragged batch: the other side of the tests."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

import torch
from torch import Tensor

from formwright import registry
from formwright.models.batch import Batch

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LENGTHS = [9, 4, 1, 7]
TAUGHT = [3, 8, 5, 1]
BERT = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def examples() -> list[tuple[str, str, dict[str, Any]]]:
    """(family, published class, configuration) of every example that a family gives."""
    found = []
    for name in registry.names("family"):
        found += [(name, kind, options) for kind, options in registry.resolve("family", name)().examples()]
    return found


def make(kind: str, options: dict[str, Any], seed: int = 0) -> Any:
    """A published model with every weight random, norms and biases included, so that no exchange goes unseen."""
    made = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = made(made.config_class(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.2
            parameter.copy_(noise + 1.0 if parameter.dim() == 1 and "norm" in name.lower() else noise)
        if hasattr(model, "tie_weights"):
            model.tie_weights()
    return model


def save(model: Any, directory: Path, **how: Any) -> Path:
    with _quiet():
        model.save_pretrained(directory, **how)
    return directory


def load(kind: str, directory: Path) -> Any:
    """The published class from a directory; every weight must be found there."""
    with _quiet():
        model, said = getattr(transformers, kind).from_pretrained(
            directory, output_loading_info=True, dtype=torch.float32
        )
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"], said
    return model.eval()


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ids(vocab: int = 90, lengths: list[int] | None = None, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ragged rows of ids padded on the right with 0, which no row contains, and their lengths."""
    lengths = LENGTHS if lengths is None else lengths
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocab, (len(lengths), max(lengths)), generator=gen)
    sizes = torch.tensor(lengths)
    return torch.where(torch.arange(max(lengths)) < sizes[:, None], tokens, 0), sizes


def mask(tokens: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(tokens.shape[1]) < lengths[:, None]).long()


def pictures(model: Any) -> Tensor:
    config = model.config
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
    return torch.randn(3, config.num_channels, *size, generator=torch.Generator().manual_seed(2))


def kind_of(model: Any) -> str:
    """Which inputs it reads: tokens, pixels, or two rows of tokens."""
    if hasattr(model.config, "image_size"):
        return "pixels"
    return "pair" if getattr(model.config, "is_encoder_decoder", False) else "tokens"


@torch.no_grad()
def theirs(model: Any) -> dict[str, Tensor]:
    """``states`` of the body and, where there is a head, ``logits`` of the standard batch."""
    if kind_of(model) == "pixels":
        given = {"pixel_values": pictures(model)}
    else:
        tokens, sizes = ids()
        given = {"input_ids": tokens, "attention_mask": mask(tokens, sizes)}
    if kind_of(model) == "pair":
        target, taught = ids(lengths=TAUGHT, seed=3)
        given.update(decoder_input_ids=target, decoder_attention_mask=mask(target, taught))
    with _quiet():
        body = getattr(model, model.base_model_prefix, model)
        out = model(**given)
        if getattr(out, "last_hidden_state", None) is not None:
            return {"states": out.last_hidden_state}
        if kind_of(model) == "pair":
            return {"logits": out.logits}
        return {"states": body(**given).last_hidden_state, "logits": out.logits}


def batch(model: Any, packed: bool) -> Batch:
    """The standard batch in our form."""
    if kind_of(model) == "pixels":
        return Batch(inputs={"pixels": pictures(model)})
    if kind_of(model) == "pair":
        (source, sizes), (target, taught) = ids(), ids(lengths=TAUGHT, seed=3)
        if packed:
            rows = {"encoder.tokens": (source, sizes), "decoder.tokens": (target, taught)}
            return Batch(
                inputs={key: flat(*row) for key, row in rows.items()},
                offsets={key: offsets(row[1]) for key, row in rows.items()},
            )
        return Batch(
            inputs={"encoder.tokens": source, "decoder.tokens": target},
            lengths={"encoder.tokens": sizes, "decoder.tokens": taught},
        )
    tokens, sizes = ids()
    if packed:
        return Batch(inputs={"tokens": flat(tokens, sizes)}, offsets={"tokens": offsets(sizes)})
    return Batch(inputs={"tokens": tokens}, lengths={"tokens": sizes})


def flat(rows: Tensor, lengths: Tensor) -> Tensor:
    """Valid entries end to end, (1, T, ...)."""
    return rows[torch.arange(rows.shape[1]) < lengths[:, None]][None]


def offsets(lengths: Tensor) -> Tensor:
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))


def narrows(model: Any) -> bool:
    return getattr(model, "source", {}).get("family") == "opt"


@torch.no_grad()
def ours(model: Any, given: Batch) -> dict[str, Tensor]:
    """``states`` after the last norm (for OPT in the width of its token table) and what the head says."""
    tower = model.tower(model.spec.output) if hasattr(model, "towers") else model
    x, ctx = model.embed(given)
    x, ctx = tower.run(x, ctx)
    x = x if tower.final_norm is None else tower.final_norm(x)
    head = tower.head()
    narrow = getattr(head, "transform", None) if narrows(model) else None
    return {"states": x if narrow is None else narrow(x, ctx), "logits": head(x, ctx)}


def rows(value: Tensor, model: Any, packed: bool) -> Tensor:
    """The valid entries of a result with one value a token, so that both layouts read alike."""
    if packed or kind_of(model) == "pixels":
        return value
    return flat(value, torch.tensor(TAUGHT if kind_of(model) == "pair" else LENGTHS))
