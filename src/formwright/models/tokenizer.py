"""Texts to rows of ids, by the real tokenizer that a checkpoint carries (the ``tokenizers`` library).

A thin wrapper: it knows the ids that pad, begin and end, cuts to a length, and counts what was cut.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formwright.kit.errors import DataError


class Tokenizer:
    """``files`` are kept as bytes, name -> content, so that saving a model gives its tokenizer back unchanged."""

    def __init__(self, backend: Any, files: dict[str, bytes] | None = None, settings: dict[str, Any] | None = None):
        self.backend = backend
        self.files = files or {"tokenizer.json": backend.to_str().encode()}
        self.settings = settings or {}
        backend.no_truncation()
        backend.no_padding()
        #: Rows cut to the length limit so far, for one warning a call.
        self.cut = 0

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint directory, or None where it has none."""
        from tokenizers import Tokenizer as Backend

        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise DataError(f"{path} is not a tokenizer: {error}") from None
        names = (
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "vocab.txt",
            "vocab.json",
            "merges.txt",
            "added_tokens.json",
            "tokenizer.model",
            "spiece.model",
            "sentencepiece.bpe.model",
            "chat_template.jinja",
        )
        files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if name in files:
                try:
                    settings.update(json.loads(files[name]))
                except ValueError:
                    raise DataError(f"{directory / name} is not JSON") from None
        return cls(backend, files, settings)

    def _special(self, name: str) -> int | None:
        token = self.settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else self.backend.token_to_id(token)

    @property
    def pad_id(self) -> int:
        found = self._special("pad_token")
        return 0 if found is None else found

    @property
    def end_id(self) -> int | None:
        """The token that ends a text, or None."""
        return self._special("eos_token")

    @property
    def start_id(self) -> int | None:
        return self._special("bos_token")

    @property
    def mask_id(self) -> int | None:
        """The token that stands for one to be guessed, or None."""
        return self._special("mask_token")

    @property
    def special_ids(self) -> set[int]:
        """Ids of the tokens that stand for no text: padding, begin, end, classifier, separator, mask."""
        names = ("pad_token", "bos_token", "eos_token", "cls_token", "sep_token", "mask_token")
        return {id for id in map(self._special, names) if id is not None}

    def tokens(self) -> list[str]:
        """The pieces by id, as the vocabulary writes them."""
        return [self.backend.id_to_token(id) or "" for id in range(self.size)]

    @property
    def size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        max_length: int | None = None,
        special: bool = True,
    ) -> list[list[int]]:
        """Ids of each text (or pair), special tokens included unless told, cut to ``max_length``."""
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {index} is a {type(text).__name__}, not a string")
        inputs = list(texts) if pairs is None else list(zip(texts, pairs))
        if max_length is None:
            self.backend.no_truncation()
        else:
            self.backend.enable_truncation(max_length)
        encoded = self.backend.encode_batch(inputs, add_special_tokens=special)
        self.backend.no_truncation()
        self.cut += sum(1 for row in encoded if row.overflowing)
        return [row.ids for row in encoded]

    def types(self, texts: Sequence[str], pairs: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Segment numbers of the tokens of each pair."""
        if max_length is not None:
            self.backend.enable_truncation(max_length)
        encoded = self.backend.encode_batch(list(zip(texts, pairs)))
        self.backend.no_truncation()
        return [row.type_ids for row in encoded]

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without special tokens, and the (start, end) characters that each covers."""
        row = self.backend.encode(text, add_special_tokens=False)
        return row.ids, row.offsets

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)
