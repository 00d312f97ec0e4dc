"""Checks that every program must pass after every pass: SSA, types, stage, aliasing."""

from __future__ import annotations

import re

from dsc.errors import VerificationError
from dsc.ir.analyses import overwritten, storage_roots
from dsc.ir.graph import Graph, Node, Value, Weight
from dsc.ir.interface import State
from dsc.ir.op import TypeMismatch, infer
from dsc.ir.printer import print_node
from dsc.ir.program import Program, graph_symbols, is_causal_step
from dsc.ir.stages import is_legal
from dsc.ir.types import TensorType

NEIGHBOURS = 3
VALUE_NAME = re.compile(r"[\w.$-]+")
WEIGHT_NAME = re.compile(r"[\w.$/-]+")
WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
RESERVED = frozenset({"inf", "nan", "true", "false", "_"})


def verify(program: Program) -> None:
    """Raise `VerificationError` unless the program is well formed at its stage."""
    types = program.weight_types()
    for graph in program.entries.values():
        verify_graph(graph, types)
        if len(set(graph.output_names)) != len(graph.output_names):
            what = f"two outputs share a name: {', '.join(graph.output_names)}"
            raise _error(graph, None, what, "return")
        node = next((n for n in graph.walk() if not is_legal(n.op, program.stage)), None)
        if node is not None:
            raise _error(graph, node, f"{node.op} is not legal at stage {program.stage.name}")
        _check_formats(graph)
        _check_states(graph, program)
        unknown = graph_symbols(graph) - program.symbols.keys()
        if unknown:
            raise _error(graph, None, f"symbols without a range: {', '.join(sorted(unknown))}")
    for name, kind in types.items():
        if kind.format is not None and kind.format.behind:
            raise VerificationError(f"@{name} is {kind}: only states have scales behind their rows")
    for name in (*types, *program.symbols):
        pattern = WORD if name in program.symbols else WEIGHT_NAME
        if not pattern.fullmatch(name) or name in RESERVED:
            raise VerificationError(f"the text form cannot hold the name {name!r}")


def _check_formats(graph: Graph) -> None:
    """What comes in and goes out is numbers, but for states with scales behind their rows."""
    taken = [graph.inputs[i] for _, i in graph.aliases]
    given = [graph.outputs[o] for o, _ in graph.aliases]
    for x in (*graph.inputs, *graph.outputs):
        format = x.type.format
        if format is not None and not (format.behind and x in (*taken, *given)):
            what = f"{x} is {x.type}: only weights have a stored format, and states with scales"
            raise _error(graph, None, f"{what} behind their rows")


def _check_states(graph: Graph, program: Program) -> None:
    """What a step updates must be the states that are declared, as they are stored."""
    if not is_causal_step(graph):
        return
    states = {s.input: s for s in program.states}
    for output, source in graph.aliases:
        value, name = graph.inputs[source], graph.output_names[output]
        state = states.get(value.name)
        try:
            held = State.of(value, name, state.storage) if state is not None else None
        except ValueError:
            held = None
        if held is None or held != state:
            what = f"{value}: {value.type}, which {name} updates, is not declared as this state"
            what += ": declare the state, and how it is stored, in the interface"
            raise _error(graph, None, what, "return")


def verify_graph(graph: Graph, weights: dict[str, TensorType] | None = None) -> None:
    """Raise `VerificationError` unless one graph is well formed.

    Checks single definition before use, operand and result types against the operators' own
    inference, weights against `weights` (when given), and the declared aliases.
    """
    if not WORD.fullmatch(graph.name):
        raise _error(graph, None, f"the text form cannot hold the name {graph.name!r}")
    defined: dict[str, Value] = {}
    for value in graph.inputs:
        _define(graph, None, value, defined)
    for node in graph.nodes:
        for operand in node.operands:
            _check_operand(graph, node, operand, defined, weights)
        if node.body is not None:
            verify_graph(node.body, weights)
        _check_types(graph, node)
        for value in node.outputs:
            _define(graph, node, value, defined)
    for operand in graph.outputs:
        _check_operand(graph, None, operand, defined, weights)
    _check_aliases(graph)
    _check_in_place(graph)


def _define(graph: Graph, node: Node | None, value: Value, defined: dict[str, Value]) -> None:
    if value.name in defined:
        raise _error(graph, node, f"{value} is defined twice")
    if not VALUE_NAME.fullmatch(value.name):
        raise _error(graph, node, f"the text form cannot hold the name {value.name!r}")
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
        shown, declared = (", ".join(map(str, types)) for types in (wanted, found))
        what = f"{node.op} has the type {shown}, {declared} declared"
        raise _error(graph, node, what, "type")


def _check_aliases(graph: Graph) -> None:
    seen: set[int] = set()
    taken: set[int] = set()
    for output, source in graph.aliases:
        known = 0 <= output < len(graph.outputs) and 0 <= source < len(graph.inputs)
        if not known or source in seen or output in taken:
            what = f"output {output} cannot update input {source}"
            raise _error(graph, None, what, "return")
        seen.add(source)
        taken.add(output)
        result, state = graph.outputs[output].type, graph.inputs[source].type
        if result.dtype != state.dtype or result.rank != state.rank:
            what = f"output {output}, {result}, cannot update {state}"
            raise _error(graph, None, what, "return")


def _check_in_place(graph: Graph) -> None:
    """What is overwritten in place, or is a view of that storage, must not be read afterwards."""
    writes = {id(node): overwritten(node) for node in graph.nodes}
    if not any(writes.values()):
        return
    roots = storage_roots(graph)
    sharing: dict[str, list[str]] = {}
    for value in graph.inputs:
        sharing.setdefault(roots[value.name], []).append(value.name)
    stale: dict[str, str] = {}
    for node in graph.nodes:
        for operand in node.operands:
            _check_fresh(graph, node, operand, stale)
        for index in writes[id(node)]:
            state = node.inputs[index]
            if not isinstance(state, Value):
                raise _error(graph, node, f"{node.op} overwrites the weight {state}")
            root = roots[state.name]
            others = (x for i, x in enumerate(node.inputs) if i != index and isinstance(x, Value))
            if any(roots[x.name] == root for x in others):
                raise _error(graph, node, f"{node.op} reads {state}, which it overwrites")
            stale.update(dict.fromkeys(sharing[root], node.op))
        for value in node.outputs:
            sharing.setdefault(roots[value.name], []).append(value.name)
    for operand in graph.outputs:
        _check_fresh(graph, None, operand, stale)


def _check_fresh(
    graph: Graph, node: Node | None, operand: Value | Weight, stale: dict[str, str]
) -> None:
    if isinstance(operand, Value) and operand.name in stale:
        raise _error(graph, node, f"{operand} is read after {stale[operand.name]} overwrote it")


def _error(graph: Graph, node: Node | None, what: str, part: str = "") -> VerificationError:
    if node is None:
        return VerificationError(what, where=f"graph {graph.name}", culprit=graph, part=part)
    at = graph.nodes.index(node) if node in graph.nodes else 0
    near = graph.nodes[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1]
    picture = "\n".join(("> " if n is node else "  ") + print_node(n) for n in near)
    where = node.loc or f"graph {graph.name}"
    return VerificationError(what, where=where, picture=picture, culprit=node, part=part)
