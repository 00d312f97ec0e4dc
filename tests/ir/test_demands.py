"""Demands: any sizes that satisfy what an operator states fit it, and no statement is idle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsc.ir import demands
from dsc.ir.extents import Extent, System
from dsc.ir.op import OpDef, TypeMismatch, registry
from dsc.ir.sized import Sized, broadcasting
from dsc.ir.traits import Role
from dsc.ir.types import TensorType
from tests.ir.strategies import call_graph
from tests.ir.test_operators import CASES, filled, operators

LARGE = (20, 90)
"""Sizes that shrink, unlike those up to 8."""
MORE = {
    "all_gather": ["f32[{a},{b}] {{axis=1, ranks=2}}"],
    "reduce_scatter": ["f32[{a},60] {{axis=1, ranks=3}}"],
    "all_to_all": ["f32[60,{a}] {{axis=0, ranks=3}}"],
    "attention": ["f32[{a},{b},36,{c}], f32[{a},{d},12,{c}], f32[{a},{d},12,{c}]"
                  " {{scale=1.0, causal=false}}"],
    "experts": ["f32[{a},{b}], i64[{a},2], f32[{a},2], f32[{c},60,{b}], f32[{c},{b},30]"],
    "sdpa": ["f32[{a},36,{b},{c}], f32[{a},12,{d},{c}], f32[{a},12,{d},{c}], bool[1,1,{b},{d}]"
             " {{scale=1.0, grouped=true}}"],
}  # fmt: skip
"""Many heads, ranks and inner rows."""


def texts(name: str) -> list[str]:
    """Calls of an operator at large sizes."""
    cases = [*CASES[name], *MORE.get(name, ())]
    return [filled(case, seed, LARGE) for case in cases for seed in range(3)]


def fits(definition: OpDef, text: str) -> bool:
    """Whether sizes that satisfy the demands alone are those of a call; nothing else is equated."""
    graph = call_graph(definition.name, text)
    (node,) = graph.nodes
    system = System()
    types = [v.type for v in node.operands]
    results = [v.type for v in node.outputs]
    ins = [[system.extent(d) for d in t.shape] for t in types]
    outs = [[system.extent(d) for d in t.shape] for t in results]
    held = demands.dim_attrs(node.op, node.attrs)
    extents = {name: demands.sizes_of(node.attrs[name], system) for name in held}
    names = definition.operand_names(len(types))
    operands, shapes = dict(zip(names, types, strict=True)), dict(zip(names, ins, strict=True))
    sized = Sized(
        operands, node.attrs, tuple(results), system=system, op=node.op, ins=shapes, outs=outs,
        extents=extents,
    )  # fmt: skip
    demands.demand(sized)
    solved = system.solve()
    values = [solved[system.find(u)] for u in range(len(system.parent))]

    def small(extent: Any) -> Any:
        if isinstance(extent, Extent):
            return extent.value(values.__getitem__)
        return tuple(map(small, extent))

    given = [t.with_shape(small(x)) for t, x in zip(types, ins, strict=True)]
    wanted = tuple(t.with_shape(small(x)) for t, x in zip(results, outs, strict=True))
    attrs = {**node.attrs, **{name: small(x) for name, x in extents.items()}}
    try:
        inferred = definition.infer(given, attrs)
    except TypeMismatch:
        return False
    return inferred == wanted and runs(definition, given, attrs)


def runs(definition: OpDef, types: list[TensorType], attrs: dict[str, Any]) -> bool:
    """Whether the reference takes operands of these types; collectives have one rank here."""
    if definition.traits.role is Role.COLLECTIVE:
        return True
    tensors = [torch.zeros(t.shape, dtype=t.dtype.torch) for t in types]  # type: ignore[arg-type]
    try:
        definition.reference(*tensors, **definition.with_defaults(attrs))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", operators())
def test_what_an_operator_demands_is_all_it_needs(name: str) -> None:
    assert [text for text in texts(name) if not fits(registry()[name], text)] == []


@pytest.mark.parametrize("name", operators())
def test_what_a_declaration_adds_to_its_signature_is_needed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = registry()[name]
    traits = definition.traits
    if traits.demand in (None, broadcasting) or name == "histc":
        named = [o.pattern.dims != ("...",) for o in definition.operands]
        stated = traits.demand is not None or all(named)
        assert stated
        return
    silent = replace(definition, traits=replace(traits, demand=lambda call: None))
    monkeypatch.setattr(demands, "lookup", lambda op: silent)
    assert not all(fits(definition, text) for text in texts(name))
