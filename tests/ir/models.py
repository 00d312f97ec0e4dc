"""Random programs as users and tracers write them, for properties of the whole pipeline.

`models()` draws two kinds: causal language-model steps (embedding, layers over declared caches,
wanted rows, head) and free graphs. Both mix single operators with whole mechanisms of the family,
each as its operator or taken apart (`tests.ir.spellings`), and hold dead code, duplicates,
constants, shared weights and weight expressions. Everything drawn verifies and runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from dsc.ir.dims import Dim, Range, Sym, symbol
from dsc.ir.formats import Format
from dsc.ir.graph import GraphBuilder, Operand, Value, Weight
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Source, WeightExpr, apply, leaf, random_source, sources
from tests.ir import spellings as spell

RANGES = {"B": Range(1, 4), "S": Range(1, 8), "P": Range(0, 32), "L": Range(1, 8)}
B, S, P, L = (symbol(n) for n in "BSPL")
HEADS, ROPE = 2, 4
SMOOTH = ("silu", "sigmoid", "tanh", "neg", "abs", "relu", "cos", "sin", "gelu")
"""Operators that stretch no difference, so that a tolerance holds through a chain of them."""


@st.composite
def models(draw: st.DrawFn) -> Program:
    """A program at stage TRACED, of one entry, over seeded random weights."""
    writer = _Writer(draw)
    if draw(st.integers(0, 2)):
        writer.language_model()
    else:
        writer.free_graph()
    return writer.program()


class _Writer:
    """Appends random code to a builder; `pool` holds the values to go on with."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.dtype = draw(st.sampled_from((DType.f32, DType.f32, DType.f32, DType.bf16)))
        self.width: int = draw(st.sampled_from((8, 12)))
        self.name = "step"
        self.b = GraphBuilder(self.name)
        self.pool: list[Value] = []
        self.weights: dict[str, WeightExpr] = {}
        self.outputs: list[tuple[str, Operand]] = []
        self.updates: dict[str, str] = {}
        self.apart: bool = draw(st.booleans())
        self.ragged: bool = draw(st.booleans())
        self.append = self.spelling("scatter" if self.ragged else "concat")

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def chance(self, of: int = 2) -> bool:
        return bool(self.draw(st.integers(0, of - 1)) == of - 1)

    def spelling(self, *apart: str) -> str:
        """The operator, or one of the traced spellings, mostly the same way in one program."""
        return str(self.one_of(*apart)) if self.apart != self.chance(8) else ""

    def call(self, op: str, *operands: Operand | None, **attrs: Any) -> Value:
        return self.b.call(op, *operands, **attrs)[0]

    def keep(self, *values: Value) -> Value:
        self.pool += [v for v in values if v.type.dtype is self.dtype]
        return values[0]

    def known(self, name: str, t: TensorType) -> Value:
        """The graph input of a name, declared when first read."""
        found = next((v for v in self.b.inputs if v.name == name), None)
        return found or self.b.input(name, t)

    def lengths(self) -> Value:
        return self.known("lengths", TensorType(DType.i64, (B,)))

    def positions(self) -> Value:
        return self.known("positions", TensorType(DType.i64, (B, S)))

    # Programs

    def language_model(self) -> None:
        """input_ids to logits, with cached rows as further outputs."""
        ids = self.known("input_ids", TensorType(DType.i64, (B, S)))
        self.positions(), self.lengths()
        at = self.known("logits_at", TensorType(DType.i64, (B, L)))
        table = self.weight(17, self.width)
        x = self.keep(self.call("embedding", ids, table))
        for layer in range(self.draw(st.integers(1, 2))):
            self.b.loc = f"model.layers.{layer}"
            x = self.layer(x, layer)
        self.b.loc = "model"
        for _ in range(self.draw(st.integers(0, 2))):
            self.move()
        rows = spell.select_rows(self.b, self.norm(x), at, self.spelling("gather"))
        tied = self.chance(3)
        self.outputs.append(("logits", self.linear(rows, 17, table if tied else None)))
        self.more_outputs(0)

    def free_graph(self) -> None:
        """Moves over one or two inputs."""
        self.name = "main"
        self.keep(self.known("x", TensorType(self.dtype, (B, S, self.width))))
        if self.chance():
            self.keep(self.known("y", TensorType(self.dtype, (B, S, self.width))))
        for index in range(self.draw(st.integers(1, 8))):
            self.b.loc = f"model.layers.{index}"
            self.move()
        self.more_outputs(1)

    def more_outputs(self, least: int) -> None:
        last = self.pool[-1:] if least else []
        others = self.draw(st.lists(st.sampled_from(self.pool), max_size=2))
        names = (self.one_of("x", "out0"), "out1", "out2") if least else ("out0", "out1")
        self.outputs += zip(names, (*last, *others), strict=False)

    def program(self) -> Program:
        names, values = zip(*self.outputs, strict=True)
        inputs = [v.name for v in self.b.inputs]
        aliases = [(names.index(o), inputs.index(i)) for o, i in self.updates.items()]
        graph = self.b.finish(values, names, tuple(aliases))
        found = {s.key: s.type for expr in self.weights.values() for s in sources(expr)}
        used = {s for v in graph.values() for s in v.type.symbols}
        ranges = {name: r for name, r in RANGES.items() if name in used}
        source = random_source(found)
        return Program("random", {self.name: graph}, self.weights, ranges, source, {}, Stage.TRACED)

    # Weights

    def weight(self, *shape: int, dtype: DType | None = None) -> Weight:
        """A weight of its own, or now and then one that is read already."""
        t = TensorType(dtype or self.dtype, shape)
        same = [n for n, e in self.weights.items() if e.type == t]
        if same and self.chance(8):
            return Weight(self.one_of(*same), t)
        name = f"w{len(self.weights)}"
        self.weights[name] = self.expression(name, t)
        return Weight(name, t)

    def expression(self, key: str, t: TensorType) -> WeightExpr:
        rows, *rest = t.shape
        assert isinstance(rows, int)
        match self.one_of("source", "source", "slice", "concat", "cast", "permute", "fp8"):
            case "slice":
                longer = TensorType(t.dtype, (rows + 2, *rest))
                return apply("slice", Source(key, longer), axis=0, start=1, end=rows + 1)
            case "concat" if rows > 1:
                parts = [TensorType(t.dtype, (n, *rest)) for n in (1, rows - 1)]
                made = [Source(f"{key}.{i}", part) for i, part in enumerate(parts)]
                return apply("concat", *made, axis=0)
            case "cast":
                return apply("cast", Source(key, t.with_dtype(DType.f16)), dtype=t.dtype)
            case "permute" if len(rest) == 1:
                turned = TensorType(t.dtype, (rest[0], rows))
                return apply("permute", Source(key, turned), dims=(1, 0))
            case "fp8" if rest:
                stored = TensorType(DType.f8e4m3, t.shape, Format((4, 4), DType.f32))
                return apply("dequantize", leaf(key, stored), dtype=t.dtype)
        return Source(key, t)

    # Mechanisms over the residual stream [B,S,width]

    def layer(self, x: Value, index: int) -> Value:
        """Norm, mechanism, residual sum, and now and then something else."""
        parts: list[Callable[[Value, int], Value]] = [self.mla, self.grouped_queries]
        after: list[Callable[[Value, int], Value]] = [self.mlp, self.moe]
        if self.chance(3):
            x = self.keep(self.call("add", x, self.one_of(*parts, *after)(self.norm(x), index)))
        else:
            x = self.keep(self.call("add", x, self.one_of(*parts)(self.norm(x), index)))
            x = self.keep(self.call("add", self.one_of(*after)(self.norm(x), index), x))
        if self.chance(4):
            self.move()
        return x

    def norm(self, x: Value) -> Value:
        if self.chance(6):
            return x
        width = x.type.shape[-1]
        assert isinstance(width, int)
        weight, eps = self.weight(width), self.one_of(1e-6, 1e-5)
        if self.chance():
            bias = self.weight(width) if self.chance() else None
            return spell.layer_norm(self.b, x, weight, bias, eps, self.spelling("traced"))
        return spell.rms_norm(self.b, x, weight, eps, self.spelling("rsqrt", "sqrt"))

    def linear(self, x: Value, rows: int, weight: Weight | None = None) -> Value:
        width = x.type.shape[-1]
        assert isinstance(width, int)
        bias = self.weight(rows) if self.chance(5) else None
        return self.call("linear", x, weight or self.weight(rows, width), bias)

    def mlp(self, x: Value, index: int) -> Value:
        inner = self.one_of(4, 6, 10)
        if self.chance(4):
            both = self.linear(x, 2 * inner)
            gate, up = self.b.call("split", both, sizes=(inner, inner), axis=-1)
        else:
            gate, up = self.linear(x, inner), self.linear(x, inner)
        hidden = spell.swiglu(self.b, gate, up, self.spelling("silu", "sigmoid"))
        return self.linear(hidden, self.width)

    def moe(self, x: Value, index: int) -> Value:
        experts, inner = 8, self.one_of(3, 4)
        groups = self.one_of(1, 1, 2, 4)
        attrs = {
            "score": self.one_of("sigmoid", "softmax"), "groups": groups,
            "keep": max(1, groups // 2), "group_score": self.one_of("top2", "max"),
            "fill": self.one_of(float("-inf"), 0.0), "top_k": self.one_of(1, 2),
            "normalise": self.chance(), "scale": self.one_of(1.0, 2.5),
        }  # fmt: skip
        gate = self.weight(experts, self.width)
        bias = self.weight(experts, dtype=DType.f32) if self.chance() else None
        if bias is not None:  # a biased score below a fill of 0 has no one reading
            attrs["fill"] = float("-inf")
        flat = self.call("reshape", x, shape=(B * S, self.width))
        idx, w = spell.route(self.b, flat, gate, bias, attrs, self.spelling("traced"))
        gate_up = self.weight(experts, 2 * inner, self.width)
        down = self.weight(experts, self.width, inner)
        how = self.spelling("dense", "grouped")
        y = self.call("reshape", spell.experts(self.b, flat, idx, w, gate_up, down, how),
                      shape=x.type.shape)  # fmt: skip
        return self.call("add", y, self.mlp(x, index)) if self.chance(3) else y

    def grown(self, name: str, new: Value) -> Value:
        """New rows [B,S,d] behind a declared cache of their own."""
        past = self.b.input(f"past.{name}", TensorType(self.dtype, (B, P, new.type.shape[2])))
        present = spell.append(self.b, past, new, self.lengths(), self.append)
        self.outputs.append((f"present.{name}", present))
        self.updates[f"present.{name}"] = past.name
        return present

    def turned(self, x: Value, layout: str, scale: float, dims: int = ROPE) -> Value:
        inv_freq = self.weight(dims // 2, dtype=DType.f32)
        how = self.spelling("traced")
        return spell.rope(self.b, x, self.positions(), inv_freq, layout, scale, how)

    def mla(self, x: Value, index: int) -> Value:
        """A query of two parts over a latent cache and one of rope keys."""
        c, nope, v = 6, self.one_of(3, 4), self.one_of(3, 4)
        layout = self.one_of("interleaved", "deinterleave", "half")
        scale = self.one_of(1.0, 1.25)
        q = self.linear(x, HEADS * (nope + ROPE))
        q = self.call("reshape", q, shape=(B, S, HEADS, nope + ROPE))
        q_nope, q_rope = self.b.call("split", q, sizes=(nope, ROPE), axis=3)
        latent, rope = self.b.call("split", self.linear(x, c + ROPE), sizes=(c, ROPE), axis=2)
        latent = self.grown(f"{index}.latent", self.norm(latent))
        rope = self.grown(f"{index}.rope", self.turned(rope, layout, scale))
        operands = (q_nope, self.turned(q_rope, layout, scale), latent, rope)
        kv_b = self.weight(HEADS * (nope + v), c)
        y = spell.mla(
            self.b, *operands, kv_b, self.lengths(), 0.3, self.spelling("sdpa", "softmax"),
            self.append == "concat",
        )  # fmt: skip
        return self.linear(self.call("reshape", y, shape=(B, S, HEADS * v)), self.width)

    def grouped_queries(self, x: Value, index: int) -> Value:
        """Attention over caches of keys and values."""
        d = ROPE
        parts = [self.linear(x, HEADS * d) for _ in range(3)]
        if self.chance():
            heads = [self.call("reshape", p, shape=(B, S, HEADS, d)) for p in parts[:2]]
            dims = self.one_of(ROPE, ROPE // 2)
            heads = [self.turned(p, "half", 1.0, dims) for p in heads]
            parts[:2] = [self.call("reshape", p, shape=(B, S, HEADS * d)) for p in heads]
        q, k, v = parts
        k, v = self.grown(f"{index}.k", k), self.grown(f"{index}.v", v)
        q = self.call("reshape", q, shape=(B, S, HEADS, d))
        k, v = (self.call("reshape", p, shape=(B, P + S, HEADS, d)) for p in (k, v))
        y = spell.attention(
            self.b, q, k, v, self.lengths(), 0.5, self.spelling("sdpa", "softmax"),
            self.append == "concat",
        )  # fmt: skip
        return self.linear(self.call("reshape", y, shape=(B, S, HEADS * d)), self.width)

    # Moves: one to a few operators on any value of the pool

    def move(self) -> None:
        moves: tuple[Callable[[Value], object], ...] = (
            self.pointwise, self.pair, self.neutral, self.masked, self.view, self.part,
            self.reduce, self.project, self.siblings, self.whole, self.choose, self.repeat,
            self.dead, self.convert, self.share, self.nothing,
        )  # fmt: skip
        self.one_of(*moves)(self.one_of(*self.pool))

    def whole(self, x: Value) -> None:
        """A mechanism, where the value is a row of the stream."""
        if x.type.shape != (B, S, self.width):
            self.project(x)
            return
        kind = self.one_of("norm", "mlp", "moe", "rope", "attention")
        if kind == "rope":
            part, _ = self.b.call("split", x, sizes=(ROPE, self.width - ROPE), axis=2)
            layout = self.one_of("interleaved", "deinterleave", "half")
            self.keep(self.turned(part, layout, 1.0))
        elif kind == "attention":
            shape = (B, S, HEADS, self.width // HEADS)
            q, k, v = (
                self.call("reshape", self.linear(x, self.width), shape=shape) for _ in range(3)
            )
            y = spell.attention(self.b, q, k, v, None, 0.5, self.spelling("sdpa", "softmax"))
            self.keep(self.call("reshape", y, shape=x.type.shape))
        elif kind == "norm":
            self.keep(self.norm(x))
        else:
            self.keep((self.mlp if kind == "mlp" else self.moe)(x, 9))

    def masked(self, x: Value) -> None:
        """Rows that attend to each other under a mask of values, what each begins with."""
        rank = len(x.type.shape)
        if rank < 2:
            self.pointwise(x)
            return
        first = self.call("slice", x, axis=rank - 1, start=0, end=1)
        mask = self.call("permute", first, dims=(*range(rank - 2), rank - 1, rank - 2))
        y = self.keep(self.call("sdpa", x, x, x, mask, scale=0.5))
        self.outputs.append((f"masked.{len(self.outputs)}", y))

    def pointwise(self, x: Value) -> None:
        for _ in range(self.draw(st.integers(1, 3))):
            x = self.keep(self.call(self.one_of(*SMOOTH), x))

    def pair(self, x: Value) -> None:
        same = [v for v in self.pool if v.type == x.type]
        self.keep(self.call(self.one_of("add", "sub", "maximum", "minimum", "swiglu"), x,
                            self.one_of(*same)))  # fmt: skip

    def neutral(self, x: Value) -> None:
        """Arithmetic with constants, some of which change nothing, some of which fold."""
        op, value = self.one_of(("add", 0.0), ("mul", 1.0), ("mul", 0.5), ("div", 2.0), ("sub", 1))
        constant = spell.number(self.b, float(value), self.dtype)
        if self.chance(3):
            constant = self.call("neg", constant)
        self.keep(self.call(op, x, constant))

    def view(self, x: Value) -> None:
        shape = x.type.shape
        match self.one_of("flat", "unit", "permute", "back"):
            case "flat" if len(shape) > 1:
                self.keep(self.call("reshape", x, shape=(shape[0] * shape[1], *shape[2:])))
            case "unit":
                unit = self.call("reshape", x, shape=(1, *shape))
                self.keep(self.call("expand", unit, shape=(2, *shape)))
            case "permute":
                order = tuple(self.draw(st.permutations(range(len(shape)))))
                self.keep(self.call("permute", x, dims=order))
            case _:
                turned = self.call("reshape", x, shape=(*shape, 1))
                self.keep(self.call("reshape", turned, shape=shape))

    def part(self, x: Value) -> None:
        """Slices and splits of the last axis, joined again or not."""
        last = x.type.shape[-1] if x.type.rank else 1
        if not isinstance(last, int) or last < 2:
            return
        cut = self.draw(st.integers(1, last - 1))
        axis = self.one_of(-1, x.type.rank - 1)
        if self.chance():
            a, b = self.b.call("split", x, sizes=(cut, last - cut), axis=axis)
        else:
            a = self.call("slice", x, axis=axis, start=0, end=cut)
            b = self.call("slice", x, axis=axis, start=cut, end=last)
        if self.chance():
            a, b = (b, a) if self.chance() else (a, b)
            a = self.call("concat", a, self.call("neg", b) if self.chance() else b, axis=axis)
        self.keep(a)

    def reduce(self, x: Value) -> None:
        op = self.one_of("sum", "mean", "amax", "softmax", "cumsum")
        if not x.type.rank:
            return
        axis = x.type.rank - 1
        if isinstance(x.type.shape[axis], Sym) and op != "softmax":
            op = "amax"
        if op in ("softmax", "cumsum"):
            self.keep(self.call(op, x, axis=axis))
            return
        kept = self.chance()
        y = self.keep(self.call(op, x, axes=(axis,), keepdims=kept))
        if kept:
            self.keep(self.call("add", x, y))

    def project(self, x: Value) -> None:
        last = x.type.shape[-1] if x.type.rank else None
        if not isinstance(last, int) or last > 24:
            return
        rows = self.one_of(self.width, 5)
        if self.chance(4):
            turned = self.call("permute", self.weight(rows, last), dims=(1, 0))
            self.keep(self.call("matmul", x, turned))
        else:
            self.keep(self.linear(x, rows))

    def siblings(self, x: Value) -> None:
        """Linears that share an input, as queries, keys and values do."""
        last = x.type.shape[-1] if x.type.rank else None
        if isinstance(last, int) and last <= 24:
            rows: list[Dim] = [self.one_of(3, 4, self.width) for _ in range(self.one_of(2, 3))]
            made = [self.linear(x, int(n)) for n in rows]  # type: ignore[arg-type]
            self.keep(*made)
            if self.chance():
                self.b.call("split", made[-1], sizes=(1, rows[-1] - 1), axis=-1)

    def choose(self, x: Value) -> None:
        """where() by a mask over the channels."""
        last = x.type.shape[-1] if x.type.rank else None
        if isinstance(last, int):
            index = self.call("arange", start=0, end=last, dtype=DType.i64)
            limit = spell.number(self.b, self.one_of(1, 2), DType.i64)
            mask = self.call("lt", index, limit)
            self.keep(self.call("where", mask, x, spell.number(self.b, 0.25, self.dtype)))

    def repeat(self, x: Value) -> None:
        """A node once more, and a value of both."""
        if self.b.nodes:
            node = self.one_of(*self.b.nodes[-8:])
            if node.op == "append":  # a state is appended to once
                return
            again = self.b.call(node.op, *node.inputs, **node.attrs)
            self.keep(*again)

    def dead(self, x: Value) -> None:
        """Code that no output needs."""
        self.call("silu", self.call("neg", x))

    def nothing(self, x: Value) -> None:
        """An empty part, and a join with it."""
        if not x.type.rank:
            return
        axis = x.type.rank - 1
        empty = self.call("neg", self.call("slice", x, axis=axis, start=0, end=0))
        self.keep(self.call("concat", x, empty, axis=axis))

    def convert(self, x: Value) -> None:
        """There and back."""
        other = DType.f32 if self.dtype is not DType.f32 else self.one_of(DType.f32, DType.bf16)
        self.keep(self.call("cast", self.call("cast", x, dtype=other), dtype=self.dtype))

    def share(self, x: Value) -> None:
        """One value read many times."""
        a, b = self.call("silu", x), self.call("tanh", x)
        self.keep(self.call("add", self.call("mul", a, b), a))
