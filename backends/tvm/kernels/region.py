"""Fused regions to launches: what kind of kernel a body is, and what that kernel is told.

A row-wise body becomes one loop over rows (`region_rows`), a GEMM with what follows it a product
whose tiles are finished before they are stored (`region_products`). Anything else is refused with a
reason, and the pass that fuses puts it back.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from dsc.backends.tvm.kernels import ALONG_ROWS
from dsc.backends.tvm.kernels.coded import PAIRS, coded
from dsc.backends.tvm.kernels.coded_rows import scratch_bytes
from dsc.backends.tvm.kernels.formulas import check
from dsc.backends.tvm.kernels.panels import fits, panel_bytes
from dsc.backends.tvm.kernels.region_products import Product, product_region
from dsc.backends.tvm.kernels.region_rows import row_region
from dsc.backends.tvm.launch import Launch, Unsupported, fp32_only, rows_of, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.shapes import SizeTable
from dsc.backends.tvm.tir import PARALLEL_WORK, STORAGE, VALUE
from dsc.ir.analyses import structural_hash
from dsc.ir.dims import Dim
from dsc.ir.graph import Graph, Node
from dsc.ir.op import traits_of
from dsc.ir.region_columns import Columns
from dsc.ir.region_steps import NoKernel, Rows, RowStep, alone
from dsc.ir.regions import anchor_of, classify
from dsc.ir.traits import Role
from dsc.ir.types import DType

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


_IN_FP32 = frozenset({"linear", "grouped_linear", "rms_norm", "layer_norm", "rope"})
"""Operators whose regions compute in fp32 whatever the element type."""
_KNOWN: dict[tuple[str, Machine], Launch | str] = {}
"""Launches, or why there is none, by what a body computes: layers repeat."""


def _lowered(body: Graph, machine: Machine) -> Launch:
    for value in body.values():
        if value.type.format is None and value.type.dtype not in STORAGE:
            raise Unsupported(f"element type {value.type.dtype}")
    for node in body.nodes:
        along = traits_of(node.op).role in (Role.REDUCTION, Role.ROTATION)
        if along and node.op not in ALONG_ROWS:
            raise Unsupported(f"no kernel for the operator {node.op}")
        if node.op in _IN_FP32:
            fp32_only(node)
        if traits_of(node.op).role is Role.POINTWISE:
            check(node)
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
    families = table.numbered(columns.families())
    x, weight = (anchor.operands[i].type for i in range(2))
    *groups, m, k = (static_dim(d, "a weight's axis") for d in weight.shape)
    factors = [o.type for o in anchor.operands if o.type.dtype.is_float]
    codes = coded(anchor, x.dtype, weight, machine)
    native = codes is None and fits(machine, k, *factors)
    rows_at = table.numbered(rows_of(x))
    depth = table.size(k) if native and not groups else k  # stacked weights are of few shapes
    places = [view.buffer for view in given]
    last = places[2] if len(places) > 2 else -1
    gemm = Product(
        x.dtype, places[0], places[1], -1 if groups else last, last if groups else -1,
        groups[0] if groups else 0, rows_at, m, depth, m * k >= 4 * PARALLEL_WORK, codes,
    )  # fmt: skip
    if not native:
        bf16 = codes is not None and (x.dtype is DType.bf16 or codes.way == PAIRS)
        bf16 = bf16 and machine.bf16
        machine = replace(machine, bf16=bf16, tiles=False)
    static = (gemm, families, _parameters(body), len(table.dims), machine)
    tiles = native and machine.tiles
    scratch = panel_bytes(rows_of(x), k, max(gemm.experts, 1)) if tiles else 0
    if codes is not None:
        scratch = scratch_bytes(codes, rows_of(x))
    flops = rows_of(x) * (2 * m * k)
    return Launch(product_region, static, tuple(table.dims), scratch=scratch, flops=flops)


def _parameters(body: Graph) -> tuple[int, ...]:
    """The kernel's addresses for each operand, then for each result."""
    return tuple(len(x.type.parts) for x in (*body.inputs, *body.outputs))


def _rows(body: Graph, machine: Machine) -> Launch:
    """A body without an anchor: one kernel over the rows."""
    if any(v.type.format is not None for v in body.inputs):
        raise Unsupported("a weight in a stored format that no product reads")
    found, table = Rows(body), SizeTable()
    for step in found.steps:
        _check_row(step)
    size = sum(_kept_bytes(s) for s in found.steps if s.kept)
    if size > SCRATCH:
        raise Unsupported(f"{size} bytes of a row are too many to keep on the stack")
    steps, rows_at = table.numbered((found.steps, found.rows))
    static = (steps, rows_at, len(_parameters(body)), len(table.dims), machine)
    flops: Dim = 0
    for node in found.core:
        flops = flops + node.output.type.numel * 2
    title = "_".join(dict.fromkeys(step.op for step in steps))[:48].rstrip("_")
    return Launch(row_region, static, tuple(table.dims), flops=flops, title=title)


def _check_row(step: RowStep) -> None:
    """Raise `Unsupported` for what the kernel cannot do on a row."""
    x = step.reads[0].dtype
    if step.role is Role.REDUCTION:
        if VALUE[x] == "bool" or (step.op == "softmax" and not x.is_float):
            raise Unsupported(f"{step.op} of {x}")
        if step.op in _IN_FP32:
            static_dim(step.over[-1], "the normalised axis")
    elif step.role is not Role.POINTWISE:
        for d in (*step.extents, *step.over[2:]):
            static_dim(d, f"a row or page of {step.op}")


def _kept_bytes(step: RowStep) -> int:
    """Bytes of a row of a step's result. Raises `Unsupported` where they are not known."""
    known = [e for e in step.extents if isinstance(e, int)]
    if len(known) < len(step.extents):
        raise Unsupported("a row of symbolic width between two loops")
    return prod(known) * step.dtype.itemsize
