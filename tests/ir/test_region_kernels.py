"""What a region's kernel is told to do, done element by element, gives what the region computes.

`run_columns` and `run_rows` do no more than what a kernel does: they read and write numbers at the
addresses that the steps name, row by row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dsc.ir.dims import Dim, evaluate
from dsc.ir.graph import Graph
from dsc.ir.interpreter import run_graph
from dsc.ir.op import lookup
from dsc.ir.parser import parse_graph
from dsc.ir.region_columns import PRODUCT, Columns, Family
from dsc.ir.region_steps import Lines, Literal, NoKernel, Read, Rows, RowStep
from dsc.ir.traits import Role

Array = npt.NDArray[Any]
SIZES = {"B": 2, "S": 3}
OPS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg,
    "cast": lambda x: x,
}  # fmt: skip


def size(dim: Dim) -> int:
    return evaluate(dim, SIZES)


def inputs_of(graph: Graph) -> list[torch.Tensor]:
    """Small whole numbers, so that sums and products are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    shapes = [tuple(map(size, v.type.shape)) for v in graph.inputs]
    return [torch.randint(-3, 4, shape, generator=generator).to(v.type.dtype.torch)
            for v, shape in zip(graph.inputs, shapes, strict=True)]  # fmt: skip


def buffers_of(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[Array]:
    """The memory of inputs, then that of results, in which nothing is yet."""
    sizes = [size(v.type.numel) for v in graph.outputs]
    return [*(x.clone().numpy().ravel() for x in inputs), *(np.full(n, np.nan) for n in sizes)]


def address(lines: Lines, row: int, index: Sequence[int]) -> int:
    """Where an element of a row lies."""
    at = size(lines.view.offset)
    for extent, stride in reversed(lines.rows):
        row, place = divmod(row, size(extent))
        at += place * size(stride)
    assert row == 0 or not lines.rows
    return at + sum(i * size(s) for i, s in zip(index, lines.inner, strict=True))


def run_columns(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[Array]:
    """What the families of the columns of a body's first node write."""
    anchor = graph.nodes[0]
    columns = Columns(graph, anchor)
    buffers = buffers_of(graph, inputs)
    given = dict(zip((v.name for v in graph.inputs), inputs, strict=True))
    x, w = (given[v.name] for v in anchor.operands)
    y = (x @ w.T).reshape(-1, w.shape[0]).numpy()
    assert size(columns.rows) == y.shape[0]
    families = columns.families()
    assert [f.start for f in families] == sorted(f.start for f in families)
    for family in families:
        assert family.walk[-1][1] == 1
        indices = list(product(*(range(extent) for extent, _ in family.walk)))
        assert family.blocks * family.width == len(indices)
        wanted = {step.shift + read.shift for step in family.steps
                  for read in step.reads if read.source == PRODUCT}  # fmt: skip
        assert wanted - {0} == set(family.shifts)
        for row, index in product(range(y.shape[0]), indices):
            run_column(family, y[row], row, index, buffers)
    return buffers[len(inputs) :]


def run_column(
    family: Family, y: Array, row: int, index: Sequence[int], buffers: Sequence[Array]
) -> None:
    """All that is done at one place of a family's walk."""
    column = family.start + sum(i * s for i, (_, s) in zip(index, family.walk, strict=True))
    values = {(PRODUCT, shift): y[column + shift] for shift in (0, *family.shifts)}
    for step in family.steps:
        reads: list[Any] = []
        for read in step.reads:
            if isinstance(read.source, Literal):
                reads.append(read.source.value)
            elif isinstance(read.source, Lines):
                lines = read.source
                reads.append(buffers[lines.view.buffer][address(lines, row, index)])
            else:
                reads.append(values[read.source, step.shift + read.shift])
        values[step.number, step.shift] = OPS[step.op](*reads)
    for number, lines in family.writes:
        buffers[lines.view.buffer][address(lines, row, index)] = values[number, 0]


def run_rows(graph: Graph, inputs: Sequence[torch.Tensor], single: bool) -> list[Array]:
    """What the steps of a body's rows write."""
    body = Rows(graph, single=single)
    buffers = buffers_of(graph, inputs)
    for row in range(size(body.rows)):
        values: dict[int, Array] = {}
        for step in body.steps:
            reads = [row_read(x, row, values, buffers) for x in step.reads]
            values[step.number] = found = row_value(step, reads)
            assert found.shape == tuple(map(size, step.extents))
            for lines in step.writes:
                for index in np.ndindex(found.shape):
                    buffers[lines.view.buffer][address(lines, row, index)] = found[index]
    return buffers[len(inputs) :]


def row_read(x: Read, row: int, values: dict[int, Array], buffers: Sequence[Array]) -> Array:
    """What a step reads for one row."""
    if isinstance(x.source, Literal):
        return np.asarray(x.source.value)
    if isinstance(x.source, int):
        return values[x.source]
    lines = x.source
    extents = [size(d) for d in lines.view.shape[lines.lead :]]
    found = [buffers[lines.view.buffer][address(lines, row, i)] for i in np.ndindex(*extents)]
    return np.array(found).reshape(extents)


def row_value(step: RowStep, reads: Sequence[Array]) -> Array:
    """The result of a step on one row."""
    extents = tuple(map(size, step.extents))
    if step.role is Role.POINTWISE:
        return np.array(np.broadcast_to(OPS[step.op](*reads), extents))
    tensors = [torch.as_tensor(x) for x in reads]
    if step.role is Role.ROTATION:
        x, positions, frequencies = tensors
        given = [x[None, None], positions.reshape(1, 1), frequencies]
        return np.asarray(lookup(step.op).run(given, step.attrs)[0, 0])
    over = tuple(range(len(step.over)))
    assert tensors[0].shape == tuple(map(size, step.over))
    attrs = dict(step.attrs)
    if "axes" in attrs:
        attrs = {**attrs, "axes": over, "keepdims": False}
    elif "axis" in attrs:
        attrs["axis"] = -1
    return np.asarray(lookup(step.op).run(tensors, attrs)).reshape(extents)


PRODUCTS = {
    "alone": "%w: f32[6,4]) { %y = linear %x, %w return %y }",
    "one column": "%w: f32[1,4]) { %y = linear %x, %w %z = neg %y return %z }",
    "bias and residual": """%w: f32[6,4], %b: f32[6], %r: f32[B,S,6]) { %y = linear %x, %w
        %a = add %y, %b %c = mul %r, %a return %c }""",
    "both of a value and what is made of it": """%w: f32[6,4]) { %y = linear %x, %w
        %a = neg %y %b = add %a, %y return %b, %y, %a }""",
    "a number": """%w: f32[6,4]) { %y = linear %x, %w
        %two = full {shape=[], value=2.0, dtype=f32} %a = mul %two, %y return %a }""",
    "gate and up": """%w: f32[6,4]) { %y = linear %x, %w
        %g, %u = split %y {sizes=[3,3]} %n = neg %g %a = mul %n, %u return %a }""",
    "up before gate": """%w: f32[6,4]) { %y = linear %x, %w
        %g, %u = split %y {sizes=[3,3]} %n = neg %u %a = sub %n, %g return %a }""",
    "three parts": """%w: f32[9,4], %b: f32[5]) { %y = linear %x, %w
        %a, %b2, %c = split %y {sizes=[1,3,5]} %d = add %c, %b return %c, %d, %b2, %a }""",
    "heads": """%w: f32[12,4]) { %y = linear %x, %w
        %h = reshape %y {shape=[B,S,4,3]} %a, %b = split %h {sizes=[1,2]}
        %c = neg %b return %a, %c }""",
    "heads before tokens": """%w: f32[12,4], %r: f32[B,4,S,3]) { %y = linear %x, %w
        %h = reshape %y {shape=[B,S,4,3]} %p = permute %h {dims=[0,2,1,3]}
        %a = add %p, %r return %a }""",
    "an operand a head": """%w: f32[12,4], %r: f32[4,1], %s: f32[3]) { %y = linear %x, %w
        %h = reshape %y {shape=[B,S,4,3]} %a = mul %h, %r %b = add %a, %s return %b }""",
    "an operand a row": """%w: f32[6,4], %r: f32[B,S,1], %q: f32[S,1]) { %y = linear %x, %w
        %a = mul %y, %r %b = add %q, %a return %b }""",
    "an operand whose columns lie apart": """%w: f32[6,4], %r: f32[6,B,S]) { %y = linear %x, %w
        %t = permute %r {dims=[1,2,0]} %a = add %y, %t return %a }""",
    "every second column": """%w: f32[6,4], %r: f32[B,S,3]) { %y = linear %x, %w
        %e = slice %y {axis=2, start=0, end=6, step=2}
        %o = slice %y {axis=2, start=1, end=6, step=2}
        %a = sub %e, %o %b = mul %a, %r return %b }""",
    "parts of heads as one": """%w: f32[12,4], %r: f32[B,S,12]) { %y = linear %x, %w
        %h = reshape %y {shape=[B,S,2,2,3]} %q = reshape %r {shape=[B,S,2,2,3]}
        %a = add %h, %q return %a }""",
    "a value at two shifts": """%w: f32[6,4], %r: f32[6]) { %y = linear %x, %w
        %n = mul %y, %r %a, %b = split %n {sizes=[3,3]} %c = sub %a, %b return %c }""",
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_columns_of_a_product_give_what_the_region_computes(name: str) -> None:
    graph = parse_graph(f"graph main(%x: f32[B,S,4], {PRODUCTS[name]}")
    inputs = inputs_of(graph)
    wanted = run_graph(graph, inputs)
    for found, tensor in zip(run_columns(graph, inputs), wanted, strict=True):
        assert np.array_equal(found, tensor.numpy().ravel())


REFUSED = {
    "a result that is not made of the product": "%y = linear %x, %w %z = neg %y return %z, %b",
    "a linear of what the region computes": "%a = neg %x %y = linear %a, %w return %y",
    "neg of values outside of the product": "%y = linear %x, %w %z = neg %b return %y, %z",
    "columns of the product that are wanted in two forms":
        "%y = linear %x, %w %a = slice %y {axis=2, start=2, end=4} return %y, %a",
    "softmax in a region around a product": "%y = linear %x, %w %z = softmax %y return %z",
    "operands that lie differently in the product":
        "%y = linear %x, %w %a = slice %y {axis=2, start=0, end=3}"
        " %e = slice %y {axis=2, start=0, end=6, step=2} %z = add %a, %e return %z",
    "a part of the product's rows":
        "%y = linear %x, %w %z = slice %y {axis=0, start=0, end=1} return %z",
    "rows that are not the product's":
        "%y = linear %x, %w %z = slice %y {axis=1, start=0, end=S, step=2} return %z",
    "columns of a symbolic number":
        "%y = linear %x, %w %z = slice %y {axis=2, start=S, end=6} return %z",
    "columns at a symbolic place":
        "%y = linear %x, %w %z = slice %y {axis=2, start=S, end=S+3} return %z",
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_a_product_that_one_kernel_cannot_follow_is_refused(reason: str) -> None:
    text = f"graph main(%x: f32[B,S,4], %w: f32[6,4], %b: f32[6]) {{ {REFUSED[reason]} }}"
    graph = parse_graph(text)
    anchor = next(n for n in graph.nodes if n.op == "linear")
    with pytest.raises(NoKernel, match=f"^{reason}$"):
        Columns(graph, anchor).families()


ROWWISE = {
    "pointwise": "%x: f32[B,S,4], %b: f32[4]) { %a = add %x, %b %c = neg %a return %c, %a }",
    "a number": """%x: f32[B,S,4]) { %two = full {shape=[1], value=2.0, dtype=f32}
        %a = mul %x, %two return %a }""",
    "no axes": "%x: f32[], %y: f32[]) { %a = add %x, %y return %a }",
    "an operand a row": "%x: f32[B,S,4], %b: f32[S,1]) { %a = mul %x, %b return %a }",
    "views of operands": """%x: f32[B,S,8], %b: f32[4,S,B]) {
        %p, %q = split %x {axis=2, sizes=[4,4]} %t = permute %b {dims=[2,1,0]}
        %a = sub %q, %t %c = mul %a, %p return %c }""",
    "a slice from inside": """%x: f32[B,S,9]) {
        %p = slice %x {axis=2, start=1, end=9, step=2} %q = slice %x {axis=-1, start=4, end=8}
        %a = sub %p, %q return %a }""",
    "a broadcast": """%x: f32[B,1,4], %y: f32[B,S,4]) { %e = expand %x {shape=[B,S,4]}
        %a = add %y, %e return %a }""",
    "views of results": """%x: f32[B,S,4]) { %a = neg %x %b = permute %a {dims=[2,0,1]}
        %c = reshape %b {shape=[4,B*S]} return %c, %a }""",
}  # fmt: skip
REDUCING = {
    "softmax": "%x: f32[B,S,4]) { %a = softmax %x %b = add %a, %x return %b, %a }",
    "norm": """%x: f32[B,S,4], %g: f32[4]) { %a = rms_norm %x, %g {eps=1e-05}
        %b = mul %a, %x return %b }""",
    "two norms": """%x: f32[B,S,4], %g: f32[4]) { %n = neg %x %a = rms_norm %n, %g {eps=1e-05}
        %b = rms_norm %a, %g {eps=1e-05} return %b }""",
    "a sum of a row": """%x: f32[B,S,4]) { %a = sum %x {axes=[2], keepdims=true}
        %b = sub %x, %a return %b, %a }""",
    "a sum that drops its axis": "%x: f32[B,S,4]) { %a = sum %x {axes=[2]} return %a }",
    "rope": """%x: f32[B,S,4], %p: i64[B,S], %f: f32[2]) {
        %a = rope %x, %p, %f {layout="half"} return %a }""",
    "rope of heads": """%x: f32[B,S,3,4], %p: i64[B,S], %f: f32[2]) {
        %n = permute %x {dims=[0,1,2,3]} %a = rope %n, %p, %f {layout="interleaved"} return %a }""",
}  # fmt: skip


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("name", [*ROWWISE, *REDUCING])
def test_rows_give_what_the_region_computes(name: str, single: bool) -> None:
    if single and name in REDUCING:
        return
    graph = parse_graph(f"graph main({ROWWISE.get(name) or REDUCING[name]}")
    inputs = inputs_of(graph)
    wanted = run_graph(graph, inputs)
    for found, tensor in zip(run_rows(graph, inputs, single), wanted, strict=True):
        np.testing.assert_allclose(found, tensor.numpy().ravel(), rtol=1e-5, atol=1e-6)
