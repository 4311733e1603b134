"""A stream's state against a naive model of it: one Python list of tokens a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formwright.engine.state import State
from formwright.kit.errors import Refusal


class Lists:
    """What a state should remember, as lists of the values of each row."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[float]] = [[] for _ in range(rows)]

    def append(self, new: list[list[float]]) -> None:
        self.rows = [old + more for old, more in zip(self.rows, new)]


def feed(state: State, new: list[list[float]], spare: int, window: int | None = None, ragged: bool = True):
    width = max((len(row) for row in new), default=0) + spare
    call = torch.full((len(new), width, 1), float("nan"))
    for index, row in enumerate(new):
        call[index, : len(row), 0] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in new], dtype=torch.long) if ragged else None
    found = state.append("k", call, lengths, window)
    state.advance(lengths, width)
    return found


def held(state: State) -> list[list[float]]:
    """The values of each row that the state still holds, oldest first."""
    value = state.values.get("k")
    if value is None:
        return [[] for _ in state.seen]
    total = value.shape[1]
    counts = [min(int(seen), total) for seen in state.seen]
    return [value[index, total - count :, 0].tolist() for index, count in enumerate(counts)]


def last(rows: list[list[float]], window: int | None) -> list[list[float]]:
    return rows if window is None else [row[-window:] for row in rows]


calls = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=5)


@settings(max_examples=60)
@given(calls=calls, spare=st.integers(0, 2), window=st.none() | st.integers(1, 5))
def test_append_equals_lists(calls: list[list[int]], spare: int, window: int | None) -> None:
    state, naive, next_value = State(3), Lists(3), 0
    for sizes in calls:
        new = [[float(next_value := next_value + 1) for _ in range(size)] for size in sizes]
        before = last(naive.rows, window)
        values, positions = feed(state, new, spare, window)
        naive.append(new)
        for index, row in enumerate(naive.rows):
            seen = positions[index] >= 0
            # All that is kept from before and all that is new comes back, in place.
            needed = before[index] + new[index]
            found = values[index, seen, 0].tolist()
            assert found[len(found) - len(needed) :] == needed
            assert positions[index, seen].tolist() == list(range(len(row) - len(found), len(row)))
    assert state.seen.tolist() == [len(row) for row in naive.rows]
    assert held(state) == last(naive.rows, window)
    longest = max(len(row) for row in naive.rows)
    if window is None:
        assert state.values["k"].shape[1] == longest
    else:
        assert state.values["k"].shape[1] <= window


operation = st.one_of(
    st.tuples(st.just("feed"), st.lists(st.integers(0, 3), min_size=6, max_size=6)),
    st.tuples(st.just("take"), st.lists(st.integers(0, 5), min_size=1, max_size=4)),
    st.tuples(st.just("join"), st.integers(0, 2)),
    st.tuples(st.just("truncate"), st.lists(st.integers(0, 6), min_size=6, max_size=6)),
    st.tuples(st.just("fork"), st.just(0)),
)


@settings(max_examples=80)
@given(operations=st.lists(operation, max_size=8))
def test_any_sequence_of_operations_equals_lists(operations) -> None:
    state, rows, next_value = State(2), [[], []], 0
    forks: list[tuple[State, list[list[float]]]] = []
    for name, argument in operations:
        if name == "feed":
            new = [[float(next_value := next_value + 1) for _ in range(argument[i % 6])] for i in range(len(rows))]
            feed(state, new, 1)
            rows = [old + more for old, more in zip(rows, new)]
        elif name == "take":
            chosen = [index % len(rows) for index in argument]
            state, rows = state.take(torch.tensor(chosen)), [list(rows[index]) for index in chosen]
        elif name == "join" and len(rows) < 6:
            other = State(2)
            for _ in range(argument):
                feed(other, [[-1.0], [-2.0, -3.0]], 0)
            state, rows = state.join(other), rows + [[-1.0] * argument, [-2.0, -3.0] * argument]
        elif name == "truncate":
            lengths = [argument[index % 6] for index in range(len(rows))]
            state.truncate(torch.tensor(lengths))
            rows = [row[:length] for row, length in zip(rows, lengths)]
        elif name == "fork":
            forks.append((state.fork(), [list(row) for row in rows]))
        assert state.seen.tolist() == [len(row) for row in rows]
        assert held(state) == rows
    for fork, kept in forks:  # whatever happened since, a fork is as it was
        assert fork.seen.tolist() == [len(row) for row in kept]
        assert held(fork) == kept


def test_a_fork_is_free_and_independent() -> None:
    state = State(2)
    feed(state, [[1.0, 2.0], [3.0]], 0)
    fork = state.fork()
    assert fork.values["k"].data_ptr() == state.values["k"].data_ptr()
    feed(fork, [[9.0], [8.0]], 0)
    fork.append("late", torch.zeros(2, 1, 1), None)
    assert set(state.growing) == {"k"}
    fork.put("other", torch.zeros(2, 3))
    assert held(state) == [[1.0, 2.0], [3.0]]
    assert held(fork) == [[1.0, 2.0, 9.0], [3.0, 8.0]]
    assert set(state.values) == {"k"}
    assert state.seen.tolist() == [2, 1]


def test_nothing_remembered_comes_from_padding() -> None:
    state = State(2)
    feed(state, [[1.0], []], 3)
    feed(state, [[2.0], [3.0]], 0)
    assert held(state) == [[1.0, 2.0], [3.0]]


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_keeps_only_its_tokens(window: int) -> None:
    state = State(1)
    for value in range(7):
        values, positions = feed(state, [[float(value)]], 0, window, ragged=False)
        assert values.shape[1] <= window + 1
        assert positions[0, -1] == value
    assert held(state) == [[float(v) for v in range(7)][-window:]]
    assert state.bytes() == window * 4


def test_fixed_slots_refuse_to_be_truncated() -> None:
    state = State(1)
    feed(state, [[1.0, 2.0]], 0)
    state.put("hidden", torch.zeros(1, 4))
    with pytest.raises(Refusal, match=r"hidden cannot be truncated; fork"):
        state.truncate(torch.tensor([1]))
    windowed = State(1)
    feed(windowed, [[1.0, 2.0]], 0, window=4)
    with pytest.raises(Refusal, match=r"k cannot be truncated"):
        windowed.truncate(torch.tensor([1]))


def test_join_says_what_does_not_fit() -> None:
    one, two = State(1), State(1)
    one.put("hidden", torch.zeros(1, 4))
    two.put("hidden", torch.zeros(1, 5))
    with pytest.raises(Refusal, match=r"hidden has shapes \(1, 4\) and \(1, 5\)"):
        one.join(two)
    with pytest.raises(Refusal, match=r"only one of them holds hidden"):
        one.join(State(1))
    with pytest.raises(Refusal, match=r"only one of them holds hidden"):
        State(1).join(one)


def test_bytes_and_leaves() -> None:
    state = State(2)
    assert state.fresh
    assert state.bytes() == 0
    feed(state, [[1.0, 2.0], [3.0]], 0)
    state.put("hidden", torch.zeros(2, 3, dtype=torch.float64, requires_grad=True))
    assert not state.fresh
    assert state.bytes() == 2 * 2 * 4 + 2 * 3 * 8
    assert set(state.leaves()) == {"k", "hidden"}
    assert state.leaves()["hidden"].requires_grad


def test_taking_rows_forgets_the_columns_that_nobody_needs() -> None:
    state = State(2)
    feed(state, [[float(v) for v in range(50)], [1.0, 2.0]], 0)
    assert state.take(torch.tensor([1])).values["k"].shape[1] == 2
    assert state.take(torch.tensor([], dtype=torch.long)).values["k"].shape == (0, 0, 1)


def rowed(first: float, rows: int = 2, tokens: int = 1, **how) -> torch.Tensor:
    return torch.arange(float(first), first + rows * tokens, **how).reshape(rows, tokens, 1)


@torch.no_grad()
def test_a_step_writes_its_tokens_and_copies_the_rest_rarely() -> None:
    state, places = State(2), []
    for step in range(500):
        state.append("k", rowed(2.0 * step), None)
        state.advance(None, 1)
        places.append(state.values["k"].data_ptr())
    assert state.values["k"][:, :, 0].tolist() == [list(range(0, 1000, 2)), list(range(1, 1001, 2))]
    assert len(set(places)) < 10
    assert state.bytes() == 2 * 500 * 4


@torch.no_grad()
def test_the_room_of_a_window_stays_small() -> None:
    state = State(1)
    for step in range(300):
        values, positions = state.append("k", rowed(step, 1), None, 5)
        state.advance(None, 1)
        assert values[0, -5:, 0].tolist() == list(range(max(0, step - 4), step + 1))
        assert positions[0, -1] == step
        assert "k" not in state.rooms or state.rooms["k"].places.shape[1] <= 6 + 32 + 5
    assert state.bytes() == 5 * 4


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 3])
def test_forks_that_share_a_room_go_on_each_for_itself(window: int | None) -> None:
    state = State(2)
    for step in range(4):
        state.append("k", rowed(2.0 * step), None, window)
        state.advance(None, 1)
    snapshot, copied = state.values["k"], state.values["k"].clone()
    forks = [state, state.fork(), state.fork(), state.take(torch.tensor([1, 0]))]
    for index, fork in enumerate(forks):
        for step in range(3):
            fork.append("k", rowed(100.0 * (index + 1) + 2 * step), None, window)
            fork.advance(None, 1)
    assert torch.equal(snapshot, copied)
    for index, fork in enumerate(forks):
        before = copied if index < 3 else copied[[1, 0]]
        wanted = torch.cat((before, *(rowed(100.0 * (index + 1) + 2 * step) for step in range(3))), 1)
        assert torch.equal(fork.values["k"], wanted if window is None else wanted[:, -window:])


def test_rooms_are_left_where_they_cannot_be_written() -> None:
    state = State(2)
    with torch.inference_mode():
        for step in range(3):
            state.append("k", rowed(2.0 * step), None)
    with torch.no_grad():  # an inference tensor is not written outside inference mode
        state.append("k", rowed(6.0), None)
    state.append("k", rowed(8.0, dtype=torch.float64), None)
    assert state.values["k"].dtype == torch.float64
    grown = rowed(10.0, dtype=torch.float64).requires_grad_()
    (state.append("k", grown, None)[0] ** 2).sum().backward()
    assert grown.grad is not None and grown.grad.flatten().tolist() == [20.0, 22.0]
    assert state.values["k"][0, :, 0].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    with torch.no_grad():
        state.put("k", torch.zeros(2, 1, 1))
        state.append("k", torch.ones(2, 1, 1), None)
    assert state.values["k"][0, :, 0].tolist() == [0.0, 1.0]


def test_rows_are_even_until_one_takes_less() -> None:
    state = State(2)
    feed(state, [[1.0], [2.0]], 0, ragged=False)
    assert state.even and state.fork().even
    assert not state.join(state.fork()).even
    feed(state, [[3.0], []], 0)
    assert not state.even and not state.take(torch.tensor([0, 1])).even
    assert state.take(torch.tensor([1])).even
