"""The router, and the experts: matrix products over tokens that are sorted by expert.

Each expert is a branch of its own, an `If` that is skipped when no token chose it. A branch
multiplies with an initializer that points into the stack of experts in the weights file: a decode
step reads the weights of the chosen experts once and copies none. A Loop over the chosen experts
must gather the weights of each, which takes twice as long for one token, and one Gather of all
chosen experts three times. But ONNX Runtime takes milliseconds a branch to load a model, so one
with too many branches (V3 has 14,848 experts) gets the Loop.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from dsc.backends.onnxruntime.emit.coded import Matrix, gathered, is_coded, times
from dsc.backends.onnxruntime.emit.core import count, linear
from dsc.backends.onnxruntime.emit.pointwise import gated
from dsc.backends.onnxruntime.emit.qmoe import is_qmoe, qmoe
from dsc.backends.onnxruntime.graph import GraphWriter, Shape, static
from dsc.ir.dims import Dim, product, symbol
from dsc.ir.graph import Attrs, Node, Operand, Weight
from dsc.ir.types import DType

LAST = 2**63 - 1
"""The end of an axis, to Slice."""


def _route(
    g: GraphWriter, node: Node, x: str, weight: str, bias: str = "", logit_bias: str = ""
) -> tuple[str, str]:
    """Scores, biased scores cut to the best groups, TopK, weights from the unbiased scores."""
    shape = node.operands[0].type.shape
    n, experts = shape[:-1], node.operands[1].type.shape[0]
    attrs = node.attrs
    logits = linear(g, x, shape, weight, experts)
    logits = g.op("Add", logits, logit_bias) if logit_bias else logits
    sigmoid = attrs["score"] == "sigmoid"
    scores = g.op("Sigmoid", logits) if sigmoid else g.op("Softmax", logits, axis=-1)
    biased = g.op("Add", scores, bias) if bias else scores
    if attrs["keep"] < attrs["groups"]:
        biased = _kept(g, biased, (*n, experts), attrs)
    _, idx = g.ops("TopK", 2, biased, g.i64(attrs["top_k"]))
    w = g.op("GatherElements", scores, idx, axis=-1)
    if attrs["normalise"]:
        total = g.op("ReduceSum", w, g.i64(-1), keepdims=1)
        w = g.op("Div", w, g.op("Add", total, g.scalar(1e-20)))
    if attrs["scale"] != 1.0:
        w = g.op("Mul", w, g.scalar(attrs["scale"]))
    is_positive = attrs["scale"] >= 0  # scores are
    shared = attrs["shared"]
    if shared:
        to = g.shape((*n, shared))
        always = g.constant(np.arange(static(experts), static(experts) + shared))
        idx = g.op("Concat", idx, g.op("Expand", always, to), axis=-1)
        w = g.op("Concat", w, g.op("Expand", g.scalar(1.0), to), axis=-1)
    g.pool.positive |= {w} if is_positive else set()
    return idx, w


def _kept(g: GraphWriter, biased: str, shape: Shape, attrs: Attrs) -> str:
    """`biased` [*n, e] with the scores outside of the best groups replaced by `fill`."""
    groups: int = attrs["groups"]
    grouped_shape = (*shape[:-1], groups, shape[-1] // groups)
    grouped = g.reshape(biased, shape, grouped_shape)
    if attrs["group_score"] == "top2":
        best, _ = g.ops("TopK", 2, grouped, g.i64(2))
        best = g.op("ReduceSum", best, g.i64(-1), keepdims=0)
    else:
        best = g.op("ReduceMax", grouped, g.i64(-1), keepdims=0)
    _, chosen = g.ops("TopK", 2, best, g.i64(attrs["keep"]))
    # A group is kept when it is among the chosen: [*n, groups, 1] == [*n, 1, keep].
    each = g.op("Unsqueeze", g.arange(groups), g.i64(1))
    same = g.op("Equal", each, g.op("Unsqueeze", chosen, g.i64(-2)))
    kept = g.op("ReduceMax", g.op("Cast", same, to=6), g.i64(-1), keepdims=1)
    kept = g.op("Cast", kept, to=9)
    masked = g.op("Where", kept, grouped, g.scalar(attrs["fill"]))
    return g.reshape(masked, grouped_shape, shape)


def sort_by_expert(g: GraphWriter, idx: str, shape: Shape, experts: int) -> tuple[str, str]:
    """Of idx [m, k]: the (token, slot) pairs in the order of their experts, and offsets [e+1]."""
    pairs = product(shape)
    flat = g.op("Reshape", idx, g.i64(-1))
    _, order = g.ops("TopK", 2, flat, g.dim(pairs), largest=0)
    ends = g.op("CumSum", count(g, flat, experts), g.constant(np.array(0, dtype=np.int64)))
    return order, g.op("Concat", g.i64(0), ends, axis=0)


Stack = tuple[Operand, str]
"""A stack of matrices, one a group: the operand and its ONNX name."""


def over_groups(
    g: GraphWriter, x: str, offsets: str, width: Dim, stacks: list[Stack], body: Callable[..., str]
) -> str:
    """Rows of x [m, k], sorted by group, through body(writer, rows, *matrices): f32[m, width].

    The matrices are those of the row's group, one of each stack, in fp32 or in codes.
    """
    if not (g.pool.unroll and all(_in_place(stack) for stack, _ in stacks)):
        return _looped(g, x, offsets, width, stacks, body)
    weights = [stack for stack, _ in stacks if isinstance(stack, Weight)]
    groups = static(weights[0].type.shape[0])
    bounds = g.ops("Split", groups + 1, offsets, axis=0, num_outputs=groups + 1)
    parts = []
    for group, (start, end) in enumerate(pairwise(bounds)):
        then, otherwise = g.branch(), g.branch()
        rows = then.op("Slice", x, start, end, g.i64(0))
        result = body(then, rows, *(_matrix(g, w, group) for w in weights))
        nothing = otherwise.zeros((0, width), DType.f32)
        parts.append(g.choose(g.op("Less", start, end), (then, result), (otherwise, nothing)))
    return parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=0)


def _matrix(g: GraphWriter, stack: Weight, group: int) -> str | Matrix:
    """A matrix of a stack where it lies."""
    return Matrix(stack, group) if is_coded(stack) else g.weight(stack, group)


def multiplied(
    g: GraphWriter, rows: str, matrix: str | Matrix, width: int, bias: str, activations: str
) -> str:
    """Rows [m, width] times the transpose of a matrix, plus a bias."""
    shape: Shape = (symbol("m"), width)
    if isinstance(matrix, Matrix):
        return times(g, rows, shape, matrix, bias, activations)
    return g.op("Gemm", rows, matrix, *((bias,) if bias else ()), transB=1)


def _in_place(stack: Operand) -> bool:
    """Whether matrices of a stack can be used where they lie.

    16-bit weights cannot: they would be widened when the model loads, and ONNX Runtime would hold
    every expert in fp32. The Loop widens one at a time, as it is used.
    """
    return isinstance(stack, Weight) and (is_coded(stack) or stack.type.dtype is DType.f32)


def _looped(
    g: GraphWriter, x: str, offsets: str, width: Dim, stacks: list[Stack], body: Callable[..., str]
) -> str:
    """`over_groups` as a Loop over the groups that have rows."""
    starts = g.op("Slice", offsets, g.i64(0), g.i64(-1))
    ends = g.op("Slice", offsets, g.i64(1), g.i64(LAST))
    taken = g.op("Squeeze", g.op("NonZero", g.op("Sub", ends, starts)), g.i64(0))

    def one(b: GraphWriter, i: str) -> str:
        group = b.op("Gather", taken, i)
        start, end = (b.op("Unsqueeze", b.op("Gather", s, group), b.i64(0)) for s in (starts, ends))
        matrices = [
            gathered(b, stack, group) if isinstance(stack, Weight) and is_coded(stack)
            else b.cast(b.op("Gather", name, group, axis=0), stack.type.dtype, DType.f32)
            for stack, name in stacks
        ]  # fmt: skip
        return body(b, b.op("Slice", x, start, end, b.i64(0)), *matrices)

    return g.collect(g.zeros((0, width), DType.f32), g.op("Size", taken), one)


def _experts(
    g: GraphWriter, node: Node, x: str, idx: str, w: str, gate_up: str, down: str, *biases: str
) -> str:
    """Dispatch, both products and the activation of one expert after the other, combine.

    In codes all of it is one QMoE where that can say it.
    """
    if is_qmoe(g, node, w):
        return qmoe(g, node, x, idx, w, *biases)
    types = [a.type for a in node.operands]
    (*n, d), (*_, k) = types[0].shape, types[1].shape
    m, inner = product(tuple(n)), static(types[4].shape[2])
    widths = {"gate_up": static(d), "down": inner}
    tokens = g.cast(x, types[0].dtype, DType.f32)
    tokens = g.reshape(tokens, types[0].shape, (m, d))
    order, offsets = sort_by_expert(g, idx, (m, k), static(types[3].shape[0]))
    token = g.op("Div", order, g.constant(np.array(k, dtype=np.int64)))
    rows = g.op("Gather", tokens, token, axis=0)

    def one(b: GraphWriter, rows: str, *matrices: str | Matrix) -> str:
        given = dict(zip(stacks, matrices, strict=True))

        def product(rows: str, name: str) -> str:
            bias, matrix = given.get(f"{name}_bias", ""), given[name]
            assert isinstance(bias, str)
            return multiplied(b, rows, matrix, widths[name], bias, node.attrs["activations"])

        gate, up = _gate_and_up(b, product(rows, "gate_up"), inner, node.attrs["pairs"])
        return product(gated(b, gate, up, node.attrs), "down")

    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    stacks = {
        name: (operand, given)
        for name, operand, given in zip(
            names, node.inputs[3:], (gate_up, down, *biases), strict=False
        )
        if operand is not None
    }
    sorted_rows = over_groups(g, rows, offsets, d, list(stacks.values()), one)
    weights = g.reshape(w, types[2].shape, (m, k))
    y = combine(g, sorted_rows, order, weights, (m, k, d))
    return g.cast(g.reshape(y, (m, d), types[0].shape), DType.f32, types[0].dtype)


def _gate_and_up(g: GraphWriter, both: str, inner: int, pairs: bool) -> tuple[str, str]:
    """The results of gate rows and of up rows, [m, inner] each."""
    if not pairs:
        gate, up = g.ops("Split", 2, both, g.i64(inner, inner), axis=1)
        return gate, up
    apart = g.op("Reshape", both, g.i64(-1, inner, 2))
    gate, up = (g.op("Gather", apart, g.constant(np.array(i, np.int64)), axis=2) for i in range(2))
    return gate, up


def combine(g: GraphWriter, y: str, order: str, w: str, shape: Shape) -> str:
    """Sorted rows y [m*k, d] back in their slots, and each token's weighted sum: f32[m, d]."""
    m, k, d = shape
    pairs = m * k
    _, inverse = g.ops("TopK", 2, order, g.dim(pairs), largest=0)
    slots = g.reshape(g.op("Gather", y, inverse, axis=0), (pairs, d), (m, k, d))
    # [m, 1, k] times [m, k, d] is the weighted sum, without a product of its own.
    summed = g.op("MatMul", g.op("Unsqueeze", w, g.i64(1)), slots)
    return g.op("Squeeze", summed, g.i64(1))


def _dispatch(g: GraphWriter, node: Node, x: str, idx: str) -> tuple[str, str, str]:
    shape = node.operands[1].type.shape
    order, offsets = sort_by_expert(g, idx, shape, node.attrs["experts"])
    k = g.op("Squeeze", g.dim(shape[1]), g.i64(0))
    return g.op("Gather", x, g.op("Div", order, k), axis=0), offsets, order


def _grouped_linear(g: GraphWriter, node: Node, x: str, weight: str, offsets: str) -> str:
    x_type, w_type = (a.type for a in node.operands[:2])
    wide = g.cast(x, x_type.dtype, DType.f32)

    def one(b: GraphWriter, rows: str, matrix: str | Matrix) -> str:
        return multiplied(b, rows, matrix, static(w_type.shape[2]), "", node.attrs["activations"])

    stacks = [(node.operands[1], weight)]
    y = over_groups(g, wide, offsets, w_type.shape[1], stacks, one)
    return g.cast(y, DType.f32, x_type.dtype)


def _combine(g: GraphWriter, node: Node, y: str, order: str, w: str) -> str:
    (_, d), _, (m, k) = (a.type.shape for a in node.operands)
    return combine(g, y, order, w, (m, k, d))


EMITTERS: dict[str, Callable[..., Any]] = {
    "route": _route,
    "experts": _experts,
    "dispatch": _dispatch,
    "grouped_linear": _grouped_linear,
    "combine": _combine,
}
