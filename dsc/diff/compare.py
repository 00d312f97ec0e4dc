"""The comparison as data: entries in pairs, layers in pairs, costs, lines aligned, errors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dsc.diff.lines import Row, align, lines_of, with_moves
from dsc.diff.measure import Timing
from dsc.diff.operators import Off, Operator, kernels, operators
from dsc.diff.sides import Side
from dsc.errors import DscError, VerificationError
from dsc.ir.costs import Costs, node_costs, total
from dsc.ir.graph import Graph, Node
from dsc.ir.layers import by_layer, runs
from dsc.ir.program import Program
from dsc.report import region_names, sizes_at
from dsc.rewrite.verify import WIDEST, compare_programs, pinned, weight_elements

MEASURES = ("nodes", "regions", "read_bytes", "written_bytes", "weight_bytes", "flops")
ROUNDING = 1e-4
"""What orders of fp32 sums may make of a difference."""
CONTEXT = 1024
"""Tokens in the cache where costs are stated."""


@dataclass(frozen=True)
class Layer:
    """One part of the model on both sides; `before` or `after` is empty where it is absent."""

    name: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    nodes: tuple[tuple[Node, ...], tuple[Node, ...]]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal for layers that differ in their number and names alone."""
        costs = [tuple(side.get(m) for m in MEASURES) for side in (self.before, self.after)]
        return (*costs, *(tuple(map(_signature, nodes)) for nodes in self.nodes))


@dataclass(frozen=True)
class EntryDiff:
    """A pair of entries. `errors`: the largest difference of each output; `at` the sizes.

    `operators` have the error that each adds, the worst first, and `kernels` how far the outputs of
    compiled code are apart, where that was asked for.

    `programs` hold the graphs; what the second one fixes, as a decode does S, is fixed in both.
    """

    names: tuple[str, str]
    programs: tuple[Program, Program]
    at: tuple[Mapping[str, int], Mapping[str, int]]
    totals: tuple[Mapping[str, float], Mapping[str, float]]
    layers: tuple[Layer, ...]
    errors: Mapping[str, float]
    times: tuple[Timing | None, Timing | None]
    operators: Sequence[Operator] = ()
    kernels: Mapping[str, Off] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The entry's name, or both names."""
        return self.names[1] if self.names[0] == self.names[1] else " → ".join(self.names)

    @property
    def graphs(self) -> tuple[Graph, Graph]:
        """The two graphs."""
        first, second = self.programs
        return first.entries[self.names[0]], second.entries[self.names[1]]

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """The text of both sides by layer, aligned; what a layer renames is known to the next."""
        known: dict[str, str] = {}
        texts = {
            x.name: align(lines_of(x.nodes[0]), lines_of(x.nodes[1]), known) for x in self.layers
        }
        return with_moves(texts, known)

    @property
    def error(self) -> float | None:
        """The largest difference of any output, where both ran."""
        return max(self.errors.values(), default=None)

    def runs(self) -> list[list[Layer]]:
        """Layers in order, neighbours of the same shape together."""
        return runs(self.layers, lambda x: x.name, lambda x: x.shape)


@dataclass(frozen=True)
class Diff:
    """Two sides compared. `agreement` says in words how their results compare, or why not."""

    sides: tuple[Side, Side]
    entries: tuple[EntryDiff, ...]
    unpaired: tuple[tuple[str, ...], tuple[str, ...]]
    agreement: str

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON values, without texts."""
        return {
            "before": self.sides[0].label,
            "after": self.sides[1].label,
            "agreement": self.agreement,
            "unpaired": [list(names) for names in self.unpaired],
            "entries": {e.name: _entry_dict(e) for e in self.entries},
        }


def compare(
    before: Side,
    after: Side,
    times: tuple[Mapping[str, Timing], Mapping[str, Timing]] = ({}, {}),
    run: bool = True,
    seed: int = 0,
    context: int | None = None,
) -> Diff:
    """Compare two sides; with `run` they are interpreted on the same inputs, too.

    Costs are those of a step with `context` tokens in the cache: by default as many as both take,
    `CONTEXT` at most.
    """
    most = min(side.text.limits.max_context for side in (before, after))
    at = min(CONTEXT, most) if context is None else context
    names = _pairs(list(before.text.entries), list(after.text.entries))
    errors, agreement = _errors(before, after, seed) if run else ({}, "not run")
    entries = tuple(
        _entry(before, after, a, b, errors, (times[0].get(a), times[1].get(b)), at)
        for a, b in names
    )
    alone = (
        tuple(n for n in before.text.entries if n not in {a for a, _ in names}),
        tuple(n for n in after.text.entries if n not in {b for _, b in names}),
    )
    return Diff((before, after), entries, alone, agreement)


def with_operators(found: Diff, trust: bool, seed: int = 0) -> Diff:
    """The comparison, both run on the same inputs: operator by operator, and as code if there is.

    Raises `UsageError` where one is too wide to interpret.
    """
    before, after = found.sides
    valued = before.has_values and after.has_values
    entries = []
    for entry in found.entries:
        first, second = (side.program if valued else side.text for side in found.sides)
        programs = _pinned(first, second, *entry.names)
        added = operators(programs, entry.names, seed)
        ran = kernels(found.sides, entry.names, trust, seed) if valued else {}
        entries.append(replace(entry, operators=added, kernels=ran))
    return replace(found, entries=tuple(entries))


def _pairs(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, str]]:
    """Entries by name; a single entry of other name is compared with every one."""
    shared = [(n, n) for n in after if n in before]
    if shared or not before or not after:
        return shared
    if len(before) == 1 or len(after) == 1:
        return [(a, b) for a in before for b in after]
    return []


def _errors(before: Side, after: Side, seed: int) -> tuple[dict[tuple[str, str], float], str]:
    """The largest difference by (entry, output), and how that came out in words."""
    valued = before.has_values and after.has_values
    first, second = (s.program if valued else s.text for s in (before, after))
    if len(second.entries) == 1 and len(first.entries) > 1:
        first, second = second, first
    try:
        wide = max(map(weight_elements, (first, second))) > WIDEST
        if wide:
            first, second = shrunk_together(first, second)
        found = compare_programs(first, second, float("inf"), seed)
    except DscError as problem:
        return {}, f"not compared: {problem.what}"
    if wide:
        found.form, valued = "shrunk", False
    weights = "the artifacts' weights" if valued else "random weights"
    told = str(found) if found.failure else found.told(_verdict(found.worst))
    words = f"{told} ({weights}, both texts interpreted in fp32)"
    return dict(found.errors), words


def _verdict(worst: float) -> str:
    """A word for the largest difference of two programs, relative to max(1, |value|max)."""
    if worst == 0.0:
        return "agree in every bit"
    return "agree but for rounding" if worst <= ROUNDING else "differ"


def shrunk_together(first: Program, second: Program) -> tuple[Program, Program]:
    """Both programs at the same small sizes. Raises `VerificationError` where there are none."""
    shared = first.weights.keys() & second.weights.keys()
    if any(first.weights[n] != second.weights[n] for n in shared):
        raise VerificationError("both are too wide to interpret, and their weights differ")
    sides = {"before": first, "after": second}
    graphs = {f"{k}.{n}": g for k, side in sides.items() for n, g in side.entries.items()}
    joint = replace(
        first,
        entries=graphs,
        weights={**second.weights, **first.weights},
        symbols={**second.symbols, **first.symbols},
    ).shrunk()

    def part(key: str, whole: Program) -> Program:
        entries = {name: joint.entries[f"{key}.{name}"] for name in whole.entries}
        return replace(joint, entries=entries, stage=whole.stage).pruned()

    return part("before", first), part("after", second)


def _entry(
    before: Side,
    after: Side,
    old: str,
    new: str,
    errors: Mapping[tuple[str, str], float],
    times: tuple[Timing | None, Timing | None],
    context: int,
) -> EntryDiff:
    programs = _pinned(before.text, after.text, old, new)
    graphs = programs[0].entries[old], programs[1].entries[new]
    at = (
        sizes_at(before.text, graphs[0], context),
        sizes_at(after.text, graphs[1], context),
    )
    costs = node_costs(graphs[0]), node_costs(graphs[1])
    parts = by_layer(graphs[0]), by_layer(graphs[1])
    layers = []
    for name in _merged(list(parts[0]), list(parts[1])):
        nodes = [part.get(name, []) for part in parts]
        stats = [_stats(n, c, a) for n, c, a in zip(nodes, costs, at, strict=True)]
        for stat, timing in zip(stats, times, strict=True):
            if timing is not None and name in timing.layers:
                stat["milliseconds"] = timing.layers[name]
        layers.append(Layer(name, stats[0], stats[1], (tuple(nodes[0]), tuple(nodes[1]))))
    totals = [_stats(list(g.nodes), c, a) for g, c, a in zip(graphs, costs, at, strict=True)]
    for stat, timing in zip(totals, times, strict=True):
        if timing is not None:
            stat["milliseconds"] = timing.milliseconds
    found = {name: e for (entry, name), e in errors.items() if entry in (old, new)}
    return EntryDiff((old, new), programs, at, (totals[0], totals[1]), tuple(layers), found, times)


def _pinned(before: Program, after: Program, old: str, new: str) -> tuple[Program, Program]:
    """Both programs with the symbols fixed that are numbers in the other's inputs.

    Caches that are stored otherwise say nothing of it: the rows of a page are no context.
    """
    first, second = before.entries[old], after.entries[new]
    stored = [{state.input: state.storage for state in side.states} for side in (before, after)]
    apart = {n for n in stored[0].keys() & stored[1].keys() if stored[0][n] != stored[1][n]}
    alike = [replace(g, inputs=tuple(v for v in g.inputs if v.name not in apart))
             for g in (first, second)]  # fmt: skip
    sizes = pinned(alike[0], alike[1]), pinned(alike[1], alike[0])
    return (
        replace(before, entries={**before.entries, old: first.substitute(sizes[0])}),
        replace(after, entries={**after.entries, new: second.substitute(sizes[1])}),
    )


def _stats(nodes: list[Node], costs: Costs, at: Mapping[str, int]) -> dict[str, float]:
    if not nodes:
        return {}
    regions = sum(region_names(nodes).values())
    return {"nodes": len(nodes), "regions": regions, **total(nodes, costs, at)}


def _merged(before: list[str], after: list[str]) -> list[str]:
    """All names in an order that respects both, as far as they agree."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    order: dict[str, None] = {}
    for _, a, b, c, d in matcher.get_opcodes():
        order.update(dict.fromkeys([*before[a:b], *after[c:d]]))
    return list(order)


def _signature(node: Node) -> tuple[Any, ...]:
    """An operator with its types; of a fused node those of its body as well."""
    types = tuple(str(v.type) for v in node.outputs)
    inner = () if node.body is None else tuple(map(_signature, node.body.nodes))
    read = tuple("" if x is None else str(x.type) for x in node.inputs)
    return (node.op, types, read, inner)


def _entry_dict(entry: EntryDiff) -> dict[str, Any]:
    return {
        "at": [dict(at) for at in entry.at],
        "before": dict(entry.totals[0]),
        "after": dict(entry.totals[1]),
        "error": entry.error,
        "errors": dict(entry.errors),
        "operators": [each.as_dict() for each in entry.operators],
        "kernels": {name: off.as_dict() for name, off in entry.kernels.items()},
        "layers": [
            {"layer": x.name, "before": dict(x.before), "after": dict(x.after)}
            for x in entry.layers
        ],
    }
