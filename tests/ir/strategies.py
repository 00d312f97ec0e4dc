"""Random well-typed graphs and programs, for every test that wants a property of all of them.

`graphs()` draws graphs that verify: chains over shared values with symbolic dims, weights, fused
bodies, operators with several results, odd names, locations and floats; and single calls of any
operator of the registry. `programs()` wraps them with weight expressions, ranges and metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

from dsc.ir.dims import Dim, Range, Sym, symbol
from dsc.ir.graph import Graph, GraphBuilder, Operand, Value, Weight
from dsc.ir.op import registry
from dsc.ir.parser import parse_operands
from dsc.ir.program import Program
from dsc.ir.stages import Stage, is_legal
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Source, WeightExpr, apply, random_source, sources

RANGES = {"B": Range(1, 4), "S": Range(1, 8), "P": Range(0, 9)}
SIZES = {"B": 2, "S": 3, "P": 4}
ODD_FLOATS = (1e-6, 1e-20, 5e-324, 0.1, 1e22, float("inf"), 0.0, -0.0)
SINGLE = sorted(
    name
    for name, definition in registry().items()
    if definition.example and is_legal(name, Stage.TRACED)
)

names = st.text("abcXYZ019_.$-é", min_size=1, max_size=8)
locations = st.one_of(st.just(""), st.text(max_size=12), st.just('model.layers.3."odd" \\ path'))
symbols = st.sampled_from([symbol(n) for n in sorted(RANGES)])


@st.composite
def dims(draw: st.DrawFn, depth: int = 3) -> Dim:
    """A dim: small polynomials and floor divisions over B, S and P."""
    if depth == 0:
        return draw(st.one_of(st.integers(-5, 70), symbols))
    a, b = draw(dims(depth - 1)), draw(dims(depth - 1))
    match draw(st.sampled_from(("+", "-", "*", "//", "a"))):
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case "//":
            return a // draw(st.integers(1, 9))
    return a


def call_graph(op: str, text: str, dtype: DType | None = None) -> Graph:
    """A graph of one call, from operand types and attributes in an operator's `example` form.

    With `dtype`, fp32 operands become that type where the operator leaves the type open.
    """
    operands, attrs = parse_operands(text)
    definition = registry()[op]
    builder = GraphBuilder("call")
    values: list[Operand | None] = []
    for index, (t, _) in enumerate(operands):
        declared = definition.operands[min(index, len(definition.operands) - 1)].pattern.dtype
        is_open = declared not in DType.__members__ and declared != "bool"
        wide = dtype is not None and is_open and t.dtype is DType.f32
        values.append(builder.input(f"x{index}", t.with_dtype(dtype) if wide and dtype else t))
    outputs = builder.call(op, *values, **attrs)
    return builder.finish(outputs)


@st.composite
def graphs(draw: st.DrawFn, steps: int = 8, name: str = "main", bodies: bool = True) -> Graph:
    """A graph that verifies and runs."""
    grow = _Grow(draw, name, bodies)
    for _ in range(draw(st.integers(1, steps))):
        grow.step()
    return grow.finish()


class _Grow:
    """Appends random nodes to a builder; `pool` holds the values to choose from."""

    def __init__(self, draw: st.DrawFn, name: str, bodies: bool) -> None:
        self.draw = draw
        self.b = GraphBuilder(name)
        self.bodies = bodies
        self.dtype = draw(st.sampled_from((DType.f32, DType.bf16)))
        B, S, P = (symbol(n) for n in "BSP")
        self.b.input("b", TensorType(self.dtype, (B,)))
        self.b.input("s", TensorType(self.dtype, (S,)))
        self.b.input("p", TensorType(self.dtype, (P,)))
        shape = (B, S, draw(st.sampled_from((4, 6))))
        self.pool: list[Value] = [self.b.input(self.hint(), TensorType(self.dtype, shape))]

    def hint(self) -> str:
        return self.draw(names)

    def pick(self) -> Value:
        return self.draw(st.sampled_from(self.pool))

    def weight(self, *shape: Dim, dtype: DType | None = None) -> Weight:
        t = TensorType(dtype or self.dtype, shape)
        return Weight(f"w/{'x'.join(map(str, shape))}.{t.dtype}", t)

    def add(self, op: str, *operands: Operand | None, **attrs: Any) -> tuple[Value, ...]:
        out = self.b.call(op, *operands, hint=self.hint(), loc=self.draw(locations), **attrs)
        self.pool += [v for v in out if v.type.dtype is self.dtype]
        return out

    def step(self) -> None:
        moves: list[Callable[[Value], object]] = [
            self.pointwise, self.norm, self.project, self.flatten, self.turn, self.part,
            self.join, self.reduce, self.convert, self.constant, self.single,
        ]  # fmt: skip
        if self.bodies:
            moves.append(self.fuse)
        self.draw(st.sampled_from(moves))(self.pick())

    def pointwise(self, x: Value) -> None:
        op = self.draw(st.sampled_from(("add", "mul", "sub", "maximum", "swiglu", "silu", "neg")))
        self.add(op, *([x] if op in ("silu", "neg") else [x, x]))

    def norm(self, x: Value) -> None:
        eps = self.draw(st.sampled_from(ODD_FLOATS))
        if x.type.rank and isinstance(x.type.shape[-1], int):
            op = self.draw(st.sampled_from(("rms_norm", "layer_norm")))
            self.add(op, x, self.weight(x.type.shape[-1]), eps=eps)

    def project(self, x: Value) -> None:
        if x.type.rank and isinstance(x.type.shape[-1], int):
            width = self.draw(st.sampled_from((2, 4, 6)))
            bias = self.weight(width) if self.draw(st.booleans()) else None
            self.add("linear", x, self.weight(width, x.type.shape[-1]), bias)

    def flatten(self, x: Value) -> None:
        if x.type.rank >= 2:
            first, second, *rest = x.type.shape
            self.add("reshape", x, shape=(first * second, *rest))
        else:
            self.add("reshape", x, shape=(1, *x.type.shape, 1))

    def turn(self, x: Value) -> None:
        order = self.draw(st.permutations(range(x.type.rank)))
        self.add("permute", x, dims=tuple(order))

    def part(self, x: Value) -> None:
        last = x.type.shape[-1] if x.type.rank else None
        if isinstance(last, int) and last >= 2:
            self.add("split", x, sizes=(1, last - 1))
            self.add("slice", x, axis=-1, start=0, end=last, step=2)
        elif x.type.rank and isinstance(last, Sym):
            self.add("slice", x, axis=-1, start=0, end=last)

    def join(self, x: Value) -> None:
        if x.type.rank:
            self.add("concat", x, x, axis=self.draw(st.integers(-x.type.rank, x.type.rank - 1)))

    def reduce(self, x: Value) -> None:
        if x.type.rank:
            op = self.draw(st.sampled_from(("sum", "mean")))
            self.add(op, x, axes=(-1,), keepdims=self.draw(st.booleans()))

    def convert(self, x: Value) -> None:
        dtype = self.draw(st.sampled_from((DType.f16, DType.f32, DType.bf16, DType.boolean)))
        self.add("cast", x, dtype=dtype)

    def constant(self, x: Value) -> None:
        value = self.draw(st.sampled_from((*ODD_FLOATS, float("nan"), 3)))
        self.add("full", shape=x.type.shape, value=value, dtype=self.dtype)

    def single(self, x: Value) -> None:
        """Any operator of the registry, on operands of its own."""
        op = self.draw(st.sampled_from(SINGLE))
        operands, attrs = parse_operands(registry()[op].example)
        inputs = [self.b.input(self.hint(), t) for t, _ in operands]
        self.add(op, *inputs, **attrs)

    def fuse(self, x: Value) -> None:
        inner = GraphBuilder("body")
        value = inner.input(self.hint(), x.type)
        y = inner.call("mul", value, value, hint=self.hint())[0]
        if x.type.rank:
            z = inner.call("softmax", y, axis=-1)[0]
            self.add("fused", x, body=inner.finish([y, z]))
        else:
            self.add("fused", x, body=inner.finish([y]))

    def finish(self) -> Graph:
        last = self.b.nodes[-1].outputs if self.b.nodes else (self.pool[0],)
        outputs = tuple(dict.fromkeys((*last, self.pick())))
        odd = tuple(f'out "{i}"' if self.draw(st.booleans()) else v.name for i, v in
                    enumerate(outputs))  # fmt: skip
        return self.b.finish(outputs, odd)


def weights_of(graph: Graph) -> dict[str, TensorType]:
    """Types of the weights that a graph reads."""
    operands = [x for node in graph.walk() for x in node.operands]
    return {x.name: x.type for x in (*operands, *graph.outputs) if isinstance(x, Weight)}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@st.composite
def programs(draw: st.DrawFn, steps: int = 6) -> Program:
    """A program of one or two entries over shared weights."""
    entries = {
        name: draw(graphs(steps, name)) for name in draw(st.sampled_from((["a"], ["a", "b"])))
    }
    weights: dict[str, WeightExpr] = {}
    for graph in entries.values():
        for name, t in weights_of(graph).items():
            weights[name] = draw(_expressions(name, t))
    meta: Mapping[str, Any] = draw(st.dictionaries(st.text(max_size=6), json_values, max_size=3))
    found = {s.key: s.type for expr in weights.values() for s in sources(expr)}
    name = draw(st.text(max_size=8))
    return Program(name, entries, weights, RANGES, random_source(found), meta, Stage.TRACED)


@st.composite
def _expressions(draw: st.DrawFn, name: str, t: TensorType) -> WeightExpr:
    key = draw(st.sampled_from((name, f'{name} "quoted"', f"{name}\\")))
    rows = t.shape[0]
    assert isinstance(rows, int)
    match draw(st.sampled_from(("source", "slice", "cast", "concat"))):
        case "slice":
            longer = TensorType(t.dtype, (rows + 2, *t.shape[1:]))
            return apply("slice", Source(f"{key} long", longer), axis=0, start=1, end=rows + 1)
        case "cast":
            return apply("cast", Source(f"{key} f16", t.with_dtype(DType.f16)), dtype=t.dtype)
        case "concat" if rows > 1:
            parts = (1, rows - 1)
            made = (Source(f"{key} {n}", TensorType(t.dtype, (n, *t.shape[1:]))) for n in parts)
            return apply("concat", *made, axis=0)
    return Source(f"{key} {t}", t)
