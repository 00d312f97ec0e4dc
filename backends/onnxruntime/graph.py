"""Builds one ONNX graph: nodes, constants, symbolic shapes, branches.

Everything the emitters append is a pure function of its inputs, so `op` gives the same call the
same result: the causal mask, the rotary angles and the widened copy of a value appear once in a
model, however many layers ask for them.

A symbol of the program is a number that is read off the shape of an input when the model runs.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from dsc.backends.onnxruntime.contrib import CONTRIB, DOMAIN, ORT, is_offered
from dsc.backends.onnxruntime.options import Form
from dsc.errors import UnsupportedOperator
from dsc.ir.dims import Dim, FloorDiv, Sym, symbol_name
from dsc.ir.graph import Graph, Weight
from dsc.ir.op import traits_of
from dsc.ir.traits import Role
from dsc.ir.types import DType, TensorType

ORIGIN = "|"
"""In the name of an ONNX node: what stands before the name of the value that it works for."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""The key of the modules that a node is in, the outermost first, as torch's exporter writes it."""
ONNX_TYPE = {
    DType.f32: TensorProto.FLOAT,
    DType.f64: TensorProto.DOUBLE,
    DType.bf16: TensorProto.BFLOAT16,
    DType.f16: TensorProto.FLOAT16,
    DType.f8e4m3: TensorProto.FLOAT8E4M3FN,
    DType.f8e4m3fnuz: TensorProto.FLOAT8E4M3FNUZ,
    DType.f8e5m2: TensorProto.FLOAT8E5M2,
    DType.f8e8m0: TensorProto.FLOAT8E8M0,
    DType.i64: TensorProto.INT64,
    DType.i32: TensorProto.INT32,
    DType.i16: TensorProto.INT16,
    DType.i8: TensorProto.INT8,
    DType.u8: TensorProto.UINT8,
    DType.boolean: TensorProto.BOOL,
}
NARROW = frozenset({DType.bf16, DType.f16})
"""What ONNX Runtime moves on CPUs, and widens to compute."""
Shape = tuple[Dim, ...]
Halves = Mapping[str, tuple[Weight, Weight]]
"""W_UK [h, n, c] and W_UV [h, v, c] by the name of kv_b [h*(n+v), c]."""


@dataclass(slots=True)
class External:
    """An initializer whose bytes lie in the packed weights: `start` bytes into weight `weight`."""

    tensor: TensorProto
    weight: str
    start: int
    length: int


@dataclass(slots=True)
class Pool:
    """What a graph shares with its branches: names, initializers, the sources of symbols.

    `unroll` says that work over experts may be written out, one branch an expert. `wide` names
    values that are fp32 where the program has 16 bits: caches that come and go so. `positive` names
    values that are never below 0, `tables` weights of which rows are looked up, `inputs` inputs.
    `contrib` is how often each of ONNX Runtime's own operators was written, `withheld` has those
    that would have been, if the provider computed them right.
    """

    form: Form = field(default_factory=Form)
    unroll: bool = True
    halves: Halves = field(default_factory=dict)

    symbols: dict[str, tuple[str, int]] = field(default_factory=dict)
    constants: dict[tuple[str, tuple[int, ...], bytes], TensorProto] = field(default_factory=dict)
    externals: dict[str, External] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    wide: set[str] = field(default_factory=set)
    contrib: Counter[str] = field(default_factory=Counter)
    withheld: set[str] = field(default_factory=set)
    positive: set[str] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    inputs: set[str] = field(default_factory=set)


class GraphWriter:
    """Appends ONNX nodes. Values are named by strings; the empty string is an absent operand."""

    def __init__(self, pool: Pool | None = None, outer: GraphWriter | None = None) -> None:
        self.nodes: list[NodeProto] = []
        self.outer = outer
        self.pool: Pool = outer.pool if outer is not None else pool or Pool()
        self.loc: str = outer.loc if outer is not None else ""
        self.origin: str = outer.origin if outer is not None else ""
        self._known: dict[Any, tuple[str, ...]] = {}

    @staticmethod
    def of(graph: Graph, pool: Pool) -> GraphWriter:
        """A writer for the nodes of a graph, which knows its symbols and tables."""
        for value in graph.inputs:
            pool.inputs.add(value.name)
            for axis, dim in enumerate(value.type.shape):
                name = symbol_name(dim)
                if name is not None:
                    pool.symbols.setdefault(name, (value.name, axis))
        for node in graph.walk():
            if traits_of(node.op).role is Role.LOOKUP:
                pool.tables |= {x.name for x in node.operands if isinstance(x, Weight)}
        return GraphWriter(pool)

    # Nodes

    def op(self, op_type: str, *inputs: str, **attrs: Any) -> str:
        """The single result of an ONNX operator."""
        return self.ops(op_type, 1, *inputs, **attrs)[0]

    def ops(self, op_type: str, results: int, *inputs: str, **attrs: Any) -> tuple[str, ...]:
        """The results of an ONNX operator; those of an earlier equal call where there is one."""
        key = (op_type, results, inputs, tuple((k, str(v)) for k, v in sorted(attrs.items())))
        found = self._find(key)
        if found is None:
            found = self._append(op_type, results, inputs, attrs)
            self._known[key] = found
        return found

    def here(self, op_type: str, *inputs: str, **attrs: Any) -> str:
        """As `op`, by a node of this graph and of none around it."""
        key = (op_type, 1, inputs, tuple((k, str(v)) for k, v in sorted(attrs.items())))
        if key not in self._known:
            self._known[key] = self._append(op_type, 1, inputs, attrs)
        return self._known[key][0]

    def has(self, op_type: str) -> bool:
        """Whether one of ONNX Runtime's own operators, which fits here, may be written."""
        form = self.pool.form
        if form.ops == ORT and form.provider in CONTRIB[op_type].wrong:
            self.pool.withheld.add(op_type)
        return is_offered(op_type, form.ops, form.provider)

    def contrib(self, op_type: str, *inputs: str, results: int = 1, **attrs: Any) -> str:
        """The first result of one of ONNX Runtime's own operators, which `has` allowed."""
        assert self.has(op_type), f"{op_type} is not offered"
        return self.ops(op_type, results, *inputs, domain=DOMAIN, **attrs)[0]

    def branch(self) -> GraphWriter:
        """A writer for one arm of `choose`: it reads everything that is defined here."""
        return GraphWriter(outer=self)

    def choose(
        self, condition: str, then: tuple[GraphWriter, str], otherwise: tuple[GraphWriter, str]
    ) -> str:
        """The result of the arm that a bool of one element selects; the other is not run."""
        arms = {"then_branch": _arm(*then), "else_branch": _arm(*otherwise)}
        return self._append("If", 1, (condition,), arms)[0]

    def collect(self, none: str, count: str, body: Callable[[GraphWriter, str], str]) -> str:
        """The fp32 rows of `body(writer, i)` for i = 0 .. count-1, one after another.

        `none` holds no rows, `count` and `i` are int64 scalars. The parts may differ in length;
        ONNX has sequences for that, which ONNX Runtime carries through a Loop without copying.
        """
        number = next(self.pool.numbers)
        i, going, parts = (f"Loop/{number}/{part}" for part in ("i", "going", "parts"))
        inner = self.branch()
        grown = inner.op("SequenceInsert", parts, body(inner, i))
        sequence = helper.make_tensor_sequence_value_info
        graph = helper.make_graph(
            inner.nodes,
            f"body/{number}",
            [
                helper.make_tensor_value_info(i, TensorProto.INT64, []),
                helper.make_tensor_value_info(going, TensorProto.BOOL, []),
                sequence(parts, TensorProto.FLOAT, None),
            ],
            [
                helper.make_tensor_value_info(going, TensorProto.BOOL, []),
                sequence(grown, TensorProto.FLOAT, None),
            ],
        )
        first = self._append("SequenceConstruct", 1, (none,), {})[0]
        always = self.constant(np.array(True))  # onnx's own evaluator takes no condition for false
        every = self._append("Loop", 1, (count, always, first), {"body": graph})[0]
        return self.op("ConcatFromSequence", every, axis=0)

    def _append(
        self, op_type: str, results: int, inputs: Sequence[str], attrs: dict[str, Any]
    ) -> tuple[str, ...]:
        made = [f"{op_type}/{next(self.pool.numbers)}" for _ in range(results)]
        node = helper.make_node(
            op_type,
            list(inputs),
            made,
            name="/".join(filter(None, (self.loc, made[0]))) + ORIGIN + self.origin,
            doc_string=self.loc or None,
            **attrs,
        )
        if self.loc:
            node.metadata_props.add(key=SCOPES, value=repr([*scopes(self.loc), made[0]]))
        self.nodes.append(node)
        self.pool.contrib.update([op_type] if "domain" in attrs else ())
        return tuple(made)

    def _find(self, key: Any) -> tuple[str, ...] | None:
        scope: GraphWriter | None = self
        while scope is not None:
            if key in scope._known:
                return scope._known[key]
            scope = scope.outer
        return None

    # Constants and types

    def constant(self, array: np.ndarray[Any, Any]) -> str:
        """A small constant, stored in the model."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.pool.constants:
            name = f"constant/{len(self.pool.constants)}"
            self.pool.constants[key] = numpy_helper.from_array(array, name)
        return self.pool.constants[key].name

    def i64(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant(np.array(values, dtype=np.int64))

    def scalar(self, value: float, dtype: DType = DType.f32) -> str:
        """A constant of shape []; a 16-bit float is rounded from fp32 when the model loads."""
        if dtype in (DType.bf16, DType.f16):
            return self.cast(self.scalar(value), DType.f32, dtype)
        return self.constant(
            np.array(value, dtype=helper.tensor_dtype_to_np_dtype(ONNX_TYPE[dtype]))
        )

    def cast(self, x: str, given: DType, wanted: DType) -> str:
        """`x` with another element type; itself where it has it already."""
        given = DType.f32 if x in self.pool.wide else given
        return x if given is wanted else self.op("Cast", x, to=ONNX_TYPE[wanted])

    # Weights

    def weight(self, weight: Weight, part: int | None = None) -> str:
        """A weight as an initializer in the packed file, or slice `part` of its leading axis.

        A slice is an initializer of its own that points into the middle of the tensor: reading one
        expert of a stack then copies nothing.
        """
        name = self._free(weight.name if part is None else f"{weight.name}/{part}")
        if name not in self.pool.externals:
            rows, *rest = [*map(static, weight.type.shape), 1]
            shape = list(map(static, weight.type.shape)) if part is None else rest[:-1]
            tensor = TensorProto(name=name, data_type=ONNX_TYPE[weight.type.dtype], dims=shape)
            total = static(weight.type.nbytes)
            length = total if part is None else total // rows
            start = 0 if part is None else part * length
            self.pool.externals[name] = External(tensor, weight.name, start, length)
        return name

    def stored(
        self,
        weight: Weight,
        suffix: str,
        part: TensorType,
        shape: tuple[int, ...],
        matrix: int | None = None,
        kind: int | None = None,
    ) -> str:
        """What is stored of a weight under `suffix`, or of one matrix of a stack of them.

        It is of type `part`, and an initializer of this shape and of ONNX's type `kind`.
        """
        whole = weight.name + suffix
        name = self._free(whole if matrix is None else f"{whole}/{matrix}")
        if name not in self.pool.externals:
            total = static(part.nbytes)
            length = total if matrix is None else total // static(part.shape[0])
            own = ONNX_TYPE[part.dtype] if kind is None else kind
            tensor = TensorProto(name=name, data_type=own, dims=shape)
            start = 0 if matrix is None else matrix * length
            self.pool.externals[name] = External(tensor, weight.name + suffix, start, length)
        return name

    def _free(self, name: str) -> str:
        """What a weight of this name is called: in ONNX a name is one value, inputs keep theirs."""
        return f"@{name}" if name in self.pool.inputs else name

    # Shapes

    def dim(self, dim: Dim) -> str:
        """A dim as an int64 vector of one element, worked out outside of branches."""
        if self.outer is not None:
            return self.outer.dim(dim)
        if isinstance(dim, int):
            return self.i64(dim)
        total = ""
        for monomial, coefficient in dim.terms:
            term = self.i64(coefficient) if coefficient != 1 or not monomial else ""
            for atom in monomial:
                factor = self._floordiv(atom) if isinstance(atom, FloorDiv) else self._symbol(atom)
                term = self.op("Mul", term, factor) if term else factor
            total = self.op("Add", total, term) if total else term
        return total

    def number(self, dim: Dim) -> str:
        """A dim as an int64 scalar."""
        if isinstance(dim, int):
            return self.constant(np.array(dim, dtype=np.int64))
        return self.op("Squeeze", self.dim(dim), self.i64(0))

    def shape(self, shape: Shape) -> str:
        """A shape as an int64 vector: a constant, or put together once a step for all branches."""
        if self.outer is not None:
            return self.outer.shape(shape)
        if all(isinstance(d, int) for d in shape):
            return self.i64(*map(static, shape))
        return self.op("Concat", *(self.dim(d) for d in shape), axis=0)

    def reshape(self, x: str, given: Shape, wanted: Shape) -> str:
        """`x` of shape `given` under the shape `wanted`.

        ONNX can copy a dim of the same position (0) and infer one (-1): that spares most symbolic
        shapes the arithmetic.
        """
        if given == wanted:
            return x
        same = [i < len(given) and given[i] == d for i, d in enumerate(wanted)]
        open_dims = [i for i, d in enumerate(wanted) if isinstance(d, Sym) and not same[i]]
        if len(open_dims) > 1 or 0 in wanted:
            zeros = {"allowzero": 1} if 0 in wanted else {}
            return self.op("Reshape", x, self.shape(wanted), **zeros)
        target = [
            -1 if i in open_dims else 0 if same[i] else static(d) for i, d in enumerate(wanted)
        ]
        return self.op("Reshape", x, self.i64(*target))

    def transpose(self, x: str, *dims: int) -> str:
        """Axis i of the result is axis dims[i] of x."""
        return x if list(dims) == sorted(dims) else self.op("Transpose", x, perm=list(dims))

    def swap_last(self, x: str, rank: int) -> str:
        """`x` with its last two axes exchanged; ONNX Runtime folds this into a MatMul."""
        return self.transpose(x, *range(rank - 2), rank - 1, rank - 2)

    def arange(self, end: Dim) -> str:
        """The int64 vector 0, 1, … below `end`."""
        if isinstance(end, int):
            return self.constant(np.arange(end, dtype=np.int64))
        return self.op("Range", self.number(0), self.number(end), self.number(1))

    def zeros(self, shape: Shape, dtype: DType) -> str:
        """Zeros of a shape that may be symbolic."""
        value = helper.make_tensor("value", ONNX_TYPE[dtype], [1], [0])
        return self.op("ConstantOfShape", self.shape(shape), value=value)

    def _symbol(self, name: str) -> str:
        if name not in self.pool.symbols:
            raise UnsupportedOperator(
                f"no input has an axis of size {name}", where=self.loc or None
            )
        source, axis = self.pool.symbols[name]
        return self.op("Shape", source, start=axis, end=axis + 1)

    def _floordiv(self, atom: FloorDiv) -> str:
        """Both are sizes and so not negative: ONNX's truncating division is the floor."""
        return self.op("Div", self.dim(atom.numerator), self.dim(atom.denominator))


def value_info(name: str, dtype: DType, shape: Shape, doc: str = "") -> Any:
    """The declaration of a graph input or output; axes are named by their dims (`P+S`)."""
    dims = [d if isinstance(d, int) else str(d) for d in shape]
    return helper.make_tensor_value_info(name, ONNX_TYPE[dtype], dims, doc)


def scopes(path: str) -> list[str]:
    """The modules from the whole model, "", to the one of this path; a number is no module's name.

    >>> scopes("model.layers.3.self_attn")
    ['', 'model', 'model.layers.3', 'model.layers.3.self_attn']
    """
    parts = path.split(".")
    ends = [at for at in range(1, len(parts) + 1) if not "".join(parts[at : at + 1]).isdigit()]
    return ["", *(".".join(parts[:end]) for end in ends)]


def _arm(writer: GraphWriter, result: str) -> GraphProto:
    """A branch as a graph without inputs; its output must be the result of one of its nodes."""
    if not any(result in node.output for node in writer.nodes):
        result = writer.op("Identity", result)
    name = f"branch/{next(writer.pool.numbers)}"
    output = helper.make_empty_tensor_value_info(result)
    return helper.make_graph(writer.nodes, name, [], [output])


def static(dim: Dim) -> int:
    """A dim that is known at compile time, as the dims of weights are. Else a `ValueError`."""
    if isinstance(dim, Sym):
        raise ValueError(f"{dim} is not known at compile time")
    return dim
