"""Checks that every program must pass after every pass: SSA, types, stage, aliasing."""

from __future__ import annotations

from dsc.errors import VerificationError
from dsc.ir.graph import Graph, Node, Value, Weight
from dsc.ir.op import TypeMismatch, infer, lookup
from dsc.ir.printer import print_node
from dsc.ir.program import Program
from dsc.ir.stages import LEGAL
from dsc.ir.types import TensorType

NEIGHBOURS = 3


def verify(program: Program) -> None:
    """Raise `VerificationError` unless the program is well formed at its stage."""
    types = program.weight_types()
    for entry, graph in program.entries.items():
        verify_graph(graph, types)
        illegal = {n.op for n in graph.nodes} - LEGAL[program.stage]
        if illegal:
            node = next(n for n in graph.nodes if n.op in illegal)
            raise _error(graph, node, f"{node.op} is not legal at stage {program.stage.name}")
        unknown = {s for v in graph.values() for s in v.type.symbols} - program.symbols.keys()
        if unknown:
            raise VerificationError(f"symbols without a range: {', '.join(sorted(unknown))}", entry)


def verify_graph(graph: Graph, weights: dict[str, TensorType] | None = None) -> None:
    """Raise `VerificationError` unless one graph is well formed.

    Checks single definition before use, operand and result types against the operators' own
    inference, weights against `weights` (when given), and the declared aliases.
    """
    defined: dict[str, Value] = {}
    for value in graph.inputs:
        _define(graph, None, value, defined)
    for node in graph.nodes:
        for operand in node.operands:
            _check_operand(graph, node, operand, defined, weights)
        _check_types(graph, node)
        if node.body is not None:
            verify_graph(node.body, weights)
        for value in node.outputs:
            _define(graph, node, value, defined)
    for operand in graph.outputs:
        _check_operand(graph, None, operand, defined, weights)
    _check_aliases(graph)


def _define(graph: Graph, node: Node | None, value: Value, defined: dict[str, Value]) -> None:
    if value.name in defined:
        raise _error(graph, node, f"{value} is defined twice")
    defined[value.name] = value


def _check_operand(
    graph: Graph,
    node: Node | None,
    operand: Value | Weight,
    defined: dict[str, Value],
    weights: dict[str, TensorType] | None,
) -> None:
    if isinstance(operand, Value):
        known = defined.get(operand.name)
        if known is None:
            raise _error(graph, node, f"{operand} is used before it is defined")
        if known.type != operand.type:
            raise _error(graph, node, f"{operand} is {known.type}, used as {operand.type}")
        return
    if weights is None:
        return
    if weights.get(operand.name) != operand.type:
        declared = weights.get(operand.name, "undeclared")
        raise _error(graph, node, f"{operand} is {declared}, used as {operand.type}")


def _check_types(graph: Graph, node: Node) -> None:
    try:
        wanted = infer(node.op, node.inputs, node.attrs)
    except TypeMismatch as problem:
        raise _error(graph, node, str(problem)) from None
    found = tuple(v.type for v in node.outputs)
    if wanted != found:
        shown = ", ".join(map(str, wanted))
        raise _error(graph, node, f"{node.op} has the type {shown}, {', '.join(map(str, found))} declared")


def _check_aliases(graph: Graph) -> None:
    seen: set[int] = set()
    for output, source in graph.aliases:
        if output >= len(graph.outputs) or source >= len(graph.inputs) or source in seen:
            raise _error(graph, None, f"output {output} cannot update input {source}")
        seen.add(source)
        result, state = graph.outputs[output].type, graph.inputs[source].type
        if result.dtype != state.dtype or result.rank != state.rank:
            raise _error(graph, None, f"output {output}, {result}, cannot update {state}")
    _check_in_place(graph)


def _check_in_place(graph: Graph) -> None:
    """An operand that is overwritten in place must not be read afterwards."""
    dead: dict[str, str] = {}
    for node in graph.nodes:
        for operand in node.operands:
            if isinstance(operand, Value) and operand.name in dead:
                what = f"{operand} is read after {dead[operand.name]} overwrote it"
                raise _error(graph, node, what)
        for _, index in lookup(node.op).aliases:
            overwritten = node.inputs[index]
            if isinstance(overwritten, Value):
                dead[overwritten.name] = node.op


def _error(graph: Graph, node: Node | None, what: str) -> VerificationError:
    if node is None:
        return VerificationError(what, where=f"graph {graph.name}")
    at = graph.nodes.index(node)
    near = graph.nodes[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1]
    picture = "\n".join(("> " if n is node else "  ") + print_node(n) for n in near)
    return VerificationError(what, where=node.loc or f"graph {graph.name}", picture=picture)
