"""What quantising each product does: to its own result, and to what the program gives.

Two forward runs with nothing quantised and one with each product alone, from that product on: the
first half of a run is not repeated. So n products of equal cost take about n/2 forward runs of the
reference interpreter, and no gradient. An operator runs in codes as the backend runs it, its rows
in codes too where that takes them so.

*Harm* is what the program's results lose. For a causal language model it is the Kullback-Leibler
divergence of the next token, in nats a token, from the model as it was: of all that quantising
changes it is what sampling sees, it is never negative, and unlike a change of the loss it does not
hide errors that happen to help on this text. For other programs it is the squared error of all
results, as a share of their squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsc.calibration.products import Product, weights_of
from dsc.ir.analyses import overwritten
from dsc.ir.graph import Attrs, Graph, Node, Value, Weight
from dsc.ir.interpreter import Intercept, Interpreter, bind_symbols, run_graph, run_node
from dsc.ir.lazy import torch
from dsc.ir.op import lookup, traits_of
from dsc.ir.program import Program
from dsc.ir.weights import WeightExpr, evaluate

ACTIVATIONS = "activations"
LOGITS, IDS = "logits", "input_ids"
LEAST, MOST = -24, 24
"""Exponents of two between which magnitudes are counted; what lies beyond counts at the end."""
ROWS = 256
"""Rows of logits that are compared at once."""
Results = dict[str, Any]
Stored = Mapping[str, WeightExpr]
"""Weights in codes, by name."""
Progress = Callable[[int, int], None]


@dataclass
class Rows:
    """The numbers that a product's rows hold: how many lie from 2^e to 2^(e+1), for each e."""

    largest: float = 0.0
    squares: float = 0.0
    count: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * (MOST - LEAST + 1))

    def add(self, x: Any) -> None:
        """Take in the numbers of a tensor."""
        magnitudes = x.detach().abs().float().flatten()
        if not len(magnitudes):
            return
        self.largest = max(self.largest, float(magnitudes.amax()))
        self.squares += float(magnitudes.double().square().sum())
        self.count += len(magnitudes)
        exponents = torch.frexp(magnitudes[magnitudes > 0]).exponent.long() - 1
        found = torch.bincount(exponents.clamp(LEAST, MOST) - LEAST, minlength=len(self.counts))
        self.counts = [a + b for a, b in zip(self.counts, found.tolist(), strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """The counts from the first that is not 0 to the last, `log2` that of the first."""
        held = [i for i, n in enumerate(self.counts) if n]
        first, end = (held[0], held[-1] + 1) if held else (0, 0)
        rms = math.sqrt(self.squares / self.count) if self.count else 0.0
        shown = {"max": self.largest, "rms": rms}
        return {**shown, "log2": LEAST + first, "counts": self.counts[first:end]}


@dataclass
class Errors:
    """How far numbers y lie from numbers x, by sums over both."""

    xx: float = 0.0
    yy: float = 0.0
    off: float = 0.0

    def add(self, x: Any, y: Any) -> None:
        """Take in two tensors of one shape."""
        x, y = x.detach().double().flatten(), y.detach().double().flatten()
        self.xx += float(x @ x)
        self.yy += float(y @ y)
        self.off += float((x - y).square().sum())

    @property
    def relative(self) -> float:
        """The root of the squares of what y is off, as a share of that of x."""
        return math.sqrt(self.share)

    @property
    def share(self) -> float:
        """The squares of what y is off, as a share of those of x."""
        return self.off / self.xx if self.xx else (math.inf if self.off else 0.0)

    @property
    def calc_diff(self) -> float:
        """DeepGEMM's measure: 1 - 2xy / (xx + yy), which is the squared error over xx + yy."""
        both = self.xx + self.yy
        return self.off / both if both else 0.0


@dataclass
class Harm:
    """What results lost against those of the program as it was.

    Of a language model `total` is in nats and `loss`, `was` are sums of its loss with and without;
    they and `total` are of `count` tokens.
    """

    total: float = 0.0
    count: int = 0
    loss: float = 0.0
    was: float = 0.0
    predicted: int = 0
    errors: Errors = field(default_factory=Errors)

    @property
    def value(self) -> float:
        """One number: nats a token, or a share of squares."""
        return self.total / self.count if self.count else self.errors.share

    @property
    def losses(self) -> tuple[float, float] | None:
        """The loss, in nats a token, as it was and as it is; `None` for other programs."""
        if not self.predicted:
            return None
        return self.was / self.predicted, self.loss / self.predicted

    def add(self, given: Mapping[str, Any], before: Results, after: Results) -> None:
        """Take in the results of a run."""
        if LOGITS in before and IDS in given:
            self._add_logits(given[IDS], before[LOGITS], after[LOGITS])
            return
        for name, x in before.items():
            if x.is_floating_point():
                self.errors.add(x, after[name])

    def _add_logits(self, ids: Any, before: Any, after: Any) -> None:
        targets = torch.full(ids.shape, -1)
        targets[:, :-1] = ids[:, 1:]
        pairs = (before.flatten(0, 1).split(ROWS), after.flatten(0, 1).split(ROWS))
        for x, y, wanted in zip(*pairs, targets.flatten().split(ROWS), strict=True):
            p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
            self.total += float((p.exp() * (p - q)).sum())
            self.count += len(x)
            known = wanted >= 0
            index = wanted[known, None]
            self.was -= float(p[known].gather(-1, index).sum())
            self.loss -= float(q[known].gather(-1, index).sum())
            self.predicted += len(index)


@dataclass
class Cost:
    """What quantising a product alone costs. `ran`: the inputs came to it."""

    product: Product
    rows: Rows = field(default_factory=Rows)
    errors: Errors = field(default_factory=Errors)
    harm: Harm = field(default_factory=Harm)
    ran: bool = False


@dataclass(frozen=True)
class Batch:
    """An entry, and its inputs by name as tensors."""

    entry: str
    inputs: Mapping[str, Any]


class Trial:
    """A program that runs with some of its products in codes, their rows as `activations` says."""

    def __init__(
        self, program: Program, products: Sequence[Product], activations: str = ""
    ) -> None:
        self.program = program
        self.products = products
        self.activations = activations
        self._weight = Interpreter(program).weight
        self._of = {name: product for product in products for name in product.stored}

    def measure(self, batches: Sequence[Batch], progress: Progress) -> list[Cost]:
        """What each product costs; `progress` is told of every run."""
        costs = {id(product): Cost(product) for product in self.products}
        total = len(batches) * (1 + len(costs))
        for number, batch in enumerate(batches):
            done = number * (1 + len(costs))
            progress(done, total)
            before = self._watched(batch, costs)
            for at, (cost, after) in enumerate(self._each_alone(batch, costs), done + 2):
                cost.ran = True
                cost.harm.add(batch.inputs, before, after)
                progress(min(at, total), total)
        return list(costs.values())

    def harm(self, batches: Sequence[Batch], quantised: Collection[Product]) -> Harm:
        """What several products in codes cost together."""
        found = Harm()
        stored = {name: expr for product in quantised for name, expr in product.stored.items()}
        for batch in batches:
            results = [self._run(batch, each) for each in ({}, stored)]
            found.add(batch.inputs, *results)
        return found

    def _run(self, batch: Batch, stored: Stored) -> Results:
        graph, inputs, env = self._bound(batch)
        return _told(graph, self._ran(graph, inputs, env, self._in_codes(stored, env)))

    def _ran(
        self,
        graph: Graph,
        inputs: Sequence[Any],
        env: Mapping[str, int],
        intercept: Intercept | None = None,
    ) -> list[Any]:
        """The outputs of a graph; what it writes to is a copy of what is given."""
        with torch.inference_mode():
            given = _apart(graph, inputs)
            return run_graph(graph, given, self._weight, None, env, intercept)

    def _watched(self, batch: Batch, costs: Mapping[int, Cost]) -> Results:
        """The results as they are; each product's rows and errors are noted."""
        graph, inputs, env = self._bound(batch)

        def watch(node: Node, operands: list[Any]) -> tuple[Any, ...] | None:
            names = weights_of(node, self._of)
            if not names:
                return None
            cost = costs[id(self._of[names[0]])]
            stored = cost.product.stored
            exact = run_node(node, operands, env)
            cost.rows.add(operands[_rows_index(node)])
            for x, y in zip(exact, self._coded(node, operands, stored, env), strict=True):
                cost.errors.add(x, y)
            return exact

        return _told(graph, self._ran(graph, inputs, env, watch))

    def _each_alone(
        self, batch: Batch, costs: Mapping[int, Cost]
    ) -> Iterator[tuple[Cost, Results]]:
        """Each product that the entry reads, and the results with it alone in codes."""
        graph, inputs, env = self._bound(batch)
        starts: dict[int, int] = {}
        for position, node in enumerate(graph.nodes):
            for name in weights_of(node, self._of):
                starts.setdefault(id(self._of[name]), position)
        held, at = inputs, 0
        for key, start in sorted(starts.items(), key=lambda each: each[1]):
            cost = costs[key]
            held = self._ran(_span(graph, at, start), held, env)
            at = start
            alone = self._in_codes(cost.product.stored, env)
            yield cost, _told(graph, self._ran(_span(graph, start), held, env, alone))

    def _bound(self, batch: Batch) -> tuple[Graph, list[Any], dict[str, int]]:
        graph = self.program.entry(batch.entry, batch.inputs)
        inputs = [batch.inputs[v.name] for v in graph.inputs]
        return graph, inputs, bind_symbols(graph, inputs)

    def _in_codes(self, stored: Stored, env: Mapping[str, int]) -> Intercept:
        def run(node: Node, operands: list[Any]) -> tuple[Any, ...] | None:
            read = weights_of(node, stored)
            return self._coded(node, operands, stored, env) if read else None

        return run

    def _coded(
        self, node: Node, operands: Sequence[Any], stored: Stored, env: Mapping[str, int]
    ) -> tuple[Any, ...]:
        """A product's results with the weights that are `stored` in codes."""
        given = [
            evaluate(stored[x.name], self.program.source)
            if isinstance(x, Weight) and x.name in stored else value
            for x, value in zip(node.inputs, operands, strict=True)
        ]  # fmt: skip
        if self.activations and lookup(node.op).attr(ACTIVATIONS) is not None:
            attrs = Attrs({**node.attrs, ACTIVATIONS: self.activations})
            node = replace(node, attrs=attrs)
        return run_node(node, given, env)


def _told(graph: Graph, results: Sequence[Any]) -> Results:
    """The results of a graph by name, without states."""
    states = {graph.output_names[output] for output, _ in graph.aliases}
    named = zip(graph.output_names, results, strict=True)
    return {name: x for name, x in named if name not in states}


def _rows_index(node: Node) -> int:
    """Where a product has the rows that it multiplies: the first of numbers that is no weight's."""
    stored = traits_of(node.op).stored
    names = lookup(node.op).operand_names(len(node.inputs))
    fitting = (
        index for index, (name, x) in enumerate(zip(names, node.inputs, strict=False))
        if x is not None and name not in stored and x.type.dtype.is_float
    )  # fmt: skip
    return next(fitting)


def _span(graph: Graph, start: int, end: int | None = None) -> Graph:
    """The nodes from `start` to `end` as a graph: it takes what is alive there, and gives it."""
    nodes = graph.nodes[start:end]
    inputs = _alive(graph, start)
    if end is None:
        return Graph(graph.name, inputs, nodes, graph.outputs, graph.output_names)
    return Graph(graph.name, inputs, nodes, _alive(graph, end))


def _alive(graph: Graph, at: int) -> tuple[Value, ...]:
    """The values that are there before a node, and read from it on."""
    rest = [x for node in graph.nodes[at:] for x in node.operands]
    read = {x.name for x in (*rest, *graph.outputs) if isinstance(x, Value)}
    there = (*graph.inputs, *(v for node in graph.nodes[:at] for v in node.outputs))
    return there if at == 0 else tuple(v for v in there if v.name in read)


def _apart(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    """The inputs, with copies of those that the graph writes to."""
    written = {
        x.name for node in graph.nodes for i in overwritten(node)
        if isinstance(x := node.inputs[i], Value)
    }  # fmt: skip
    pairs = zip(graph.inputs, inputs, strict=True)
    return [x.clone() if v.name in written else x for v, x in pairs]
