"""The reference interpreter: every node by its operator's `reference`, in plain torch on CPU.

It is the oracle that every pass and every backend is compared with, so it takes no short cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsc.errors import RankError, UsageError, VerificationError
from dsc.ir.analyses import last_uses
from dsc.ir.dims import Dim, Sym, evaluate, free_symbols, symbol_name
from dsc.ir.formats import Packed
from dsc.ir.graph import Graph, Node, Operand, Value
from dsc.ir.lazy import torch
from dsc.ir.op import concrete, lookup, type_of
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import evaluate as evaluate_weight

Observer = Callable[[Node, tuple[Any, ...]], None]
Intercept = Callable[[Node, list[Any]], tuple[Any, ...] | None]
"""Called with a node and its operands before it runs; what it returns is taken as the results."""


def bind_symbols(graph: Graph, inputs: Sequence[Any]) -> dict[str, int]:
    """Sizes of the symbols, read off the input tensors. Raises `UsageError` on a misfit.

    A symbol that stands alone in a dim takes that size; sums and products of symbols are checked
    afterwards, and solved where one symbol is left unknown in a sum.
    """
    if len(inputs) != len(graph.inputs):
        raise UsageError(f"{graph.name} takes {len(graph.inputs)} inputs, {len(inputs)} given")
    env = bind_shapes(graph, [tuple(tensor.shape) for tensor in inputs])
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        declared = value.type.stored.dtype
        if type_of(tensor).dtype != declared:
            raise UsageError(f"input {value.name} is {tensor.dtype}, {declared} is declared")
    return env


def bind_shapes(graph: Graph, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Sizes of the symbols, from the shapes of the inputs in order. Raises `UsageError`."""
    env: dict[str, int] = {}
    composite: list[tuple[Value, int, Dim, int]] = []
    for value, shape in zip(graph.inputs, shapes, strict=True):
        composite += _bind_shape(graph, value, tuple(shape), env)
    for value, axis, dim, size in composite:
        unknown = free_symbols(dim) - env.keys()
        if len(unknown) == 1:
            _solve(dim, size, min(unknown), env)
        if free_symbols(dim) <= env.keys() and evaluate(dim, env) != size:
            raise UsageError(
                f"input {value.name} has {size} at axis {axis}, where the sizes of the other"
                f" inputs want {evaluate(dim, env)}"
            )
    return env


def run_graph(
    graph: Graph,
    inputs: Sequence[Any],
    weight: Callable[[str], Any] | None = None,
    observe: Observer | None = None,
    outer: Mapping[str, int] | None = None,
    intercept: Intercept | None = None,
) -> list[Any]:
    """Run a graph on tensors and return its outputs in order.

    `weight` gives the value of a weight by name; `observe` sees every node with its results, those
    of a nested body before their owner; `outer` holds the symbols of the graph around a body.
    """
    env = {**(outer or {}), **bind_symbols(graph, inputs)}
    values: dict[str, Any] = {v.name: t for v, t in zip(graph.inputs, inputs, strict=True)}
    expired = last_uses(graph)

    def operand(x: Operand | None) -> Any:
        if x is None:
            return None
        if isinstance(x, Value):
            return values[x.name]
        if weight is None:
            raise VerificationError(f"{x} is read in a graph that is run without weights")
        return weight(x.name)

    for position, node in enumerate(graph.nodes):
        given = [operand(x) for x in node.inputs]
        taken = None if intercept is None else intercept(node, given)
        if taken is not None:
            results = taken
        elif node.body is not None:
            results = tuple(run_graph(node.body, given, weight, observe, env, intercept))
        else:
            results = run_node(node, given, env)
        if len(results) != len(node.outputs):
            raise VerificationError(
                f"{node.op} gave {len(results)} results, {len(node.outputs)} are declared",
                where=node.loc or None,
            )
        for value, tensor in zip(node.outputs, results, strict=True):
            _check_result(node, value, tensor, env)
            values[value.name] = tensor
        if observe is not None:
            observe(node, results)
        for name in expired.get(position, ()):
            del values[name]
    return [operand(x) for x in graph.outputs]


class Interpreter:
    """Runs the entries of a program. Weights are evaluated once, when first read."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._weights: dict[str, Any] = {}

    def weight(self, name: str) -> torch.Tensor:
        """The value of a weight."""
        if name not in self._weights:
            self._weights[name] = evaluate_weight(self.program.weights[name], self.program.source)
        return self._weights[name]  # type: ignore[no-any-return]

    def run(
        self,
        entry: str,
        inputs: Mapping[str, torch.Tensor],
        observe: Observer | None = None,
        intercept: Intercept | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run `entry` on inputs by name; the outputs by name."""
        graph = self.program.entry(entry, inputs)
        ordered = [inputs[v.name] for v in graph.inputs]
        outputs = run_graph(graph, ordered, self.weight, observe, None, intercept)
        return dict(zip(graph.output_names, outputs, strict=True))


def run_node(node: Node, operands: Sequence[Any], env: Mapping[str, int]) -> tuple[Any, ...]:
    """What a node's reference makes of operands. Raises `UsageError`, `RankError`."""
    definition = lookup(node.op)
    try:
        attrs = concrete(node.attrs, env)
    except KeyError as problem:
        raise UsageError(
            f"{node.op} needs the size of {problem}, which no input gives", where=node.loc or None
        ) from None
    try:
        held = [_held(x, tensor, env) for x, tensor in zip(node.inputs, operands, strict=True)]
        results = definition.run(held, attrs)
    except RankError as problem:
        problem.where = problem.where or node.loc or None
        raise
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def _held(operand: Operand | None, tensor: Any, env: Mapping[str, int]) -> Any:
    """A tensor under its type: what holds a state in a format is bytes alone."""
    if operand is None or operand.type.stored is operand.type:
        return tensor
    return Packed(operand.type.substitute(env), (tensor,))


def _check_result(node: Node, value: Value, tensor: Any, env: Mapping[str, int]) -> None:
    held = value.type.stored
    try:
        wanted = tuple(evaluate(d, env) for d in held.shape)
    except KeyError as problem:
        raise UsageError(
            f"{value} is {value.type}, and no input gives the size of {problem}",
            where=node.loc or None,
        ) from None
    if tuple(tensor.shape) != wanted or DType.of(tensor.dtype) != held.dtype:
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise VerificationError(
            f"{node.op} gave {found}, {value} is declared {value.type}",
            where=node.loc or None,
        )


def _solve(dim: Dim, size: int, name: str, env: dict[str, int]) -> None:
    """Bind the one unknown of `dim = size` where `dim` is linear in it with a whole solution."""
    base = evaluate(dim, {**env, name: 0})
    slope = evaluate(dim, {**env, name: 1}) - base
    if slope and (size - base) % slope == 0:
        found = (size - base) // slope
        if found >= 0 and evaluate(dim, {**env, name: found}) == size:
            env[name] = found


def _bind_shape(
    graph: Graph, value: Value, shape: tuple[int, ...], env: dict[str, int]
) -> list[tuple[Value, int, Dim, int]]:
    declared: TensorType = value.type.stored
    if len(shape) != declared.rank:
        raise UsageError(f"input {value.name} has shape {shape}, {declared.rank} axes are declared")
    composite: list[tuple[Value, int, Dim, int]] = []
    for axis, (dim, size) in enumerate(zip(declared.shape, shape, strict=True)):
        name = symbol_name(dim)
        if name is None and isinstance(dim, Sym):
            composite.append((value, axis, dim, size))
        elif (wanted := dim if name is None else env.setdefault(name, size)) != size:
            first, at = ("", 0) if name is None else symbol_places(graph)[name]
            wants = f"axis {at} of {first} has" if first else "the model has"
            raise UsageError(f"input {value.name} has {size} at axis {axis}, {wants} {wanted}")
    return composite


def symbol_places(graph: Graph) -> dict[str, tuple[str, int]]:
    """The input and the axis at which the size of each symbol is read: alone, if it stands so."""
    axes = [(v.name, axis, dim) for v in graph.inputs for axis, dim in enumerate(v.type.shape)]
    axes.sort(key=lambda each: symbol_name(each[2]) is None)
    places: dict[str, tuple[str, int]] = {}
    for value, axis, dim in axes:
        for name in free_symbols(dim):
            places.setdefault(name, (value, axis))
    return places
