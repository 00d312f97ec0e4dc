"""Seeded inputs for a graph, drawn from its types and from how it uses them.

Integers that are looked up lie in the table they index; `offsets` of a grouped GEMM ascend to the
number of rows; the `order` of a combine is a permutation; a block table gives each sequence pages
of its own; `lengths`, `positions` and `logits_at` of a causal model are what they must be.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from dsc.ir.analyses import Use, call_of, uses
from dsc.ir.dims import evaluate
from dsc.ir.formats import pack_state
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.lazy import torch
from dsc.ir.limits import CAPACITY, PAST
from dsc.ir.op import lookup, range_of, traits_of
from dsc.ir.paging import BLOCK_TABLE, page_rows
from dsc.ir.traits import DISTINCT, FROM_FIRST, Role
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import random_tensor


def sample_inputs(
    graph: Graph, sizes: Mapping[str, int], seed: int = 0, lengths: Sequence[int] | None = None
) -> dict[str, torch.Tensor]:
    """Inputs by name for symbols of the given sizes.

    `lengths` gives the input of that name; without it every sequence has all P rows of its past.
    """
    found = uses(graph)
    inputs: dict[str, torch.Tensor] = {}
    for value in graph.inputs:
        shape = tuple(evaluate(d, sizes) for d in value.type.shape)
        inputs[value.name] = _sample(graph, value, shape, sizes, found, f"{seed}:{value.name}")
    _causal(graph, inputs, sizes, lengths)
    return inputs


def _sample(
    graph: Graph,
    value: Value,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    found: Mapping[str, list[Use]],
    seed: str,
) -> torch.Tensor:
    t = TensorType(value.type.dtype, shape)
    if value.type.format is not None:
        numbers = random_tensor(t.with_dtype(DType.f32), seed)
        return pack_state(numbers, value.type.with_shape(shape)).parts[0]
    if not t.dtype.is_int:
        return random_tensor(t, seed)
    draws = list(_draws(graph, value.name, found, sizes))
    low = max((draw.low for draw in draws), default=0)
    high = min((draw.high for draw in draws), default=1)
    order = next((draw.order for draw in draws if draw.order), "")
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    if order == DISTINCT:
        count, low = prod(shape), max(low, 0)
        numbers = torch.randperm(max(1, high - low + 1), generator=generator) + low
        return numbers[torch.arange(count) % len(numbers)].reshape(shape).to(t.dtype.torch)
    drawn = torch.randint(low, max(low, high) + 1, shape, generator=generator)
    if order:
        drawn = drawn.sort()[0]
        drawn[-1:] = high
        drawn[:1] = low if order == FROM_FIRST else drawn[:1]
    return drawn.to(t.dtype.torch)


@dataclass(frozen=True, slots=True)
class _Draw:
    """The values low .. high that a use takes, in an order."""

    low: int
    high: int
    order: str


def _draws(
    graph: Graph, name: str, found: Mapping[str, list[Use]], sizes: Mapping[str, int]
) -> Iterator[_Draw]:
    """What all uses of an index take, also through what only rearranges or converts it."""
    for node, index in found[name]:
        if node is None:
            continue
        if node.body is not None:
            inner = uses(node.body)
            yield from _draws(node.body, node.body.inputs[index].name, inner, sizes)
        elif node.op == "cast" or traits_of(node.op).role in (Role.VIEW, Role.JOIN):
            for out in node.outputs:
                yield from _draws(graph, out.name, found, sizes)
        else:
            yield from _draw(node, index, sizes)


def _draw(node: Node, index: int, sizes: Mapping[str, int]) -> Iterator[_Draw]:
    """What a node declares of the values of an operand, if it does."""
    definition = lookup(node.op)
    name = definition.operands[min(index, len(definition.operands) - 1)].name
    within = definition.traits.samples.get(name) or definition.within.get(name)
    if within is not None:
        low, high = (evaluate(d, sizes) for d in range_of(within, call_of(node)))
        yield _Draw(low, high, within.order)


def _causal(
    graph: Graph,
    inputs: dict[str, torch.Tensor],
    sizes: Mapping[str, int],
    lengths: Sequence[int] | None,
) -> None:
    """Fill in the inputs of a causal language model, where the graph has them."""
    ints = {v.name for v in graph.inputs if v.type.dtype is DType.i64}
    if "lengths" in ints:
        past = torch.full_like(inputs["lengths"], sizes.get(PAST, _capacity(graph, inputs, sizes)))
        given = past if lengths is None else torch.tensor(list(lengths))
        inputs["lengths"] = given.to(past.dtype)
    if "positions" in ints and inputs["positions"].dim() == 2:
        new = torch.arange(inputs["positions"].shape[1])
        first = inputs["lengths"] if "lengths" in ints else torch.tensor([sizes.get(PAST, 0)])
        inputs["positions"] = (first[:, None] + new).expand_as(inputs["positions"]).clone()
    if "logits_at" in ints and "input_ids" in inputs:
        rows = inputs["input_ids"].shape[1]
        generator = torch.Generator().manual_seed(len(ints) + rows)
        inputs["logits_at"] = torch.randint(
            0, rows, tuple(inputs["logits_at"].shape), generator=generator
        )


def _capacity(graph: Graph, inputs: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> int:
    """Tokens that fit before the new ones, where caches have a capacity in place of a past P."""
    new = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
    rows = page_rows(graph)
    if rows is not None and BLOCK_TABLE in inputs:
        return max(0, inputs[BLOCK_TABLE].shape[1] * rows - new)
    return max(0, sizes.get(CAPACITY, new) - new)
