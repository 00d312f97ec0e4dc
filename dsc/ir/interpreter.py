"""The reference interpreter: every node by its operator's `reference`, in plain torch on CPU.

It is the oracle that every pass and every backend is compared with, so it takes no short cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsc.errors import UsageError, VerificationError
from dsc.ir.dims import Dim, Sym
from dsc.ir.graph import Graph, Node, Operand, Value
from dsc.ir.op import concrete, lookup
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import evaluate

if TYPE_CHECKING:
    import torch

Observer = Callable[[Node, tuple[Any, ...]], None]


def bind_symbols(graph: Graph, inputs: Sequence[Any]) -> dict[str, int]:
    """Sizes of the symbols, read off the input tensors. Raises `UsageError` on a misfit."""
    env: dict[str, int] = {}
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        _bind_shape(value, tuple(tensor.shape), env)
        if DType.of(tensor.dtype) != value.type.dtype:
            raise UsageError(f"input {value.name} is {tensor.dtype}, {value.type} is declared")
    return env


def run_graph(
    graph: Graph,
    inputs: Sequence[Any],
    weight: Callable[[str], Any] | None = None,
    observe: Observer | None = None,
) -> list[Any]:
    """Run a graph on tensors and return its outputs in order.

    `weight` gives the value of a weight by name; `observe` sees every node with its results.
    """
    from dsc.ir.analyses import last_uses

    env = bind_symbols(graph, inputs)
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
        results = _run_node(node, [operand(x) for x in node.inputs], env)
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
            self._weights[name] = evaluate(self.program.weights[name], self.program.source)
        return self._weights[name]  # type: ignore[no-any-return]

    def run(
        self, entry: str, inputs: Mapping[str, torch.Tensor], observe: Observer | None = None
    ) -> dict[str, torch.Tensor]:
        """Run `entry` on inputs by name; the outputs by name."""
        graph = self.program.entries[entry]
        missing = [v.name for v in graph.inputs if v.name not in inputs]
        if missing:
            raise UsageError(f"{entry} lacks the inputs {', '.join(missing)}")
        ordered = [inputs[v.name] for v in graph.inputs]
        outputs = run_graph(graph, ordered, self.weight, observe)
        return dict(zip(graph.output_names, outputs, strict=True))


def _run_node(node: Node, operands: list[Any], env: Mapping[str, int]) -> tuple[Any, ...]:
    definition = lookup(node.op)
    attrs = concrete(definition.with_defaults(node.attrs), env)
    results = definition.reference(*operands, **attrs)
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def _check_result(node: Node, value: Value, tensor: Any, env: Mapping[str, int]) -> None:
    wanted = concrete({"shape": value.type.shape}, env)["shape"]
    if tuple(tensor.shape) != wanted or DType.of(tensor.dtype) != value.type.dtype:
        raise VerificationError(
            f"{node.op} gave {tensor.dtype} {tuple(tensor.shape)}, {value} is declared {value.type}",
            where=node.loc or None,
        )


def _bind_shape(value: Value, shape: tuple[int, ...], env: dict[str, int]) -> None:
    declared: TensorType = value.type
    if len(shape) != declared.rank:
        raise UsageError(f"input {value.name} has shape {shape}, {declared} is declared")
    for dim, size in zip(declared.shape, shape, strict=True):
        name = _plain_symbol(dim)
        if name is not None and env.setdefault(name, size) == size:
            continue
        if name is None and (isinstance(dim, Sym) or dim == size):
            continue
        raise UsageError(f"input {value.name} has shape {shape}, {declared} is declared")


def _plain_symbol(dim: Dim) -> str | None:
    """The symbol's name when a dim is one symbol and nothing more."""
    if isinstance(dim, Sym) and len(dim.terms) == 1:
        ((monomial, coefficient),) = dim.terms
        if coefficient == 1 and len(monomial) == 1 and isinstance(monomial[0], str):
            return monomial[0]
    return None
