"""Placement over ranks: what an operator says of itself is so, and refusals give their reason."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from dsc.ir.op import OpDef, registry
from dsc.ir.parser import parse_operands
from dsc.ir.placement import (
    COLUMNS,
    EXPERTS,
    HEADS,
    IN_EXPERTS,
    PARTIAL,
    Place,
    PlacedCall,
    Placement,
    Placing,
    Split,
    additive,
    along_rows,
    linear_map,
    other_axes,
    over_heads,
    pointwise,
)
from dsc.ir.samples import sample_inputs
from dsc.ir.traits import Role, Traits
from dsc.ir.types import DType, TensorType
from tests.ir.strategies import call_graph
from tests.ir.test_operators import CASES, filled

RANKS = 2
PLACED = sorted(name for name, definition in registry().items() if definition.traits.place)
MORE = {
    "logical_and": ["bool[{a},{b}], bool[{a},{b}]"],
    "logical_or": ["bool[{a},{b}], bool[{a},{b}]"],
    "cast": ["f32[{a},{b}] {{dtype=f64}}"],
    "experts": ["f32[{a},{b}], i64[{a},2]=3, f32[{a},2], f32[4,8,{b}], f32[4,{b},4]",
                "f32[{a},{b}], i64[{a},2]=3, f32[{a},2], f32[4,8,{b}], f32[4,{b},4]"
                " {{pairs=true}}"],
    "attention": ["f32[{a},{b},4,{c}], f32[{a},8,2,{c}], f32[{a},8,2,{d}], i64[{a}]=1"
                  " {{scale=0.3, causal=true}}"],
    "latent_attention": ["f32[{a},{b},4,{c}], f32[{a},{b},4,4], f32[{a},9,{c}], f32[{a},9,4],"
                         " i64[{a}]=1 {{scale=0.3}}",
                         "f32[{a},{b},4,{c}], f32[{a},{b},4,4], f32[40,4,{c}], f32[40,4,4],"
                         " i64[{a}]=1, i64[{a},{d}] {{scale=0.3}}"],
    "einsum": ['f32[{a},{b},4,6], f32[4,6,{c}] {{eq="bshn,hnc->bshc"}}'],
    "split": ["f32[4,{a},8] {{sizes=[3,5]}}"],
    "reshape": ["f32[{a},12] {{shape=[{a},4,3]}}"],
}  # fmt: skip
"""Even numbers of heads and rows."""


@dataclass
class Case:
    """One call with tensors, under the names of its operands."""

    definition: OpDef
    tensors: dict[str, torch.Tensor]
    attrs: dict[str, Any]

    def ask(self, lies: Mapping[str, Placement], wish: str = "") -> Placing | str:
        """What the operator answers; what is whole and beyond the first operand is a weight."""
        assert self.definition.traits.place is not None
        types = {
            name: TensorType(DType.of(x.dtype), tuple(part(x, lies.get(name), 0).shape))
            for name, x in self.tensors.items()
        }
        weights = frozenset([*types][1:]) - lies.keys()
        results = len(self.definition.results)
        if self.definition.name == "split":
            results = len(self.attrs["sizes"])
        made = (next(iter(types.values())),) * results
        call = PlacedCall(
            types, self.attrs, made, lies=lies, weights=weights, ranks=RANKS, wish=wish
        )
        return self.definition.traits.place(call)

    def whole(self) -> list[torch.Tensor]:
        """The results on one rank."""
        return self.run(self.tensors, self.attrs)

    def on_ranks(self, lies: Mapping[str, Placement], placing: Placing) -> list[torch.Tensor]:
        """The results put together from those of the ranks."""
        made = [self._on_rank(r, lies, placing) for r in range(RANKS)]
        each = zip(placing.results, *made, strict=True)
        return [joined(placement, parts) for placement, *parts in each]

    def _on_rank(
        self, rank: int, lies: Mapping[str, Placement], placing: Placing
    ) -> list[torch.Tensor]:
        mine = {name: part(x, lies.get(name), rank) for name, x in self.tensors.items()}
        mine |= {name: self.tensors[name] for name in placing.whole}
        for name, taken in placing.parts.items():
            pieces = mine[name].chunk(taken.pieces, taken.axis)
            mine[name] = torch.cat([p.chunk(RANKS, taken.axis)[rank] for p in pieces], taken.axis)
        if placing.choice is not None:
            index, each = mine[placing.choice.index], placing.choice.experts // RANKS
            here = index // each == rank
            mine[placing.choice.index] = torch.where(here, index - rank * each, 0)
            mine[placing.choice.weight] = mine[placing.choice.weight] * here
        try:
            return self.run(mine, {**self.attrs, **placing.attrs})
        except RuntimeError as error:
            raise AssertionError(f"rank {rank} cannot run its part: {error}") from None

    def run(self, tensors: Mapping[str, torch.Tensor], attrs: dict[str, Any]) -> list[torch.Tensor]:
        """The reference's results."""
        found = self.definition.reference(*tensors.values(), **attrs)
        return [*found] if isinstance(found, tuple) else [found]


def part(x: torch.Tensor, placement: Placement, rank: int) -> torch.Tensor:
    """What a rank has of a tensor; summands are unlike each other."""
    if isinstance(placement, Split):
        return x.chunk(RANKS, placement.axis)[rank]
    if placement is None:
        return x
    first = torch.linspace(-3, 5, x.numel(), dtype=x.dtype).reshape(x.shape)
    return first if rank == 0 else x - first


def joined(placement: Placement, parts: list[torch.Tensor]) -> torch.Tensor:
    if isinstance(placement, Split):
        return torch.cat(parts, placement.axis)
    if placement is None:
        assert torch.equal(*parts)
        return parts[0]
    return parts[0] + parts[1]


def cases(definition: OpDef) -> Iterator[Case]:
    name = definition.name
    for template in (*CASES[name], *MORE.get(name, ())):
        for seed in range(3):
            text = filled(template, seed)
            graph = call_graph(name, text)
            (node,) = graph.nodes
            inputs = sample_inputs(graph, {}, seed)
            bounds = [bound for _, bound in parse_operands(text)[0]]
            for value, bound in zip(graph.inputs, bounds, strict=True):
                if bound is not None:
                    inputs[value.name] = inputs[value.name].clamp(0, bound)
            names = definition.operand_names(len(inputs))
            tensors = dict(zip(names, inputs.values(), strict=True))
            yield Case(definition, tensors, definition.with_defaults(node.attrs))


def ways(case: Case, seed: int = 0) -> Iterator[tuple[dict[str, Placement], str]]:
    """Placements of some operands alike, placements at random, and what the operator grants."""
    rng = random.Random(seed)
    options = {name: placements(x) for name, x in case.tensors.items()}
    names = [name for name, x in case.tensors.items() if x.dim()]
    groups = [names[:1], names, names[:2], [n for n in case.definition.traits.wants]]
    for group in groups:
        for placement in dict.fromkeys(p for name in group for p in options[name]):
            if all(placement in options[name] for name in group):
                yield dict.fromkeys(group, placement), ""
    for _ in range(20):
        lies = {name: rng.choice([None, *options[name]]) for name in options}
        yield {name: p for name, p in lies.items() if p is not None}, ""
    if case.definition.traits.grants == COLUMNS:
        yield {}, COLUMNS
    if case.definition.traits.grants == EXPERTS:
        yield from (({}, wish) for wish in (EXPERTS, IN_EXPERTS))


def placements(x: torch.Tensor) -> list[Placement]:
    found: list[Placement] = [Split(i) for i, n in enumerate(x.shape) if n and n % RANKS == 0]
    return [*found, PARTIAL] if x.is_floating_point() else found


def shared(definition: OpDef) -> int:
    """How many calls are shared among ranks; each must give what one rank gives."""
    count = 0
    for case in cases(definition):
        for lies, wish in ways(case):
            if not lies and not wish:
                continue
            answer = case.ask(lies, wish)
            if isinstance(answer, str):
                assert len(answer.split()) > 3, "a refusal gives its reason"
                continue
            count += 1
            for found, wanted in zip(case.on_ranks(lies, answer), case.whole(), strict=True):
                assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
                near = torch.isclose(found.double(), wanted.double(), 1e-4, 1e-4, equal_nan=True)
                assert near.all(), f"{lies} {answer}"
    return count


@pytest.mark.parametrize("name", PLACED)
def test_ranks_together_compute_what_one_does(name: str) -> None:
    assert shared(registry()[name]) > 0


@pytest.mark.parametrize(
    ("name", "place"),
    [("mul", additive), ("softmax", pointwise), ("silu", linear_map), ("sort", other_axes),
     ("topk", linear_map), ("rope", along_rows), ("attention", over_heads("q")),
     ("mla_attention", over_heads("q_nope", "q_rope")), ("rms_norm", other_axes)],
)  # fmt: skip
def test_a_wrong_declaration_is_found_out(name: str, place: Any) -> None:
    definition = registry()[name]
    wrong = replace(definition, traits=replace(definition.traits, place=place))
    with pytest.raises(AssertionError):
        shared(wrong)


def call(lies: Mapping[str, Placement], attrs: dict[str, Any] | None = None) -> PlacedCall:
    """x [4, 6, 2] and y like it, with a number beside them."""
    types = {"x": TensorType(DType.f32, (4, 6, 2)), "y": TensorType(DType.f32, (4, 6, 2))}
    types["n"] = TensorType(DType.f32, ())
    weights = frozenset({"y"})
    return PlacedCall(types, attrs or {}, (types["x"],), lies=lies, weights=weights, ranks=RANKS)


BOTH = {"x": Split(1), "y": Split(1)}
SUMS = {"x": PARTIAL, "y": PARTIAL, "n": PARTIAL}


@pytest.mark.parametrize(
    ("place", "lies", "why"),
    [
        (pointwise, {"x": Split(1)}, "do not lie alike"),
        (pointwise, {"x": Split(1), "y": Split(0)}, "do not lie alike"),
        (pointwise, {**BOTH, "n": PARTIAL}, "do not lie alike"),
        (pointwise, {"x": PARTIAL, "y": PARTIAL}, "not a sum"),
        (additive, {"x": PARTIAL, "y": PARTIAL}, "not a sum"),
        (linear_map, {"x": Split(0)}, "needs all of x"),
        (linear_map, SUMS, "only the first operand"),
        (other_axes, {"x": Split(1)}, "along the axis that is split"),
        (other_axes, {"x": Split(0), "y": Split(0)}, "only x may be in parts"),
        (along_rows, {"x": Split(2)}, "along the axis that is split"),
        (along_rows, {"x": PARTIAL}, "not in summands"),
        (along_rows, BOTH, "only x may be in parts"),
        (over_heads("x"), {"x": Split(0)}, "all of x must be split by heads"),
        (over_heads("x"), {"x": Split(HEADS), "y": Split(HEADS)}, "and nothing else"),
        (over_heads("x", weight="n"), {"x": Split(HEADS)}, "n is computed"),
    ],
)
def test_a_refusal_says_why(place: Place, lies: Mapping[str, Placement], why: str) -> None:
    answer = place(call(lies, {"axis": -2}))
    assert isinstance(answer, str)
    assert why in answer


@pytest.mark.parametrize(
    ("place", "lies", "result"),
    [
        (pointwise, BOTH, Split(1)),
        (linear_map, {"x": PARTIAL}, PARTIAL),
        (other_axes, {"x": Split(0)}, Split(0)),
        (other_axes, {"x": PARTIAL}, PARTIAL),
        (along_rows, {"x": Split(1)}, Split(1)),
        (over_heads("x", weight="y"), {"x": Split(HEADS)}, Split(HEADS)),
    ],
)
def test_what_is_shared_lies_so(
    place: Place, lies: Mapping[str, Placement], result: Placement
) -> None:
    answer = place(call(lies, {"axis": 1}))
    assert isinstance(answer, Placing)
    assert answer.results == (result,)


def test_heads_are_the_letters_of_heads() -> None:
    """What attention wants in parts are its operands with an axis h or g, and heads lie alike."""
    for name in PLACED:
        definition = registry()[name]
        if definition.traits.role is Role.ATTENTION:
            dims = {o.name: o.pattern.dims for o in definition.operands}
            heads = {name: found for name, found in dims.items() if {"h", "g"} & {*found[HEADS:]}}
            assert definition.traits.wants == tuple(heads)
            assert {found[HEADS] for found in heads.values()} <= {"h", "g"}


def test_a_pointwise_operator_is_shared_by_its_role() -> None:
    assert Traits(Role.POINTWISE).place is pointwise
    assert Traits(Role.OTHER).place is None
