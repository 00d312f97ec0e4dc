"""Raising experts where extents coincide, beyond the examples of its rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.weights import random_source, sources
from dsc.passes._gated_experts import GROUPED
from dsc.passes.eliminate_dead_code import EliminateDeadCode
from dsc.passes.raise_experts import RaiseExperts
from dsc.rewrite.base import PassReport
from dsc.rewrite.verify import compare_programs


def grouped(experts: int, chosen: int) -> Program:
    """The grouped spelling behind its own router, `chosen` of so many experts a token."""
    text = GROUPED.replace("[5,", f"[{experts},").replace("bins=5", f"bins={experts}")
    text = text.replace("[N,2", f"[N,{chosen}").replace("2*N", f"{chosen}*N")
    text = text.replace("value=2,", f"value={chosen},")
    head, _, body = text.partition("{\n")
    assert "%idx" in head
    attrs = f'score="sigmoid", top_k={chosen}, normalise=false'
    shapes = {"gate": (experts, 4), "gu": (experts, 4, 6), "dn": (experts, 3, 4)}
    weights = "\n".join(
        f'  @{name} : f32{list(shape)} = source "{name}" : f32{list(shape)}'
        for name, shape in shapes.items()
    )
    route = f"  %idx, %w = route %x, @gate {{{attrs}}} : i64[N,{chosen}], f32[N,{chosen}]\n"
    program = parse_program(
        'program "experts" {stage=TRACED}\nsymbols {N=[1,8]}\n'
        f"weights {{\n{weights}\n}}\ngraph g(%x: f32[N,4]) {{\n{route}{body}"
    )
    found = {s.key: s.type for e in program.weights.values() for s in sources(e)}
    return replace(program, source=random_source(found))


@pytest.mark.parametrize(("experts", "chosen"), [(1, 1), (2, 1), (2, 2), (3, 3)])
def test_no_sorting_is_left_whatever_is_chosen_of_however_few(experts: int, chosen: int) -> None:
    """With one expert what is sorted is in order already: the whole is raised all the same."""
    before = grouped(experts, chosen)
    after = RaiseExperts().run(before, PassReport())
    left = {node.op for node in EliminateDeadCode().run(after, PassReport()).entries["g"].nodes}
    assert {"route", "experts"} <= left <= {"route", "experts", "reshape", "sum"}
    assert compare_programs(before, after, 1e-5).ok
