"""What a kernel for a region has to do: which elements lie where, and the steps of a row.

A body's inputs lie in buffers, and views of them are strides; a value that a view leads out of the
region is written straight to where the view puts it. What is left are operators: over rows, each a
step that reads lines of memory, results of earlier steps and literals. Backends turn steps into
code; what no kernel can do whatever the backend is refused here, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dsc.ir import views
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Attrs, Graph, GraphBuilder, Node, Operand, Value
from dsc.ir.op import traits_of
from dsc.ir.ops.shape import axis_of
from dsc.ir.paging import cached_rows
from dsc.ir.regions import axes_of, role
from dsc.ir.traits import Role
from dsc.ir.types import DType
from dsc.ir.views import View


class NoKernel(Exception):
    """One kernel cannot run a body; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Lines:
    """A view whose first `lead` axes are the row number; the others are what a row holds."""

    view: View
    lead: int

    @staticmethod
    def of(view: View, lead: int) -> Lines:
        """A view by rows, axes of the row number joined where they are evenly spaced."""
        axes = list(zip(view.shape, view.strides, strict=True))
        rows = views.joined(axes[:lead])
        kept = [*rows, *axes[lead:]]
        return Lines(view.strided(tuple(d for d, _ in kept), tuple(s for _, s in kept)), len(rows))

    @property
    def rows(self) -> tuple[tuple[Dim, Dim], ...]:
        """Extents and strides that a row number unravels into, outermost first."""
        return tuple(zip(self.view.shape, self.view.strides, strict=True))[: self.lead]

    @property
    def inner(self) -> tuple[Dim, ...]:
        """Strides inside a row."""
        return self.view.strides[self.lead :]

    @property
    def unit(self) -> bool:
        """Whether neighbours in a row are neighbours in memory."""
        return self.inner[-1:] == (1,)

    @property
    def constant(self) -> bool:
        """Whether a row holds one value only."""
        return all(s == 0 for s in self.inner)


@dataclass(frozen=True, slots=True)
class Literal:
    """A number in every place."""

    value: float | int | bool


@dataclass(frozen=True, slots=True)
class Read:
    """What a step reads: memory, the result of the step of that number, or a literal.

    `shift` is for products: how many columns further on it is read.
    """

    source: Lines | int | Literal
    dtype: DType
    shift: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """An operator of a region, whose result is of element type `dtype`; steps have numbers."""

    number: int
    op: str
    dtype: DType
    attrs: Attrs
    reads: tuple[Read, ...]


@dataclass(frozen=True, slots=True)
class RowStep(Step):
    """An operator on a row: `extents` are what the row of its result holds.

    `over` are the axes that a reduction runs along; of a write, the new rows of a sequence and the
    rows that it has in the tensor, or the blocks and the rows of a page. A write reads the new row,
    the lengths, the tensor, and the block table where there is one. `writes` says where the result
    leaves the region. `kept` results are read by others than the run of neighbouring
    pointwise steps of the same extents that they stand in.
    """

    role: Role
    extents: tuple[Dim, ...]
    over: tuple[Dim, ...] = ()
    writes: tuple[Lines, ...] = ()
    kept: bool = False


Place = View | Literal
"""What an input of a body is."""


def dense(value: Operand, buffer: int) -> View:
    """A value that lies in a buffer of its own."""
    return View(buffer, value.type, views.dense_strides(value.type.shape))


def alone(node: Node) -> Graph:
    """The body of a region of one operator; axes that it runs along are brought last."""
    builder = GraphBuilder("alone")
    operands = [builder.input(f"x{i}", x.type) for i, x in enumerate(node.operands)]
    rank = node.operands[0].type.rank
    axes = axes_of(node) if traits_of(node.op).role is Role.REDUCTION else []
    order = [a for a in range(rank) if a not in axes] + axes
    if order == list(range(rank)):
        return builder.finish(builder.call(node.op, *operands, **node.attrs))
    last = range(rank - len(axes), rank)
    named = {"axes": tuple(last)} if "axes" in node.attrs else {"axis": last[0]}
    moved = builder.permute(operands[0], dims=order)
    (result,) = builder.call(node.op, moved, *operands[1:], **{**node.attrs, **named})
    if result.type.rank == rank:
        result = builder.permute(result, dims=[order.index(a) for a in range(rank)])
    return builder.finish([result])


class Body:
    """A region's body: where its inputs, and what views make of them, lie; what leaves it.

    `places` says where the inputs lie, `targets` where the results go; by default each has a buffer
    of its own, numbered in order.
    """

    def __init__(
        self,
        body: Graph,
        places: Sequence[Place] | None = None,
        targets: Sequence[View] | None = None,
    ) -> None:
        self.body = body
        count = len(body.inputs)
        if places is None:
            places = [dense(v, i) for i, v in enumerate(body.inputs)]
        if targets is None:
            targets = [dense(v, count + i) for i, v in enumerate(body.outputs)]
        self.targets = targets
        self.given: dict[str, View] = {}
        self.literals: dict[str, Literal] = {}
        for value, place in zip(body.inputs, places, strict=True):
            if isinstance(place, View):
                self.given[value.name] = place
            else:
                self.literals[value.name] = place
        self.core: list[Node] = []
        self.views: dict[str, Node] = {}
        for node in body.nodes:
            self._place(node)

    def _place(self, node: Node) -> None:
        if role(node) is Role.CONSTANT:
            self.literals[node.output.name] = Literal(node.attrs["value"])
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
        for value, place in zip(self.body.outputs, self.targets, strict=True):
            if not isinstance(value, Value) or value.name in self.given:
                raise NoKernel("a result that the region does not compute")
            name = value.name
            while name in self.views:
                place = unapply_view(self.views[name], place)
                name = self.views[name].operands[0].name
            found.setdefault(name, []).append(place)
        return found


class Rows(Body):
    """A body without an anchor, as the steps of a row, of which there are `rows`.

    Where all operators are pointwise, rows may be `single` elements.
    """

    def __init__(
        self,
        body: Graph,
        places: Sequence[Place] | None = None,
        targets: Sequence[View] | None = None,
        single: bool = False,
    ) -> None:
        super().__init__(body, places, targets)
        self.single = single
        self.numbers = {v.name: i for i, n in enumerate(self.core) for v in n.outputs}
        if not self.core:
            raise NoKernel("there are views only")
        self.leaving = self.results()
        made = [self._step(node) for node in self.core]
        self.rows = made[0][1]
        if any(rows != self.rows for _, rows in made):
            raise NoKernel("operators on different rows")
        self.steps = _with_kept([step for step, _ in made])

    def _step(self, node: Node) -> tuple[RowStep, Dim]:
        """A node as a step, and over how many rows it goes."""
        number, part = self.numbers[node.output.name], traits_of(node.op).role
        shape = node.operands[0].type.shape
        over: tuple[Dim, ...] = ()
        match part:
            case Role.POINTWISE:
                shape = node.output.type.shape
                lead = len(shape) if self.single else max(len(shape) - 1, 0)
                reads = tuple(self._read(x, lead, shape) for x in node.operands)
                extents = shape[lead:] or (1,)
            case Role.REDUCTION:
                lead = len(shape) - len(axes_of(node))
                reads = tuple(map(self._read, node.operands, (lead, 0, 0)))
                over = shape[lead:]
                extents = over if node.output.type.shape == shape else (1,)
            case Role.ROTATION:
                lead = 2
                reads = tuple(map(self._read, node.operands, (2, 2, 0)))
                extents = shape[2:]
            case Role.WRITE if node.op == "cache_write":
                return self._write(node, number)
            case _:
                raise NoKernel(f"{node.op} in a row-wise region")
        writes = []
        for view in self.leaving.get(node.output.name, ()):
            if extents == (1,):  # kept axes or not, one number a row
                view = view.strided((*view.shape[:lead], 1), (*view.strides[:lead], 1))
            writes.append(Lines.of(view, lead))
        of = (node.op, node.output.type.dtype, node.attrs)
        step = RowStep(number, *of, reads, part, extents, over, tuple(writes))
        return step, product(shape[:lead])

    def _read(self, x: Operand, lead: int, shape: tuple[Dim, ...] | None = None) -> Read:
        """What a step reads, broadcast to `shape`; `lead` of its axes are the row."""
        if x.name in self.literals:
            return Read(self.literals[x.name], x.type.dtype)
        if x.name in self.numbers:
            return Read(self.numbers[x.name], x.type.dtype)
        if x.name not in self.given:
            raise NoKernel("a view between two operators")
        view = self.given[x.name]
        if shape is not None:
            view = views.expand(view, shape)
            if len(view.shape) == lead:
                view = view.strided((*view.shape, 1), (*view.strides, 0))
        return Read(Lines.of(view, lead), x.type.dtype)

    def _write(self, node: Node, number: int) -> tuple[RowStep, Dim]:
        """The cache is the region's operand, and its result has no address of its own."""
        cache, new, *where = node.operands
        for x in (cache, *where):
            if x.name not in self.given or not self.given[x.name].is_dense:
                raise NoKernel("a cache, or what says where its rows go, that is no operand")
        lengths, *table = (self._read(x, 1) for x in where)
        reads = (self._read(new, 2), lengths, self._read(cache, 1), *table)
        if not all(place.is_dense for place in self.leaving.get(node.output.name, ())):
            raise NoKernel("a view of a cache")
        b, s, width = new.type.shape
        page = cache.type.shape[1:2] if table else ()
        over = (s, cached_rows(node, "cache"), *page)
        of = (node.op, node.output.type.dtype, node.attrs)
        return RowStep(number, *of, reads, Role.WRITE, (width,), over), b * s


def _with_kept(steps: Sequence[RowStep]) -> tuple[RowStep, ...]:
    """Steps whose results are read in the same loop alone need not be kept."""
    run, runs = 0, {s.number: 0 for s in steps[:1]}
    for before, step in pairwise(steps):
        joins = {before.role, step.role} == {Role.POINTWISE} and before.extents == step.extents
        run += not joins
        runs[step.number] = run
    late = {
        read.source
        for step in steps
        for read in step.reads
        if isinstance(read.source, int) and runs[read.source] != runs[step.number]
    }
    return tuple(replace(step, kept=step.number in late) for step in steps)


def apply_view(node: Node, view: View) -> list[View]:
    """What a view operator makes of a view. Raises `NoKernel` where elements would move."""
    attrs = node.attrs
    match node.op:
        case "reshape":
            return [_reshaped(view, attrs["shape"])]
        case "permute":
            return [views.permute(view, attrs["dims"])]
        case "expand":
            return [views.expand(view, attrs["shape"])]
        case "slice":
            axis, step = axis_of(attrs["axis"], len(view.shape)), int(attrs["step"])
            return [views.narrow(view, axis, attrs["start"], node.output.type.shape[axis], step)]
        case "split":
            axis, start = axis_of(attrs["axis"], len(view.shape)), 0
            parts, position = [], start
            for value in node.outputs:
                extent = value.type.shape[axis]
                parts.append(views.narrow(view, axis, position, extent))
                position = position + extent  # type: ignore[assignment]
            return parts
    raise NoKernel(f"{node.op} is no view of a region's kernel")


def unapply_view(node: Node, result: View) -> View:
    """Where the operand's elements lie in the buffer of `result`, which the node's result fills."""
    if node.op == "reshape":
        return _reshaped(result, node.operands[0].type.shape)
    if node.op == "permute":
        dims = node.attrs["dims"]
        return views.permute(result, [dims.index(a) for a in range(len(dims))])
    raise NoKernel(f"a {node.op} of what the region computes")


def _reshaped(view: View, shape: tuple[Dim, ...]) -> View:
    made = views.reshape(view, shape)
    if made is None:
        raise NoKernel("a reshape that moves elements")
    return made
