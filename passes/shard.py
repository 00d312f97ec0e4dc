"""Share a program among ranks: heads, rows, vocabulary and experts, with collectives between.

What           linears that make heads, the inner rows of an MLP, or logits keep a slice of their
               rows on each rank (tensor parallel), experts are dealt out (expert parallel), and
               sums and gathers over the ranks join what belongs together.
Why it pays    each rank holds and reads 1/ranks of the large weights; a decode step is bound by
               reading them. A layer pays two sums of one hidden row a token.
Preconditions  stage CANONICAL or OPTIMIZED, weights of the program. The heads of attention and the
               number of experts part evenly into ranks (else an error); rows of an MLP and the
               vocabulary that do not part stay whole. Latent caches and the router are whole on
               every rank. One program results: weights are slices over the symbol `rank`.
Before         graph main(%x: f32[N,8], @gate: f32[6,8], @up: f32[6,8], @down: f32[8,6]) {
                 %g = linear %x, @gate : f32[N,6]
                 %u = linear %x, @up : f32[N,6]
                 %h = swiglu %g, %u : f32[N,6]
                 %d = linear %h, @down : f32[N,8]
                 %y = add %x, %d : f32[N,8]
                 return %y
               }
After          graph main(%x: f32[N,8], @gate.shard_0: f32[3,8], @up.shard_0: f32[3,8],
                 @down.shard_1: f32[8,3]) {
                 %g = linear %x, @gate.shard_0 : f32[N,3]
                 %u = linear %x, @up.shard_0 : f32[N,3]
                 %h = swiglu %g, %u : f32[N,3]
                 %d = linear %h, @down.shard_1 : f32[N,8]
                 %d.sum = all_reduce %d {ranks=2} : f32[N,8]
                 %y = add %x, %d.sum : f32[N,8]
                 return %y
               }
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dsc.errors import UsageError
from dsc.ir.analyses import producers
from dsc.ir.dims import Range
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value
from dsc.ir.interface import Mesh
from dsc.ir.op import lookup, traits_of
from dsc.ir.placement import COLUMNS, EXPERTS, HEADS, IN_EXPERTS, Placement, Placing
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.traits import Role
from dsc.passes._placements import Sharding
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.options import option
from dsc.rewrite.rebuild import Operands, rebuild

PARALLEL = ("tp+ep", "tp", "ep")


@dataclass(frozen=True)
class Shard(Pass):
    """Share every entry among `ranks`.

    `parallel` is `tp+ep` (experts dealt out, all else tensor parallel), `tp` (experts in parts as
    well) or `ep` (only the experts are shared).
    """

    ranks: int = option(2, least=1)
    parallel: str = option("tp+ep", among=PARALLEL)

    needs = frozenset({Stage.CANONICAL, Stage.OPTIMIZED})
    ensures = Stage.OPTIMIZED
    tolerance = 1e-5  # sums over ranks have another order

    def run(self, program: Program, report: PassReport) -> Program:
        """Rewrite all entries. Raises `UsageError` for what does not part into the ranks."""
        if self.ranks == 1:
            return program.at(Stage.OPTIMIZED)
        experts = EXPERTS if "ep" in self.parallel else IN_EXPERTS
        sharding = Sharding(program, self.ranks, experts, report)
        done = program.map_entries(lambda graph: self._graph(sharding, graph))
        mesh = Mesh(self.ranks, self.parallel)
        symbols = {**program.symbols, "rank": Range(0, self.ranks - 1)}
        done = replace(done.declaring(mesh=mesh), symbols=symbols)
        shared = done.with_weights(sharding.weights).pruned()
        report.facts |= {"ranks": self.ranks, "parallel": self.parallel}
        return shared.at(Stage.OPTIMIZED)

    def _graph(self, sharding: Sharding, graph: Graph) -> Graph:
        for node in graph.nodes:
            self._check(node)
        tensor = "tp" in self.parallel
        sharding.enter(frozenset(self._columns(graph, sharding)) if tensor else frozenset())
        results = {x.name for x in graph.outputs}

        def share(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
            done = sharding.run(b, node, operands)
            if done is None:
                return None
            wanted = [v.name in results for v in node.outputs]
            return [
                sharding.whole(b, new) or new if whole else new
                for new, whole in zip(done, wanted, strict=True)
            ]

        return rebuild(graph, share)

    def _check(self, node: Node) -> None:
        """Refuse heads and experts that cannot be dealt out evenly."""
        traits = traits_of(node.op)
        if traits.role is Role.ATTENTION and traits.wants and "tp" in self.parallel:
            heads = node[traits.wants[0]].type.shape[HEADS]
            _divides(heads, "attention heads", self.ranks, node.loc)
        if traits.grants == EXPERTS and "ep" in self.parallel:
            for name in sorted(traits.stacked):
                _divides(node[name].type.shape[0], "experts", self.ranks, node.loc)

    def _columns(self, graph: Graph, sharding: Sharding) -> Iterator[str]:
        """Results that are made in parts: what makes heads, inner rows of an MLP, logits."""
        made = producers(graph)
        outputs = {x.name for x in graph.outputs}
        for node in graph.nodes:
            traits = traits_of(node.op)
            if traits.wants:
                ways = {name: _way(sharding, made, node[name]) for name in traits.wants}
            elif traits.grants == COLUMNS and node.output.name in outputs:
                ways = {"": _way(sharding, made, node.output)}
            else:
                continue
            found = {name: way for name, way in ways.items() if way is not None}
            lies = {name: placement for name, (_, placement) in found.items()}
            taken = not traits.wants or isinstance(sharding.ask(node, lies), Placing)
            if len(found) < len(ways) or not taken:
                why = f"what {node.op} reads comes from no linear that parts into {self.ranks}"
                sharding.report.miss("columns", node.loc, why)
                continue
            yield from (source for source, _ in found.values())


def check_parallel(ranks: int, parallel: str) -> None:
    """Raise `UsageError` unless these are options of the pass."""
    if ranks < 1:
        raise UsageError(f"{ranks} ranks", hint="give at least 1")
    if parallel not in PARALLEL:
        raise UsageError(f"no way to share called {parallel!r}", hint=f"one of {PARALLEL}")


def check_parts(heads: int, experts: int, ranks: int, parallel: str) -> None:
    """Raise `UsageError` unless ranks can share a model of so many heads and routed experts."""
    if "tp" in parallel:
        _divides(heads, "attention heads", ranks)
    if "ep" in parallel:
        _divides(experts, "experts", ranks)


def _divides(number: object, what: str, ranks: int, where: str = "") -> None:
    if isinstance(number, int) and number % ranks == 0:
        return
    fits = [n for n in range(1, 65) if isinstance(number, int) and number % n == 0]
    raise UsageError(
        f"{number} {what} do not part into {ranks} ranks",
        where=where or None,
        hint=f"a number of ranks that divides {number}: {', '.join(map(str, fits))}",
    )


def _way(
    sharding: Sharding, made: Mapping[str, Node], x: Operand | None
) -> tuple[str, Placement] | None:
    """The result made in parts that `x` comes from by first operands, and how `x` lies then."""
    path: list[tuple[Node, int]] = []
    while not path or traits_of(path[-1][0].op).grants != COLUMNS:
        node = made.get(x.name) if isinstance(x, Value) else None
        if node is None or traits_of(node.op).place is None or not node.inputs:
            return None
        path.append((node, node.outputs.index(x)))
        x = node.inputs[0]
    source, through = path[-1][0], path[-2::-1]
    answer = sharding.ask(source, {}, COLUMNS)
    placement = None if isinstance(answer, str) else answer.results[0]
    for node, result in through:
        (first,) = lookup(node.op).operand_names(1)
        if placement is not None:
            answer = sharding.ask(node, {first: placement})
            placement = None if isinstance(answer, str) else answer.results[result]
    return None if placement is None else (source.output.name, placement)
