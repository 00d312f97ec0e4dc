"""route: score every expert, keep the best groups, choose top_k, weigh by the unbiased scores.

Scores are computed by all threads (a decode step reads the whole gate matrix), then each token
chooses on one thread: a few hundred experts are cheaper to scan k times than to sort.
"""

from __future__ import annotations

from dsc.backends.tvm.kernels.dots import product_rows
from dsc.backends.tvm.launch import Launch, operand, rows_of, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.tir import (
    PARALLEL_WORK,
    Expr,
    Local,
    PrimFunc,
    Tensor,
    bind,
    build,
    exp,
    f32,
    for_each,
    integer,
    loop,
    select,
    sigmoid,
    tirx,
    when,
)
from dsc.ir.graph import Node
from dsc.ir.types import DType

NEVER = float("-inf")


def lower(node: Node, machine: Machine) -> Launch:
    """The launch of `route`; scratch holds the scores, f32 [rows, experts]."""
    x, weight = operand(node, 0).type, operand(node, 1).type
    experts, d = (static_dim(n, "a gate axis") for n in weight.shape)
    rows = rows_of(x)
    attrs = node.attrs
    given = tuple(node.get(name) is not None for name in ("bias", "logit_bias"))
    options = tuple(sorted(attrs.items()))
    static = (x.dtype, weight.dtype, experts, d, given, options, machine)
    flops = rows * (2 * experts * d)
    return Launch(route, static, (rows,), scratch=rows * (4 * experts), flops=flops)


def route(
    dtype: DType,
    gate: DType,
    experts: int,
    d: int,
    given: tuple[bool, ...],
    options: tuple[tuple[str, object], ...],
    machine: Machine,
) -> PrimFunc:
    """Arguments: x, weight, biases, idx and w [rows, top_k + shared], scratch; rows.

    `given`: whether there is a bias that chooses, and one of the logits.
    """
    attrs: dict[str, object] = dict(options)
    top_k, shared = int(str(attrs["top_k"])), int(str(attrs["shared"]))

    def emit(x_at: Expr, w_at: Expr, *others: Expr) -> None:
        *biases, idx_at, out_at, scratch, rows = others
        x, w = Tensor(x_at, dtype, (rows, d)), Tensor(w_at, gate, (experts, d))
        found = iter(biases)
        bias, shift = (Tensor(next(found), DType.f32, (experts,)) if g else None for g in given)
        scores = Tensor(scratch, DType.f32, (rows, experts))
        chosen = Tensor(idx_at, DType.i64, (rows, top_k + shared))
        weights = Tensor(out_at, DType.f32, (rows, top_k + shared))
        _score(x, w, scores, rows, experts, d, machine)

        def token(r: Expr) -> None:
            if shift is not None:
                with loop(experts) as e:
                    scores.store(scores.load(r, e) + shift.load(e), r, e)
            _normalise(scores, r, experts, attrs["score"] == "softmax")
            ranked = Local(experts)
            with loop(experts) as e:
                ranked[e] = scores.load(r, e) + (f32(0.0) if bias is None else bias.load(e))
            _mask_groups(ranked, experts, attrs)
            _choose(ranked, scores, chosen, weights, r, experts, attrs)
            for i in range(shared):
                chosen.store(integer(experts + i), r, integer(top_k + i))
                weights.store(f32(1.0), r, integer(top_k + i))

        for_each(rows, experts * (top_k + 2), token)

    def plain(x: Expr, w: Expr, idx: Expr, out: Expr, scratch: Expr, rows: Expr) -> None:
        emit(x, w, idx, out, scratch, rows)

    def biased(
        x: Expr, w: Expr, bias: Expr, idx: Expr, out: Expr, scratch: Expr, rows: Expr
    ) -> None:
        emit(x, w, bias, idx, out, scratch, rows)

    def biased_twice(
        x: Expr, w: Expr, bias: Expr, shift: Expr, idx: Expr, out: Expr, scratch: Expr, rows: Expr
    ) -> None:
        emit(x, w, bias, shift, idx, out, scratch, rows)

    return build((plain, biased, biased_twice)[sum(given)])


def _score(
    x: Tensor, w: Tensor, scores: Tensor, rows: Expr, experts: int, d: int, machine: Machine
) -> None:
    """Gate logits of all experts, in blocks of experts."""
    block = 8

    def columns(first: Expr, count: int) -> None:
        product_rows(
            x, lambda i: i * d, rows, w, lambda j: (first + j) * d, count, d, machine,
            lambda i, j, value: scores.store(value, i, first + j),
        )  # fmt: skip

    if experts >= block:
        work = PARALLEL_WORK if experts * d >= PARALLEL_WORK else rows * (block * d)
        for_each(experts // block, work, lambda g: columns(g * block, block))
    if experts % block:
        columns(integer(experts - experts % block), experts % block)


def _normalise(scores: Tensor, r: Expr, experts: int, softmax: bool) -> None:
    """Turn row r of the logits into scores, in place."""
    if not softmax:
        with loop(experts) as e:
            scores.store(sigmoid(scores.load(r, e)), r, e)
        return
    peak, mass = Local(1), Local(1)
    peak[0], mass[0] = f32(NEVER), f32(0.0)
    with loop(experts) as e:
        peak[0] = tirx.max(peak[0], scores.load(r, e))
    with loop(experts) as e:
        value = bind(exp(scores.load(r, e) - peak[0]))
        mass[0] = mass[0] + value
        scores.store(value, r, e)
    with loop(experts) as e:
        scores.store(scores.load(r, e) / mass[0], r, e)


def _mask_groups(ranked: Local, experts: int, attrs: dict[str, object]) -> None:
    """Overwrite the experts outside of the best `keep` groups with `fill`."""
    groups, keep = int(str(attrs["groups"])), int(str(attrs["keep"]))
    if keep >= groups:
        return
    size = experts // groups
    best, kept = Local(groups), Local(groups, "int32")
    with loop(groups) as g:
        first, second = Local(1), Local(1)
        first[0], second[0] = f32(NEVER), f32(NEVER)
        with loop(size) as i:
            value = bind(ranked[g * size + i])
            second[0] = tirx.max(second[0], tirx.min(first[0], value))
            first[0] = tirx.max(first[0], value)
        best[g] = first[0] + second[0] if attrs["group_score"] == "top2" else first[0]
        kept[g] = tirx.const(0, "int32")
    with loop(keep):
        kept[_argmax(best, kept, groups)] = tirx.const(1, "int32")
    with loop(groups) as g, loop(size) as i:
        value = ranked[g * size + i]
        fill = f32(float(str(attrs["fill"])))
        ranked[g * size + i] = select(tirx.EQ(kept[g], 1), value, fill)


def _choose(
    ranked: Local,
    scores: Tensor,
    chosen: Tensor,
    weights: Tensor,
    r: Expr,
    experts: int,
    attrs: dict[str, object],
) -> None:
    """The top_k of `ranked` in falling order, and their weights."""
    top_k, scale = int(str(attrs["top_k"])), f32(float(str(attrs["scale"])))
    taken, mass = Local(experts, "int32"), Local(1)
    mass[0] = f32(0.0)
    with loop(experts) as e:
        taken[e] = tirx.const(0, "int32")
    with loop(top_k) as k:
        expert = bind(_argmax(ranked, taken, experts))
        taken[expert] = tirx.const(1, "int32")
        chosen.store(expert, r, k)
        mass[0] = mass[0] + scores.load(r, expert)
    with loop(top_k) as k:
        value = scores.load(r, chosen.load(r, k))
        if attrs["normalise"]:
            value = value / (mass[0] + f32(1e-20))
        weights.store(value * scale, r, k)


def _argmax(values: Local, taken: Local, count: int) -> Expr:
    """Index (int64) of the largest value that is not taken; of equals, the first."""
    best, where = Local(1), Local(1, "int64")
    best[0], where[0] = f32(NEVER), integer(-1)
    with loop(count) as i:
        better = tirx.any(where[0] < 0, values[i] > best[0])
        with when(tirx.all(tirx.EQ(taken[i], 0), better)):
            best[0] = values[i]
            where[0] = i
    return bind(where[0])
