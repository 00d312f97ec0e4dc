"""What a session keeps between steps, by hand-made states: slots, rings, grown caches and pages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dsc.errors import UsageError
from dsc.ir.arrays import Array
from dsc.ir.interface import State, Storage
from dsc.ir.paging import BLOCK_TABLE
from dsc.ir.types import DType, TensorType
from dsc.runtime.caches import Grown, Kept, Paged, Slots, kept_by
from dsc.runtime.pages import PagePool

ROW = TensorType(DType.f32, (2,))


def state(storage: Storage, rows: int = 0) -> State:
    return State(f"past.{storage}", f"present.{storage}", ROW, storage, rows)


CONTIGUOUS, GROWN = state(Storage.CONTIGUOUS), state(Storage.GROWN)
RING, FIXED, PAGED = state(Storage.RING, 3), state(Storage.FIXED), state(Storage.PAGED, 4)
COUNT, CAPACITY = 3, 7


def slots(*states: State) -> Slots:
    return Slots(states, COUNT, CAPACITY)


def numbered(*shape: int) -> Array:
    """An array that holds 1, 2, 3, ..."""
    return 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_a_step_is_given_a_view_of_its_rows() -> None:
    kept = slots(CONTIGUOUS, RING, FIXED)
    every = kept.inputs([0, 1, 2], [0, 0, 0], [1, 1, 1], 1)
    assert {n: x.shape for n, x in every.items()} == {
        "past.contiguous": (COUNT, CAPACITY, 2), "past.ring": (COUNT, 3, 2), "past.fixed": (3, 2),
    }  # fmt: skip
    assert not any(x.any() for x in every.values())
    part = kept.inputs([1, 2], [0, 0, 0], [0, 1, 1], 1)
    part["past.fixed"][0, 0] = 5
    assert every["past.fixed"].tolist() == [[0, 0], [5, 0], [0, 0]]
    again = kept.inputs([1, 2], [0, 1, 1], [0, 2, 2], 1)
    assert all(again[name] is x for name, x in part.items()), "a bound call may be used again"
    other = kept.inputs([1], [0, 2, 2], [0, 3, 2], 1)
    assert other["past.fixed"].tolist() == [[5, 0]]


def test_of_a_step_only_what_was_not_written_in_place_is_taken_over() -> None:
    kept = slots(CONTIGUOUS, RING, FIXED)
    given = kept.inputs([1, 2], [0, 0, 0], [0, 1, 1], 1)
    given["past.contiguous"][:] = 9
    outputs = {
        "present.contiguous": numbered(2, CAPACITY, 2),
        "present.ring": numbered(2, 3, 2),
        "present.fixed": numbered(2, 2),
    }
    kept.keep([1, 2], outputs, [0, 1, 1])
    every = kept.inputs([0, 1, 2], [0, 1, 1], [0, 1, 1], 0)
    assert every["past.fixed"].tolist() == [[0, 0], [1, 2], [3, 4]]
    assert every["past.ring"][0].tolist() == [[0, 0]] * 3
    assert np.array_equal(every["past.ring"][1:], outputs["present.ring"])
    assert (every["past.contiguous"][1:] == 9).all()
    assert not every["past.contiguous"][0].any()


def filled() -> Slots:
    """Slots in which every number is another, of rows with 1, 2 and 4 tokens."""
    kept = slots(CONTIGUOUS, RING, FIXED)
    for x in kept.inputs([0, 1, 2], [0, 0, 0], [1, 2, 4], 4).values():
        x[...] = numbered(*x.shape)
    return kept


def held(kept: Kept) -> dict[str, Array]:
    return kept.inputs([0, 1, 2], [1, 2, 4], [1, 2, 4], 0)


def test_the_last_row_takes_the_place_of_one_that_leaves() -> None:
    """All that it has of rings and fixed states, and of tokens its own ones alone."""
    kept, before = filled(), held(filled())
    kept.drop(0, [1, 2, 4])
    after = held(kept)
    for name in ("past.ring", "past.fixed"):
        assert np.array_equal(after[name][0], before[name][2])
    assert np.array_equal(after["past.contiguous"][0, :4], before["past.contiguous"][2, :4])
    assert np.array_equal(after["past.contiguous"][0, 4:], before["past.contiguous"][0, 4:])
    for name, x in after.items():
        assert np.array_equal(x[1:], before[name][1:])
    unchanged = {name: x.copy() for name, x in after.items()}
    kept.drop(1, [4, 2])
    assert all(np.array_equal(x, unchanged[name]) for name, x in held(kept).items())


def test_a_new_row_begins_with_zeros_and_a_saved_one_comes_back() -> None:
    kept, before = filled(), held(filled())
    saved = kept.saved(1)
    assert saved.keys() == {"past.ring", "past.fixed"}
    kept.begin(1)
    after = held(kept)
    assert not after["past.ring"][1].any()
    assert not after["past.fixed"][1].any()
    assert np.array_equal(after["past.contiguous"], before["past.contiguous"])
    kept.restore(1, saved)
    assert all(np.array_equal(x, before[name]) for name, x in held(kept).items())
    assert np.array_equal(after["past.ring"][[0, 2]], before["past.ring"][[0, 2]])


def test_a_row_that_was_never_used_has_nothing_to_save_or_begin() -> None:
    kept = slots(RING)
    kept.begin(0)
    assert kept.saved(0) == {}
    kept.restore(0, {})
    fresh = kept.inputs([0], [0], [1], 1)["past.ring"]
    fresh[...] = 7
    kept.restore(0, {})
    assert not fresh.any()


def test_cleared_slots_are_fresh_memory() -> None:
    kept = filled()
    kept.clear()
    assert kept.saved(0) == {}
    assert not any(x.any() for x in held(kept).values())


class Device:
    """A device that holds caches of its own; the host's arrays stand for them."""

    def __init__(self) -> None:
        self.held: dict[int, Array] = {}
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def new_cache(self, shape: tuple[int, ...], dtype: DType) -> Array:
        made = np.full(shape, np.nan, dtype.numpy)
        self.held[id(made)] = np.zeros_like(made)
        return made

    def rows(self, batch: int) -> int:
        return batch

    def copy(self, source: Array, target: Array) -> None:
        assert source.base is not None
        assert source.base is target.base
        assert source.flags.c_contiguous
        held = self.held[id(source.base)]
        first = source.base.ctypes.data
        at = [(x.ctypes.data - first) // x.itemsize for x in (source, target)]
        flat = held.reshape(-1)
        flat[at[1] : at[1] + target.size] = flat[at[0] : at[0] + source.size]
        self.calls.append((source.shape, target.shape))

    def read_back(self, cache: Array) -> None:
        raise AssertionError("caches stay where they are")

    changed = read_back


def test_on_a_device_rows_move_without_the_host() -> None:
    device = Device()
    kept = Slots([CONTIGUOUS], COUNT, CAPACITY, device)
    (slot,) = kept.inputs([0, 1, 2], [0, 0, 0], [1, 1, 1], 1).values()
    (held,) = device.held.values()
    held[...] = numbered(*held.shape)
    kept.drop(1, [1, 5])
    assert device.calls == [], "the last one moves nowhere"
    wanted = held.copy()
    wanted[0, :3] = wanted[1, :3]
    kept.drop(0, [1, 3])
    wanted[1, :2] = wanted[0, :2]
    kept.fork(0, 1, [3, 2])
    assert device.calls == [((3, 2), (3, 2)), ((2, 2), (2, 2))]
    assert np.array_equal(held, wanted)
    kept.clear()
    (again,) = kept.inputs([0, 1, 2], [0, 0, 0], [1, 1, 1], 1).values()
    assert again.ctypes.data == slot.ctypes.data, "it is the device's"
    assert np.isnan(again).all(), "the host's memory is never touched"


def grown(*lengths: int) -> Grown:
    """Rows of so many tokens, of which token t of row r is [10 r + t, 10 r + t + 0.5]."""
    kept = Grown([GROWN])
    longest = max(lengths)
    rows = list(range(len(lengths)))
    assert kept.inputs(rows, [0] * len(rows), lengths, longest)["past.grown"].shape[1] == 0
    kept.keep(rows, {"present.grown": tokens(rows, 0, longest)}, lengths)
    return kept


def tokens(rows: list[int], first: int, end: int) -> Array:
    found = np.array(rows)[:, None] * 10.0 + np.arange(first, end)
    return np.stack([found, found + 0.5], -1).astype(np.float32)


def test_a_step_over_all_rows_is_given_the_longest_and_gives_it_back_grown() -> None:
    kept = grown(1, 3)
    given = kept.inputs([0, 1], [1, 3], [2, 4], 1)["past.grown"]
    assert np.array_equal(given, tokens([0, 1], 0, 3))
    assert given.flags.c_contiguous
    padded = tokens([0, 1], 0, 5)
    kept.keep([0, 1], {"present.grown": padded}, [2, 4])
    assert np.array_equal(kept.inputs([0, 1], [2, 4], [2, 4], 0)["past.grown"], padded[:, :4])


def test_a_step_over_some_rows_leaves_the_others_as_they_were() -> None:
    kept = grown(1, 2)
    assert kept.inputs([0], [1, 2], [2, 2], 1)["past.grown"].shape == (1, 1, 2)
    kept.keep([0], {"present.grown": 100 + tokens([0], 0, 2)}, [2, 2])
    found = kept.inputs([0, 1], [2, 2], [2, 2], 0)["past.grown"]
    assert np.array_equal(found - tokens([0, 1], 0, 2), [[[100] * 2] * 2, [[0] * 2] * 2])
    kept = grown(4, 1, 2)
    given = kept.inputs([1, 2], [4, 1, 2], [4, 2, 3], 1)["past.grown"]
    assert np.array_equal(given, tokens([1, 2], 0, 2))
    kept.keep([1, 2], {"present.grown": 100 + tokens([1, 2], 0, 3)}, [4, 2, 3])
    found = kept.inputs([0, 1, 2], [4, 2, 3], [4, 2, 3], 0)["past.grown"]
    assert np.array_equal(found[0], tokens([0], 0, 4)[0])
    assert np.array_equal(found[1:, :3], 100 + tokens([1, 2], 0, 3))


def test_a_row_that_joins_alone_is_put_behind_the_others() -> None:
    kept = grown(3, 2)
    given = kept.inputs([2], [3, 2, 0], [3, 2, 5], 5)["past.grown"]
    assert given.shape == (1, 0, 2)
    kept.keep([2], {"present.grown": tokens([2], 0, 6)}, [3, 2, 5])
    found = kept.inputs([0, 1, 2], [3, 2, 5], [3, 2, 5], 0)["past.grown"]
    assert np.array_equal(found[2], tokens([2], 0, 5)[0])
    assert np.array_equal(found[:2, :3], tokens([0, 1], 0, 3))
    assert not found[:2, 3:].any()


def test_a_grown_cache_is_cut_to_the_longest_that_is_left() -> None:
    kept = grown(1, 4, 2)
    kept.drop(1, [1, 4, 2])
    assert np.array_equal(kept._held["past.grown"], tokens([0, 2], 0, 2))
    kept.drop(1, [1, 2])
    assert np.array_equal(kept._held["past.grown"], tokens([0], 0, 1))
    kept.drop(0, [1])
    assert kept._held["past.grown"].shape == (0, 0, 2)
    kept = grown(1, 4)
    kept.truncate([1, 3])
    assert np.array_equal(kept._held["past.grown"], tokens([0, 1], 0, 3))
    kept.clear()
    assert kept._held == {}


def test_pages_are_taken_for_the_tokens_after_a_step_and_the_table_has_room_for_its_padding() -> (
    None
):
    kept = Paged([PAGED], PagePool(5, 4))
    given = kept.inputs([0, 1], [0, 0], [5, 2], 6)
    pages, table = given["past.paged"], given[BLOCK_TABLE]
    assert pages.shape == (5, 4, 2)
    assert table.tolist() == [[0, 1], [2, -1]]
    again = kept.inputs([0, 1], [5, 2], [6, 3], 1)
    assert again["past.paged"] is pages
    assert again[BLOCK_TABLE] is table, "as long as it lasts"
    wide = kept.inputs([1], [6, 3], [6, 4], 6)
    assert wide[BLOCK_TABLE].tolist() == [[2, -1, -1]]
    kept.truncate([4, 4])
    assert kept.inputs([0, 1], [4, 4], [5, 5], 1)[BLOCK_TABLE].tolist() == [[0, 1], [2, 3]]
    kept.drop(0, [5, 5])
    assert kept.inputs([0], [5], [6], 1)[BLOCK_TABLE].tolist() == [[2, 3]]
    kept.clear()
    assert kept.inputs([0], [0], [1], 1)[BLOCK_TABLE].tolist() == [[0]]


def test_slots_run_from_the_first_row_to_the_last_and_pages_in_any_order() -> None:
    pool = PagePool(1, 4)
    for kept in (slots(CONTIGUOUS), Grown([GROWN])):
        assert kept.together([3, 1]) == [1, 2, 3]
        assert kept.together([2]) == [2]
    assert Paged([PAGED], pool).together([3, 1]) == [3, 1]


def test_each_state_is_kept_as_it_is_declared() -> None:
    def kinds(*states: State) -> list[type]:
        return [type(k) for k in kept_by(states, 1, 8, PagePool(1, 4), None)]

    assert kinds() == []
    assert kinds(PAGED, GROWN) == [Grown, Paged]
    assert kinds(RING, PAGED, FIXED, GROWN, CONTIGUOUS) == [Slots, Grown, Paged]
    (kept,) = kept_by([RING, CONTIGUOUS], 1, 8, None, None)
    assert kept.inputs([0], [0], [1], 1)["past.contiguous"].shape == (1, 8, 2)


# --- the pool -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "blocks"),
    [
        ([4], [[0]]),
        ([5], [[0, 1]]),
        ([0, 1], [[], [0]]),
        ([8, 12], [[0, 1], [2, 3, 4]]),
    ],
)
def test_a_sequence_has_as_many_pages_as_its_tokens_fill(
    lengths: list[int], blocks: list[list[int]]
) -> None:
    pool = PagePool(5, 4)
    pool.grow(lengths)
    assert pool.blocks == blocks
    assert pool.used == sum(map(len, blocks))
    pool.grow(lengths)
    pool.grow([max(0, n - 3) for n in lengths])
    assert pool.blocks == blocks, "nothing is given back by growing"


def test_all_pages_can_be_taken_and_not_one_more() -> None:
    pool = PagePool(3, 4)
    pool.grow([4])
    words = "2 more pages of 4 tokens are needed, 1 are free of 3"
    pool.grow([4, 4])
    with pytest.raises(UsageError, match=words) as told:
        pool.grow([8, 5])
    assert told.value.hint == "open the session with a larger max_batch or max_context"
    assert [b for b in pool.blocks if b] == [[0], [1]], "nobody got a page"
    pool.grow([8, 4])
    assert (pool.blocks, pool.used) == ([[0, 2], [1]], 3)


@pytest.mark.parametrize(
    ("back", "free"),
    [
        (lambda p: p.shrink([1, 4]), [1, 3, 4]),
        (lambda p: p.shrink([0, 5]), [0, 1, 4]),
        (lambda p: p.drop(0), [0, 1, 4]),
        (lambda p: p.drop(1), [2, 3, 4]),
        (PagePool.release, [0, 1, 2, 3, 4]),
    ],
)
def test_pages_that_come_back_are_taken_again_the_lowest_first(
    back: Callable[[PagePool], None], free: list[int]
) -> None:
    pool = PagePool(5, 4)
    pool.grow([8, 8])
    back(pool)
    taken = [page for held in pool.blocks for page in held]
    assert sorted(taken + free) == list(range(5))
    assert pool.used == 5 - len(free)
    fresh = len(pool.blocks)
    pool.grow([*(4 * len(held) for held in pool.blocks), 4 * len(free)])
    assert pool.blocks[fresh] == free
