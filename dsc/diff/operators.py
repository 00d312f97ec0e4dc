"""The error that each operator adds: two programs on the same inputs, operator by operator.

Operators are matched by the name of what they give. One of the second program runs twice: on what
the first program's gave, which is the error that it adds itself, and on what came before it in its
own program, which is what has come together. Both are interpreted in fp32 over the weights that are
stored. Two artifacts run as they are compiled as well, each entry as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsc.calibration.measure import Errors
from dsc.diff.measure import executable_of
from dsc.diff.sides import Side
from dsc.errors import UsageError
from dsc.ir.analyses import overwritten
from dsc.ir.arrays import tensor_of
from dsc.ir.costs import step_sizes
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.interpreter import Interpreter, bind_symbols, run_graph, run_node
from dsc.ir.lazy import torch
from dsc.ir.program import Program
from dsc.ir.samples import sample_inputs
from dsc.rewrite.verify import WIDEST, weight_elements
from dsc.rewrite.widen import in_fp32, runnable

TOKENS, CONTEXT = 16, 32
"""New tokens of a step that takes any number, and tokens in its cache."""


@dataclass
class Off:
    """How far numbers are off: by sums over them (`calc_diff`), and at most."""

    sums: Errors = field(default_factory=Errors)
    most: float = 0.0

    @staticmethod
    def between(x: Any, y: Any) -> Off:
        """Of y against x."""
        found = Off()
        found.sums.add(x, y)
        if x.numel():
            found.most = float((x.double() - y.double()).abs().amax())
        return found

    def as_dict(self) -> dict[str, float]:
        """The figures, `relative` being the root of the squares as a share of those of x."""
        return {
            "calc_diff": self.sums.calc_diff, "relative": self.sums.relative, "max": self.most,
        }  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """An operator that both have: what it `added` on the same inputs, and what has `come` to it."""

    name: str
    op: str
    loc: str
    added: Off
    come: Off

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        named = {"value": self.name, "operator": self.op, "module": self.loc}
        return {**named, "added": self.added.as_dict(), "accumulated": self.come.as_dict()}


def operators(
    programs: tuple[Program, Program], names: tuple[str, str], seed: int = 0
) -> list[Operator]:
    """What each operator of the second entry adds, the worst first.

    `programs` have values, or get random ones by the names of their sources, the same on both
    sides. Raises `UsageError` where one is too wide to interpret.
    """
    if max(map(weight_elements, programs)) > WIDEST:
        raise UsageError("these programs are too wide to interpret", hint="leave out --run")
    first, second = (in_fp32(runnable(program, widen=False)) for program in programs)
    graphs = first.entries[names[0]], second.entries[names[1]]
    inputs = same_inputs((first, second), names, seed)
    with torch.inference_mode():
        known = _values(first, graphs[0], inputs[0])
        found = _compared(second, graphs[1], inputs[1], known)
    return sorted(found, key=lambda each: each.added.sums.calc_diff, reverse=True)


def same_inputs(
    programs: tuple[Program, Program], names: tuple[str, str], seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs by name for both entries, the same for both as far as they go.

    Caches may have other numbers of rows (axis 1): the first rows are the same, and indices lie
    within both. Raises `UsageError` where anything else differs.
    """
    first, second = (
        sample_inputs(graph, step_sizes(graph, 1, TOKENS, CONTEXT, program.symbols), seed)
        for program, graph in (
            (program, program.entries[name]) for program, name in zip(programs, names, strict=True)
        )
    )
    for name, x in second.items():
        y = first.get(name)
        if y is None or _without_rows(x) != _without_rows(y):
            found = "none" if y is None else list(y.shape)
            raise UsageError(
                f"input {name} is {list(x.shape)}, and {found} on the other side: these are two"
                " models",
                hint="leave out --run, or name two forms of one model",
            )
        if x.dtype == y.dtype == torch.int64 and x.shape == y.shape:
            first[name] = second[name] = torch.minimum(x, y)
        elif x.dtype == y.dtype and x.dim() > 1:
            rows = min(x.shape[1], y.shape[1])
            x[:, :rows] = y[:, :rows]
        elif x.dtype == y.dtype:
            second[name] = y
    return first, second


def _without_rows(x: Any) -> tuple[int, ...]:
    return tuple(x.shape[:1]) + tuple(x.shape[2:])


def kernels(
    sides: tuple[Side, Side], names: tuple[str, str], trust: bool, seed: int = 0
) -> dict[str, Off]:
    """How far the results of two artifacts' code are apart on the same inputs, by name."""
    inputs = same_inputs((sides[0].program, sides[1].program), names, seed)
    first, second = (
        executable_of(side, trust).run(name, {k: x.clone() for k, x in given.items()})
        for side, name, given in zip(sides, names, inputs, strict=True)
    )
    found = {}
    for name, x in first.items():
        pair = [each if isinstance(each, torch.Tensor) else tensor_of(each)
                for each in (x, second.get(name, x))]  # fmt: skip
        if _comparable(*pair):
            found[name] = Off.between(*pair)
    return found


def _values(program: Program, graph: Graph, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All values of a graph by name, as they were when they were made."""
    tops = {id(node) for node in graph.nodes}
    found = dict(inputs)

    def note(node: Node, results: tuple[Any, ...]) -> None:
        if id(node) in tops:
            found.update(zip((v.name for v in node.outputs), results, strict=True))

    given = [inputs[v.name].clone() for v in graph.inputs]
    run_graph(graph, given, Interpreter(program).weight, note)
    return found


def _compared(
    program: Program, graph: Graph, inputs: Mapping[str, Any], known: Mapping[str, Any]
) -> list[Operator]:
    """Every node whose results the other program has too."""
    found: list[Operator] = []
    weight = Interpreter(program).weight
    given = [inputs[v.name].clone() for v in graph.inputs]
    env = bind_symbols(graph, given)
    tops = {id(node) for node in graph.nodes}
    same: dict[str, tuple[Any, ...]] = {}

    def again(node: Node, operands: Sequence[Any]) -> None:
        """Run a node on what the other program has, where all of that fits it."""
        written = overwritten(node)
        read = list(operands)
        for index, x in enumerate(node.inputs):
            if isinstance(x, Value) and x.name in known:
                if not _fits(known[x.name], operands[index]):
                    return
                read[index] = known[x.name]
            if index in written:
                read[index] = read[index].clone()
        body = node.body
        same[node.outputs[0].name] = (
            run_node(node, read, env) if body is None
            else tuple(run_graph(body, read, weight, None, env))
        )  # fmt: skip

    def before(node: Node, operands: list[Any]) -> None:
        if id(node) in tops and node.outputs[0].name in known:
            again(node, operands)

    def after(node: Node, results: tuple[Any, ...]) -> None:
        if id(node) not in tops or node.outputs[0].name not in same:
            return
        alone = same.pop(node.outputs[0].name)
        for value, x, y in zip(node.outputs, alone, results, strict=True):
            exact = known.get(value.name)
            if exact is not None and _comparable(exact, x):
                off = Off.between(exact, x), Off.between(exact, y)
                found.append(Operator(value.name, node.op, node.loc, *off))

    run_graph(graph, given, weight, after, None, before)
    return found


def _fits(x: Any, y: Any) -> bool:
    return bool(x.shape == y.shape and x.dtype == y.dtype)


def _comparable(x: Any, y: Any) -> bool:
    return bool(x.shape == y.shape and x.is_floating_point() and y.is_floating_point())
