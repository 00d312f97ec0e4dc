"""One graph on a rank: the propagation behind `shard`.

How an operator is shared is its declaration's affair (`dsc.ir.placement`). Here values are followed
through a graph, weights cut, collectives placed where a value is needed whole, and reasons told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dsc.ir.graph import Attrs, GraphBuilder, Node, Operand, Value, Weight
from dsc.ir.op import infer, lookup, traits_of
from dsc.ir.placement import COLUMNS, EXPERTS, Choice, Part, PlacedCall, Placement, Placing, Split
from dsc.ir.program import Program
from dsc.ir.ranks import RANK
from dsc.ir.types import DType
from dsc.ir.weights import WeightExpr, apply
from dsc.rewrite.base import PassReport
from dsc.rewrite.rebuild import Operands


@dataclass
class Sharding:
    """The state of one run: where the values of the graph lie, and the weights that were cut.

    `columns` names the results of which readers need only a part of the columns; `experts` is the
    wish for how experts are shared.
    """

    program: Program
    ranks: int
    experts: str
    report: PassReport
    weights: dict[str, WeightExpr] = field(default_factory=dict)
    columns: frozenset[str] = frozenset()
    placed: dict[str, Placement] = field(default_factory=dict)
    _whole: dict[str, Value] = field(default_factory=dict)
    _loc: dict[str, str] = field(default_factory=dict)

    def enter(self, columns: frozenset[str]) -> None:
        """Begin another graph."""
        self.columns = columns
        self.placed.clear()
        self._whole.clear()
        self._loc.clear()

    def of(self, x: Operand | None) -> Placement:
        """How an operand lies."""
        return self.placed.get(x.name) if isinstance(x, Value) else None

    def run(self, b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Value] | None:
        """Append what a rank runs in the place of `node`; `None` where the node stays as it is."""
        given = _named(node.op, operands)
        lies = {name: self.of(x) for name, x in given.items() if self.of(x) is not None}
        wish = self._wish(node)
        if not lies and not wish:
            return None
        answer = self.ask(node, lies, wish, operands)
        if isinstance(answer, str):
            if not lies:
                self.report.miss("shard", node.loc, answer)
                return None
            if any(isinstance(placement, Split) for placement in lies.values()):
                at = ", ".join(str(given[name]) for name in lies)
                self.report.miss("shard", node.loc, f"{node.op} takes {at} whole: {answer}")
            answer = Placing((), whole=tuple(lies))
        values = self._place(b, node, given, answer)
        self.placed.update(zip((v.name for v in values), answer.results, strict=False))
        self._loc.update((v.name, node.loc) for v in values)
        return values

    def ask(
        self,
        node: Node,
        lies: Mapping[str, Placement],
        wish: str = "",
        operands: Operands | None = None,
    ) -> Placing | str:
        """How ranks share a node whose operands lie so, or why not."""
        place = traits_of(node.op).place
        if place is None:
            return f"{node.op} does not say how ranks share it"
        given = _named(node.op, node.inputs if operands is None else operands)
        types = {name: x.type for name, x in given.items() if x is not None}
        weights = frozenset(name for name, x in given.items() if isinstance(x, Weight))
        results = tuple(v.type for v in node.outputs)
        return place(
            PlacedCall(
                types, node.attrs, results, lies=lies, weights=weights, ranks=self.ranks, wish=wish
            )
        )

    def _wish(self, node: Node) -> str:
        """What is asked of a node even where all its operands are whole."""
        grants = traits_of(node.op).grants
        if grants == EXPERTS:
            return self.experts
        return COLUMNS if grants == COLUMNS and node.output.name in self.columns else ""

    def _place(
        self, b: GraphBuilder, node: Node, given: dict[str, Operand | None], placing: Placing
    ) -> tuple[Value, ...]:
        """Append `node` as a rank runs it; its results keep their names."""
        given |= {name: self.whole(b, given[name]) for name in placing.whole}
        if placing.choice is not None:
            given |= self._local(b, placing.choice, given)
        for name, part in placing.parts.items():
            weight = given[name]
            assert isinstance(weight, Weight)
            given[name] = self.part(weight, part)
        if placing.kind:
            self.report.fire(placing.kind)
        operands = tuple(given.values())
        attrs = Attrs({**node.attrs, **placing.attrs})
        types = infer(node.op, operands, attrs)
        outputs = tuple(Value(v.name, t) for v, t in zip(node.outputs, types, strict=True))
        b.nodes.append(Node(node.op, operands, attrs, outputs, node.loc))
        return outputs

    def whole(self, b: GraphBuilder, x: Operand | None) -> Operand | None:
        """`x` as every rank needs it: gathered or summed by a collective, once."""
        placement = self.of(x)
        if not isinstance(x, Value) or placement is None:
            return x
        if x.name not in self._whole:
            op, hint, attrs = "all_reduce", f"{x.name}.sum", {"ranks": self.ranks}
            if isinstance(placement, Split):
                op, hint, attrs["axis"] = "all_gather", f"{x.name}.all", placement.axis
            (found,) = b.call(op, x, hint=hint, loc=self._loc.get(x.name, b.loc), **attrs)
            self.report.fire(op)
            self._whole[x.name] = found
        return self._whole[x.name]

    def part(self, weight: Weight, part: Part) -> Weight:
        """This rank's part of a weight along an axis, as a slice expression."""
        expr, axis = self.program.weights[weight.name], part.axis
        cut = self._sliced(expr, axis)
        if part.pieces > 1:
            each = expr.type.shape[axis] // part.pieces
            bounds = [(i * each, i * each + each) for i in range(part.pieces)]
            pieces = [apply("slice", expr, axis=axis, start=s, end=e) for s, e in bounds]
            cut = apply("concat", *(self._sliced(piece, axis) for piece in pieces), axis=axis)
        return self._keep(f"{weight.name}.shard_{axis}", cut)

    def _sliced(self, expr: WeightExpr, axis: int) -> WeightExpr:
        """This rank's part of a weight expression."""
        each = expr.type.shape[axis] // self.ranks
        return apply("slice", expr, axis=axis, start=RANK * each, end=RANK * each + each)

    def _keep(self, name: str, expr: WeightExpr) -> Weight:
        """The weight called `name`, which is `expr`."""
        self.weights[name] = expr
        return Weight(name, expr.type)

    def _local(
        self, b: GraphBuilder, choice: Choice, given: Mapping[str, Operand | None]
    ) -> dict[str, Operand | None]:
        """A choice of experts as this rank sees it: its own by their place here, others weigh 0.

        Two tables with an entry an expert say where each lies; they are all that differs by rank.
        """
        number = choice.experts
        mine = number // self.ranks

        def constant(value: int) -> WeightExpr:
            return apply("full", shape=(), value=float(value), dtype=DType.i64)

        first = RANK * -mine
        place = apply("arange", start=first, end=first + number, dtype=DType.i64)
        inside = apply(
            "logical_and",
            apply("ge", place, constant(0)),
            apply("lt", place, constant(mine)),
        )
        local = self._keep(f"rank.place_of_{number}", apply("where", inside, place, constant(0)))
        present = self._keep(f"rank.has_of_{number}", apply("cast", inside, dtype=DType.f32))
        index = given[choice.index]
        (here,) = b.call("take", local, index, axis=0, hint="place")
        (mask,) = b.call("take", present, index, axis=0, hint="has")
        (weight,) = b.call("mul", given[choice.weight], mask, hint="w_here")
        return {choice.index: here, choice.weight: weight}


def _named(op: str, operands: Operands) -> dict[str, Operand | None]:
    """Operands under the names of the operator's signature."""
    return dict(zip(lookup(op).operand_names(len(operands)), operands, strict=True))
