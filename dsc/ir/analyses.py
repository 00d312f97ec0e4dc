"""Facts about a graph, computed when asked: uses, last uses, structural hashes, cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from dsc.ir.dims import Dim
from dsc.ir.graph import Graph, Node, Operand, Value, Weight

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


def structural_hash(graph: Graph) -> str:
    """A hash of a graph modulo value names, weight names and locations.

    Equal for the same computation on other weights, so that identical layers share a kernel.
    """
    numbers: dict[str, int] = {}

    def number(operand: Operand | None) -> str:
        if operand is None:
            return "_"
        key = str(operand)
        mark = "@" if isinstance(operand, Weight) else "%"
        return f"{mark}{numbers.setdefault(key, len(numbers))}:{operand.type}"

    lines = [number(v) for v in graph.inputs]
    for node in graph.nodes:
        operands = ",".join(number(x) for x in node.inputs)
        attrs = ",".join(f"{k}={_attr_key(v)}" for k, v in node.attrs.items())
        lines.append(f"{node.op}({operands}){{{attrs}}}->{','.join(map(number, node.outputs))}")
    lines.append(",".join(number(x) for x in graph.outputs))
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

    Views move nothing. Experts count the weights of the chosen experts only where the number of
    tokens is known to be below the number of experts; else all of them.
    """
    if node.op in ("reshape", "slice", "split", "expand"):
        return Cost()
    read: Dim = 0
    weights: Dim = 0
    for operand in node.operands:
        if isinstance(operand, Weight):
            weights = weights + _weight_bytes(node, operand)
        else:
            read = read + operand.type.nbytes
    written: Dim = 0
    for value in node.outputs:
        written = written + value.type.nbytes
    return Cost(read, written, weights, flops(node))


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
            return 2 * types[0].numel * types[1].shape[-1]
        case "experts":
            rows = types[1].numel
            return 2 * rows * (types[3].shape[1] * types[3].shape[2] + types[4].shape[1] * types[4].shape[2])
        case "latent_attention":
            b, s, h, c = types[0].shape
            t, r = types[2].shape[1], types[1].shape[-1]
            return 2 * b * s * h * t * (2 * c + r)
        case "mla_attention":
            b, s, h, n = types[0].shape
            t, r, v = types[2].shape[1], types[1].shape[-1], node.output.type.shape[-1]
            return 2 * b * t * types[4].numel + 2 * b * s * h * t * (n + r + v)
        case "attention":
            b, s, h, d = types[0].shape
            return 2 * b * s * h * types[1].shape[1] * (d + types[2].shape[-1])
        case "einsum":
            from dsc.ir.ops.core import einsum_terms

            terms, _ = einsum_terms(str(node.attrs["eq"]))
            sizes = {c: d for term, t in zip(terms, types, strict=True) for c, d in zip(term, t.shape, strict=True)}
            total: Dim = 2
            for size in sizes.values():
                total = total * size
            return total
        case _ if node.body is not None:
            return total_cost(node.body.nodes).flops
    return node.outputs[0].type.numel if node.outputs else 0


def _weight_bytes(node: Node, weight: Weight) -> Dim:
    if node.op == "embedding":
        return node.output.type.nbytes
    if node.op == "experts":
        chosen, all_experts = node.operands[1].type.numel, weight.type.shape[0]
        if isinstance(chosen, int) and isinstance(all_experts, int) and chosen < all_experts:
            return weight.type.nbytes // all_experts * chosen
    return weight.type.nbytes


def _attr_key(value: object) -> str:
    return structural_hash(value) if isinstance(value, Graph) else str(value)
