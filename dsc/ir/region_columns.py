"""What follows a product in its region, as families of its columns.

Every value after the product is placed in the product's own rows and columns: a view moves the
place, a pointwise operator stays where its operands are, and operands that lie elsewhere in the row
(the other half of a merged gate|up) are read at a shift. What leaves the region then is a walk over
columns, with operators to apply on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

from dsc.ir.dims import Dim, product
from dsc.ir.graph import Graph, Node, Operand
from dsc.ir.op import traits_of
from dsc.ir.region_steps import Body, Lines, NoKernel, Place, Read, Step, apply_view
from dsc.ir.regions import role
from dsc.ir.traits import Role
from dsc.ir.views import View, dense_strides, expand

PRODUCT = -1
"""The step number of the product itself."""
Axis = tuple[Dim, Dim]
"""Extent and stride."""


@dataclass(frozen=True, slots=True)
class ColumnStep(Step):
    """A pointwise operator on columns of a family, at a shift from them."""

    shift: int


@dataclass(frozen=True, slots=True)
class Family:
    """Columns that are treated alike: `walk` lists extents and strides, from column `start` on.

    The last axis of the walk has stride 1. `shifts` are the distances of the further columns that
    the same results need. `steps` are the operators: one may be wanted at several shifts. The inner
    axes of their lines are those of the walk. `writes` say which step's value goes where.
    """

    start: int
    walk: tuple[tuple[int, int], ...]
    shifts: tuple[int, ...]
    steps: tuple[ColumnStep, ...]
    writes: tuple[tuple[int, Lines], ...]

    @property
    def blocks(self) -> int:
        """How many times the last axis of the walk occurs."""
        return prod(extent for extent, _ in self.walk[:-1])

    @property
    def width(self) -> int:
        """The extent of the last axis of the walk."""
        return self.walk[-1][0]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A value: the step that makes it, and where it lies in the product."""

    number: int
    place: View


@dataclass(frozen=True, slots=True)
class _Step:
    """A pointwise operator; views are those of region operands."""

    node: Node
    place: View
    operands: tuple[Read | View, ...]


@dataclass
class _Draft:
    """A family under construction: its raw column axes, and who walks them."""

    start: int
    raw: list[tuple[int, int]]
    place: View
    order: list[tuple[int, int]] = field(default_factory=list)
    shifts: set[int] = field(default_factory=set)
    writes: list[tuple[int, View]] = field(default_factory=list)


class Columns(Body):
    """A body around the product that `anchor` computes, as families of its columns."""

    def __init__(
        self,
        body: Graph,
        anchor: Node,
        places: Sequence[Place] | None = None,
        targets: Sequence[View] | None = None,
    ) -> None:
        super().__init__(body, places, targets)
        if any(x.name not in self.given for x in anchor.operands):
            raise NoKernel(f"a {anchor.op} of what the region computes")
        y = anchor.output
        self.rows, self.m = product(y.type.shape[:-1]), y.type.shape[-1]
        place = View(0, y.type, dense_strides(y.type.shape))
        self.placed = {y.name: _Placed(PRODUCT, place)}
        self.steps: list[_Step] = []
        for node in body.nodes:
            if node is not anchor:
                self._follow(node)

    def families(self) -> tuple[Family, ...]:
        """All families, in the order of their columns. Raises `NoKernel`."""
        drafts: dict[tuple[object, ...], _Draft] = {}
        for value, target in zip(self.body.outputs, self.targets, strict=True):
            placed = self.placed.get(value.name)
            if placed is None:
                raise NoKernel("a result that is not made of the product")
            raw = self._columns(placed.place)
            start = _start(placed.place)
            draft = drafts.setdefault((start, *raw), _Draft(start, raw, placed.place))
            draft.writes.append((placed.number, target))
            self._need(draft, placed.number, 0)
        found = [self._family(d) for _, d in sorted(drafts.items(), key=lambda p: p[1].start)]
        _check_apart(found)
        return tuple(found)

    # --- reading the body -------------------------------------------------------------------------

    def _follow(self, node: Node) -> None:
        if role(node) is Role.CONSTANT:
            return
        source = self.placed.get(node.operands[0].name)
        if traits_of(node.op).role is Role.VIEW:
            if source is not None:
                made = apply_view(node, source.place)
                for value, place in zip(node.outputs, made, strict=True):
                    self.placed[value.name] = _Placed(source.number, place)
            return
        if traits_of(node.op).role is not Role.POINTWISE:
            raise NoKernel(f"{node.op} in a region around a product")
        inside = [self.placed[x.name] for x in node.operands if x.name in self.placed]
        if not inside:
            raise NoKernel(f"{node.op} of values outside of the product")
        own = min((p.place for p in inside), key=_start)
        operands = tuple(self._read(x, own) for x in node.operands)
        self.placed[node.output.name] = _Placed(len(self.steps), own)
        self.steps.append(_Step(node, own, operands))

    def _read(self, x: Operand, own: View) -> Read | View:
        """An operand of an operator that lies at `own`."""
        if x.name in self.literals:
            return Read(self.literals[x.name], x.type.dtype)
        if x.name not in self.placed:
            if x.name not in self.given:
                raise NoKernel("an operand that neither enters the region nor is its product")
            return expand(self.given[x.name], own.shape)
        placed = self.placed[x.name]
        if placed.place.shape != own.shape or _steps(placed.place) != _steps(own):
            raise NoKernel("operands that lie differently in the product")
        return Read(placed.number, x.type.dtype, _start(placed.place) - _start(own))

    def _need(self, draft: _Draft, number: int, shift: int) -> None:
        """Note that a family needs a step at a shift, and what that needs in turn."""
        if number == PRODUCT:
            draft.shifts.add(shift)
            return
        if (number, shift) in draft.order:
            return
        for operand in self.steps[number].operands:
            if isinstance(operand, Read) and isinstance(operand.source, int):
                self._need(draft, operand.source, shift + operand.shift)
        draft.order.append((number, shift))

    # --- rows and columns -------------------------------------------------------------------------

    def _split(self, place: View) -> tuple[list[int], list[int]]:
        """Axes of a place that walk rows, outermost first, and those that walk columns."""
        rows: list[int] = []
        columns: list[int] = []
        for axis, (extent, stride) in enumerate(zip(place.shape, place.strides, strict=True)):
            if extent == 1:
                continue
            within = isinstance(stride, int) and isinstance(self.m, int) and stride < self.m
            (columns if within else rows).append(axis)
        order: list[int] = []
        wanted: Dim = self.m
        while rows:
            nearest = next((a for a in rows if place.strides[a] == wanted), None)
            if nearest is None:
                raise NoKernel("rows that are not the product's")
            rows.remove(nearest)
            order.insert(0, nearest)
            wanted = wanted * place.shape[nearest]
        if product(tuple(place.shape[a] for a in order)) != self.rows:
            raise NoKernel("a part of the product's rows")
        return order, columns

    def _columns(self, place: View) -> list[tuple[int, int]]:
        """Extents and strides of a place's columns, widest stride first."""
        _, columns = self._split(place)
        found = []
        for axis in columns:
            extent, stride = place.shape[axis], place.strides[axis]
            if not isinstance(extent, int) or not isinstance(stride, int) or stride < 1:
                raise NoKernel("columns of a symbolic number")
            found.append((extent, stride))
        found.sort(key=lambda pair: -pair[1])
        if not found or found[-1][1] != 1:
            found.append((1, 1))
        return found

    def _walked(self, view: View, place: View, draft: _Draft, shift: int) -> _Walked:
        """How `view`, of the shape of `place`, is read or written along a family's columns."""
        rows, columns = self._split(place)
        lead = [(view.shape[a], view.strides[a]) for a in rows]
        pairs = sorted(((place.strides[a], view.strides[a]) for a in columns), key=_first)
        step = pairs[-1][1] if pairs and pairs[-1][0] == 1 else 0
        if all(own * step == other for own, other in pairs):
            away = draft.start + shift - place.offset
            inner = [step * stride for _, stride in draft.raw]
            return _Walked(view, lead, inner, view.offset + step * away)
        if self._columns(place) != draft.raw or place.offset != draft.start + shift:
            raise NoKernel("an operand that lies differently from the product's columns")
        inner = [other for _, other in pairs]
        return _Walked(view, lead, inner + [0] * (len(draft.raw) - len(inner)), view.offset)

    def _family(self, draft: _Draft) -> Family:
        """A family, its column axes joined where everybody walks them evenly."""
        reads: dict[tuple[int, int, int], _Walked] = {}
        for number, shift in draft.order:
            step = self.steps[number]
            for i, operand in enumerate(step.operands):
                if isinstance(operand, View):
                    reads[number, shift, i] = self._walked(operand, step.place, draft, shift)
        writes = [(n, self._walked(v, draft.place, draft, 0)) for n, v in draft.writes]
        walked = [*reads.values(), *(w for _, w in writes)]
        walk, joined = _join(draft.raw, walked)
        lines = [_lines(w, walk, inner) for w, inner in zip(walked, joined, strict=True)]
        by_key = dict(zip(reads, lines, strict=False))
        steps = []
        for number, shift in draft.order:
            node, operands = self.steps[number].node, self.steps[number].operands
            given = tuple(
                Read(by_key[number, shift, i], o.dtype) if isinstance(o, View) else o
                for i, o in enumerate(operands)
            )
            of = (node.op, node.output.type.dtype, node.attrs)
            steps.append(ColumnStep(number, *of, given, shift))
        shifts = tuple(sorted(draft.shifts - {0}))
        stores = [(n, a) for (n, _), a in zip(writes, lines[len(reads) :], strict=True)]
        return Family(draft.start, tuple(walk), shifts, tuple(steps), tuple(stores))


@dataclass(frozen=True, slots=True)
class _Walked:
    """A view along a family's raw column axes, row axes apart."""

    view: View
    lead: Sequence[Axis]
    inner: Sequence[Dim]
    offset: Dim


def _lines(walked: _Walked, walk: Sequence[tuple[int, int]], inner: Sequence[Dim]) -> Lines:
    """A view with the product's row axes, then the axes of a walk."""
    shape = (*(d for d, _ in walked.lead), *(d for d, _ in walk))
    strides = (*(s for _, s in walked.lead), *inner)
    type = walked.view.type.with_shape(shape)
    return Lines.of(View(walked.view.buffer, type, strides, walked.offset), len(walked.lead))


def _start(place: View) -> int:
    """The first column of a place. Raises `NoKernel` where it is not known."""
    if not isinstance(place.offset, int):
        raise NoKernel("columns at a symbolic place")
    return place.offset


def _first(pair: tuple[Dim, Dim]) -> int:
    assert isinstance(pair[0], int)
    return -pair[0]


def _steps(place: View) -> list[Dim]:
    """Strides of the axes that have more than one element."""
    return [s for d, s in zip(place.shape, place.strides, strict=True) if d != 1]


def _join(
    raw: Sequence[tuple[int, int]], walked: Sequence[_Walked]
) -> tuple[list[tuple[int, int]], list[list[Dim]]]:
    """Column axes joined with their neighbours where the product and all accesses allow it."""
    walk: list[tuple[int, int]] = [raw[0]]
    inner: list[list[Dim]] = [[w.inner[0]] for w in walked]
    for axis, (extent, stride) in enumerate(raw[1:], start=1):
        even = walk[-1][1] == stride * extent
        if even and all(
            i[-1] == w.inner[axis] * extent for i, w in zip(inner, walked, strict=True)
        ):
            walk[-1] = (walk[-1][0] * extent, stride)
            for i, w in zip(inner, walked, strict=True):
                i[-1] = w.inner[axis]
            continue
        walk.append((extent, stride))
        for i, w in zip(inner, walked, strict=True):
            i.append(w.inner[axis])
    return walk, inner


def _check_apart(families: Sequence[Family]) -> None:
    """Raise `NoKernel` where a column would be computed twice."""
    spans: list[tuple[int, int]] = []
    for family in families:
        starts = [family.start + s for s in (0, *family.shifts)]
        for extent, stride in family.walk[:-1]:
            starts = [s + i * stride for s in starts for i in range(extent)]
        spans += [(s, s + family.walk[-1][0]) for s in starts]
    spans.sort()
    if any(before[1] > after[0] for before, after in pairwise(spans)):
        raise NoKernel("columns of the product that are wanted in two forms")
