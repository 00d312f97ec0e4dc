"""The protocol's statistics, and the limit that measurements are shares of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsc.ir.interface import Guard
from dsc.ir.parser import parse_program
from dsc.runtime.limit import Work, limit_seconds, prefill_work, step_work
from dsc.runtime.probes import ABSENT, LEAST_BYTES, MatrixProbe, ReadProbe
from dsc.runtime.protocol import Spread, Turn, drift, ratios, steady, take_turns

TEXT = (Path(__file__).resolve().parent.parent / "data" / "small_lm.dsc").read_text()


def test_a_probe_serves_both_its_neighbours() -> None:
    probes = iter([10.0, 9.5, 5.0, 5.2])
    steps = iter([[1.0, 2.0], [3.0], [4.0]])
    turns = take_turns(lambda: next(probes), lambda: next(steps), 3)
    assert turns == [
        Turn(10.0, (1.0, 2.0), 9.5), Turn(9.5, (3.0,), 5.0), Turn(5.0, (4.0,), 5.2),
    ]  # fmt: skip
    assert [t.seconds for t in steady(turns, float)] == [(1.0, 2.0), (4.0,)]


@pytest.mark.parametrize(("before", "after", "kept"), [(10, 9, 1), (10, 8.9, 0), (8.9, 10, 0)])
def test_turns_between_probes_that_differ_by_more_than_a_tenth_are_dropped(
    before: float, after: float, kept: int
) -> None:
    assert len(steady([Turn(before, (1.0,), after)], float)) == kept
    assert drift(before, after) == drift(after, before)
    assert drift(0.0, 0.0) == 0.0


def test_medians_and_quartiles() -> None:
    assert Spread.of([5, 1, 3, 2, 4]) == Spread(3, 2, 4, 5)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 1)
    assert ratios([2.0, 4.0], [4.0, 2.0]) == [2.0, 0.5]


def test_each_operator_is_bound_by_memory_or_by_the_cores() -> None:
    work = [Work(100, 1), Work(1, 100)]
    assert limit_seconds(work, bandwidth=100, matrix=100) == 2
    assert limit_seconds(work, bandwidth=200, matrix=100) == 1.5
    assert limit_seconds([], 1, 1) == 0


def test_the_work_of_a_step_is_weights_and_cache() -> None:
    program = parse_program(TEXT)
    weights = 4 * (24 * 8 + 10 * 8 + 20 * 6 + 8 * 12 + 9 * 8 + 8 + 2 * 2)
    row = 4 * (6 + 4)
    for context in (0, 20):
        found = sum(w.bytes for w in step_work(program, 2, 1, context))
        embedding = 2 * 8 * 4
        assert found == weights + embedding + 2 * row * (context + 1)
    chunks = prefill_work(program, 1, 7, 4)
    assert len(chunks) == 2 * len(program.entries[program.choose_entry(4, 1, 4)].nodes)


def test_the_work_of_a_step_is_that_of_the_entry_that_takes_it() -> None:
    program = parse_program(TEXT)
    (name,) = program.entries
    empty = program.entries[name].with_nodes([])
    both = replace(program, entries={**program.entries, "wide": replace(empty, name="wide")})
    for guard in (Guard("wide", batch=1), Guard("wide", context=5)):
        chosen = both.declaring(guards=(guard, Guard(name)))
        assert not step_work(chosen, 1, 1, 4)
        assert step_work(chosen, 2, 1, 5) == step_work(program, 2, 1, 5)


def test_a_token_of_a_chunk_attends_to_half_of_it_on_average() -> None:
    """Attention of the chunk's tokens among themselves; everything else grows with their number."""
    program = parse_program(TEXT)

    def flops(new: int, context: int) -> float:
        return sum(w.flops for w in step_work(program, 1, new, context))

    n = 16
    a_pair = (flops(n, 1000) - flops(n, 0)) / 1000 / n
    squared = flops(2 * n, 0) - 2 * flops(n, 0)  # what does not grow with the number of tokens
    assert squared == pytest.approx(a_pair * n * n, rel=0.2)


def test_probes_read_what_they_say() -> None:
    with ReadProbe(1, size=1 << 22) as read, MatrixProbe(1, shape=(8, 16, 32)) as product:
        assert read.size == 1 << 22
        assert read() > 1e6
        assert product() > 1e3
    with ReadProbe(2, size=1) as least:
        assert least.size == 2 * LEAST_BYTES


def test_a_read_touches_every_byte() -> None:
    with ReadProbe(1, size=1 << 20) as read:
        (part,) = read.parts
        assert read._search(part.ctypes.data, ABSENT, part.nbytes) is None
        part[-1] = ABSENT
        assert (
            read._search(part.ctypes.data, ABSENT, part.nbytes) == part.ctypes.data + (1 << 20) - 1
        )


def test_the_product_is_the_faster_of_the_types_that_a_program_may_be_computed_in() -> None:
    with MatrixProbe(1, shape=(8, 16, 32), dtype="fp32") as product:
        assert product.dtype == "fp32"
    probe = MatrixProbe(1, shape=(8, 16, 32), dtype="fp16")
    probe._run = lambda dtype: {"fp16": 1.0, "fp32": 4.0}[dtype]  # type: ignore[method-assign]
    with probe:
        assert (probe.dtype, probe()) == ("fp32", 4.0)
