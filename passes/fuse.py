"""Fuse operators into regions: one kernel for what would be several, values that stay on the chip.

What           operators become the bodies of `fused` nodes, by level. 1: pointwise operators.
               2: and row-wise ones (norms, softmax, rope, writes into caches), and what follows a
               GEMM in its epilogue (splits, swiglu, residual adds). 3: and row-wise regions side by
               side that read the same values, attention with the views around it.
Why it pays    a value inside a region is neither written to memory nor read again, and a step has
               fewer kernels to start. For V3, decode goes from 25 kernels a MoE layer to 13.
Preconditions  stage CANONICAL or OPTIMIZED. `level` and `limits` say what the backend's kernels
               take. A region has at most one anchor; no path leaves it and comes back; it never
               holds both a write in place and a reader of what is written.
Before         graph main(%x: f32[N,8], %r: f32[N,8], @w: f32[8,8], @g: f32[8]) {
                 %y = linear %x, @w : f32[N,8]
                 %z = add %r, %y : f32[N,8]
                 %h = rms_norm %z, @g {eps=1e-06} : f32[N,8]
                 return %z, %h
               }
After          graph main(%x: f32[N,8], %r: f32[N,8], @w: f32[8,8], @g: f32[8]) {
                 %z = fused %x, @w, %r {body=graph body(%x: f32[N,8], %w1: f32[8,8], %r: f32[N,8]) {
                   %y = linear %x, %w1 : f32[N,8]
                   %z = add %r, %y : f32[N,8]
                   return %z
                 }} : f32[N,8]
                 %h = rms_norm %z, @g {eps=1e-06} : f32[N,8]
                 return %z, %h
               }
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dsc.ir.analyses import structural_hash, total_cost
from dsc.ir.dims import Range, bounds
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.layers import home, layer_number
from dsc.ir.program import Program
from dsc.ir.regions import FUSION_LEVELS, RegionLimits, is_free, name_of, role
from dsc.ir.stages import Stage
from dsc.ir.traits import Role
from dsc.passes._regions import refusal
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option
from dsc.rewrite.regions import Grouping, inline_graph, outline

_GEMM_FIRST = (Role.PRODUCT, Role.EXPERTS, Role.ATTENTION)
_ROWWISE = frozenset({Role.POINTWISE, Role.REDUCTION, Role.ROTATION, Role.WRITE})


@dataclass(frozen=True)
class Fuse(Pass):
    """Fuse at `level`; `asked` is the level that was asked for, where a backend takes fewer."""

    level: int = option(3, among=FUSION_LEVELS)
    limits: RegionLimits = field(default_factory=RegionLimits, metadata={"of": "regions"})
    asked: int | None = option(None, among=FUSION_LEVELS)

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})
    ensures = Stage.LOWERED

    def run(self, program: Program, report: PassReport) -> Program:
        """Fuse every entry, and tell its regions by layer."""
        report.facts["level"] = self.level
        if self.asked is not None and self.asked > self.level:
            report.facts["level_asked"] = self.asked
        entries: dict[str, Graph] = {}
        regions: dict[str, Mapping[str, list[str]]] = {}
        for name, graph in program.entries.items():
            entries[name] = graph
            if self.level > 0:
                sweep = _Sweep(graph, self.level, self.limits, report)
                entries[name] = _accepted(sweep.run(), self.limits, report)
            regions[name] = by_layer(entries[name], self.limits)
            report.facts[name] = _measured(graph, entries[name], self.limits, program.symbols)
        report.facts["regions"] = regions
        return replace(program, entries=entries, stage=Stage.LOWERED)


def _accepted(graph: Graph, limits: RegionLimits, report: PassReport) -> Graph:
    """The graph without the regions that the backend's kernels do not take."""
    accepts = limits.accepts
    if accepts is None:
        return graph
    for node in graph.nodes:
        if node.body is not None and not accepts(node):
            report.miss("accepts", node.loc, f"the backend has no kernel for {name_of(node)}")
    return inline_graph(graph, accepts)


def by_layer(graph: Graph, limits: RegionLimits) -> dict[str, list[str]]:
    """The names of a graph's kernels in order, by the layer of the model they belong to."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if not is_free(node, limits):
            layer = layer_number(home(node))
            found.setdefault("" if layer is None else str(layer), []).append(name_of(node))
    return found


def _measured(
    before: Graph, after: Graph, limits: RegionLimits, ranges: Mapping[str, Range]
) -> dict[str, Any]:
    """Kernels and bytes of values they move, before and after; how many bodies differ."""

    def made(graph: Graph) -> list[Node]:
        return [n for n in graph.nodes if not is_free(n, limits)]

    def moved(graph: Graph) -> int:
        spent = total_cost(made(graph))
        return bounds(spent.read + spent.written, ranges).hi

    bodies = [n.body for n in after.nodes if n.body is not None]
    return {
        "kernels": [len(made(before)), len(made(after))],
        "bytes": [moved(before), moved(after)],
        "regions": len(bodies),
        "distinct_bodies": len({structural_hash(b) for b in bodies}),
    }


class _Sweep:
    """One graph on its way to regions: which groups are tried, in which order.

    What may be one region is for `refusal` to say; here only the order of the greedy choices is
    decided. GEMMs choose first, since an epilogue saves the largest values.
    """

    def __init__(self, graph: Graph, level: int, limits: RegionLimits, report: PassReport) -> None:
        self.level = level
        self.limits = limits
        self.report = report
        self.groups = Grouping(graph)
        self.graph = graph
        self.missed: set[tuple[str, str, str]] = set()

    def run(self) -> Graph:
        """The graph with its regions."""
        if self.level >= 2:
            self._epilogues()
        self._chains()
        if self.level >= 3:
            self._siblings()
        self._views()
        self._trim()
        fused = outline(self.groups)
        return fused if any(n.body is not None for n in fused.nodes) else self.graph

    def _positions(self, *roles: Role) -> Iterator[int]:
        """Positions of the nodes of some roles, in order."""
        for i, node in enumerate(self.graph.nodes):
            if role(node) in roles:
                yield i

    def _epilogues(self) -> None:
        """Give every anchor what follows it: views, activations, residual adds."""
        for wanted in _GEMM_FIRST:
            for i in self._positions(wanted):
                again = True
                while again:
                    group = self.groups.owner[i]
                    follow = filter(self._may_follow, self.groups.consumers(group))
                    again = any(self._try(group, c) for c in follow)

    def _may_follow(self, group: int) -> bool:
        """Whether a group is one that epilogues hold. Rope that goes into a cache stays with it."""
        nodes = self.groups.nodes(group)
        if role(nodes[-1]) is Role.ROTATION:
            readers = self.groups.consumers(group)
            if any(role(n) is Role.WRITE for g in readers for n in self.groups.nodes(g)):
                return False
        return all(n.op in self.limits.epilogue for n in nodes)

    def _chains(self) -> None:
        """Join row-wise operators with what they read."""
        for i in self._positions(*_ROWWISE):
            for p in reversed(self.groups.producers(self.groups.owner[i])):
                if all(role(n) in _ROWWISE for n in self.groups.nodes(p)):
                    self._try(p, self.groups.owner[i])

    def _siblings(self) -> None:
        """Join row-wise groups that read the same value, or values of the same group."""
        for value in self.graph.inputs:
            if value.type.dtype.is_float:
                self._side_by_side(self.groups.readers(value.name))
        for i in range(len(self.graph.nodes)):
            values = [v for n in self.groups.nodes(self.groups.owner[i]) for v in n.outputs]
            self._side_by_side({g for v in values for g in self.groups.readers(v.name)})

    def _side_by_side(self, readers: set[int | None]) -> None:
        found = sorted((g for g in readers if g is not None), key=self.groups.rank.__getitem__)
        whole = [g for g in found if all(role(n) in _ROWWISE for n in self.groups.nodes(g))]
        while len(whole) > 1:
            first, *rest = whole
            whole = [g for g in rest if not self._try(first, g, quiet=True)]

    def _views(self) -> None:
        """Let views that cost something be read, or written, by the one region next to them."""
        for i in reversed(list(self._positions(Role.VIEW))):
            group = self.groups.owner[i]
            if self.groups.members[group] != [i]:
                continue
            readers = {g for v in self.graph.nodes[i].outputs for g in self.groups.readers(v.name)}
            (reader,) = readers if len(readers) == 1 else (None,)
            if reader is not None and self._try(group, reader, quiet=True):
                continue
            for p in self.groups.producers(group):
                self._try(p, group, quiet=True)

    def _trim(self) -> None:
        """Put free views at the border of a region out of it: on their own they cost nothing."""
        again = True
        while again:
            again = any([self._trimmed(i) for i in self._positions(Role.VIEW)])

    def _trimmed(self, i: int) -> bool:
        node, group = self.graph.nodes[i], self.groups.owner[i]
        if not self.limits.free(node) or len(self.groups.members[group]) == 1:
            return False
        (source,) = node.operands
        inside = {v.name for n in self.groups.nodes(group) for v in n.outputs}
        readers = {g for v in node.outputs for g in self.groups.readers(v.name)}
        if not isinstance(source, Value) or source.name not in inside:
            self.groups.release(i, ahead=True)
        elif group not in readers:
            self.groups.release(i, ahead=False)
        else:
            return False
        return True

    def _try(self, a: int, b: int, quiet: bool = False) -> bool:
        """Join two groups if that makes a legal region; note why not where it nearly did."""
        groups = self.groups
        nodes, kept = groups.nodes(a, b), groups.kept(a, b)
        why = refusal(nodes, kept, self.level, self.limits) or groups.obstacle(a, b)
        if not why:
            groups.join(a, b)
            self.report.fire(f"level {self.level}")
            return True
        if not quiet:
            self._miss(groups.nodes(a)[-1], groups.nodes(b)[0], why)
        return False

    def _miss(self, first: Node, second: Node, why: str) -> None:
        """Note a near-miss once for each pair of operators and reason."""
        key = (first.op, second.op, why)
        if key not in self.missed:
            self.missed.add(key)
            self.report.miss(f"{first.op} with {second.op}", second.loc or first.loc, why)
