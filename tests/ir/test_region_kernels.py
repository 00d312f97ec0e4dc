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

from dsc.ir.dims import Dim, evaluate, symbol
from dsc.ir.graph import Graph
from dsc.ir.interpreter import run_graph
from dsc.ir.op import lookup
from dsc.ir.parser import parse_graph
from dsc.ir.region_columns import PRODUCT, Columns, Family
from dsc.ir.region_steps import Lines, Literal, NoKernel, Read, Rows, RowStep
from dsc.ir.traits import Role
from dsc.ir.types import DType, TensorType
from dsc.ir.views import View

Array = npt.NDArray[Any]
SIZES = {"B": 2, "S": 3}
B = symbol("B")
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


WALKS: dict[str, list[tuple[int, tuple[tuple[int, int], ...], tuple[int, ...]]]] = {
    "alone": [(0, ((6, 1),), ())],
    "one column": [(0, ((1, 1),), ())],
    "gate and up": [(0, ((3, 1),), (3,))],
    "up before gate": [(0, ((3, 1),), (3,))],
    "three parts": [(0, ((1, 1),), ()), (1, ((3, 1),), ()), (4, ((5, 1),), ())],
    "heads": [(0, ((4, 3), (1, 1)), ()), (1, ((4, 3), (2, 1)), ())],
    "heads before tokens": [(0, ((4, 3), (3, 1)), ())],
    "an operand a head": [(0, ((4, 3), (3, 1)), ())],
    "every second column": [(0, ((3, 2), (1, 1)), (1,))],
    "parts of heads as one": [(0, ((12, 1),), ())],
}


@pytest.mark.parametrize("name", WALKS)
def test_columns_are_walked_in_as_few_axes_as_all_that_is_read_allows(name: str) -> None:
    graph = parse_graph(f"graph main(%x: f32[B,S,4], {PRODUCTS[name]}")
    families = Columns(graph, graph.nodes[0]).families()
    assert [(f.start, f.walk, f.shifts) for f in families] == WALKS[name]


REFUSED = {
    "columns of the product that are wanted in two forms ":
        "%y = linear %x, %w %a, %b2 = split %y {sizes=[3,3]} %z = mul %a, %b2"
        " %c = slice %y {axis=2, start=4, end=5} return %z, %c",
    "columns of the product that are wanted in two forms  ":
        "%y = linear %x, %w %h = reshape %y {shape=[B,S,2,3]}"
        " %a = slice %h {axis=3, start=0, end=2} %c = slice %y {axis=2, start=3, end=6}"
        " return %a, %c",
    "operands that lie differently in the product ":
        "%y = linear %x, %w %e = slice %y {axis=2, start=0, end=1} %z = add %y, %e return %z",
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
    with pytest.raises(NoKernel, match=f"^{reason.strip()}$"):
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
    "layer norm": """%x: f32[B,S,4], %g: f32[4], %d: f32[4]) { %n = neg %x
        %a = layer_norm %n, %g, %d {eps=1e-05} return %a }""",
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


NO_ROWS = {
    "there are views only": "%x: f32[B,S,4]) { %y = reshape %x {shape=[B*S,4]} return %y }",
    "a result that the region does not compute": "%x: f32[B,S,4]) { %y = neg %x return %y, %x }",
    "a result that the region does not compute ":
        "%x: f32[B,S,4], @w: f32[3]) { %y = neg %x return %y, @w }",
    "a view between two operators":
        "%x: f32[B,S,4]) { %y = neg %x %t = permute %y {dims=[1,0,2]} %z = neg %t return %z }",
    "linear in a row-wise region":
        "%x: f32[B,S,4], %w: f32[4,4]) { %y = linear %x, %w return %y }",
    "a slice of what the region computes":
        "%x: f32[B,S,4]) { %y = neg %x %z = slice %y {axis=2, start=0, end=2} return %z }",
    "a reshape that moves elements":
        "%x: f32[B,S,4]) { %t = permute %x {dims=[2,0,1]} %r = reshape %t {shape=[4*B*S]}"
        " %y = neg %r return %y }",
    "a view of a cache":
        "%c: f32[B,9,4], %n: f32[B,S,4], %l: i64[B]) { %d = cache_write %c, %n, %l"
        " %e = permute %d {dims=[1,0,2]} return %e }",
    "a cache, or what says where its rows go, that is no operand":
        "%c: f32[9,B,4], %n: f32[B,S,4], %l: i64[B]) { %t = permute %c {dims=[1,0,2]}"
        " %d = cache_write %t, %n, %l return %d }",
}  # fmt: skip


@pytest.mark.parametrize("reason", NO_ROWS)
def test_what_no_kernel_of_rows_can_do_is_refused(reason: str) -> None:
    with pytest.raises(NoKernel, match=f"^{reason.strip()}$"):
        Rows(parse_graph(f"graph main({NO_ROWS[reason]}"))


def test_a_cache_that_leaves_under_another_shape_is_the_cache() -> None:
    graph = parse_graph("""graph main(%c: f32[B,9,4], %n: f32[B,S,4], %l: i64[B]) {
      %d = cache_write %c, %n, %l %e = reshape %d {shape=[B,36]} return %e }""")
    assert [step.op for step in Rows(graph).steps] == ["cache_write"]


@pytest.mark.parametrize("paged", [False, True])
def test_a_step_that_writes_rows_of_a_cache_says_where_they_go(paged: bool) -> None:
    cache, table = ("N,5,4", ", %t: i64[B,M]") if paged else ("B,9,4", "")
    graph = parse_graph(f"""graph main(%c: f32[{cache}], %n: f32[B,S,8], %l: i64[B]{table}) {{
      %p, %q = split %n {{axis=2, sizes=[4,4]}} %y = neg %q
      %d = cache_write %c, %y, %l{", %t" if paged else ""} return %d
    }}""")
    neg, write = Rows(graph).steps
    assert str(Rows(graph).rows) == "B*S"
    assert (write.role, write.extents, neg.kept) == (Role.WRITE, (4,), True)
    assert [str(d) for d in write.over] == (["S", "M", "5"] if paged else ["S", "9"])
    new, lengths, rows, *rest = (read.source for read in write.reads)
    assert new == neg.number
    assert isinstance(lengths, Lines)
    assert isinstance(rows, Lines)
    assert (lengths.view.buffer, lengths.rows, lengths.inner) == (2, ((B, 1),), ())
    count, page = ("N", 5) if paged else ("B", 9)
    assert [(str(d), s) for d, s in rows.rows] == [(count, page * 4)]
    assert (rows.view.buffer, rows.inner) == (0, (4, 1))
    if paged:
        (table_read,) = rest
        assert isinstance(table_read, Lines)
        assert [str(x) for x in (*table_read.rows[0], *table_read.inner)] == ["B", "M", "1"]


@pytest.mark.parametrize(
    ("shape", "strides", "lead", "rows", "inner", "unit", "constant"),
    [
        ((2, 3, 4), (12, 4, 1), 2, ((6, 4),), (1,), True, False),
        ((2, 3, 4), (13, 4, 1), 2, ((2, 13), (3, 4)), (1,), True, False),
        ((2, 3, 4), (12, 4, 1), 1, ((2, 12),), (4, 1), True, False),
        ((2, 1, 4), (12, 7, 2), 2, ((2, 12),), (2,), False, False),
        ((2, 4), (1, 0), 1, ((2, 1),), (0,), False, True),
        ((2, 3, 4), (1, 1, 0), 1, ((2, 1),), (1, 0), False, False),
        ((2,), (1,), 1, ((2, 1),), (), False, True),
        ((2,), (1,), 0, (), (1,), True, False),
    ],
)
def test_lines_are_rows_by_number_and_what_each_holds(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    lead: int,
    rows: tuple[tuple[int, int], ...],
    inner: tuple[int, ...],
    unit: bool,
    constant: bool,
) -> None:
    lines = Lines.of(View(0, TensorType(DType.f32, shape), strides, 5), lead)
    assert (lines.rows, lines.inner, lines.view.offset) == (rows, inner, 5)
    assert (lines.unit, lines.constant) == (unit, constant)
