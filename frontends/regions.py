"""Regions: parts of an ATen graph that are compiled, and the memory that is planned for them.

Every tensor that a region reads is an input, so that code never holds a value that could go stale.
Sizes are symbols of the program, bound by the shapes of inputs; one that no shape of the region
shows, as an `int` argument, comes in as the shape `[n, 0]` of a tensor without elements.

Memory is planned for sizes up to bounds far above those seen, since address space that nobody
touches costs nothing; a call beyond them plans and compiles its region again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, fx

from dsc.errors import UnsupportedOperator
from dsc.frontends.fx_import import FxImporter, hint, module_path, source_place
from dsc.frontends.lowering import Unsupported
from dsc.frontends.options import Options
from dsc.frontends.partition import is_number
from dsc.frontends.placed import results
from dsc.ir.analyses import live
from dsc.ir.dims import Dim, Range, Sym, bounds, free_symbols, symbol, symbol_name
from dsc.ir.graph import Graph, Operand
from dsc.ir.limits import OPEN
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, Source

if TYPE_CHECKING:
    from dsc.api import CompiledModel

Witness: TypeAlias = list[tuple[Sequence[Tensor], list[Tensor]]]
"""Inputs and results of runs."""

ROOM = 8
"""The least bound of a symbolic size: batches of up to 8 share one plan."""

ARENA = 1 << 30
"""Bytes that the intermediate values of a region may take at the bounds that are planned for."""


class RegionImporter(FxImporter):
    """Translates some nodes of a graph; what they read from elsewhere becomes inputs.

    `names` are those of the whole graph's inputs; `constants` are those whose values are known.
    """

    def __init__(
        self, name: str, names: Mapping[fx.Node, str], constants: Mapping[fx.Node, Tensor]
    ) -> None:
        super().__init__(name)
        self.names = names
        self.constants = constants
        self.inputs: list[fx.Node] = []

    def place(self, node: fx.Node) -> str:
        """The path of the node's module, or the user's line where it is in none."""
        return place_of(node)

    def read(self, node: fx.Node) -> None:
        """Declare a value from outside: an input, a weight, or a number."""
        if is_number(node):
            self.guarded(node, lambda: self._size(node.meta["val"]))
            return
        if node.op == "get_attr":
            self.guarded(node, lambda: self._constant(node.name, attribute(node)))
        elif node in self.constants:
            self.guarded(node, lambda: self._constant(self.names[node], self.constants[node]))
        else:
            self.guarded(node, lambda: self._input(node))

    def _input(self, node: fx.Node) -> Any:
        fake = node.meta.get("val")
        if not isinstance(fake, Tensor):
            raise Unsupported(f"an input that is a {type(fake).__name__}")
        if fake.is_complex():
            raise Unsupported("a complex input")
        found = self.lowering.builder.input(
            self.names.get(node, node.name), self.lowering.type_of(fake)
        )
        self.inputs.append(node)
        return found

    def _constant(self, name: str, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            raise Unsupported(f"a constant that is a {type(tensor).__name__}")
        kind = self.lowering.type_of(tensor)
        if tensor.dim() == 0:
            return self.lowering.number(tensor.item(), kind.dtype)
        return self.lowering.constant(name, tensor.detach().resolve_neg())


def place_of(node: fx.Node) -> str:
    """Where the user finds a node: the path of its module, else `file.py:12`."""
    return module_path(node) or source_place(node)


def attribute(node: fx.Node) -> Any:
    """What a `get_attr` node reads."""
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found


@dataclass
class Region:
    """A part of a graph that is compiled, for sizes within `executable.program.symbols`.

    Who wants to know what goes in and out gives a list as `witness`, for as long as it is wanted.
    """

    program: Program
    options: Options
    inputs: tuple[fx.Node, ...]
    sizes: Mapping[str, fx.Node]
    outputs: tuple[fx.Node, ...]
    hints: Mapping[str, int]
    numbers: Mapping[str, torch.SymInt]
    executable: CompiledModel | None = None
    compilations: int = 0
    seconds: float = 0.0
    witness: Witness | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        (self.graph,) = self.program.entries.values()
        self._names = [v.name for v in self.graph.inputs]
        self._bounds: list[tuple[int, int, int]] = []
        self._axes = _axes(self.graph)
        self.layouts = {
            name: _layout(n.meta["val"])
            for name, n in zip(self.graph.output_names, self.outputs, strict=True)
        }

    def prepare(self) -> None:
        """Compile for the sizes at hand. Raises `DscError`, `InternalError`."""
        self._compile(self.hints)

    @property
    def features(self) -> frozenset[str]:
        """Symbols that are the last axis of a matrix, whose size kernels may have to know."""
        last = [v.type.shape[-1] for v in self.graph.values() if v.type.rank > 1]
        return frozenset(name for dim in last for name in free_symbols(dim))

    def with_sizes(self, names: Collection[str]) -> Region:
        """The region with these symbols replaced by the sizes at hand."""
        env: dict[str, Dim] = {n: self.hints[n] for n in names}
        program = replace(
            self.program,
            entries={self.graph.name: self.graph.substitute(env)},
            symbols={n: r for n, r in self.program.symbols.items() if n not in env},
        )
        hints = {n: h for n, h in self.hints.items() if n not in env}
        return replace(self, program=program, hints=hints, executable=None, _lock=threading.Lock())

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The region's outputs, laid out in memory as PyTorch's would be."""
        if any(tensors[i].shape[axis] > high for i, axis, high in self._bounds):
            self._grow(tensors)
        executable = self.executable
        assert executable is not None
        with self._lock:  # an arena serves one call at a time
            made = results(executable, self._names, tensors, self.layouts)
        if self.witness is not None:
            self.witness.append((tensors, made))
        return made

    def _grow(self, tensors: Sequence[Tensor]) -> None:
        self._compile({s: tensors[i].shape[axis] for s, (i, axis) in self._axes.items()})

    def _compile(self, sizes: Mapping[str, int]) -> None:
        with self._lock:
            start = time.perf_counter()
            old = self.executable.program.symbols if self.executable is not None else {}
            symbols = planned_for(self.graph, self.program.symbols, sizes, old)
            executable = self.options.compile(replace(self.program, symbols=symbols))
            self.executable = executable
            self._bounds = [(*self._axes[s], r.hi) for s, r in symbols.items() if s in self._axes]
            self.compilations += 1
            self.seconds += time.perf_counter() - start


def planned_for(
    graph: Graph,
    known: Mapping[str, Range],
    sizes: Mapping[str, int],
    smaller: Mapping[str, Range],
) -> dict[str, Range]:
    """Ranges of the symbols that memory is planned for.

    At least the next power of two of each size and the bounds that have been outgrown; then twice
    that of all, again and again, as long as all intermediate values together stay within `ARENA`.
    """
    least = {
        s: max(ROOM, 1 << (sizes.get(s, 1) - 1).bit_length() if sizes.get(s, 1) > 0 else 1,
               smaller[s].hi if s in smaller else 0)
        for s in known
    }  # fmt: skip
    factor = 1
    while known and factor < 1 << 20:
        wider = _scaled(known, least, 2 * factor)
        if sum(bounds(v.type.nbytes, wider).hi for n in graph.nodes for v in n.outputs) > ARENA:
            break
        factor *= 2
    return _scaled(known, least, factor)


def _scaled(known: Mapping[str, Range], least: Mapping[str, int], by: int) -> dict[str, Range]:
    return {s: Range(r.lo, max(r.lo, min(r.hi, least[s] * by))) for s, r in known.items()}


def _axes(graph: Graph) -> dict[str, tuple[int, int]]:
    """An input and its axis that is each symbol."""
    found: dict[str, tuple[int, int]] = {}
    for position, value in enumerate(graph.inputs):
        for axis, dim in enumerate(value.type.shape):
            name = symbol_name(dim)
            if name is not None:
                found.setdefault(name, (position, axis))
    return found


def _layout(fake: Tensor) -> tuple[int, ...] | None:
    """The order of axes in memory, outermost first; `None` where they lie as they are counted."""
    hints = [hint(s) for s in fake.stride()]
    if any(h is None for h in hints):
        return None
    sizes = [hint(n) for n in fake.shape]
    counted = [a for a in range(fake.dim()) if sizes[a] != 1]
    order = sorted(counted, key=lambda a: -hints[a])
    if order == counted:
        return None
    rest = iter(order)
    return tuple(next(rest) if sizes[a] != 1 else a for a in range(fake.dim()))


def region_of(
    importer: RegionImporter, options: Options, outputs: Sequence[fx.Node]
) -> Region | None:
    """The region of nodes that have been translated.

    `None` where that made a constant of a symbol of the trace: they are to be translated again.
    """
    builder = importer.lowering.builder
    names = tuple(f"out.{i}" for i in range(len(outputs))) if len(outputs) > 1 else ("out",)
    results = [cast(Operand, importer.values[n]) for n in outputs]
    graph = live(builder.finish(results, names))
    torch_names = {ours: theirs for theirs, ours in importer.sizes.names.items()}
    sizes: dict[str, fx.Node] = {}
    for name in sorted(_symbols(graph) - _axes(graph).keys()):
        found = _number(outputs[0].graph, torch_names[name])
        if found is None:
            return None
        sizes[name] = found
        builder.input(f"size.{name}", TensorType(DType.i8, (symbol(name), 0)))
    graph = live(builder.finish(results, names))
    known = {n: _facts(outputs[0].graph, torch_names[n]) for n in sorted(_symbols(graph))}
    weights = importer.lowering.constants
    program = Program(
        graph.name,
        {graph.name: graph},
        {k: Source(k, importer.lowering.type_of(v)) for k, v in weights.items()},
        {name: range for name, (range, _) in known.items()},
        DictSource(dict(weights)),
        {},
        Stage.TRACED,
    ).pruned()
    return Region(
        program,
        options,
        tuple(importer.inputs),
        sizes,
        tuple(outputs),
        {name: number.node.hint for name, (_, number) in known.items()},
        {name: number for name, (_, number) in known.items()},
    )


def _symbols(graph: Graph) -> set[str]:
    """The symbols of all types and attributes."""
    dims: list[Dim] = [d for v in graph.values() for d in v.type.shape]
    for node in graph.nodes:
        for given in node.attrs.values():
            dims += [d for d in (given if isinstance(given, tuple) else (given,))
                     if isinstance(d, Sym)]  # fmt: skip
    return {name for d in dims for name in free_symbols(d)}


def _number(graph: fx.Graph, name: str) -> fx.Node | None:
    """The node whose value is a symbol of the trace; `None` where it has become a constant.

    A negative number is no size: it becomes a constant of the trace, another one another trace.
    """
    node: fx.Node
    for node in graph.nodes:
        number = node.meta.get("val")
        if isinstance(number, torch.SymInt) and str(number.node.expr) == name:
            _ = bool(number >= 0)  # which the trace is guarded for from now on
            if number.node.hint < 0:
                int(number)
            return node if number.node.expr.is_Symbol else None
    raise UnsupportedOperator(f"the size {name} is that of no input")


def _facts(graph: fx.Graph, name: str) -> tuple[Range, torch.SymInt]:
    """The range of a symbol that the trace holds for, and the symbol as a number."""
    from torch.fx.experimental.sym_node import SymNode

    number = next(n for n in _numbers(graph) if name in map(str, n.node.expr.free_symbols))
    environment = number.node.shape_env
    found = next(s for s in number.node.expr.free_symbols if str(s) == name)
    known = environment.bound_sympy(found)
    low, high = (max(0, min(x, OPEN)) for x in (known.lower, known.upper))
    return Range(int(low), int(high)), torch.SymInt(SymNode(found, environment, int, None))


def _numbers(graph: fx.Graph) -> Iterable[torch.SymInt]:
    """The symbolic sizes among a graph's values and in the shapes of its tensors."""
    for node in graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        yield from (n for n in sizes if isinstance(n, torch.SymInt))
