"""Seeded inputs for a graph, drawn from its types and from how it uses them.

Integers that are looked up lie in the table they index; `offsets` of a grouped GEMM ascend to the
number of rows; the `order` of a combine is a permutation; a block table gives each sequence pages
of its own; `lengths`, `positions` and `logits_at` of a causal model are what they must be.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from dsc.ir.analyses import Use, uses
from dsc.ir.dims import Dim, evaluate
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.op import lookup
from dsc.ir.paging import BLOCK_TABLE, page_rows
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import random_tensor

if TYPE_CHECKING:
    import torch

_TABLES: Mapping[str, tuple[int, int, int | str]] = {
    # operator: (operand that indexes, operand that is indexed, its axis or the attribute naming it)
    "embedding": (0, 1, 0),
    "select_rows": (1, 0, 1),
    "take": (1, 0, "axis"),
    "gather": (1, 0, "axis"),
    "scatter": (1, 0, "axis"),
    "index_put": (1, 0, 0),
    "experts": (1, 3, 0),
}
_PASS_THROUGH = frozenset({"reshape", "permute", "expand", "slice", "split", "cast", "concat"})


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
    import torch

    t = TensorType(value.type.dtype, shape)
    if not t.dtype.is_int:
        return random_tensor(t, seed)
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    for node, index in found[value.name]:
        pages = _paged(node, index, sizes)
        if pages is not None:
            numbers = torch.randperm(pages, generator=generator)
            return numbers[torch.arange(prod(shape)) % pages].reshape(shape)
        rows = _ordered(node, index, sizes)
        if rows is None:
            continue
        if node is not None and node.op == "combine":
            return torch.randperm(shape[0], generator=generator).to(t.dtype.torch)
        cuts = torch.randint(0, rows + 1, shape, generator=generator).sort()[0]
        if node is not None and node.op == "grouped_linear":
            cuts[0] = 0
        cuts[-1:] = rows
        return cuts.to(t.dtype.torch)
    high = [evaluate(d, sizes) for d in _indexed(graph, value.name, found)]
    return random_tensor(t, seed, max(1, min(high, default=2)))


def _paged(node: Node | None, index: int, sizes: Mapping[str, int]) -> int | None:
    """Pages that a value names, where it is used as a block table."""
    if node is None or node.body is not None:
        return None
    names = [o.name for o in lookup(node.op).operands]
    if BLOCK_TABLE not in names or names.index(BLOCK_TABLE) != index:
        return None
    return evaluate(node.operands[names.index("pages")].type.shape[0], sizes)


def _ordered(node: Node | None, index: int, sizes: Mapping[str, int]) -> int | None:
    """Rows that `offsets`, `ends` or `order` range over, where a value is used as one."""
    if node is None or (node.op, index) not in (
        ("grouped_linear", 2),
        ("grouped_mm", 2),
        ("combine", 1),
    ):
        return None
    return evaluate(node.operands[0].type.shape[0], sizes)


def _indexed(graph: Graph, name: str, found: Mapping[str, list[Use]]) -> list[Dim]:
    """Extents of all that a value is used to index, also through views and casts."""
    extents: list[Dim] = []
    for node, index in found[name]:
        if node is None:
            continue
        if node.op in _PASS_THROUGH:
            for out in node.outputs:
                extents += _indexed(graph, out.name, found)
        elif node.op == "dispatch" and index == 1:
            extents.append(node.attrs["experts"])
        elif node.op == "histc":
            extents.append(node.attrs["bins"])
        elif node.op in _TABLES and _TABLES[node.op][0] == index:
            _, table, axis = _TABLES[node.op]
            axis = axis if isinstance(axis, int) else int(node.attrs[axis])
            operand = node.inputs[table]
            assert operand is not None
            extents.append(operand.type.shape[axis])
    return extents


def _causal(
    graph: Graph,
    inputs: dict[str, torch.Tensor],
    sizes: Mapping[str, int],
    lengths: Sequence[int] | None,
) -> None:
    """Fill in the inputs of a causal language model, where the graph has them."""
    import torch

    ints = {v.name for v in graph.inputs if v.type.dtype is DType.i64}
    if "lengths" in ints:
        past = torch.full_like(inputs["lengths"], sizes.get("P", _capacity(graph, inputs, sizes)))
        given = past if lengths is None else torch.tensor(list(lengths))
        inputs["lengths"] = given.to(past.dtype)
    if "positions" in ints and inputs["positions"].dim() == 2:
        new = torch.arange(inputs["positions"].shape[1])
        first = inputs["lengths"] if "lengths" in ints else torch.tensor([sizes.get("P", 0)])
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
    return max(0, sizes.get("C", new) - new)
