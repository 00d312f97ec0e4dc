"""Contractions, reductions and selections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsc.backends.onnxruntime.emit.coded import Matrix, is_coded, times
from dsc.backends.onnxruntime.emit.pointwise import one
from dsc.backends.onnxruntime.graph import GraphWriter, Shape
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Node, Weight
from dsc.ir.ops.core import einsum_terms
from dsc.ir.types import DType


def linear(g: GraphWriter, x: str, shape: Shape, weight: str, rows: Dim, bias: str = "") -> str:
    """x [*n, k] times the transpose of weight [rows, k], plus bias [rows].

    Gemm with transB reads the weight as checkpoints store it, so the file is mapped and never
    transposed.
    """
    k = shape[-1]
    flat = g.reshape(x, shape, (product(shape[:-1]), k)) if len(shape) != 2 else x
    y = g.op("Gemm", flat, weight, *((bias,) if bias else ()), transB=1)
    if len(shape) == 2:
        return y
    return g.reshape(y, (product(shape[:-1]), rows), (*shape[:-1], rows))


def _types(node: Node) -> list[Any]:
    return [x.type for x in node.operands]


def _linear(g: GraphWriter, node: Node, x: str, weight: str, bias: str = "") -> str:
    given, matrix, *_ = _types(node)
    stored = node.operands[1]
    if is_coded(stored):
        assert isinstance(stored, Weight)
        return times(g, x, given.shape, Matrix(stored), bias, node.attrs["activations"])
    return linear(g, x, given.shape, weight, matrix.shape[0], bias)


def _einsum(g: GraphWriter, node: Node, *xs: str) -> str:
    shapes = tuple(t.shape for t in _types(node))
    weight = next((i for i, x in enumerate(node.operands) if isinstance(x, Weight)), None)
    return contract(g, node.attrs["eq"], xs, shapes, weight)


def contract(
    g: GraphWriter, eq: str, xs: Sequence[str], shapes: Sequence[Shape], weight: int | None
) -> str:
    """As one MatMul where every letter is a batch, free or contracted one; else as Einsum.

    ONNX Runtime's Einsum transposes both operands whenever it runs. Here operand `weight` is never
    transposed: if its contracted axes come last (W_UV [h, v, c]), it goes on the left.
    """
    terms, result = einsum_terms(eq)
    if len(terms) != 2 or not _is_matmul(terms, result):
        return g.op("Einsum", *xs, equation=eq)
    sizes = {
        c: d
        for term, shape in zip(terms, shapes, strict=True)
        for c, d in zip(term, shape, strict=True)
    }
    order = [0, 1]
    batch = [c for c in result if c in terms[0] and c in terms[1]]
    inner = [c for c in terms[0] if c in terms[1] and c not in result]
    free = [[c for c in term if c not in batch and c not in inner] for term in terms]
    if weight is not None:
        # A weight goes where its own order of axes is the one that MatMul reads.
        inner = [c for c in terms[weight] if c in inner]
        leads = terms[weight] == "".join([*batch, *free[weight], *inner])
        order = [weight, 1 - weight] if leads else [1 - weight, weight]
    left, right = order
    a = _arranged(g, xs[left], terms[left], (batch, free[left], inner), sizes)
    b = _arranged(g, xs[right], terms[right], (batch, inner, free[right]), sizes)
    y = g.op("MatMul", a, b)
    given = [product(tuple(sizes[c] for c in free[i])) for i in order]
    have = [*batch, *free[left], *free[right]]
    dims = tuple(sizes[c] for c in batch)
    y = g.reshape(y, (*dims, *given), tuple(sizes[c] for c in have))
    return g.transpose(y, *(have.index(c) for c in result))


def _is_matmul(terms: tuple[str, ...], result: str) -> bool:
    """Whether no letter repeats in a term and none is summed in one operand alone."""
    letters = set("".join(terms))
    once = all(len(set(t)) == len(t) for t in (*terms, result))
    return once and all(c in result or all(c in t for t in terms) for c in letters)


def _arranged(
    g: GraphWriter, x: str, term: str, groups: tuple[list[str], ...], sizes: dict[str, Dim]
) -> str:
    """`x` with its axes in the order of `groups`; the last two groups become one axis each."""
    batch, rows, columns = groups
    wanted = [*batch, *rows, *columns]
    x = g.transpose(x, *(term.index(c) for c in wanted))
    flat = tuple(product(tuple(sizes[c] for c in group)) for group in (rows, columns))
    given = tuple(sizes[c] for c in wanted)
    return g.reshape(x, given, (*(sizes[c] for c in batch), *flat))


def _reduce(op_type: str) -> Callable[..., str]:
    def emit(g: GraphWriter, node: Node, x: str) -> str:
        axes = g.i64(*node.attrs["axes"])
        return g.op(op_type, x, axes, keepdims=int(node.attrs["keepdims"]))

    return emit


def _cumsum(g: GraphWriter, node: Node, x: str) -> str:
    return g.op("CumSum", x, g.constant(np.array(node.attrs["axis"], dtype=np.int64)))


def _topk(g: GraphWriter, node: Node, x: str) -> tuple[str, ...]:
    return g.ops("TopK", 2, x, g.i64(node.attrs["k"]))


def _sort(g: GraphWriter, node: Node, x: str) -> tuple[str, ...]:
    """All of an axis by TopK, which takes the lower index first among equals: a stable sort."""
    axis = node.attrs["axis"]
    (given,) = _types(node)
    largest = int(node.attrs["descending"])
    return g.ops("TopK", 2, x, g.dim(given.shape[axis]), axis=axis, largest=largest)


def _index_put(g: GraphWriter, node: Node, x: str, index: str, values: str) -> str:
    given, places, new = _types(node)
    shape = (*places.shape, *given.shape[1:])
    if new.shape != shape:
        values = g.op("Expand", values, g.shape(shape))
    where = g.op("Unsqueeze", index, g.i64(-1))
    reduction = "add" if node.attrs["accumulate"] else "none"
    return g.op("ScatterND", x, where, values, reduction=reduction)


def _histc(g: GraphWriter, node: Node, x: str) -> str:
    (given,) = _types(node)
    flat = g.op("Reshape", g.cast(x, given.dtype, DType.i64), g.i64(-1))
    return g.cast(count(g, flat, node.attrs["bins"]), DType.i64, given.dtype)


def count(g: GraphWriter, x: str, bins: Dim) -> str:
    """How often each of 0 .. bins-1 is in the int64 vector `x`: int64[bins]."""
    equal = g.op("Equal", g.op("Unsqueeze", x, g.i64(1)), g.arange(bins))
    ones = g.op("Cast", equal, to=7)
    return g.op("ReduceSum", ones, g.i64(0), keepdims=0)


EMITTERS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "matmul": one("MatMul"),
    "einsum": _einsum,
    "sum": _reduce("ReduceSum"),
    "mean": _reduce("ReduceMean"),
    "amax": _reduce("ReduceMax"),
    "amin": _reduce("ReduceMin"),
    "argmax": one("ArgMax", "axis", keepdims=0),
    "cumsum": _cumsum,
    "softmax": one("Softmax", "axis"),
    "topk": _topk,
    "sort": _sort,
    "index_put": _index_put,
    "histc": _histc,
}
