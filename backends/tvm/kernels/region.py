"""Fused regions to launches: what kind of kernel a body is, and what that kernel is told.

A row-wise body becomes one loop over rows (`region_rows`), a GEMM with what follows it a product
whose tiles are finished before they are stored (`region_products`), another anchor the anchor's
kernel with a result that passes through the epilogue (`region_flat`). Anything else is refused with
a reason, and the pass that fuses puts it back.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from dsc.backends.tvm.kernels import bf16_linear
from dsc.backends.tvm.kernels.access import (
    Access,
    access,
    apply_view,
    make_access,
    unapply_view,
)
from dsc.backends.tvm.kernels.bf16_rows import panel_bytes
from dsc.backends.tvm.kernels.families import Families
from dsc.backends.tvm.kernels.pointwise import attributes
from dsc.backends.tvm.kernels.region_products import Product, product_region
from dsc.backends.tvm.kernels.region_rows import RowStep, row_region
from dsc.backends.tvm.kernels.values import Operand, check_pointwise
from dsc.backends.tvm.launch import Launch, Unsupported, fp32_only, rows_of, static_dim
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.shapes import SizeTable
from dsc.backends.tvm.tir import PARALLEL_WORK, STORAGE, VALUE
from dsc.ir.analyses import structural_hash
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.graph import Operand as Input
from dsc.ir.op import traits_of
from dsc.ir.regions import Kind, anchor_of, classify, role, rows
from dsc.ir.traits import Role
from dsc.ir.views import View, dense_strides, expand

SCRATCH = 1 << 18
"""Bytes of stack that a row's intermediate values may take."""
_ROWWISE = (Kind.POINTWISE, Kind.ROWWISE)


def lower(node: Node, machine: Machine) -> Launch:
    """The launch of a `fused` node. Raises `Unsupported` with the reason when there is none."""
    assert node.body is not None, "a fused node has a body"
    key = (structural_hash(node.body), machine)
    if key not in _KNOWN:
        try:
            _KNOWN[key] = _lowered(node.body, machine)
        except Unsupported as reason:
            _KNOWN[key] = str(reason)
    found = _KNOWN[key]
    if isinstance(found, str):
        raise Unsupported(found)
    return found


_IN_FP32 = frozenset({"linear", "grouped_linear", "rms_norm", "softmax", "rope"})
"""Operators whose regions compute in fp32 whatever the element type."""
_KNOWN: dict[tuple[str, Machine], Launch | str] = {}
"""Launches, or why there is none, by what a body computes: layers repeat."""


def _lowered(body: Graph, machine: Machine) -> Launch:
    for value in body.values():
        if value.type.dtype not in STORAGE:
            raise Unsupported(f"element type {value.type.dtype}")
    for node in body.nodes:
        if node.op in _IN_FP32:
            fp32_only(node)
    kind = classify(body)
    if kind in _ROWWISE:
        return RowAnalysis(body, machine).launch()
    anchor = anchor_of(body.nodes)
    if anchor is not None and anchor.op in ("linear", "grouped_linear"):
        return _product(body, anchor, machine)
    raise Unsupported(f"a region of kind {kind}" + (f" around {anchor.op}" if anchor else ""))


def _product(body: Graph, anchor: Node, machine: Machine) -> Launch:
    """A linear or grouped_linear with its epilogue."""
    found = Body(body)
    for each in anchor.operands:
        if each.name not in found.given or not found.given[each.name].is_dense:
            raise Unsupported(f"a {anchor.op} of what the region computes")
    families = Families(body, anchor, found.given, found.literals, found.table).found()
    x, weight = (anchor.operands[i].type for i in range(2))
    *groups, m, k = (static_dim(d, "a weight's axis") for d in weight.shape)
    factors = [o.type for o in anchor.operands if o.type.dtype.is_float]
    native = bf16_linear.fits(machine, k, *factors)
    rows_at, depth = found.table.dim(rows_of(x)), found.table.size(k) if native else k
    places = [found.given[o.name].buffer for o in anchor.operands]
    last = places[2] if len(places) > 2 else -1
    gemm = Product(
        x.dtype, places[0], places[1], -1 if groups else last, last if groups else -1,
        groups[0] if groups else 0, rows_at, m, depth, m * k >= 4 * PARALLEL_WORK,
    )  # fmt: skip
    machine = machine if native else replace(machine, bf16=False, tiles=False)
    static = (gemm, families, found.parameters, len(found.table.dims), machine)
    tiles = native and machine.tiles
    scratch = panel_bytes(rows_of(x), k, max(gemm.experts, 1)) if tiles else 0
    flops = rows_of(x) * (2 * m * k)
    return Launch(product_region, static, tuple(found.table.dims), scratch=scratch, flops=flops)


def dense(value: Value, buffer: int) -> View:
    """A value that lies in a buffer of its own."""
    return View(buffer, value.type, dense_strides(value.type.shape))


class Body:
    """A region's body: where its inputs, and what views make of them, lie; what leaves it."""

    def __init__(self, body: Graph) -> None:
        self.body = body
        self.table = SizeTable()
        self.given = {v.name: dense(v, i) for i, v in enumerate(body.inputs)}
        self.literals: dict[str, float] = {}
        self.core: list[Node] = []
        self.views: dict[str, Node] = {}
        for node in body.nodes:
            self._place(node)

    @property
    def parameters(self) -> int:
        """The kernel's addresses: operands, then results."""
        return len(self.body.inputs) + len(self.body.outputs)

    def _place(self, node: Node) -> None:
        if role(node) is Role.CONSTANT:
            self.literals[node.output.name] = float(node.attrs["value"])
        elif traits_of(node.op).role is not Role.VIEW:
            self.core.append(node)
        elif (source := self.given.get(node.operands[0].name)) is not None:
            made = apply_view(node, source)
            self.given.update((v.name, x) for v, x in zip(node.outputs, made, strict=True))
        else:
            self.views.update((v.name, node) for v in node.outputs)

    def results(self) -> dict[str, list[View]]:
        """For each computed value, where in the region's results its elements lie."""
        found: dict[str, list[View]] = {}
        for i, value in enumerate(self.body.outputs, start=len(self.body.inputs)):
            if not isinstance(value, Value) or value.name in self.given:
                raise Unsupported("a result that the region does not compute")
            name, place = value.name, dense(value, i)
            while name in self.views:
                place = unapply_view(self.views[name], place)
                name = self.views[name].operands[0].name
            found.setdefault(name, []).append(place)
        return found


class RowAnalysis(Body):
    """A body without an anchor, as the steps of a row."""

    def __init__(self, body: Graph, machine: Machine) -> None:
        super().__init__(body)
        self.machine = machine
        self.rows: Dim = rows(self.core[0])
        self.numbers = {v.name: i for i, n in enumerate(self.core) for v in n.outputs}
        self.read_later = {x.name for n in self.core for x in n.operands} & self.numbers.keys()

    def launch(self) -> Launch:
        """One kernel over the rows."""
        results = self.results()
        steps = tuple(self._step(node, results) for node in self.core)
        steps = tuple(_with_kept(steps))
        size = sum(_kept_bytes(s) for s in steps if s.kept)
        if size > SCRATCH:
            raise Unsupported(f"{size} bytes of a row are too many to keep on the stack")
        rows_at = self.table.dim(self.rows)
        static = (steps, rows_at, self.parameters, len(self.table.dims), self.machine)
        flops: Dim = 0
        for node in self.core:
            flops = flops + node.output.type.numel * 2
        return Launch(row_region, static, tuple(self.table.dims), flops=flops)

    def _step(self, node: Node, results: dict[str, list[View]]) -> RowStep:
        part, out = role(node), node.output.type
        attrs: tuple[tuple[str, object], ...] = ()
        lead = max(out.rank - 1, 0)
        match part:
            case Role.POINTWISE:
                check_pointwise(node)
                attrs = attributes(node)
                operands = [self._operand(x, lead, out.shape) for x in node.operands]
                extents = out.shape[lead:] or (1,)
            case Role.REDUCTION:
                operands, extents, attrs = self._reduction(node)
                lead = node.operands[0].type.rank - 1
            case Role.ROTATION:
                operands, extents, attrs = self._rotation(node)
                lead = 2
            case Role.WRITE if node.op == "cache_write":
                return self._write(node)
            case _:
                raise Unsupported(f"{node.op} in a row-wise region")
        writes = []
        for view in results.get(node.output.name, ()):
            inner = view.strides[lead:] or (1,)  # of a reduction without keepdims
            pairs = list(zip(view.shape, view.strides, strict=True))[:lead]
            writes.append(make_access(view, pairs, inner, view.offset, self.table))
        if product(out.shape[:lead]) != self.rows:
            raise Unsupported("operators on different rows")
        sizes = tuple(self.table.dim(d) for d in extents)
        number = self.numbers[node.output.name]
        return RowStep(
            number, node.op, tuple(operands), out.dtype, sizes, tuple(writes),
            node.output.name in self.read_later, part is Role.POINTWISE, attrs,
        )  # fmt: skip

    def _operand(self, x: Input, lead: int, shape: tuple[Dim, ...] | None = None) -> Operand:
        """What a step reads, broadcast to `shape`; `lead` of its axes are the row."""
        if x.name in self.literals:
            return Operand(self.literals[x.name], x.type.dtype)
        if x.name in self.numbers:
            return Operand(self.numbers[x.name], x.type.dtype)
        if x.name not in self.given:
            raise Unsupported("a view between two operators")
        view = self.given[x.name]
        found = access(view if shape is None else expand(view, shape), lead, self.table)
        if shape is not None and not found.inner:
            found = replace(found, inner=(0,))
        return Operand(found, x.type.dtype)

    def _reduction(
        self, node: Node
    ) -> tuple[list[Operand], tuple[Dim, ...], tuple[tuple[str, object], ...]]:
        x = node.operands[0].type
        if VALUE[x.dtype] == "bool":
            raise Unsupported(f"{node.op} of bool")
        operands = [self._operand(node.operands[0], x.rank - 1)]
        if node.op == "rms_norm":
            static_dim(x.shape[-1], "the normalised axis")
            operands.append(self._operand(node.operands[1], 0))
            return operands, x.shape[-1:], (("eps", node.attrs["eps"]),)
        if node.op == "softmax":
            if VALUE[x.dtype] != "float32":
                raise Unsupported(f"softmax of {x.dtype}")
            return operands, x.shape[-1:], ()
        return operands, (1,), (("extent", self.table.dim(x.shape[-1])),)

    def _rotation(
        self, node: Node
    ) -> tuple[list[Operand], tuple[Dim, ...], tuple[tuple[str, object], ...]]:
        x, positions, frequencies = node.operands
        for d in x.type.shape[2:]:
            static_dim(d, "a rotated axis")
        attrs = node.attrs
        operands = [self._operand(x, 2), self._operand(positions, 2), self._operand(frequencies, 0)]
        return operands, x.type.shape[2:], tuple(sorted(attrs.items()))

    def _write(self, node: Node) -> RowStep:
        """The cache is the region's operand, and its result has no address of its own."""
        cache, new, lengths = node.operands
        operands = (
            self._operand(new, 2), self._operand(lengths, 1), self._operand(cache, 1)
        )  # fmt: skip
        target = operands[2].source
        if not isinstance(target, Access) or not self.given[cache.name].is_dense:
            raise Unsupported("a cache that is not the region's operand")
        if node.output.name in self.views:
            raise Unsupported("a view of a cache")
        width = static_dim(new.type.shape[2], "a cache row")
        sizes = (width, new.type.shape[1], cache.type.shape[1])
        number = self.numbers[node.output.name]
        extents = tuple(self.table.dim(d) for d in sizes)
        return RowStep(number, node.op, operands, new.type.dtype, extents, (), False, False)


def _kept_bytes(step: RowStep) -> int:
    """Bytes of a row of a step's result. Raises `Unsupported` where they are not known."""
    known = [e for e in step.extents if isinstance(e, int)]
    if len(known) < len(step.extents):
        raise Unsupported("a row of symbolic width between two loops")
    return prod(known) * step.dtype.itemsize


def _with_kept(steps: tuple[RowStep, ...]) -> list[RowStep]:
    """Steps whose results are read in the same loop alone need no scratch."""
    runs: dict[int, int] = {}
    run = 0
    for before, step in zip((None, *steps), steps, strict=False):
        joins = before is not None and before.pointwise and step.pointwise
        run += not (joins and before is not None and before.extents == step.extents)
        runs[step.number] = run
    late = {
        o.source
        for s in steps
        for o in s.operands
        if isinstance(o.source, int) and runs[o.source] != runs[s.number]
    }
    return [replace(s, kept=s.number in late) for s in steps]
