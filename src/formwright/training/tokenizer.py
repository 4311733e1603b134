"""A tokenizer for models built from nothing: byte-level BPE (Sennrich et al., 2016, 1508.07909; Radford et al., 2019).

Every text can be said, since the 256 bytes are tokens; the most frequent pair of neighbours becomes a new token until
the vocabulary is full. Trained by the ``tokenizers`` library. Cost: seconds for ten megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from formwright.kit.errors import DataError, SpecError
from formwright.models.tokenizer import Tokenizer

#: Begins and ends a text, and pads: one token is enough, since padding is never read.
END = "<|endoftext|>"
#: Stands for a token that is to be guessed.
MASK = "<|mask|>"
#: 256 bytes and the special token.
LEAST = 257


def train_tokenizer(texts: Iterable[str], vocab: int, mask: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer of at most ``vocab`` tokens, with id 0 for begin, end and padding.

    ``mask`` adds a token, id 1, that stands for one to be guessed.

    It may stay smaller where the texts have no more pairs that occur twice; its ``size`` tells. Encoding adds no
    special token, and decoding gives every text back exactly.

    Raises SpecError below 257 tokens and DataError without text.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = [END, MASK] if mask else [END]
    if vocab < LEAST - 1 + len(special):
        least = f"{LEAST - 1 + len(special)}: 256 bytes and {'two special tokens' if mask else 'one special token'}"
        raise SpecError(f"vocab={vocab} must be at least {least}")
    texts = list(texts)
    if not any(texts):
        raise DataError("a tokenizer is trained on texts, and all given ones are empty")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    settings = {"bos_token": END, "eos_token": END, "pad_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    if mask:
        settings["mask_token"] = MASK
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode(),
    }
    return Tokenizer(backend, files, settings)
