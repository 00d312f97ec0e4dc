"""Facts about a graph, computed when asked: uses, last uses, structural hashes, cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dsc.ir.dims import Dim
from dsc.ir.graph import Graph, Node, Operand, Value, Weight
from dsc.ir.op import lookup
from dsc.ir.ops.shape import VIEWS

Use = tuple[Node | None, int]


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


def producers(graph: Graph) -> dict[str, Node]:
    """The node that defines each value; inputs are absent."""
    return {v.name: node for node in graph.nodes for v in node.outputs}


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


def _shared(node: Node) -> dict[int, int]:
    """Result index -> index of the operand whose storage it may share."""
    if node.op in VIEWS:
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
    if node.op in ("reshape", "slice", "split", "expand"):
        return Cost()
    read: Dim = 0
    weights: Dim = 0
    in_place = overwritten(node)
    for index, operand in enumerate(node.inputs):
        if isinstance(operand, Weight):
            weights = weights + _weight_bytes(node, operand)
        elif operand is not None and not (index in in_place and _only_written(node, index)):
            read = read + _read_bytes(node, index, operand)
    updated = {result for result, index in _shared(node).items() if index in in_place}
    written: Dim = 0
    for result, value in enumerate(node.outputs):
        if result not in updated:
            written = written + value.type.nbytes
    if node.op in _WRITES:
        written = _rows_written(node)
    for inner in node.body.nodes if node.body is not None else ():
        moved = cost(inner)
        weights = weights + moved.weights
        if inner.op in _WRITES:
            written = written + moved.written
    return Cost(read, written, weights, flops(node))


_WRITES: Mapping[str, tuple[int, ...]] = {"cache_write": (1,), "page_write": (1, 2)}
"""Writes in place, and the operands that hold the new rows."""


def _rows_written(node: Node) -> Dim:
    total: Dim = 0
    for index in _WRITES[node.op]:
        total = total + node.operands[index].type.nbytes
    return total


def _read_bytes(node: Node, index: int, operand: Operand) -> Dim:
    """Bytes read of an operand: of a table the rows taken, of pages those that the table names."""
    if _LOOKUPS.get(node.op) == index:
        return node.output.type.nbytes
    if node.op in _PAGED and index == 2:
        batch, width = node.operands[0].type.shape[0], operand.type.shape[2]
        return operand.type.with_shape((batch, _cached_rows(node), width)).nbytes
    return operand.type.nbytes


def _cached_rows(node: Node) -> Dim:
    """Rows that an attention over pages reads for each sequence, at most."""
    return node.operands[3].type.shape[1] * node.operands[2].type.shape[1]


def _only_written(node: Node, index: int) -> bool:
    """Whether an operand that is updated in place is not read besides, by a body."""
    if node.body is None:
        return True
    name = node.body.inputs[index].name
    return all(
        i in overwritten(inner)
        for inner in node.body.nodes
        for i, operand in enumerate(inner.inputs)
        if isinstance(operand, Value) and operand.name == name
    )


def total_cost(nodes: Iterable[Node]) -> Cost:
    """The sum over nodes."""
    result = Cost()
    for node in nodes:
        result = result + cost(node)
    return result


def flops(node: Node) -> Dim:
    """Floating-point operations of a node; two for a multiply and add."""
    types = [x.type for x in node.operands]
    match node.op:
        case "linear" | "route":
            return 2 * types[0].numel * types[1].shape[0]
        case "grouped_linear":
            return 2 * types[0].numel * types[1].shape[1]
        case "matmul":
            return 2 * node.output.type.numel * types[0].shape[-1]
        case "grouped_mm":
            return 2 * types[0].numel * types[1].shape[2]
        case "experts":
            (_, g, d), (_, _, i) = types[3].shape, types[4].shape
            return 2 * types[1].numel * (g * d + d * i)
        case "sdpa":
            return (
                2 * types[0].numel * types[1].shape[-2]
                + 2 * node.output.type.numel * (types[1].shape[-2])
            )
        case "latent_attention":
            b, s, h, c = types[0].shape
            t, r = types[2].shape[1], types[1].shape[-1]
            return 2 * b * s * h * t * (2 * c + r)
        case "mla_attention":
            b, s, h, n = types[0].shape
            t, r, v = types[2].shape[1], types[1].shape[-1], node.output.type.shape[-1]
            return 2 * b * t * types[4].numel + 2 * b * s * h * t * (n + r + v)
        case "paged_latent_attention":
            b, s, h, c = types[0].shape
            return 2 * b * s * h * _cached_rows(node) * (2 * c + types[1].shape[-1])
        case "paged_mla_attention":
            b, s, h, n = types[0].shape
            t, r, v = _cached_rows(node), types[1].shape[-1], node.output.type.shape[-1]
            return 2 * b * t * types[4].numel + 2 * b * s * h * t * (n + r + v)
        case "attention":
            b, s, h, d = types[0].shape
            return 2 * b * s * h * types[1].shape[1] * (d + types[2].shape[-1])
        case "einsum":
            from dsc.ir.ops.core import einsum_terms

            terms, _ = einsum_terms(str(node.attrs["eq"]))
            sizes = {
                letter: dim
                for term, t in zip(terms, types, strict=True)
                for letter, dim in zip(term, t.shape, strict=True)
            }
            total: Dim = 2
            for size in sizes.values():
                total = total * size
            return total
        case _ if node.body is not None:
            return total_cost(node.body.nodes).flops
    return node.outputs[0].type.numel if node.outputs else 0


_PAGED = frozenset({"paged_latent_attention", "paged_mla_attention"})
_LOOKUPS = {"embedding": 1, "gather": 0, "take": 0, "select_rows": 0}


def _weight_bytes(node: Node, weight: Weight) -> Dim:
    if node.op in _LOOKUPS:
        return node.output.type.nbytes
    if node.op == "experts":
        chosen, all_experts = node.operands[1].type.numel, weight.type.shape[0]
        if isinstance(chosen, int) and isinstance(all_experts, int) and chosen < all_experts:
            return weight.type.nbytes // all_experts * chosen
    return weight.type.nbytes


def _attr_key(value: object, numbers: dict[str, int]) -> str:
    if isinstance(value, Graph):
        return _hash(value, numbers)
    if isinstance(value, tuple):
        return f"[{','.join(_attr_key(v, numbers) for v in value)}]"
    return f"{type(value).__name__} {value!r}"
