"""The protocol's statistics, and the limit that measurements are shares of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dsc.backends.tvm.lean import tiles_allowed
from dsc.errors import InternalError
from dsc.ir.graph import Attrs
from dsc.ir.interface import Guard
from dsc.ir.parser import parse_program
from dsc.runtime import loops as loops_of
from dsc.runtime import probes
from dsc.runtime.costs import multiplies_codes
from dsc.runtime.limit import Work, limit_seconds, prefill_work, step_work
from dsc.runtime.loops import LINE, loops
from dsc.runtime.probes import (
    ABSENT,
    FEW_ROWS,
    LEAST_BYTES,
    SEARCH,
    STREAMS,
    MatrixProbe,
    ReadProbe,
)
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


def test_products_of_codes_have_a_peak_of_their_own() -> None:
    work = [Work(1, 100), Work(1, 100, coded=True), Work(300, 100, coded=True)]
    assert limit_seconds(work, bandwidth=100, matrix=100) == 5
    assert limit_seconds(work, bandwidth=100, matrix=100, coded=200) == 4.5


@pytest.mark.parametrize(
    ("activations", "coded"), [("", False), ("i8:32", True), ("f8e4m3:128", False)]
)
def test_work_on_rows_in_integers_is_coded(activations: str, coded: bool) -> None:
    (graph,) = parse_program(TEXT).entries.values()
    linear = next(node for node in graph.nodes if node.op == "linear")
    told = replace(linear, attrs=Attrs({**linear.attrs, "activations": activations}))
    assert multiplies_codes(told) == coded


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


@pytest.fixture
def without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler."""
    monkeypatch.setattr(probes, "loops", lambda: None)


def test_probes_read_what_they_say() -> None:
    with ReadProbe(1, size=1 << 22) as read, MatrixProbe(1, shape=(8, 16, 32)) as product:
        assert read.size == 1 << 22
        assert len(read.forms) == 2
        assert read() > 1e6
        assert product() > 1e3
    with ReadProbe(2, size=1) as least:
        assert least.size == 2 * LEAST_BYTES


@pytest.mark.parametrize("threads", [1, 3])
def test_every_form_of_reading_reads_every_word(threads: int) -> None:
    """A word that is another is seen, wherever it lies: so a form that leaves some out would be."""
    found = loops()
    assert found is not None
    size = threads * 3 * LINE * STREAMS * 100
    with ReadProbe(threads, size) as read:
        words = read.memory.view(np.uint64)
        assert len(words) == read.size // 8
        for number, form in enumerate(found.forms):
            assert read.read(form) > 0
            place = number * len(words) // len(found.forms) - 1
            words[place] = 2
            with pytest.raises(InternalError, match=form):
                read.read(form)
            words[place] = 1
            assert read.read(form) > 0


def test_every_product_in_registers_has_a_speed() -> None:
    found = loops()
    assert found is not None
    able = [name for name in found.products if "tiles" not in name or tiles_allowed()]
    speeds = {name: found.multiply(name, 1, 1e-3) for name in able}
    assert min(speeds.values()) > 1e6
    assert {name.partition(" ")[0] for name in speeds} <= {"fp32", "bf16", "int8"}


@pytest.mark.usefixtures("without_loops")
def test_without_a_compiler_the_c_library_reads_and_torch_multiplies() -> None:
    with ReadProbe(2, size=1 << 20) as read, MatrixProbe(1, shape=(8, 16, 32)) as product:
        assert read.forms == (SEARCH,)
        assert read() > 1e6
        assert product.way.endswith("by torch")
        assert product() > 1e3
        read.memory[-1] = ABSENT
        with pytest.raises(AssertionError, match="nobody wrote"):
            read()


def test_a_compiler_that_takes_no_loops_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("/bin/false", "no-such-compiler"):
        monkeypatch.setenv("CXX", tool)
        assert loops.__wrapped__() is None
    monkeypatch.setattr(loops_of, "_library", lambda: b"nothing that runs")
    assert loops.__wrapped__() is None


@pytest.mark.usefixtures("without_loops")
def test_the_product_is_the_fastest_of_the_types_that_a_program_may_be_computed_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speeds = {"fp16": 1.0, "fp32": 4.0, "int8": 8.0}
    monkeypatch.setattr(MatrixProbe, "_by_torch", lambda _, dtype, rows: lambda: speeds[dtype])
    with MatrixProbe(1, dtype="fp32") as product:
        assert product.dtype == "fp32"
    with MatrixProbe(1, dtype="fp16") as product:
        assert (product.dtype, product.way, product()) == ("fp32", "fp32 by torch", 4.0)
    with MatrixProbe(1, dtype="fp16", coded=True) as product:
        assert (product.dtype, product()) == ("int8", 8.0)


def test_a_way_to_multiply_that_is_slow_is_not_tried_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int]] = []

    def by_torch(_: MatrixProbe, dtype: str, rows: int) -> Callable[[], float]:
        asked.append((dtype, rows))
        return lambda: 1.0 if dtype == "bf16" else 3.0

    registers = SimpleNamespace(products=("bf16 vectors", "int8 vectors"), multiply=lambda *_: 5.0)
    monkeypatch.setattr(MatrixProbe, "_by_torch", by_torch)
    monkeypatch.setattr(probes, "loops", lambda: registers)
    with MatrixProbe(1, (512, 8, 8), "bf16") as product:
        assert (product.way, product()) == ("bf16 vectors", 5.0)
    assert asked == [("bf16", FEW_ROWS), ("fp32", FEW_ROWS), ("fp32", 512)]
