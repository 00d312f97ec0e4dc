"""Cut a graph into regions and put it together again: the mechanics under the pass that fuses.

`Grouping` partitions the nodes of a graph; two groups may join when the graph of groups stays free
of cycles, which is the same as saying that no path leaves the joined group and comes back, and when
no write in place meets a reader of the same storage. `outline` makes each group of several nodes
one `fused` node, `inline` is its inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from dsc.ir.analyses import overwritten, storage_roots, uses
from dsc.ir.graph import Attrs, Graph, Node, Operand, Value, Weight
from dsc.ir.op import traits_of
from dsc.ir.program import Program
from dsc.ir.regions import anchor_of, is_literal
from dsc.ir.traits import Role

FAR = 96
"""Groups further apart than this in the order are not joined, so that a sweep stays linear."""


class Grouping:
    """A partition of a graph's nodes into groups, kept in an order in which they can run.

    Nodes and groups are numbers: a node its position, a group the position of one of its nodes.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        count = len(graph.nodes)
        self.before: list[set[int]] = [set() for _ in range(count)]
        self.after: list[set[int]] = [set() for _ in range(count)]
        self.apart: set[tuple[int, int]] = set()
        self.owner = list(range(count))
        self.members: dict[int, list[int]] = {i: [i] for i in range(count)}
        self.order = list(range(count))
        self.rank = list(range(count))
        self._readers: dict[str, list[int | None]] = {}
        position = {id(node): i for i, node in enumerate(graph.nodes)}
        for name, found in uses(graph).items():
            self._readers[name] = [None if n is None else position[id(n)] for n, _ in found]
        self._add_edges()

    def _add_edges(self) -> None:
        """Find what must run before what.

        Results before their readers, readers of a storage before what overwrites it, and what ranks
        tell each other in one order on all of them.
        """
        made = {v.name: i for i, node in enumerate(self.graph.nodes) for v in node.outputs}
        roots = storage_roots(self.graph)
        seen: dict[str, list[int]] = {}
        talk = [
            i
            for i, node in enumerate(self.graph.nodes)
            if traits_of(node.op).role is Role.COLLECTIVE
        ]
        for first, second in pairwise(talk):
            self._edge(first, second)
        for i, node in enumerate(self.graph.nodes):
            names = [x.name for x in node.operands if isinstance(x, Value)]
            for name in names:
                if name in made:
                    self._edge(made[name], i)
            written = {roots[x.name] for k in overwritten(node) if (x := node.inputs[k])}
            for root in written:
                for reader in seen.get(root, ()):
                    self._edge(reader, i)
                    self.apart.add((reader, i))
            for name in {roots[n] for n in names} - written:
                seen.setdefault(name, []).append(i)
            if written:
                for value in node.outputs:
                    late = (r for r in self._readers[value.name] if r is not None)
                    self.apart.update((i, r) for r in late)

    def _edge(self, first: int, second: int) -> None:
        self.before[second].add(first)
        self.after[first].add(second)

    def nodes(self, *groups: int) -> list[Node]:
        """The nodes of some groups, in program order."""
        found = sorted(i for g in groups for i in self.members[g])
        return [self.graph.nodes[i] for i in found]

    def producers(self, group: int) -> list[int]:
        """Groups that must run before a group, in order."""
        found = {self.owner[p] for i in self.members[group] for p in self.before[i]}
        return sorted(found - {group}, key=self.rank.__getitem__)

    def consumers(self, group: int) -> list[int]:
        """Groups that must run after a group, in order."""
        found = {self.owner[s] for i in self.members[group] for s in self.after[i]}
        return sorted(found - {group}, key=self.rank.__getitem__)

    def readers(self, name: str) -> set[int | None]:
        """Groups that read a value; `None` where the graph returns it."""
        return {None if i is None else self.owner[i] for i in self._readers[name]}

    def kept(self, *groups: int) -> set[str]:
        """Names of the values of some groups that are needed outside of them."""
        inside: set[int | None] = set(groups)
        values = [v.name for n in self.nodes(*groups) for v in n.outputs]
        return {name for name in values if self.readers(name) - inside} or {values[-1]}

    def obstacle(self, a: int, b: int) -> str:
        """Why two groups cannot be one; empty when they can."""
        first, last = sorted((a, b), key=self.rank.__getitem__)
        if self.rank[last] - self.rank[first] > FAR:
            return "they are too far apart"
        one, other = set(self.members[a]), set(self.members[b])
        if any((x in one and y in other) or (x in other and y in one) for x, y in self.apart):
            return "one writes in place what the other reads"
        if self._between(first, last) & set(self.producers(last)):
            return "what lies between them depends on one and is needed by the other"
        return ""

    def join(self, a: int, b: int) -> int:
        """Make two groups one; its number. Only after `obstacle` found none."""
        first, last = sorted((a, b), key=self.rank.__getitem__)
        start, end = self.rank[first], self.rank[last]
        late = self._between(first, last)
        window = self.order[start + 1 : end]
        ahead = [g for g in window if g not in late]
        behind = [g for g in window if g in late]
        self.order[start : end + 1] = [*ahead, first, *behind]
        self.members[first] = sorted(self.members[first] + self.members.pop(last))
        for i in self.members[first]:
            self.owner[i] = first
        self._rank_from(start)
        return first

    def release(self, i: int, *, ahead: bool) -> None:
        """Take node `i` out of its group, to run right ahead of it or right behind it."""
        group = self.owner[i]
        rest = [m for m in self.members[group] if m != i]
        at = self.rank[group]
        own, new = (rest[0], i) if group == i else (group, i)
        if group == i:
            del self.members[group]
        self.members[own], self.members[new] = rest, [i]
        for member in rest:
            self.owner[member] = own
        self.owner[i] = new
        self.order[at : at + 1] = [new, own] if ahead else [own, new]
        self._rank_from(at)

    def _between(self, first: int, last: int) -> set[int]:
        """Groups in the order between two that depend on the first."""
        late = {first}
        for group in self.order[self.rank[first] + 1 : self.rank[last]]:
            if any(self.owner[p] in late for i in self.members[group] for p in self.before[i]):
                late.add(group)
        return late - {first}

    def _rank_from(self, start: int) -> None:
        for position in range(start, len(self.order)):
            self.rank[self.order[position]] = position


def outline(grouping: Grouping) -> Graph:
    """The graph with every group of several nodes as one `fused` node."""
    graph = grouping.graph
    literals = {n.output.name: n for n in graph.nodes if is_literal(n)}
    nodes: list[Node] = []
    for group in grouping.order:
        members = grouping.nodes(group)
        nodes.append(
            members[0] if len(members) == 1 else region_of(members, grouping.kept(group), literals)
        )
    return _without_dead_literals(graph.with_nodes(nodes), set(literals))


def region_of(members: Sequence[Node], kept: set[str], literals: dict[str, Node]) -> Node:
    """One `fused` node of several nodes; literals that they read are copied into the body."""
    made = {v.name for n in members for v in n.outputs}
    read = dict.fromkeys(x for n in members for x in n.operands)
    given = [x for x in read if isinstance(x, Weight) or x.name not in made]
    copied = [literals[x.name] for x in given if isinstance(x, Value) and x.name in literals]
    outer = [x for x in given if isinstance(x, Weight) or x.name not in literals]
    taken = made | {x.name for x in given if isinstance(x, Value)}
    inner: dict[Operand, Value] = {}
    for x in outer:
        inner[x] = x if isinstance(x, Value) else Value(_fresh(f"w{len(inner)}", taken), x.type)
    nodes = [
        replace(n, inputs=tuple(x if x is None else inner.get(x, x) for x in n.inputs))
        for n in (*copied, *members)
    ]
    results = tuple(v for n in members for v in n.outputs if v.name in kept)
    body = Graph("body", tuple(inner.values()), tuple(nodes), results)
    return Node("fused", tuple(outer), Attrs({"body": body}), results, _loc(members))


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _loc(members: Sequence[Node]) -> str:
    """Where a region comes from: its anchor's module, else the module around all of its nodes."""
    anchor = anchor_of(members)
    if anchor is not None:
        return anchor.loc
    paths = [n.loc.split(".") for n in members]
    shared = 0
    while all(len(p) > shared and p[shared] == paths[0][shared] for p in paths):
        shared += 1
    return ".".join(paths[0][:shared])


def _without_dead_literals(graph: Graph, literals: set[str]) -> Graph:
    """The graph without the literals that only regions read, which have copies of their own."""
    read = {x.name for n in graph.nodes for x in n.operands} | {x.name for x in graph.outputs}
    dead = literals - read
    return graph.with_nodes(n for n in graph.nodes if n.outputs[0].name not in dead)


def inline(program: Program) -> Program:
    """The program with every region's body in the place of the region; itself when none is there.

    The inverse of fusing, up to the names of values and equal literals. For backends that take no
    regions, or not this one.
    """
    return program.map_entries(inline_graph)


def inline_graph(graph: Graph, keep: Callable[[Node], bool] | None = None) -> Graph:
    """One graph with the bodies of its `fused` nodes in their places, nested ones too.

    Regions that `keep` holds to be good stay.
    """
    stay = {id(n) for n in graph.nodes if n.body is None or (keep is not None and keep(n))}
    if len(stay) == len(graph.nodes):
        return graph
    taken = {v.name for v in graph.values()}
    env: dict[str, Operand] = {}
    literals: dict[tuple[Attrs, str], Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        for each in _expanded(node, env, taken, id(node) in stay):
            if is_literal(each):
                same = literals.setdefault((each.attrs, str(each.output.type)), each.output)
                if same is not each.output:
                    env[each.output.name] = same
                    continue
            nodes.append(each)
    outputs = tuple(_now(x, env) for x in graph.outputs)
    return graph.with_nodes(nodes, outputs)


def _expanded(node: Node, env: dict[str, Operand], taken: set[str], stays: bool) -> Iterator[Node]:
    """A node with its operands as they are now; a region as the nodes of its body."""
    operands = tuple(None if x is None else _now(x, env) for x in node.inputs)
    if stays or node.body is None:
        yield replace(node, inputs=operands)
        return
    body = inline_graph(node.body)
    inner: dict[str, Operand] = {
        v.name: x for v, x in zip(body.inputs, operands, strict=True) if x is not None
    }
    names: dict[str, str] = {}
    for result, value in zip(node.outputs, body.outputs, strict=True):
        if isinstance(value, Value) and value.name not in inner:
            names.setdefault(value.name, result.name)
    for each in body.nodes:
        outputs = tuple(
            Value(names.get(v.name) or _fresh(v.name, taken), v.type) for v in each.outputs
        )
        inputs = tuple(None if x is None else _now(_now(x, inner), env) for x in each.inputs)
        inner.update((v.name, new) for v, new in zip(each.outputs, outputs, strict=True))
        yield replace(each, inputs=inputs, outputs=outputs)
    for result, value in zip(node.outputs, body.outputs, strict=True):
        found = _now(value, inner)
        if isinstance(found, Weight) or found.name != result.name:
            env[result.name] = found


def _now(operand: Operand, env: dict[str, Operand]) -> Operand:
    return env.get(operand.name, operand) if isinstance(operand, Value) else operand
