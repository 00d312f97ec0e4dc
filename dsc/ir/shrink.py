"""Maps every large dim of a program to a small one, so that a program of any width interprets.

Real widths are too big to interpret: one expert layer of DeepSeek-V3 is 45 GB in fp32. `shrink`
keeps every node, layer and entry and changes the numbers alone: dims of weights, inputs and
attributes, consistently, so that all types infer again. Numbers up to 8 stay, even stays even,
whole blocks stay whole, groups still divide the experts. Equal numbers map to equal ones; where
that leaves no solution, equal numbers of the same role (the name of the weight or input that has
them); where that fails too, whatever the operators demand. Weights become seeded random tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsc.errors import VerificationError
from dsc.ir.demands import demand, dim_attrs, sizes_of
from dsc.ir.extents import Extent, System, Unsolvable
from dsc.ir.graph import Attrs, Graph, GraphBuilder, Operand, Value, Weight
from dsc.ir.op import TypeMismatch, lookup
from dsc.ir.program import Program
from dsc.ir.sized import Shape, Sized
from dsc.ir.types import TensorType
from dsc.ir.weights import Source, WeightExpr, apply, random_source, source_types

Scope = dict[str, Shape]


def shrink(program: Program) -> Program:
    """The program at small sizes, over random weights.

    The integers of `meta["config"]` follow where that is unambiguous. Raises `VerificationError`
    when no small sizes satisfy what the operators demand.
    """
    survey = Survey(program)
    roles: tuple[tuple[str, Callable[[int], object] | None], ...] = (
        ("equal numbers", lambda unknown: 0),
        ("equal numbers of one role", lambda unknown: survey.system.labels.get(unknown, unknown)),
        ("equal extents", None),
    )
    reasons: list[str] = []
    for name, role in roles:
        system = survey.system.copy()
        if role is not None:
            system.merge_by(role)
        try:
            values = system.solve()
            return Rebuild(
                survey, [values[system.find(u)] for u in range(len(system.parent))]
            ).run()
        except (Unsolvable, TypeMismatch) as problem:
            reasons.append(f"{name} kept equal: {problem}")
    raise VerificationError(
        f"no small sizes fit the program {program.name}\n" + "\n".join(reasons),
        hint="verify this pass on a narrower model",
    )


@dataclass
class Survey:
    """The extents of a program: of its weights, sources, inputs and attributes."""

    program: Program
    system: System = field(default_factory=System)
    sources: Scope = field(default_factory=dict)
    weights: Scope = field(default_factory=dict)
    inputs: dict[str, Scope] = field(default_factory=dict)
    stacked: dict[int, Extent] = field(default_factory=dict)
    """Number of operands of each stack among the weight expressions, by its identity."""
    attrs: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Extents of attributes, by the identity of the node or expression that has them."""

    def __post_init__(self) -> None:
        for name, expr in self.program.weights.items():
            shape = self._expr(expr)
            self._same(shape, self._shape(expr.type, name))
            self.weights[name] = shape
        for graph in self.program.entries.values():
            scope = {v.name: self._shape(v.type, v.name) for v in graph.inputs}
            for earlier in self.inputs.values():
                for name in earlier.keys() & scope.keys():
                    if len(earlier[name]) == len(scope[name]):
                        self._same(earlier[name], scope[name])
            self.inputs[graph.name] = dict(scope)
            self._graph(graph, scope)

    def _shape(self, t: TensorType, name: str = "") -> Shape:
        role = re.sub(r"\d+", "#", name)
        return [
            self.system.extent(dim, f"{role} axis {axis}" if name else "")
            for axis, dim in enumerate(t.shape)
        ]

    def _same(self, a: Shape, b: Shape) -> None:
        for x, y in zip(a, b, strict=True):
            self.system.equate(x, y)

    def _expr(self, expr: WeightExpr) -> Shape:
        if isinstance(expr, Source):
            shape = self._shape(expr.type, expr.key)
            known = self.sources.setdefault(expr.key, shape)
            self._same(known, shape)
            return known
        ins: list[Shape] = []
        for arg in expr.args:  # the experts of a layer: one form, hundreds of times
            twin = bool(ins) and _same_form(expr.args[0], arg)
            ins.append(self._twin(expr.args[0], arg, ins[0]) if twin else self._expr(arg))
        out = self._shape(expr.type)
        types = [arg.type for arg in expr.args]
        if expr.op == "stack":
            self.stacked[id(expr)] = out[0]
        self._demand(expr.op, expr, types, [expr.type], ins, [out], expr.attrs, in_weights=True)
        return out

    def _twin(self, first: WeightExpr, other: WeightExpr, shape: Shape) -> Shape:
        """Let an expression of the same form share the extents of the first."""
        if isinstance(first, Source) and isinstance(other, Source):
            mine = self.sources[first.key]
            self._same(mine, self.sources.setdefault(other.key, mine))
        elif not isinstance(first, Source) and not isinstance(other, Source):
            self.attrs.setdefault(id(other), self.attrs[id(first)])
            if id(first) in self.stacked:
                self.stacked.setdefault(id(other), self.stacked[id(first)])
            for a, b in zip(first.args, other.args, strict=True):
                self._twin(a, b, shape)
        return shape

    def _graph(self, graph: Graph, scope: Scope) -> list[Shape]:
        for node in graph.nodes:
            ins = [None if x is None else self._operand(x, scope) for x in node.inputs]
            outs = [self._shape(v.type) for v in node.outputs]
            if node.body is not None:
                self._body(node.body, ins, outs)
            else:
                types = [None if x is None else x.type for x in node.inputs]
                results = [v.type for v in node.outputs]
                self._demand(node.op, node, types, results, ins, outs, node.attrs)
            scope.update(zip((v.name for v in node.outputs), outs, strict=True))
        return [self._operand(x, scope) for x in graph.outputs]

    def _body(self, body: Graph, ins: Sequence[Shape | None], outs: Sequence[Shape]) -> None:
        scope = {v.name: x for v, x in zip(body.inputs, ins, strict=True) if x is not None}
        for made, out in zip(self._graph(body, scope), outs, strict=True):
            self._same(made, out)

    def _operand(self, x: Operand, scope: Scope) -> Shape:
        return scope[x.name] if isinstance(x, Value) else self.weights[x.name]

    def _demand(
        self,
        op: str,
        owner: object,
        types: Sequence[TensorType | None],
        results: Sequence[TensorType],
        ins: Sequence[Shape | None],
        outs: Sequence[Shape],
        attrs: Mapping[str, Any],
        in_weights: bool = False,
    ) -> None:
        extents = {name: sizes_of(attrs[name], self.system) for name in dim_attrs(op, attrs)}
        extents = self.attrs.setdefault(id(owner), extents)
        names = lookup(op).operand_names(len(types))
        operands = {n: t for n, t in zip(names, types, strict=True) if t is not None}
        shapes = {n: x for n, x in zip(names, ins, strict=True) if x is not None}
        call = Sized(
            operands, attrs, tuple(results), system=self.system, op=op, ins=shapes, outs=outs,
            extents=extents, in_weights=in_weights,
        )  # fmt: skip
        demand(call)


@dataclass
class Rebuild:
    """The program again, with the values that were found for its extents."""

    survey: Survey
    values: Sequence[int]
    made: dict[int, WeightExpr] = field(default_factory=dict)

    def run(self) -> Program:
        """The shrunk program. Raises `TypeMismatch` where the values do not fit after all."""
        program = self.survey.program
        weights = {name: self._expr(expr) for name, expr in program.weights.items()}
        types = {name: expr.type for name, expr in weights.items()}
        entries = {}
        for name, graph in program.entries.items():
            shapes = self.survey.inputs[name]
            inputs = [Value(v.name, self._type(v.type, shapes[v.name])) for v in graph.inputs]
            entries[name] = self._graph(graph, inputs, types)
        found = source_types(weights.values())
        return replace(
            program,
            interface=program.interface.fitted(entries.values()),
            entries=entries,
            weights=weights,
            source=random_source(found),
            meta=self._meta(program.meta),
        )

    def _type(self, t: TensorType, shape: Shape) -> TensorType:
        return t.with_shape(tuple(extent.value(self.values.__getitem__) for extent in shape))

    def _attrs(self, owner: object, attrs: Mapping[str, Any]) -> dict[str, Any]:
        return {**attrs, **self._sizes(self.survey.attrs.get(id(owner), {}))}

    def _sizes(self, value: Any) -> Any:
        if isinstance(value, Extent):
            return value.value(self.values.__getitem__)
        if isinstance(value, dict):
            return {name: self._sizes(v) for name, v in value.items()}
        return tuple(self._sizes(v) for v in value)

    def _expr(self, expr: WeightExpr) -> WeightExpr:
        if id(expr) not in self.made:
            self.made[id(expr)] = self._expr_anew(expr)
        return self.made[id(expr)]

    def _expr_anew(self, expr: WeightExpr) -> WeightExpr:
        if isinstance(expr, Source):
            return Source(expr.key, self._type(expr.type, self.survey.sources[expr.key]))
        args = expr.args
        if expr.op == "stack":
            kept = self.survey.stacked[id(expr)].value(self.values.__getitem__)
            args = args[:kept] if isinstance(kept, int) else args
        return apply(expr.op, *map(self._expr, args), **self._attrs(expr, expr.attrs))

    def _graph(
        self, graph: Graph, inputs: Sequence[Value], weights: Mapping[str, TensorType]
    ) -> Graph:
        scope = {v.name: v for v in inputs}

        def operand(x: Operand | None) -> Operand | None:
            if isinstance(x, Weight):
                return Weight(x.name, weights[x.name])
            return None if x is None else scope[x.name]

        b = GraphBuilder()
        for node in graph.nodes:
            operands = tuple(operand(x) for x in node.inputs)
            attrs = Attrs(self._attrs(node, node.attrs))
            if node.body is not None:
                given = (x for x in operands if x is not None)
                inner = [
                    Value(v.name, x.type) for v, x in zip(node.body.inputs, given, strict=True)
                ]
                attrs = attrs.updated(body=self._graph(node.body, inner, weights))
            scope.update((v.name, v) for v in b.again(node, operands, attrs))
        results = tuple(x for x in map(operand, graph.outputs) if x is not None)
        return replace(graph, inputs=tuple(inputs), nodes=tuple(b.nodes), outputs=results)

    def _meta(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        config = meta.get("config")
        if not isinstance(config, dict):
            return dict(meta)
        sizes: dict[int, set[int]] = {}
        for original, value in zip(self.survey.system.original, self.values, strict=True):
            sizes.setdefault(original, set()).add(value)
        config = {
            key: min(sizes[n]) if _is_width(key, n) and len(sizes.get(n, ())) == 1 else n
            for key, n in config.items()
        }
        return {**meta, "config": config}


def _same_form(a: WeightExpr, b: WeightExpr) -> bool:
    """Whether two expressions differ in the keys of their sources alone."""
    if isinstance(a, Source) or isinstance(b, Source):
        return isinstance(a, Source) and isinstance(b, Source) and a.type == b.type
    same = a.op == b.op and a.type == b.type and a.attrs == b.attrs and len(a.args) == len(b.args)
    return same and all(map(_same_form, a.args, b.args))


def _is_width(key: str, value: object) -> bool:
    """Whether a number of config.json is a dim."""
    return isinstance(value, int) and key.endswith(
        ("_size", "_dim", "_rank", "_heads", "_experts", "_value_heads")
    )
