"""Facts about a graph, computed when asked: uses, last uses, structural hashes, cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from dsc.ir.calls import Call
from dsc.ir.dims import Dim
from dsc.ir.graph import Graph, Node, Operand, Value, Weight
from dsc.ir.lanes import moves_nothing
from dsc.ir.op import lookup, traits_of
from dsc.ir.traits import Form, Role

Use = tuple[Node | None, int]
ANY = (1 << 63) - 1
"""A number of tokens that no step has, and an int64 holds."""


def uses(graph: Graph) -> dict[str, list[Use]]:
    """Where each value is read: `(node, operand index)`; `(None, i)` for graph output i."""
    found: dict[str, list[Use]] = {v.name: [] for v in graph.values()}
    for node in graph.nodes:
        for index, operand in enumerate(node.inputs):
            if isinstance(operand, Value):
                found[operand.name].append((node, index))
    for index, operand in enumerate(graph.outputs):
        if isinstance(operand, Value):
            found[operand.name].append((None, index))
    return found


def weight_uses(graphs: Iterable[Graph]) -> dict[str, list[Use]]:
    """Where each weight is read, in bodies as well; `(None, i)` where it is graph output i."""
    found: dict[str, list[Use]] = {}
    for graph in graphs:
        read = [(node, i, x) for node in graph.walk() for i, x in enumerate(node.inputs)]
        for node, index, x in (*read, *((None, i, x) for i, x in enumerate(graph.outputs))):
            if isinstance(x, Weight):
                found.setdefault(x.name, []).append((node, index))
    return found


def row_operands(op: str) -> frozenset[str]:
    """Operands with rows, of which a row of every result needs its own row alone.

    Rows are all axes but the last. Such operands share `*name` with all results where no attribute
    names an axis; those of a pointwise operator, which broadcast, all are.
    """
    declared = lookup(op)
    if declared.traits.form is not Form.MODEL:
        return frozenset()
    if declared.traits.role is Role.POINTWISE:
        return frozenset(o.name for o in declared.operands)
    leads = {r.dims[0] if len(r.dims) in (1, 2) else "" for r in declared.results}
    lead = leads.pop() if len(leads) == 1 else ""
    if not lead.startswith("*") or declared.attr("axis") is not None:
        return frozenset()
    return frozenset(o.name for o in declared.operands if o.pattern.dims[:1] == (lead,))


def few_tokens(nope: int, value: int, latent: int) -> int:
    """New tokens up to which attention over latents costs fewer flops than expanding them.

    c (n + v) / (2 c - n - v) for a latent of width c, nope width n and value width v; `ANY` where
    it always does.

    >>> few_tokens(128, 128, 512)
    170
    """
    excess = 2 * latent - nope - value
    return latent * (nope + value) // excess if excess > 0 else ANY


def producers(graph: Graph) -> dict[str, Node]:
    """The node that defines each value; inputs are absent."""
    return {v.name: node for node in graph.nodes for v in node.outputs}


def live(graph: Graph) -> Graph:
    """The graph without nodes whose results nobody reads; itself when there are none."""
    needed = {x.name for x in graph.outputs if not isinstance(x, Weight)}
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if any(v.name in needed for v in node.outputs):
            kept.append(node)
            needed |= {x.name for x in node.operands if isinstance(x, Value)}
    if len(kept) == len(graph.nodes):
        return graph
    return graph.with_nodes(reversed(kept))


def last_uses(graph: Graph) -> dict[int, list[str]]:
    """Names of the values that are dead after each node, by the node's position.

    A result that nobody reads dies at its own node; graph outputs never do.
    """
    last: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        for operand in (*node.operands, *node.outputs):
            if isinstance(operand, Value):
                last[operand.name] = position
    for operand in graph.outputs:
        last.pop(operand.name, None)
    dead: dict[int, list[str]] = {}
    for name, position in last.items():
        dead.setdefault(position, []).append(name)
    return dead


def storage_roots(graph: Graph) -> dict[str, str]:
    """For every value, the value whose storage it may share: through views and writes in place."""
    roots = {v.name: v.name for v in graph.inputs}
    for node in graph.nodes:
        shared = _shared(node)
        for index, value in enumerate(node.outputs):
            operand = node.inputs[shared[index]] if index in shared else None
            is_value = isinstance(operand, Value)
            roots[value.name] = roots[operand.name] if is_value else value.name  # type: ignore[union-attr]
    return roots


def overwritten(node: Node) -> frozenset[int]:
    """Indices of the operands that a node updates in place; for `fused`, its body does."""
    if node.body is None:
        return frozenset(index for _, index in lookup(node.op).aliases)
    roots = storage_roots(node.body)
    touched = {
        roots[operand.name]
        for inner in node.body.nodes
        for index in overwritten(inner)
        if isinstance(operand := inner.inputs[index], Value)
    }
    return frozenset(i for i, v in enumerate(node.body.inputs) if v.name in touched)


def aliases_of(node: Node) -> dict[int, int]:
    """Result index -> index of the operand that it is, updated in place; for `fused`, by its body.

    Unlike the views among what `storage_roots` follows, these results have no storage of their own.
    """
    in_place = overwritten(node)
    return {result: index for result, index in _shared(node).items() if index in in_place}


def written_roots(graph: Graph) -> dict[str, Operand]:
    """The operand whose bytes each value is: itself, or what a view or in-place operator reads.

    Views are those that no code runs for: other results have storage of their own.
    """
    roots: dict[str, Operand] = {v.name: v for v in graph.inputs}

    def root(x: Operand | None) -> Operand:
        if x is None:
            raise ValueError("an absent operand has no storage")
        return roots[x.name] if isinstance(x, Value) else x

    for node in graph.nodes:
        shared = aliases_of(node)
        for index, value in enumerate(node.outputs):
            if moves_nothing(node):
                roots[value.name] = root(node.inputs[0])
            elif index in shared:
                roots[value.name] = root(node.inputs[shared[index]])
            else:
                roots[value.name] = value
    return roots


def _shared(node: Node) -> dict[int, int]:
    """Result index -> index of the operand whose storage it may share."""
    if traits_of(node.op).role is Role.VIEW:
        return {index: 0 for index in range(len(node.outputs))}
    if node.body is None:
        return dict(lookup(node.op).aliases)
    roots = storage_roots(node.body)
    places = {v.name: i for i, v in enumerate(node.body.inputs)}
    found = ((i, roots[x.name]) for i, x in enumerate(node.body.outputs) if isinstance(x, Value))
    return {i: places[root] for i, root in found if root in places}


def structural_hash(graph: Graph) -> str:
    """A hash of a graph modulo value names, weight names and locations.

    Equal for the same computation on other weights, so that identical layers share a kernel.
    """
    return _hash(graph, {})


def _hash(graph: Graph, numbers: dict[str, int]) -> str:
    # A body numbers its own values; the weights it reads are those of the graph around it.
    numbers = {k: n for k, n in numbers.items() if k.startswith("@")}

    def number(operand: Operand | None) -> str:
        if operand is None:
            return "_"
        key = str(operand)
        mark = "@" if isinstance(operand, Weight) else "%"
        return f"{mark}{numbers.setdefault(key, len(numbers))}:{operand.type}"

    lines = [number(v) for v in graph.inputs]
    for node in graph.nodes:
        operands = ",".join(number(x) for x in node.inputs)
        for inner in node.body.walk() if node.body is not None else ():
            for x in inner.operands:
                if isinstance(x, Weight):
                    number(x)
        attrs = ",".join(f"{k}={_attr_key(v, numbers)}" for k, v in node.attrs.items())
        lines.append(f"{node.op}({operands}){{{attrs}}}->{','.join(map(number, node.outputs))}")
    lines.append(",".join(number(x) for x in graph.outputs) + f" {sorted(graph.aliases)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes that must move and floating-point operations, as dims."""

    read: Dim = 0
    written: Dim = 0
    weights: Dim = 0
    flops: Dim = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read + other.read,
            self.written + other.written,
            self.weights + other.weights,
            self.flops + other.flops,
        )


def cost(node: Node) -> Cost:
    """What one node reads, writes and computes, from its types alone.

    Views move nothing. A lookup reads the rows it takes, a write in place the rows it writes.
    Experts count the weights of the chosen experts only where the number of (token, expert) pairs
    is known to be below the number of experts; else all of them.
    """
    if traits_of(node.op).role is Role.VIEW:
        return Cost()
    read: Dim = 0
    weights: Dim = 0
    for index, operand in enumerate(node.inputs):
        if operand is None:
            continue
        moved = operand.type.bytes_of(elements_read(node, index))
        if isinstance(operand, Weight):
            weights = weights + moved
        else:
            read = read + moved
    in_place = overwritten(node)
    updated = {result for result, index in _shared(node).items() if index in in_place}
    written = rows_written(node)
    for result, value in enumerate(node.outputs):
        if result not in updated:
            written = written + value.type.nbytes
    for inner in node.body.nodes if node.body is not None else ():
        weights = weights + cost(inner).weights
    return Cost(read, written, weights, flops(node))


def call_of(node: Node) -> Call:
    """A node under the names of its operator's signature."""
    types = [None if x is None else x.type for x in node.inputs]
    return lookup(node.op).call(types, node.attrs, [v.type for v in node.outputs])


def rows_written(node: Node) -> Dim:
    """Bytes of the rows that a node, or its body, writes into what it updates in place."""
    inside = node.body.nodes if node.body is not None else ()
    total: Dim = sum(map(rows_written, inside), start=0)
    into = traits_of(node.op).into
    for name in traits_of(node.op).writes:
        held = node[into[name]].type if name in into else node[name].type
        total = total + held.with_shape(node[name].type.shape).nbytes
    return total


def elements_read(node: Node, index: int) -> Dim:
    """Elements that a node reads of an operand: of a table the rows taken, of what is written none.

    A region reads what its operators read: all where one of them does, else the sum.
    """
    operand = node.inputs[index]
    assert operand is not None
    whole = operand.type.numel
    if node.body is None:
        taken = elements_taken(node, index)
        return whole if taken is None else _least(node, taken, whole)
    name = node.body.inputs[index].name
    total: Dim = 0
    for inner in node.body.nodes:
        for i, x in enumerate(inner.inputs):
            if isinstance(x, Value) and x.name == name:
                read = elements_read(inner, i)
                if read == whole:
                    return whole
                total = total + read
    passed_on = any(isinstance(x, Value) and x.name == name for x in node.body.outputs)
    return whole if passed_on else total


def elements_taken(node: Node, index: int) -> Dim | None:
    """Elements that a node takes of an operand, each choice apart; `None`: all that it has."""
    operands = lookup(node.op).operands
    count = traits_of(node.op).reads.get(operands[min(index, len(operands) - 1)].name)
    return None if count is None else count(call_of(node))


def _least(node: Node, taken: Dim, whole: Dim) -> Dim:
    """The smaller of two counts. Where sizes are open, experts are taken to be all chosen."""
    if isinstance(taken, int) and isinstance(whole, int):
        return min(taken, whole)
    return whole if traits_of(node.op).stacked else taken


def total_cost(nodes: Iterable[Node]) -> Cost:
    """The sum over nodes."""
    result = Cost()
    for node in nodes:
        result = result + cost(node)
    return result


def flops(node: Node) -> Dim:
    """Floating-point operations of a node; two for a multiply and add."""
    if node.body is not None:
        return total_cost(node.body.nodes).flops
    return traits_of(node.op).flops(call_of(node))


def _attr_key(value: object, numbers: dict[str, int]) -> str:
    if isinstance(value, Graph):
        return _hash(value, numbers)
    if isinstance(value, tuple):
        return f"[{','.join(_attr_key(v, numbers) for v in value)}]"
    return f"{type(value).__name__} {value!r}"
