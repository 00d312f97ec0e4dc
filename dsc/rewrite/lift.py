"""Lifting: cut a region out of a graph, guess what it computes, and prove the guess by running it.

Tracers spell one function in many ways, so the raise passes match meaning, not spelling. Structure
*proposes*: `cut` collects everything between well-chosen boundary values, and the rule reads a
hypothesis off it. Evaluation *proves*: region and candidate run on seeded random inputs at several
sizes and must agree. A proof is about real numbers: 16-bit types are widened to fp32 on both sides
first, so that what remains of a difference is meaning and not rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from dsc.errors import DscError
from dsc.ir.analyses import structural_hash
from dsc.ir.dims import Dim, evaluate, symbol
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value
from dsc.ir.interpreter import run_graph
from dsc.ir.lazy import torch
from dsc.ir.op import TypeMismatch
from dsc.rewrite.rebuild import Operands, rebuild
from dsc.rewrite.rule import Match
from dsc.rewrite.scope import Scope
from dsc.rewrite.verify import relative_difference

MAX_NODES = 400
TOLERANCE = 1e-4
"""Largest |difference| in a proof, relative to the largest value: fp32 noise, never a meaning."""
DOUBLE = 1e-9
"""The same in fp64: what computes in fp32 inside does not replace what does not."""


@dataclass(frozen=True)
class Region:
    """A piece of a graph as a graph of its own: the leaves are its inputs, in order of reading."""

    graph: Graph
    leaves: tuple[Operand, ...]
    nodes: tuple[Node, ...]

    @property
    def key(self) -> str:
        """Equal for regions that compute the same, whatever their names."""
        return structural_hash(self.graph)

    @property
    def ops(self) -> frozenset[str]:
        """The operators inside."""
        return frozenset(n.op for n in self.nodes)

    def constants(self) -> frozenset[float]:
        """All numbers written in the region: scalar constants and integer attributes."""
        found: set[float] = set()
        for node in self.nodes:
            for value in node.attrs.values():
                flat = value if isinstance(value, tuple) else (value,)
                found |= {float(v) for v in flat if isinstance(v, (int, float))}
        return frozenset(found)


def cut(
    scope: Scope, outputs: Sequence[Value], is_leaf: Callable[[Operand], bool]
) -> Region | None:
    """Everything that `outputs` depend on, back to leaves, weights and graph inputs.

    `is_leaf` decides for each value whether to stop there. `None` when the region grows past
    `MAX_NODES` nodes: then it is no single mechanism.
    """
    inside: dict[int, Node] = {}
    leaves: dict[str, Operand] = {}
    wanted = {v.name for v in outputs}
    pending: list[Operand] = list(reversed(outputs))
    while pending:
        operand = pending.pop()
        node = scope.producer(operand)
        if node is None or (is_leaf(operand) and operand.name not in wanted):
            leaves.setdefault(str(operand), operand)
            continue
        if id(node) not in inside:
            inside[id(node)] = node
            pending.extend(reversed(node.operands))
        if len(inside) > MAX_NODES:
            return None
    nodes = sorted(inside.values(), key=lambda n: scope.position[n.outputs[0].name])
    read = {str(x) for n in nodes for x in n.operands} | {str(v) for v in outputs}
    used = tuple(x for key, x in leaves.items() if key in read)
    return Region(as_graph(used, nodes, outputs), used, tuple(nodes))


def matched(scope: Scope, root: Node, region: Region, **values: Any) -> Match:
    """A match of a region that ends in `root`; its other nodes may be read outside of it."""
    own = tuple(n for n in region.nodes if n is not root)
    shared = frozenset(map(id, own))
    return Match({**values, "region": region}, (*own, root), root.outputs, root, scope, shared)


def as_graph(leaves: Sequence[Operand], nodes: Iterable[Node], outputs: Sequence[Value]) -> Graph:
    """Nodes as a graph of their own, in which the leaves, weights among them, are inputs."""
    inputs = {str(x): Value(f"in.{i}", x.type) for i, x in enumerate(leaves)}
    body = [
        replace(n, inputs=tuple(None if x is None else inputs.get(str(x), x) for x in n.inputs))
        for n in nodes
    ]
    results = tuple(inputs.get(str(v), v) for v in outputs)
    names = tuple(f"out.{i}" for i in range(len(outputs)))
    return Graph("region", tuple(inputs.values()), tuple(body), results, names)


def resized(graph: Graph, sizes: Mapping[int, int]) -> Graph:
    """The same computation with integer dims mapped by `sizes`, in types and attributes alike.

    Raises `TypeMismatch` when the mapped sizes do not fit together.
    """
    if not sizes:
        return graph

    def dim(d: Any) -> Any:
        return sizes.get(d, d) if isinstance(d, int) and not isinstance(d, bool) else d

    def size(value: Any) -> Any:
        return tuple(map(dim, value)) if isinstance(value, tuple) else dim(value)

    def again(b: GraphBuilder, node: Node, operands: Operands) -> tuple[Value, ...]:
        found = {k: v for k, v in node.attrs.items() if k in _EXTENTS}
        extents = {
            k: tuple(map(dim, v)) if isinstance(v, tuple) else dim(v) for k, v in found.items()
        }
        return b.again(node, operands, node.attrs.updated(**extents))

    inputs = [Value(v.name, v.type.with_shape(tuple(map(dim, v.type.shape)))) for v in graph.inputs]
    return rebuild(graph, again, inputs)


_EXTENTS = frozenset({"shape", "sizes", "start", "end", "bins"})
"""Attributes that hold extents; axes, k and steps are no sizes."""


def shrunk_sizes(
    roles: Mapping[str, int], products: Sequence[Dim], least: Mapping[str, int] | None = None
) -> dict[int, int] | None:
    """Small sizes for the dims named by `roles`, under which `products` of them stay consistent.

    `roles` gives real sizes by symbol, `products` the further dims that occur, as expressions over
    those symbols, `least` the smallest size that a role may shrink to. Equal sizes map to equal
    ones, whatever they mean. `None` when no such sizes are found.
    """
    named: list[tuple[Dim, int]] = [(symbol(n), size) for n, size in roles.items()]
    named += [(d, evaluate(d, roles)) for d in products]
    choices = [_small(size, (least or {}).get(name, 2)) for name, size in roles.items()]
    best: tuple[int, dict[int, int]] | None = None
    for picked in product(*choices):
        env = dict(zip(roles, picked, strict=True))
        sizes: dict[int, int] = {}
        for d, real in named:
            if sizes.setdefault(real, evaluate(d, env)) != evaluate(d, env):
                break
        else:
            clashes = len(sizes) - len(set(sizes.values()))
            if best is None or clashes < best[0]:
                best = (clashes, sizes)
            if clashes == 0:
                break
    return None if best is None else best[1]


def _small(size: int, least: int) -> Sequence[int]:
    """Sizes to shrink a dim of `size` to; small ones stay as they are."""
    return (size,) if size <= least + 2 else range(least + 2, min(size, least + 9) + 1)


@dataclass(frozen=True)
class Case:
    """One experiment: sizes of the symbols and a tensor for each leaf."""

    sizes: Mapping[str, int]
    tensors: Sequence[torch.Tensor]


def run(graph: Graph, case: Case) -> list[torch.Tensor]:
    """The results of a region in one experiment."""
    concrete = graph.substitute(case.sizes)
    return run_graph(concrete, list(case.tensors))


def prove(
    region: Graph,
    candidate: Graph,
    cases: Iterable[Case],
    same: Callable[[list[Any], list[Any]], str] | None = None,
) -> str:
    """Why region and candidate differ in some case; empty when they agree in all.

    Both take the same inputs. `same` compares the results of one case; the default wants equal
    shapes and values within `TOLERANCE`.
    """
    for case in cases:
        try:
            left, right = run(region, case), run(candidate, case)
        except (DscError, RuntimeError, IndexError, KeyError, TypeError, ValueError) as problem:
            return f"it does not run at {dict(case.sizes)}: {str(problem).splitlines()[0]}"
        difference = (same or _differ)(left, right)
        if difference:
            return f"{difference} at {dict(case.sizes)}"
    return ""


def _differ(left: list[Any], right: list[Any]) -> str:
    for a, b in zip(left, right, strict=True):
        found = differ(a, b)
        if found:
            return found
    return ""


def differ(a: torch.Tensor, b: torch.Tensor) -> str:
    """How two tensors differ beyond what is tolerated, in words; empty when they do not."""
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)} against {tuple(b.shape)}"
    if not a.is_floating_point():
        return "" if bool((a == b).all()) else "other elements"
    tolerance = DOUBLE if a.element_size() == 8 else TOLERANCE
    error = relative_difference(a, b)
    return f"a difference of {error:.2g}" if error > tolerance else ""


def build(leaves: Sequence[Operand], body: Callable[..., Operand | tuple[Operand, ...]]) -> Graph:
    """A candidate: `body(b, *leaves)` as a graph over the same inputs as a region's."""
    b = GraphBuilder("candidate")
    inputs = [b.input(f"in.{i}", x.type) for i, x in enumerate(leaves)]
    results = body(b, *inputs)
    outputs = results if isinstance(results, tuple) else (results,)
    return b.finish(outputs, tuple(f"out.{i}" for i in range(len(outputs))))


def proven(scope: Scope, key: tuple[Any, ...], proof: Callable[[], Any]) -> Any:
    """The result of `proof`, computed once for each key in one run of the driver."""
    if key not in scope.memo:
        try:
            scope.memo[key] = proof()
        except TypeMismatch as problem:
            scope.memo[key] = f"the sizes do not fit: {str(problem).splitlines()[0]}"
    return scope.memo[key]


def assignments(*graphs: Graph) -> list[dict[str, int]]:
    """Sizes to try for the symbols of graphs: small and pairwise different, reversed, all one."""
    names = sorted({s for g in graphs for v in g.values() for s in v.type.symbols})
    count = len(names)
    return [
        {name: 2 + i for i, name in enumerate(names)},
        {name: 1 + count - i for i, name in enumerate(names)},
        dict.fromkeys(names, 1),
    ]


def at_sizes(value: Operand, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an operand at given sizes of its symbols."""
    return tuple(evaluate(d, sizes) for d in value.type.shape)


def normal(value: Operand, sizes: Mapping[str, int], seed: int, scale: float = 1.0) -> torch.Tensor:
    """A seeded normal tensor of an operand's shape, in its (widened) type."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(at_sizes(value, sizes), generator=generator) * scale
    return tensor.to(value.type.dtype.torch)


def integers(value: Operand, sizes: Mapping[str, int], seed: int, below: int) -> torch.Tensor:
    """Seeded integers in 0 .. below-1 of an operand's shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, below, at_sizes(value, sizes), generator=generator)


def as_written(value: float, written: Iterable[float]) -> float:
    """A measured number as the region spells it: the nearest of `written`, when one is near."""
    near = [w for w in written if abs(w - value) <= 1e-5 * max(abs(value), 1e-9)]
    if near:
        return min(near, key=lambda w: abs(w - value))
    return float(f"{value:.6g}")


def extent(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The integer that a dim is at given sizes."""
    return evaluate(dim, sizes)
