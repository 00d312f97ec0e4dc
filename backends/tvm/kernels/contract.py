"""matmul and einsum: one contraction kernel that picks the axis to run vectors along.

Vectors run along the result's last letter where that is the last axis of every operand that has it
(sums of rows, as in bshd,hdc->bshc), or along a contracted letter that is last everywhere (dot
products, as in bshc,hvc->bshv), or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import mul
from typing import TypeAlias

from dsc.backends.tvm.kernels import bf16_contract
from dsc.backends.tvm.kernels.sums import summed
from dsc.backends.tvm.launch import Launch, Unsupported, operand
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.shapes import SizeTable, count, each_index, resolve, size_names
from dsc.backends.tvm.tir import (
    VALUE,
    Expr,
    Local,
    PrimFunc,
    Tensor,
    bind,
    build,
    integer,
    lanes_for,
    splat,
    total,
)
from dsc.ir.dims import Dim
from dsc.ir.graph import Node
from dsc.ir.ops.core import einsum_terms
from dsc.ir.types import DType

Terms: TypeAlias = tuple[str, ...]
UNROLL = 4
"""Vectors of one result row that are summed side by side."""


def lower_einsum(node: Node, machine: Machine) -> Launch:
    """The launch of `einsum`."""
    terms, result = einsum_terms(node.attrs["eq"])
    if any(len(set(term)) != len(term) for term in terms):
        raise Unsupported(f"a repeated letter in {node.attrs['eq']}")
    types = [x.type for x in node.operands]
    heads = bf16_contract.launch(terms, result, types, machine)
    return heads or _lower(node, terms, result, machine)


def lower_matmul(node: Node, machine: Machine) -> Launch:
    """The launch of `matmul`, as an einsum; a broadcast axis is the letter `_`, always index 0."""
    a, b = operand(node, 0).type, operand(node, 1).type
    out = node.output.type.shape
    letters = "abcdefgh"[: len(out) - 2]

    def batch(shape: tuple[Dim, ...]) -> str:
        own = letters[len(letters) - (len(shape) - 2) :]
        wide = out[len(out) - len(shape) : -2]
        return "".join(c if d == w else "_" for c, d, w in zip(own, shape[:-2], wide, strict=True))

    terms = (batch(a.shape) + "mk", batch(b.shape) + "kn")
    return _lower(node, terms, letters + "mn", machine)


def _lower(node: Node, terms: Terms, result: str, machine: Machine) -> Launch:
    table, types = SizeTable(), [x.type for x in node.operands]
    if VALUE[types[0].dtype] == "bool":
        raise Unsupported(f"{node.op} of bool")
    extents: dict[str, Dim] = {"_": 1}
    for term, t in zip(terms, types, strict=True):
        extents |= {c: d for c, d in zip(term, t.shape, strict=True) if c != "_"}
    letters = "".join(sorted(extents))
    static = (
        types[0].dtype, terms, result, letters, table.numbered(tuple(extents[c] for c in letters)),
        machine.lanes, len(table.dims),
    )  # fmt: skip
    flops = reduce(mul, extents.values(), 2)
    return Launch(contract, static, tuple(table.dims), flops=flops)


def contract(
    dtype: DType,
    terms: Terms,
    result: str,
    letters: str,
    shape: tuple[Dim, ...],
    lanes: int,
    sizes: int,
) -> PrimFunc:
    """Arguments: the operands, the result; sizes. `shape` gives the extent of each letter."""
    over = [c for c in letters if c not in result and c != "_"]

    def body(*arguments: Expr) -> None:
        addresses, given = arguments[: len(terms) + 1], arguments[len(terms) + 1 :]
        extents = dict(zip(letters, resolve(shape, given), strict=True))
        xs = [
            Tensor(at, dtype, [extents[c] for c in term])
            for at, term in zip(addresses, terms, strict=False)
        ]
        y = Tensor(addresses[-1], dtype, [extents[c] for c in result])
        along = _vector_letter(terms, result, over, extents) if VALUE[dtype] == "float32" else ""
        width = lanes_for(extents[along], lanes) if along else 1
        if along and along in result:
            _rows(xs, terms, y, result, over, extents, width)
        else:
            _dots(xs, terms, y, result, over, extents, along, width, VALUE[dtype])

    return build(body, [*(f"x{i}" for i in range(len(terms))), "y", *size_names(sizes)])


def _vector_letter(
    terms: Terms, result: str, letters: Sequence[str], extents: dict[str, Expr]
) -> str:
    """The letter to run vectors along, or an empty string."""

    def last_where_present(letter: str) -> bool:
        return all(term.endswith(letter) for term in terms if letter in term)

    end = result[-1:]
    if end and isinstance(extents[end], int) and last_where_present(end):
        return end
    for letter in letters:
        everywhere = all(term.endswith(letter) for term in terms)
        if everywhere and isinstance(extents[letter], int):
            return letter
    return ""


def _product(
    xs: Sequence[Tensor], terms: Terms, at: dict[str, Expr], along: str, width: int
) -> Expr:
    """The product of the operands' elements; operands without the vector letter are splat."""
    factors = []
    for x, term in zip(xs, terms, strict=True):
        index = [at[c] for c in term]
        vector = width > 1 and along in term
        factors.append(x.load(*index, lanes=width) if vector else splat(x.load(*index), width))
    return reduce(mul, factors)


def _rows(
    xs: Sequence[Tensor],
    terms: Terms,
    y: Tensor,
    result: str,
    letters: Sequence[str],
    extents: dict[str, Expr],
    width: int,
) -> None:
    """Vectors along the result's last letter: UNROLL accumulators, one pass over the rest."""
    along = result[-1]
    steps = extents[along] // width
    together = lanes_for(steps, UNROLL)
    outer = [extents[c] for c in result[:-1]]
    work = count([extents[c] for c in letters]) * (together * width)

    def block(index: list[Expr]) -> None:
        start = bind(index[-1] * (together * width))
        at = dict(zip(result[:-1], index, strict=False)) | {"_": integer(0)}
        parts = [Local(1, width=width) for _ in range(together)]

        def add(inner: Sequence[Expr]) -> None:
            for u, acc in enumerate(parts):
                own = dict(zip(letters, inner, strict=True)) | {along: start + u * width}
                acc[0] = acc[0] + _product(xs, terms, at | own, along, width)

        for u, value in enumerate(summed([extents[c] for c in letters], parts, add)):
            y.store(value, *(at[c] for c in result[:-1]), start + u * width)

    each_index([*outer, steps // together], work, block)


def _dots(
    xs: Sequence[Tensor],
    terms: Terms,
    y: Tensor,
    result: str,
    letters: Sequence[str],
    extents: dict[str, Expr],
    along: str,
    width: int,
    name: str,
) -> None:
    """One result element at a time, vectors along a contracted letter where there is one."""
    order = [c for c in letters if c != along] + ([along] if along else [])
    stepped = {c: (e // width if c == along and width > 1 else e) for c, e in extents.items()}

    def one(index: list[Expr]) -> None:
        at = dict(zip(result, index, strict=True)) | {"_": integer(0)}
        acc = Local(1, name, width)

        def add(inner: Sequence[Expr]) -> None:
            here = at | dict(zip(order, inner, strict=True))
            if along:
                here[along] = here[along] * width
            acc[0] = acc[0] + _product(xs, terms, here, along, width)

        (found,) = summed([stepped[c] for c in order], [acc], add)
        y.store(total(found) if width > 1 else found, *index)

    each_index([extents[c] for c in result], count([extents[c] for c in order]), one)
