"""What a stream remembers: every slot of a model by its path, batch first, and how many tokens each row has seen.

Values are replaced, never written in place, so a fork is free. Growing slots are aligned on the right: the last token
of every row stands in the last column, so one call may bring any number of new tokens per row, 0 included, and a
window is a slice. A place before a row's first token has a negative position.

Where every row brings as many tokens and no gradient is wanted, a growing value is a view into a :class:`Room` with
places to spare, so that a step costs the tokens it brings and not a copy of all that came before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from formwright.kit.errors import Refusal

#: Spare places of a new room: half of those in use, and at least this many.
SPARE = 32


class Room:
    """Memory with spare places behind ``last``, the view of it that was handed out last.

    Only places that no view has ever shown are written, so whoever holds a view sees it unchanged. Of states that share
    a room the first to go on takes its places; for the others their value is not ``last`` any more.
    """

    def __init__(self, value: Tensor, more: int) -> None:
        self.filled = value.shape[1]
        used = self.filled + more
        self.places = value.new_empty(len(value), used + max(used // 2, SPARE), *value.shape[2:])
        self.places[:, : self.filled] = value
        self.last = self.places[:, : self.filled]

    def takes(self, value: Tensor, more: int) -> bool:
        """Whether ``more`` tokens can be written right behind ``value``."""
        fits = self.filled + more <= self.places.shape[1]
        locked = self.places.is_inference() and not torch.is_inference_mode_enabled()
        return value is self.last and fits and not locked

    def add(self, tokens: Tensor) -> Tensor:
        """``last`` and then ``tokens``, as a view."""
        first, stop = self.filled - self.last.shape[1], self.filled + tokens.shape[1]
        self.places[:, self.filled : stop] = tokens
        self.filled = stop
        return self.places[:, first:stop]


class State:
    """``seen`` (B,) int64. ``values``: path.name -> tensor; growing ones are (B, S, ...) and also in ``growing``.

    ``even``: every row is known to have seen as many tokens, so that no growing value has an empty place.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        self.seen = torch.zeros(rows, dtype=torch.long, device=device)
        self.values: dict[str, Tensor] = {}
        self.growing: dict[str, int | None] = {}
        self.rooms: dict[str, Room] = {}
        self.even = True

    @property
    def fresh(self) -> bool:
        """Whether nothing has been seen yet."""
        return not self.values

    def get(self, key: str) -> Tensor | None:
        return self.values.get(key)

    def put(self, key: str, value: Tensor) -> None:
        self.values[key] = value
        self.rooms.pop(key, None)

    def append(
        self, key: str, tokens: Tensor, lengths: Tensor | None, window: int | None = None, every: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Add (B, L, ...) tokens, ``lengths`` (B,) of them valid -> all so far (B, S, ...), positions (B, S).

        All columns that this call may need come back; with ``window`` only that many stay for later calls. With
        ``every`` the entries stand for finished runs of that many tokens, and positions count runs.
        """
        rows, length = tokens.shape[:2]
        kept = self.values.get(key)
        past = 0 if kept is None else kept.shape[1]
        room = self._room(key, kept, tokens) if lengths is None and kept is not None else None
        everything = tokens if kept is None else torch.cat((kept, tokens), 1) if room is None else room.add(tokens)
        after = self.seen // every + (length if lengths is None else lengths)
        if lengths is not None:
            # Shift each row right by its number of padded places, so that its last token stands last.
            shift = (length - lengths)[:, None]
            steps = torch.arange(past + length, device=tokens.device)[None]
            source = (steps - shift).clamp(min=0)
            index = source.reshape(rows, -1, *[1] * (tokens.dim() - 2)).expand(-1, -1, *tokens.shape[2:])
            everything = everything.gather(1, index)
        total = everything.shape[1]
        positions = after[:, None] - total + torch.arange(total, device=tokens.device)[None]
        stay = everything if window is None or total <= window else everything[:, total - window :]
        if lengths is not None and window is None:
            longest = int(after.max()) if rows else 0
            stay = everything[:, max(0, total - longest) :]
        self.values[key] = stay
        self.growing[key] = window
        if room is None:
            self.rooms.pop(key, None)
        else:
            room.last = stay
        return everything, positions

    def _room(self, key: str, value: Tensor, tokens: Tensor) -> Room | None:
        """Where ``tokens`` can be written behind ``value``; None where a graph, of gradients or compiled, must see them
        joined, or their types differ."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or value.dtype != tokens.dtype:
            return None
        room = self.rooms.get(key)
        if room is None or not room.takes(value, tokens.shape[1]):
            room = self.rooms[key] = Room(value, tokens.shape[1])
            self.values[key] = room.last
        return room

    def advance(self, lengths: Tensor | None, length: int) -> None:
        """All layers have run: move ``seen`` on by this call's tokens."""
        self.seen = self.seen + (length if lengths is None else lengths)
        self.even = self.even and lengths is None

    def fork(self) -> State:
        """An independent state of the same stream; costs nothing, and the one that goes on second a copy."""
        made = self._with(dict(self.values), self.seen)
        made.rooms = dict(self.rooms)
        return made

    def _with(self, values: dict[str, Tensor], seen: Tensor) -> State:
        made = State(0, seen.device)
        made.seen, made.values, made.growing, made.even = seen, values, dict(self.growing), self.even
        return made

    def take(self, rows: Tensor) -> State:
        """The chosen rows, which may repeat."""
        made = self._with({key: value[rows] for key, value in self.values.items()}, self.seen[rows])
        longest = int(made.seen.max()) if len(made.seen) else 0
        for key in made.growing:
            made.values[key] = made.values[key][:, max(0, made.values[key].shape[1] - longest) :]
        made.even = self.even or len(made.seen) == 1
        return made

    def join(self, other: State) -> State:
        """This state's rows and then the other's; one that is still fresh can be joined where all slots grow."""
        values = {}
        growing = {**self.growing, **other.growing}
        for key in (*self.values, *(key for key in other.values if key not in self.values)):
            mine, theirs = self._rows(key, other, growing), other._rows(key, self, growing)
            if key in growing:
                width = max(mine.shape[1], theirs.shape[1])
                mine, theirs = (_widen(t, width) for t in (mine, theirs))
            elif mine.shape[1:] != theirs.shape[1:]:
                raise Refusal(
                    f"states cannot be joined: {key} has shapes {tuple(mine.shape)} and {tuple(theirs.shape)}"
                )
            values[key] = torch.cat((mine, theirs))
        joined = self._with(values, torch.cat((self.seen, other.seen)))
        joined.growing, joined.even = growing, False
        return joined

    def _rows(self, key: str, other: State, growing: Mapping[str, int | None]) -> Tensor:
        """The values under ``key``, or none of the other's kind where this stream has none yet."""
        if key in self.values:
            return self.values[key]
        if key not in growing:
            raise Refusal(f"states cannot be joined: only one of them holds {key}, which is no growing slot")
        theirs = other.values[key]
        return theirs.new_zeros(len(self.seen), 0, *theirs.shape[2:])

    def truncate(self, lengths: Tensor) -> None:
        """Forget each row's tokens from ``lengths`` (B,) on. Only where every slot grows without a window."""
        fixed = [key for key in self.values if self.growing.get(key, 0) is not None]
        if fixed:
            raise Refusal(f"{fixed[0]} cannot be truncated; fork the state before the draft instead")
        lengths = torch.minimum(lengths, self.seen)
        drop = self.seen - lengths
        for key, value in self.values.items():
            total = value.shape[1]
            steps = torch.arange(total, device=value.device)[None] - drop[:, None]
            index = steps.clamp(min=0).reshape(len(drop), total, *[1] * (value.dim() - 2)).expand_as(value)
            longest = int(lengths.max()) if len(lengths) else 0
            self.values[key] = value.gather(1, index)[:, max(0, total - longest) :]
        self.seen, self.even = lengths, False
        self.rooms.clear()

    def bytes(self) -> int:
        """Bytes of all remembered tensors."""
        return sum(value.numel() * value.element_size() for value in self.values.values())

    def leaves(self) -> Mapping[str, Tensor]:
        """The remembered tensors by key; may carry gradients."""
        return self.values


def _widen(value: Tensor, width: int) -> Tensor:
    spare = width - value.shape[1]
    return value if spare == 0 else torch.cat((value.new_zeros(len(value), spare, *value.shape[2:]), value), 1)
