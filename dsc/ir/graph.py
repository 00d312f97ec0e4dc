"""The graph: immutable, ordered, multi-result SSA.

A `Graph` is a list of `Node`s in execution order. Every `Value` is defined once, by an input or by
a node, and named uniquely in its graph. A rewrite builds a new graph: "changed" means
`new is not old`. Uses, liveness and cost are analyses over a graph, never fields of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, Union

from dsc.ir.dims import Dim, Sym, substitute
from dsc.ir.types import DType, TensorType


@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value: printed `%name`."""

    name: str
    type: TensorType

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True, slots=True)
class Weight:
    """An operand that names a weight of the program: printed `@name`."""

    name: str
    type: TensorType

    def __str__(self) -> str:
        return f"@{self.name}"


Operand: TypeAlias = Value | Weight
Attr: TypeAlias = Union[int, float, bool, str, Sym, DType, "Graph", tuple["Attr", ...]]


class Attrs(Mapping[str, Any]):
    """The attributes of a node: an immutable, hashable mapping sorted by name.

    Those of a node are all that its operator declares, defaults too, so that nobody who reads them
    has to know defaults; the text form leaves out what is the default. Equality is exact, as the
    text form is: 1, 1.0 and true differ, so do 0.0 and -0.0.
    """

    __slots__ = ("_hash", "_items", "_key")

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        frozen = {k: _freeze(v) for k, v in sorted((items or {}).items()) if v is not None}
        self._items: dict[str, Any] = frozen
        self._hash: int | None = None
        self._key: tuple[Any, ...] | None = None

    def of(self, op: str) -> Attrs:
        """The same attributes, and the defaults of those of operator `op` that are not given."""
        from dsc.ir.op import defaults

        declared = defaults(op)
        return self if declared.keys() <= self._items.keys() else Attrs({**declared, **self._items})

    def given(self, op: str) -> dict[str, Any]:
        """The attributes that are not what operator `op` has by default."""
        from dsc.ir.op import defaults

        declared = {k: _exact(v) for k, v in defaults(op).items()}
        return {k: v for k, v in self._items.items() if _exact(v) != declared.get(k)}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The attribute called `key`; what `Mapping` inherits takes five times as long."""
        return self._items.get(key, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self._exact())
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Attrs) and self._exact() == other._exact())

    def _exact(self) -> tuple[Any, ...]:
        if self._key is None:
            self._key = tuple((k, _exact(v)) for k, v in self._items.items())
        return self._key

    def __repr__(self) -> str:
        return f"Attrs({self._items!r})"

    def updated(self, **changes: Any) -> Attrs:
        """The same attributes with `changes` applied; a value of `None` removes the key."""
        return Attrs({**self._items, **changes})


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: `outputs = op inputs {attrs}`. An absent optional operand is `None`.

    `loc` is the path of the module it came from, as `model.layers.3.self_attn`.
    """

    op: str
    inputs: tuple[Operand | None, ...]
    attrs: Attrs
    outputs: tuple[Value, ...]
    loc: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attrs", self.attrs.of(self.op))

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The operands that are present."""
        return tuple(x for x in self.inputs if x is not None)

    def __getitem__(self, operand: str) -> Operand:
        """The operand of this name in the operator's signature. Raises `KeyError` if absent."""
        found = self.get(operand)
        if found is None:
            raise KeyError(f"{self.op} without {operand}")
        return found

    def get(self, operand: str) -> Operand | None:
        """The operand of this name, or `None` where an optional one was not given."""
        from dsc.ir.op import operand_index

        index = operand_index(self.op, operand)
        return self.inputs[index] if index < len(self.inputs) else None

    @property
    def output(self) -> Value:
        """The single result. An error for a node with several."""
        (value,) = self.outputs
        return value

    @property
    def body(self) -> Graph | None:
        """The nested graph of a `fused` node."""
        body = self.attrs.get("body")
        return body if isinstance(body, Graph) else None


@dataclass(frozen=True, slots=True)
class Graph:
    """A function: inputs, nodes in order, outputs.

    `output_names` are the public names of the outputs; `aliases` holds pairs
    `(output index, input index)`: that output is the updated state of that input, the way a KV
    cache is carried from step to step.
    """

    name: str
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Operand, ...]
    output_names: tuple[str, ...] = ()
    aliases: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.output_names:
            names = tuple(v.name for v in self.outputs)
            object.__setattr__(self, "output_names", names)
        if len(self.output_names) != len(self.outputs):
            raise ValueError(f"{len(self.output_names)} names for {len(self.outputs)} outputs")

    def input(self, name: str) -> Value:
        """The input called `name`."""
        for value in self.inputs:
            if value.name == name:
                return value
        raise KeyError(name)

    def updated_inputs(self) -> dict[str, str]:
        """Outputs that carry an input on in its own type, so may be that input: names by name."""
        pairs = ((self.output_names[o], self.outputs[o], self.inputs[i]) for o, i in self.aliases)
        return {name: state.name for name, output, state in pairs if output.type == state.type}

    def walk(self) -> Iterator[Node]:
        """All nodes in order, those of nested bodies after their owner."""
        for node in self.nodes:
            yield node
            if node.body is not None:
                yield from node.body.walk()

    def with_nodes(self, nodes: Iterable[Node], outputs: Iterable[Operand] | None = None) -> Graph:
        """The graph with other nodes (and outputs), the rest kept."""
        out = self.outputs if outputs is None else tuple(outputs)
        return replace(self, nodes=tuple(nodes), outputs=out)

    def mapped(
        self, operand: Callable[[Any], Any], attr: Callable[[Any], Any] | None = None
    ) -> Graph:
        """The graph with `operand(x)` for every value and weight x, `attr(v)` for attributes v.

        A value must become a value; the body of a region is an attribute.
        """
        values = {v.name: operand(v) for v in self.values()}

        def new(x: Any) -> Any:
            return values[x.name] if isinstance(x, Value) else None if x is None else operand(x)

        nodes = [
            Node(
                n.op,
                tuple(map(new, n.inputs)),
                n.attrs if attr is None else Attrs({k: attr(v) for k, v in n.attrs.items()}),
                tuple(map(new, n.outputs)),
                n.loc,
            )
            for n in self.nodes
        ]
        inputs, outputs = (tuple(map(new, xs)) for xs in (self.inputs, self.outputs))
        return replace(self, inputs=inputs, nodes=tuple(nodes), outputs=outputs)

    def retyped(
        self, retype: Callable[[TensorType], TensorType], attr: Callable[[Any], Any]
    ) -> Graph:
        """The graph with `retype(t)` for every type t, `attr(v)` for attributes v."""
        return self.mapped(lambda x: replace(x, type=retype(x.type)), attr)

    def substitute(self, env: Mapping[str, Dim]) -> Graph:
        """The graph with symbols replaced everywhere: types, attributes, bodies."""
        return self.retyped(lambda t: t.substitute(env), lambda v: _substitute_attr(v, env))

    def values(self) -> Iterator[Value]:
        """All values of this graph: the inputs, then the results in order."""
        yield from self.inputs
        for node in self.nodes:
            yield from node.outputs


@dataclass
class GraphBuilder:
    """Appends nodes whose result types are inferred: `b.rms_norm(x, w, eps=1e-6)`.

    Any operator is a method; `call` is the general form. Names are made unique from `hint`.
    """

    name: str = "main"
    inputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    repeats: dict[str, int] = field(default_factory=dict)
    loc: str = ""

    def __post_init__(self) -> None:
        self.taken.update(v.name for v in self.inputs)
        self.taken.update(v.name for node in self.nodes for v in node.outputs)

    def input(self, name: str, type: TensorType) -> Value:
        """Declare a graph input."""
        value = Value(self.fresh(name), type)
        self.inputs.append(value)
        return value

    def fresh(self, hint: str) -> str:
        """A name that no value of this graph has yet."""
        name = hint
        while name in self.taken:
            self.repeats[hint] = self.repeats.get(hint, 0) + 1
            name = f"{hint}_{self.repeats[hint]}"
        self.taken.add(name)
        return name

    def call(
        self,
        op: str,
        *operands: Operand | None,
        loc: str | None = None,
        hint: str | None = None,
        **attrs: Any,
    ) -> tuple[Value, ...]:
        """Append `op` and return its results, always as a tuple."""
        from dsc.ir.op import infer, lookup

        frozen = Attrs(lookup(op).widened(attrs))
        types = infer(op, operands, frozen)
        outputs = tuple(Value(self.fresh(hint or _short(op)), t) for t in types)
        node = Node(op, _trim(operands), frozen, outputs, self.loc if loc is None else loc)
        self.nodes.append(node)
        return outputs

    def again(
        self, node: Node, operands: tuple[Operand | None, ...], attrs: Attrs | None = None
    ) -> tuple[Value, ...]:
        """Append a node on other operands; its results keep their names, their types follow."""
        from dsc.ir.op import infer

        attrs = node.attrs if attrs is None else attrs
        types = infer(node.op, operands, attrs)
        outputs = tuple(Value(v.name, t) for v, t in zip(node.outputs, types, strict=True))
        self.nodes.append(replace(node, inputs=operands, attrs=attrs, outputs=outputs))
        return outputs

    def as_type(self, x: Operand, dtype: DType) -> Operand:
        """`x` with this element type."""
        return x if x.type.dtype == dtype else self.call("cast", x, dtype=dtype)[0]

    def as_shape(self, x: Operand, shape: Sequence[Dim]) -> Operand:
        """`x` under this shape."""
        return x if x.type.shape == shape else self.call("reshape", x, shape=shape)[0]

    def as_order(self, x: Operand, dims: Sequence[int]) -> Operand:
        """`x` with its axes in this order."""
        return x if [*dims] == sorted(dims) else self.call("permute", x, dims=tuple(dims))[0]

    def __getattr__(self, op: str) -> Any:
        if op.startswith("_"):
            raise AttributeError(op)

        def append(*operands: Operand | None, **attrs: Any) -> Value | tuple[Value, ...]:
            out = self.call(op, *operands, **attrs)
            return out[0] if len(out) == 1 else out

        return append

    def finish(
        self,
        outputs: Iterable[Operand],
        output_names: tuple[str, ...] = (),
        aliases: tuple[tuple[int, int], ...] = (),
    ) -> Graph:
        """The graph built so far, returning `outputs`."""
        nodes = tuple(self.nodes)
        return Graph(self.name, tuple(self.inputs), nodes, tuple(outputs), output_names, aliases)


def _trim(operands: tuple[Operand | None, ...]) -> tuple[Operand | None, ...]:
    while operands and operands[-1] is None:
        operands = operands[:-1]
    return operands


def _short(op: str) -> str:
    return op if len(op) <= 12 else op.split("_")[0]


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, (list, tuple)) else value


def _exact(value: Any) -> Any:
    """`value` as a key that tells apart what Python holds equal: 1, 1.0, True; 0.0, -0.0."""
    if isinstance(value, tuple):
        return tuple(_exact(v) for v in value)
    if isinstance(value, float):
        return ("float", value.hex())
    return (type(value).__name__, value) if isinstance(value, (int, str)) else value


def _substitute_attr(value: Any, env: Mapping[str, Dim]) -> Any:
    if isinstance(value, Sym):
        return substitute(value, env)
    if isinstance(value, tuple):
        return tuple(_substitute_attr(v, env) for v in value)
    return value.substitute(env) if isinstance(value, Graph) else value
