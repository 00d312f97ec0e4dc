"""What an entry admits: every operator with an index refuses what is outside, and nothing more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsc.backends.reference import ReferenceExecutable
from dsc.errors import UsageError
from dsc.ir.arrays import Array, array_of, tensor_of
from dsc.ir.index_ranges import index_ranges
from dsc.ir.interface import Guard
from dsc.ir.op import registry
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.samples import sample_inputs
from dsc.runtime.admission import Admission, Admitted
from tests.ir.strategies import call_graph
from tests.ir.test_operators import CASES, filled

INDEXED = sorted((name, operand) for name, d in registry().items() for operand in d.within)


def test_operators_with_integer_operands_say_what_they_may_hold() -> None:
    """An integer operand of a fixed element type is an index, unless named here."""
    free = {("histc", "x"), ("sample", "seeds")}
    integers = {
        (name, o.name)
        for name, d in registry().items()
        for o in d.operands
        if o.pattern.dtype in ("i64", "I")
    }
    assert integers - set(INDEXED) - free == set()


@pytest.mark.parametrize(("name", "operand"), INDEXED)
def test_an_index_outside_is_refused_and_one_inside_is_not(name: str, operand: str) -> None:
    paged = operand == "block_table"
    graph = call_graph(name, filled(CASES[name][-1], 0) if paged else registry()[name].example)
    inputs = {name: array_of(x) for name, x in sample_inputs(graph, {}).items()}
    admission = Admission(graph, {})
    admission.check(inputs)
    (node,) = graph.nodes
    if paged:  # an empty sequence needs no page
        inputs[node["lengths"].name][:] = 0
    index = node[operand].name
    span = next(d.span for d in index_ranges(graph, {}).demands if d.input == index)
    assert isinstance(span.low, int)
    assert isinstance(span.high, int)
    for value in (span.low - 1, span.low, span.high, span.high + 1):
        given = inputs[index].copy()
        given.reshape(-1)[-1 if value >= span.high else 0] = value
        if span.low <= value <= span.high:
            admission.check({**inputs, index: given})
            continue
        with pytest.raises(UsageError, match=f"input {index} holds"):
            admission.check({**inputs, index: given})


def test_a_size_is_told_by_the_input_and_the_option() -> None:
    text = 'program "p" {stage=CANONICAL}\nsymbols {B=[1,4]}\n'
    text += "graph main(%input_ids: i64[B,2], %positions: i64[B,2], %lengths: i64[B],"
    text += ' %logits_at: i64[B,2]) { return %input_ids as "y" }'
    program = parse_program(text)
    admission = Admission(program.entries["main"], program.symbols)
    for batch in (0, 5):
        with pytest.raises(UsageError, match=f"input_ids has {batch} at axis 0") as told:
            admission.check(
                {
                    v.name: np.zeros((batch, 2)[: v.type.rank], np.int64)
                    for v in program.entries["main"].inputs
                }
            )
        assert told.value.hint is not None
        assert ("max_batch" in told.value.hint) == (batch == 5)


def test_an_entry_for_few_sequences_names_no_option_that_would_not_help() -> None:
    text = 'program "p" {stage=CANONICAL}\nsymbols {B=[1,8]}\n'
    for name in ("few", "main"):
        text += f"graph {name}(%input_ids: i64[B,2]) {{ return %input_ids }}\n"
    guards = (Guard("few", batch=4), Guard("main"))
    executable = Failing(parse_program(text).declaring(guards=guards))
    for entry, batch, hint in (
        ("few", 5, "it was compiled for 1 to 4; another entry takes more"),
        ("main", 9, "it was compiled for 1 to 8"),
    ):
        with pytest.raises(UsageError) as told:
            executable.bind(entry, {"input_ids": np.zeros((batch, 2), np.int64)})
        assert told.value.hint == hint
    executable.bind("few", {"input_ids": np.zeros((4, 2), np.int64)})
    executable.bind("main", {"input_ids": np.zeros((8, 2), np.int64)})


class Failing(Admitted):
    """Ends as a runtime may, whatever it is given."""

    def execute(self, *given: object) -> dict[str, Array]:
        raise MemoryError("no room")


def test_a_run_that_fails_with_indices_inside_says_what_failed() -> None:
    program = parse_program("""
    program "p" {stage=CANONICAL}
    graph main(%x: f32[5,3], %i: i64[2]) {
      %j = add %i, %i : i64[2]
      %y = take %x, %j {axis=0} : f32[2,3]
      return %y as "y"
    }
    """)
    x = torch.zeros(5, 3)
    with pytest.raises(MemoryError, match="no room"):
        Failing(program).run("main", {"x": x, "i": torch.tensor([0, 2])})
    with pytest.raises(UsageError, match="that of take holds -2 to 4") as told:
        Failing(program).run("main", {"x": x, "i": torch.tensor([-1, 2])})
    assert told.value.hint == "0 to 4 are possible here"


def test_what_is_updated_in_place_is_not_copied_and_all_else_may_be() -> None:
    graph = replace(call_graph("cache_write", registry()["cache_write"].example), aliases=((0, 0),))
    executable = ReferenceExecutable(Program("p", {graph.name: graph}))
    inputs = {name: array_of(x) for name, x in sample_inputs(graph, {}).items()}
    cache, rows = (v.name for v in graph.inputs[:2])
    turned = {name: np.asfortranarray(inputs[name]) for name in (cache, rows)}
    wanted = executable.run(graph.name, {**inputs, cache: inputs[cache].copy()})
    found = executable.run(graph.name, {**inputs, rows: turned[rows]})
    assert next(iter(found.values())) is inputs[cache]
    np.testing.assert_array_equal(inputs[cache], next(iter(wanted.values())))
    with pytest.raises(UsageError, match=f"{cache} is updated in place"):
        executable.run(graph.name, {**inputs, cache: turned[cache]})


def test_inputs_are_of_any_kind_and_results_of_the_kind_that_came() -> None:
    program = parse_program("""
    program "p" {stage=CANONICAL}
    graph main(%x: bf16[2,3], %i: i64[2]) {
      %y = take %x, %i {axis=0} : bf16[2,3]
      return %y as "y"
    }
    """)
    executable = ReferenceExecutable(program)
    x, i = torch.rand(2, 3).bfloat16(), torch.tensor([1, 0])
    wanted = x[i]
    found = executable.run("main", {"x": x, "i": i})["y"]
    assert torch.equal(found, wanted)
    other = executable.run("main", {"x": array_of(x), "i": np.array([1, 0], ">i8").astype("=i8")})
    assert isinstance(other["y"], np.ndarray)
    assert torch.equal(tensor_of(other["y"]), wanted)
    listed = executable.run("main", {"x": array_of(x), "i": [1, 0]})["y"]
    np.testing.assert_array_equal(listed, other["y"])
    for wrong in ([0.5, 1.5], "ab", None, torch.zeros(2, device="meta", dtype=torch.int64)):
        with pytest.raises(UsageError, match="input i "):
            executable.run("main", {"x": x, "i": wrong})
