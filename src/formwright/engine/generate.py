"""``fw.generate``: prompts in, continuations out, by any causal model that streams, or an encoder with such a decoder.

Rows of unequal length run as one batch, each ends when it ends, and what a row becomes depends on its own prompt and
the seed alone. Cost: one pass over the prompts, then one token a row and step; the state grows by each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from formwright.engine.autoregressive import Autoregressive
from formwright.engine.driver import drive, language_head
from formwright.engine.protocols import Controller, Request
from formwright.engine.sampling import check_sampling
from formwright.kit.errors import DataError, Refusal, SpecError, all_of
from formwright.models.batch import Batch, pad
from formwright.models.items import part_name
from formwright.models.model import Model
from formwright.models.system import System

Prompt = str | Sequence[int]
#: What a decoder gives for bytes that are no whole character yet.
BROKEN = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """What a stream yields: row ``row`` goes on by id ``token``, which adds ``text`` (empty while a character is not
    whole, and for models without tokenizer). ``reason`` is set on a row's last piece: end, stop, length, positions."""

    row: int
    token: int
    text: str = ""
    reason: str = ""


def generate(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | int | Sequence[str | int] | None = None,
    end: bool = True,
    start: int | None = None,
    as_ids: bool = False,
    controllers: Sequence[Controller] = (),
) -> Any:
    """The continuation of every prompt, without the prompt: texts for texts, lists of ids for lists of ids.

    Args:
        prompts: texts, or rows of ids; one alone gives one answer alone. For an encoder-decoder they are what the
            encoder reads.
        max_new: new tokens a row at most. A row also ends where the model's positions end.
        temperature: 0 takes the likeliest token; above, it is drawn with ``seed``, from the ``top_k`` likeliest and
            the smallest set that holds ``top_p`` of the mass. Equal prompts in one call give different draws.
        stop: strings (cut off, with what follows) or ids (cut off) that end a row. end: also end at the tokenizer's
            end token, which is cut off.
        start: id that the decoder of an encoder-decoder starts from; default the tokenizer's padding (T5) or 0.
        as_ids: ids for texts too. controllers: change the logits, in list order.

    Raises:
        DataError: an empty prompt without a start token, a prompt longer than the model's positions, text without a
            tokenizer. Refusal: a model that cannot stream, naming the part. SpecError: options out of range.
    """
    asked = _read(model, prompts, stop, end, start)
    request = _request(asked, max_new, temperature, top_k, top_p, controllers)
    rows: list[list[int]] = [[] for _ in asked.rows]
    texts: list[str] = ["" for _ in asked.rows]
    for piece in _run(model, asked, request, seed):
        if piece.token >= 0:
            rows[piece.row].append(piece.token)
        texts[piece.row] += piece.text
    found: list[Any] = rows if as_ids or not asked.texts else texts
    return found[0] if asked.single else found


def stream(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | int | Sequence[str | int] | None = None,
    end: bool = True,
    start: int | None = None,
    controllers: Sequence[Controller] = (),
) -> Iterator[Piece]:
    """:func:`generate` piece by piece, as tokens come; all complaints are raised by the call itself."""
    asked = _read(model, prompts, stop, end, start)
    return _run(model, asked, _request(asked, max_new, temperature, top_k, top_p, controllers), seed)


@dataclass(frozen=True)
class _Asked:
    rows: list[list[int]]
    texts: bool
    single: bool
    tokenizer: Any
    ends: frozenset[int]
    stops: tuple[str, ...]
    limit: int | None
    inputs: Batch | None


def _read(model: Any, prompts: Any, stop: Any, end: bool, start: int | None) -> _Asked:
    """Prompts and stops as ids, with every complaint about them and about the model."""
    _check_model(model)
    tokenizer = getattr(model, "tokenizer", None)
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    given = [prompts] if single else list(prompts)
    kinds = {isinstance(prompt, str) for prompt in given}
    if len(kinds) > 1:
        raise DataError("prompts are either all texts or all rows of ids")
    texts = kinds == {True}
    if texts and tokenizer is None:
        raise DataError(f"{model.name or 'this model'} carries no tokenizer: give rows of ids, or set model.tokenizer")
    rows = _encode(model, given) if texts else [[int(token) for token in row] for row in given]
    stops = () if stop is None else (stop,) if isinstance(stop, (str, int)) else tuple(stop)
    words = tuple(s for s in stops if isinstance(s, str))
    if "" in words:
        raise SpecError("stop holds an empty string, which would end every row at once")
    if words and tokenizer is None:
        raise DataError("stop strings need a tokenizer; give ids")
    ends = {s for s in stops if isinstance(s, int)}
    if end and tokenizer is not None and tokenizer.end_id is not None:
        ends.add(tokenizer.end_id)
    if isinstance(model, System):
        return _system(model, rows, texts, single, tokenizer, frozenset(ends), words, start)
    rows = [row or _opening(model, tokenizer) for row in rows]
    _check_rows(model, rows, model.reach)
    return _Asked(rows, texts, single, tokenizer, frozenset(ends), words, model.reach, None)


def _encode(model: Any, texts: Sequence[str]) -> list[list[int]]:
    rows = model.tokenizer.encode(texts)
    closing = model.tokenizer.end_id
    if isinstance(model, System) or closing is None or closing == model.tokenizer.start_id:
        return rows
    # A tokenizer that closes every text would have the model go on after the end.
    return [row[:-1] if len(row) > 1 and row[-1] == closing else row for row in rows]


def _opening(model: Any, tokenizer: Any) -> list[int]:
    for name in ("start_id", "end_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return [found]
    raise DataError(
        f"an empty prompt needs a start token, which {model.name or 'this model'} does not know; give one id"
    )


def _system(model: System, rows, texts, single, tokenizer, ends, words, start: int | None) -> _Asked:
    owner = model.tower(model.spec.output)
    sources = model.spec.towers[model.spec.output].memory  # type: ignore[union-attr]
    if len(sources) != 1:
        raise Refusal(f"generate reads one encoder; {model.spec.output} reads {', '.join(sources) or 'none'}")
    _check_rows(model.tower(sources[0]), rows, model.tower(sources[0]).reach)
    first = start if start is not None else tokenizer.pad_id if tokenizer is not None else 0
    tokens, lengths = pad(rows)
    field = f"{sources[0]}.tokens"
    inputs = Batch(inputs={field: tokens}, lengths={field: lengths})
    return _Asked([[first] for _ in rows], texts, single, tokenizer, ends, words, owner.reach, inputs)


def _check_rows(model: Any, rows: Sequence[Sequence[int]], limit: int | None) -> None:
    vocab = model.stem.tokens.rows
    problems = []
    for index, row in enumerate(rows):
        if limit is not None and len(row) > limit:
            problems.append(
                f"prompt {index} has {len(row)} tokens and the model {limit} positions; cut it to {limit} or less"
            )
        wrong = [token for token in row if not 0 <= token < vocab]
        if wrong:
            problems.append(f"prompt {index} holds id {wrong[0]}; the model knows ids 0 to {vocab - 1}")
    all_of(DataError, problems)


def _check_model(model: Any) -> None:
    owner = model.tower(model.spec.output) if isinstance(model, System) else model
    if not isinstance(owner, Model):
        raise Refusal(f"generate runs a model or a system, not a {type(model).__name__}")
    problems = []
    for id, part in owner.parts():
        if not part.traits.causal or not part.traits.streams:
            lack = "reads later tokens" if not part.traits.causal else "cannot go on from a state"
            problems.append(f"{id} ({part_name(part)}) {lack}, so {model.name or 'this model'} cannot generate")
    if owner.stem.field() != "tokens":
        problems.append(f"{model.name or 'this model'} reads {owner.stem.field()}, not tokens")
    if language_head(owner) is None:
        problems.append(f"{model.name or 'this model'} has no language-model head, so it names no next token")
    all_of(Refusal, problems)


def _request(asked: _Asked, max_new: int, temperature: float, top_k, top_p, controllers) -> Request:
    problems = check_sampling(temperature, top_k, top_p)
    if max_new < 0:
        problems.append(f"max_new={max_new} must not be negative")
    all_of(SpecError, problems)
    for controller in controllers:
        if controller.level != "logits" or controller.needs:
            raise Refusal(f"{type(controller).__name__}: generate takes controllers of logits without other models")
    return Request(
        rows=asked.rows,
        max_new=max_new,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        ends=asked.ends,
        limit=asked.limit,
        inputs=asked.inputs,
        controllers=tuple(controllers),
    )


def _run(model: Any, asked: _Asked, request: Request, seed: int) -> Iterator[Piece]:
    generator = Autoregressive()
    work = generator.start(request, seed)
    reader = asked.tokenizer if asked.texts or asked.stops else None
    lines = [_Line(reader, asked.stops, row if asked.inputs is None else []) for row in asked.rows]
    training = model.training
    model.eval()
    try:
        held: dict[int, Piece] = {}
        for _, event in drive({"model": model}, [(generator, work)]):
            row = event.row
            if event.kind == "done":
                text = lines[row].rest()
                if row in held:  # its last token, which is yielded with the reason
                    piece = held.pop(row)
                    yield Piece(row, piece.token, piece.text + text, event.reason)
                continue
            if row in held:
                yield held.pop(row)
            if event.token in request.ends:
                held[row] = Piece(row, -1)
                continue
            text, stopped = lines[row].add(event.token)
            if stopped:
                generator.end(work, row)
                yield Piece(row, event.token, text, "stop")
                continue
            held[row] = Piece(row, event.token, text)
    finally:
        model.train(training)


class _Line:
    """The text of one row as it grows: whole characters only, and nothing that may yet turn out to be a stop."""

    #: Tokens of the prompt decoded along, so that a space between it and what follows is not lost.
    OVERLAP = 4

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: Sequence[int]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.given = 0
        if tokenizer is not None and prompt:
            before = tokenizer.decode(list(prompt[-self.OVERLAP :]))
            if not before.endswith(BROKEN):
                self.ids, self.given = list(prompt[-self.OVERLAP :]), len(before)

    def add(self, token: int) -> tuple[str, bool]:
        """(text that is certain now, whether a stop was met)."""
        if self.tokenizer is None:
            return "", False
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        places = [place for place in (text.find(stop, self.given) for stop in self.stops) if place >= 0]
        if places:
            return self._up_to(text, min(places)), True
        if text.endswith(BROKEN):
            return "", False
        # A tail that begins a stop waits until it is decided.
        wait = max((k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])), default=0)
        return self._up_to(text, len(text) - wait), False

    def rest(self) -> str:
        """What was held back, at the end of the row."""
        return "" if self.tokenizer is None else self._up_to(text := self.tokenizer.decode(self.ids), len(text))

    def _up_to(self, text: str, place: int) -> str:
        new, self.given = text[self.given : place], max(self.given, place)
        return new
