"""``tagging/stdlib``: what kind of Python token each piece of the standard library's source belongs to.

The kinds are those of Python's own ``tokenize``: keyword, name, number, string, comment, operator; a string that stands
alone as a statement is a docstring. Inside of a long string or comment only the context tells. Modules lie in the
splits of ``lm/stdlib``. Cost: reading and splitting 0.5 s per process, and 1 s a megabyte of source that is tagged.
"""

from __future__ import annotations

import io
import keyword
import tokenize
from collections.abc import Iterator

from formwright.registry import register
from formwright.tasks import _stdlib
from formwright.tasks._lm import SHARES
from formwright.tasks._splits import deal
from formwright.tasks._tagging import Span, TaggingTask
from formwright.tasks.base import SPLITS, digest

KINDS = ("comment", "docstring", "keyword", "name", "number", "operator", "string")
#: Token types that end a statement or stand before the first of a block.
BREAKS = frozenset([tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT])
#: Token types that may stand anywhere, also between brackets.
BETWEEN = frozenset([tokenize.NL, tokenize.COMMENT])


@register("task", "tagging/stdlib", summary="the kind of Python token of each piece of standard-library source")
class StdlibTagging(TaggingTask):
    """Accuracy of the kinds of tokens.

    length: pieces a window. rows: windows a batch. limit: characters that select and test are scored on at most.
    """

    def __init__(self, length: int = 128, rows: int = 16, limit: int = 200_000, seed: int = 0) -> None:
        texts = {digest(text): text for _, text in (*_stdlib.modules(), *_stdlib.topics()) if text.strip()}
        place = deal({key: len(text) for key, text in texts.items()}, SHARES, seed)
        source = {digest(text) for _, text in _stdlib.modules()}
        super().__init__(
            "tagging/stdlib",
            {split: [text for key, text in texts.items() if key in source and place[key] == split] for split in SPLITS},
            KINDS,
            kinds,
            length=length,
            rows=rows,
            limit=limit,
            seed=seed,
            notes=[f"standard library of Python {_stdlib.version()}"],
        )


def kinds(source: str) -> Iterator[Span]:
    """(start, end, kind) of every token of Python source that is not white space, up to an error where there is one."""
    starts = [0]
    for line in source.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    fresh = True
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            kind = _kind(token, fresh)
            if kind is not None:
                begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
                yield begin, end, kind
            fresh = fresh if token.type in BETWEEN else token.type in BREAKS
    except (tokenize.TokenError, SyntaxError):
        return


def _kind(token: tokenize.TokenInfo, fresh: bool) -> str | None:
    """The kind of a token; ``fresh`` says that a statement may begin with it."""
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    if token.type == tokenize.STRING:
        return "docstring" if fresh else "string"
    name = tokenize.tok_name[token.type]
    if name.startswith("FSTRING"):  # since Python 3.12 an f-string is several tokens
        return "string"
    return {"NUMBER": "number", "COMMENT": "comment", "OP": "operator"}.get(name)
