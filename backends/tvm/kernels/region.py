"""Fused regions to launches: what kind of kernel a body is, and what that kernel is told.

A row-wise body becomes one loop over rows (`region_rows`), a GEMM with what follows it a product
whose tiles are finished before they are stored (`region_products`). Anything else is refused with a
reason, and the pass that fuses puts it back.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from dsc.backends.tvm.kernels import ALONG_ROWS
from dsc.backends.tvm.kernels.access import access
from dsc.backends.tvm.kernels.bf16_panels import fits, panel_bytes
from dsc.backends.tvm.kernels.formulas import attributes
from dsc.backends.tvm.kernels.region_products import Family, Product, product_region
from dsc.backends.tvm.kernels.region_rows import RowStep, row_region
from dsc.backends.tvm.kernels.values import Operand, Point, check_pointwise
from dsc.backends.tvm.launch import Launch, Unsupported, fp32_only, rows_of, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.shapes import SizeTable
from dsc.backends.tvm.tir import PARALLEL_WORK, STORAGE, VALUE
from dsc.ir.analyses import structural_hash
from dsc.ir.dims import Dim
from dsc.ir.graph import Graph, Node
from dsc.ir.op import traits_of
from dsc.ir.region_columns import Columns
from dsc.ir.region_columns import Family as Found
from dsc.ir.region_steps import Lines, Literal, NoKernel, Read, Rows, alone
from dsc.ir.region_steps import RowStep as Step
from dsc.ir.regions import anchor_of, classify
from dsc.ir.traits import Role

SCRATCH = 1 << 18
"""Bytes of stack that a row's intermediate values may take."""


def lower(node: Node, machine: Machine) -> Launch:
    """The launch of a region, or of an operator that is one alone.

    Raises `Unsupported` with the reason when there is none.
    """
    body = node.body or alone(node)
    key = (structural_hash(body), machine)
    if key not in _KNOWN:
        try:
            _KNOWN[key] = _lowered(body, machine)
        except (Unsupported, NoKernel) as reason:
            _KNOWN[key] = str(reason)
    found = _KNOWN[key]
    if isinstance(found, str):
        raise Unsupported(found)
    return found


_IN_FP32 = frozenset({"linear", "grouped_linear", "rms_norm", "rope"})
"""Operators whose regions compute in fp32 whatever the element type."""
_KNOWN: dict[tuple[str, Machine], Launch | str] = {}
"""Launches, or why there is none, by what a body computes: layers repeat."""


def _lowered(body: Graph, machine: Machine) -> Launch:
    for value in body.values():
        if value.type.dtype not in STORAGE:
            raise Unsupported(f"element type {value.type.dtype}")
    for node in body.nodes:
        along = traits_of(node.op).role in (Role.REDUCTION, Role.ROTATION)
        if along and node.op not in ALONG_ROWS:
            raise Unsupported(f"no kernel for the operator {node.op}")
        if node.op in _IN_FP32:
            fp32_only(node)
    anchor = anchor_of(body.nodes)
    if anchor is None:
        return _rows(body, machine)
    if anchor.op in ("linear", "grouped_linear"):
        return _product(body, anchor, machine)
    raise Unsupported(f"a region of kind {classify(body)} around {anchor.op}")


def _product(body: Graph, anchor: Node, machine: Machine) -> Launch:
    """A linear or grouped_linear with its epilogue."""
    columns, table = Columns(body, anchor), SizeTable()
    given = [columns.given[x.name] for x in anchor.operands]
    if not all(view.is_dense for view in given):
        raise Unsupported(f"a {anchor.op} of what the region computes")
    families = tuple(_family(f, table) for f in columns.families())
    x, weight = (anchor.operands[i].type for i in range(2))
    *groups, m, k = (static_dim(d, "a weight's axis") for d in weight.shape)
    factors = [o.type for o in anchor.operands if o.type.dtype.is_float]
    native = fits(machine, k, *factors)
    rows_at = table.dim(rows_of(x))
    depth = table.size(k) if native and not groups else k  # stacked weights are of few shapes
    places = [view.buffer for view in given]
    last = places[2] if len(places) > 2 else -1
    gemm = Product(
        x.dtype, places[0], places[1], -1 if groups else last, last if groups else -1,
        groups[0] if groups else 0, rows_at, m, depth, m * k >= 4 * PARALLEL_WORK,
    )  # fmt: skip
    machine = machine if native else replace(machine, bf16=False, tiles=False)
    static = (gemm, families, _parameters(body), len(table.dims), machine)
    tiles = native and machine.tiles
    scratch = panel_bytes(rows_of(x), k, max(gemm.experts, 1)) if tiles else 0
    flops = rows_of(x) * (2 * m * k)
    return Launch(product_region, static, tuple(table.dims), scratch=scratch, flops=flops)


def _family(found: Found, table: SizeTable) -> Family:
    """A family with the numbers of its accesses in a table."""
    steps = tuple((s.number, s.shift, _point(s.node, s.reads, table)) for s in found.steps)
    writes = tuple((number, access(lines, table)) for number, lines in found.writes)
    return Family(found.start, found.walk, found.shifts, steps, writes)


def _point(node: Node, reads: tuple[Read, ...], table: SizeTable) -> Point:
    check_pointwise(node)
    operands = tuple(_operand(r, table) for r in reads)
    return Point(node.op, operands, node.output.type.dtype, attributes(node))


def _operand(read: Read, table: SizeTable) -> Operand:
    source = read.source
    if isinstance(source, Lines):
        return Operand(access(source, table), read.dtype)
    if isinstance(source, Literal):
        return Operand(float(source.value), read.dtype)
    return Operand(source, read.dtype, read.shift)


def _parameters(body: Graph) -> int:
    """The kernel's addresses: operands, then results."""
    return len(body.inputs) + len(body.outputs)


def _rows(body: Graph, machine: Machine) -> Launch:
    """A body without an anchor: one kernel over the rows."""
    found, table = Rows(body), SizeTable()
    steps = tuple(_row_step(s, table) for s in found.steps)
    size = sum(_kept_bytes(s) for s in steps if s.kept)
    if size > SCRATCH:
        raise Unsupported(f"{size} bytes of a row are too many to keep on the stack")
    rows_at = table.dim(found.rows)
    static = (steps, rows_at, _parameters(body), len(table.dims), machine)
    flops: Dim = 0
    for node in found.core:
        flops = flops + node.output.type.numel * 2
    title = "_".join(dict.fromkeys(step.op for step in steps))[:48].rstrip("_")
    return Launch(row_region, static, tuple(table.dims), flops=flops, title=title)


def _row_step(step: Step, table: SizeTable) -> RowStep:
    """A step with its numbers in a table. Raises `Unsupported` for what the kernel cannot do."""
    node, x = step.node, step.node.operands[0].type
    attrs: dict[str, object] = {}
    if step.role is Role.POINTWISE:
        check_pointwise(node)
        attrs = dict(attributes(node))
    elif step.role is Role.REDUCTION:
        if VALUE[x.dtype] == "bool" or (node.op == "softmax" and not x.dtype.is_float):
            raise Unsupported(f"{node.op} of {x.dtype}")
        if node.op == "rms_norm":
            static_dim(x.shape[-1], "the normalised axis")
            attrs = dict(node.attrs)
    else:
        for d in (*step.extents, *step.over[2:]):
            static_dim(d, f"a row or page of {node.op}")
        attrs = dict(node.attrs)
    operands = tuple(_operand(r, table) for r in step.reads)
    over = tuple(table.dim(d) for d in step.over)
    writes = tuple(access(lines, table) for lines in step.writes)
    extents = tuple(table.dim(d) for d in step.extents)
    return RowStep(
        step.number, node.op, operands, step.reads[0].dtype if step.role is Role.WRITE else
        node.output.type.dtype, extents, writes, step.kept, step.role is Role.POINTWISE,
        tuple(sorted(attrs.items())), over,
    )  # fmt: skip


def _kept_bytes(step: RowStep) -> int:
    """Bytes of a row of a step's result. Raises `Unsupported` where they are not known."""
    known = [e for e in step.extents if isinstance(e, int)]
    if len(known) < len(step.extents):
        raise Unsupported("a row of symbolic width between two loops")
    return prod(known) * step.dtype.itemsize
