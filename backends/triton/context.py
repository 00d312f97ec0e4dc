"""The state of lowering one entry: views of values so far, and the launches that make them.

Operator lowerings (in `lower/`) read operands with `view`, ask for the layout they need (`dense`,
`rows`), make results with `make` and append kernels with `launch`. They never see a device.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dsc.backends.triton import pointwise
from dsc.backends.triton.blocks import Blocks
from dsc.backends.triton.launch import (
    POINTER_TYPES,
    Buffer,
    EntryLaunches,
    Kernel,
    Kind,
    Launch,
    LaunchProgram,
    Pointer,
    is_multiple,
)
from dsc.ir import views
from dsc.ir.dims import Dim, Range, Sym, bounds
from dsc.ir.graph import Node, Operand, Weight
from dsc.ir.types import TensorType
from dsc.ir.views import View

KERNELS = Path(__file__).parent / "kernels"
ALIGNMENT = 16
UNBOUNDED = 1 << 20  # taken for a symbol without a range: only block sizes depend on it

Given = View | Pointer | Dim | float | str | bool | None


@dataclass(frozen=True, slots=True)
class Gather:
    """Row p is row order[p] // slots of `source`; `copied` makes them where rows are wanted."""

    source: View
    order: View
    slots: int
    copied: Callable[[Context], View]


@dataclass(slots=True)
class Context:
    """Lowering of one entry for one target."""

    program: LaunchProgram
    blocks: Blocks
    ranges: Mapping[str, Range]
    sources: dict[str, str]
    entry: EntryLaunches = field(default_factory=EntryLaunches)
    views: dict[str, View] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    constants: dict[str, tuple[float, TensorType]] = field(default_factory=dict)
    gathers: dict[str, Gather] = field(default_factory=dict)
    loc: str = ""

    def view(self, operand: Operand | None) -> View:
        """Where an operand lies; a weight becomes a buffer when it is first read."""
        if operand is None:
            raise ValueError("an operand that this operator needs is absent")
        if not isinstance(operand, Weight):
            if operand.name not in self.views:
                later = self.gathers.get(operand.name)
                self.views[operand.name] = (
                    later.copied(self)
                    if later is not None
                    else self._constant(*self.constants[operand.name])
                )
            return self.views[operand.name]
        if operand.name not in self.weights:
            view = self.make(operand.type, "weight", operand.name)
            self.weights[operand.name] = view.buffer
        return _dense(self.weights[operand.name], operand.type)

    def _constant(self, value: float, type: TensorType) -> View:
        """One element of memory, broadcast by stride 0."""
        one = self.make(type.with_shape(()))
        pointwise.emit(self, pointwise.constant_region(value, type.dtype), [], [one])
        return views.expand(one, type.shape)

    def operands(self, node: Node) -> list[View]:
        """The views of all operands of a node."""
        return [self.view(x) for x in node.operands]

    def make(self, type: TensorType, kind: Kind = "temp", name: str = "") -> View:
        """A new dense buffer."""
        self.entry.buffers.append(Buffer(kind, name, type.dtype, type.numel))
        return _dense(len(self.entry.buffers) - 1, type)

    def set(self, node: Node, *results: View) -> None:
        """Bind the results of a node."""
        for value, view in zip(node.outputs, results, strict=True):
            self.views[value.name] = view

    def result(self, node: Node, index: int = 0) -> View:
        """A dense buffer for a result of the node, bound to it."""
        view = self.make(node.outputs[index].type)
        self.views[node.outputs[index].name] = view
        return view

    def limit(self, dim: Dim) -> int:
        """The largest value that a dim can take; a guess for symbols without a range."""
        if isinstance(dim, int):
            return dim
        known = {s: self.ranges.get(s, Range(0, UNBOUNDED)) for s in _symbols(dim)}
        return bounds(dim, known).hi

    def copy(self, source: View, target: View) -> None:
        """Copy elements between two layouts of one shape."""
        pointwise.emit(self, pointwise.copy_region(source, target.dtype), [source], [target])

    def dense(self, view: View) -> View:
        """The view, or a dense copy of it."""
        if view.is_dense:
            return view
        made = self.make(view.type)
        self.copy(view, made)
        return made

    def reshaped(self, view: View, shape: tuple[Dim, ...]) -> View:
        """The view under another shape, copied when its strides do not allow that."""
        direct = views.reshape(view, shape)
        if direct is not None:
            return direct
        return _dense(self.dense(view).buffer, view.type.with_shape(shape))

    def rows(self, view: View) -> tuple[View, Dim, Dim]:
        """The value as rows of its last axis: a view, the number of rows, and their stride."""
        folded = views.fold(view, len(view.shape) - 1)
        if folded is None or not views.has_unit_rows(view):
            view = self.dense(view)
            folded = views.fold(view, len(view.shape) - 1)
            assert folded is not None, "a dense value folds"
        return view, folded[0], folded[1]

    def unit_rows(self, view: View) -> View:
        """The view, copied when its last axis is not contiguous."""
        return view if views.has_unit_rows(view) else self.dense(view)

    def launch(
        self,
        name: str,
        grid: tuple[Dim, ...],
        given: Mapping[str, Given],
        warps: int = 4,
        stages: int = 1,
    ) -> None:
        """Append a launch of `module:function`; `given` names its parameters, in any order.

        Static numbers, strings and absent operands become compile-time constants; symbolic
        numbers and pointers are passed at run time, those that are multiples of 16 under that
        promise: without it loads of 16 bytes become one load an element. A grid with a zero dim
        launches nothing.
        """
        module, function = name.split(":")
        order = parameters(self.sources.get(module) or template(module), function)
        if set(order) != set(given):
            raise TypeError(f"{name}: {sorted(set(order) ^ set(given))} missing or unknown")
        signature: dict[str, str] = {}
        constants: dict[str, object] = {}
        aligned: list[str] = []
        arguments: list[Pointer | Dim | float] = []
        for parameter in order:
            value = given[parameter]
            if isinstance(value, View):
                value = Pointer(value.buffer, value.offset, value.dtype)
            if isinstance(value, Pointer):
                signature[parameter] = POINTER_TYPES[value.dtype]
                if is_multiple(value.offset * value.dtype.itemsize, ALIGNMENT):
                    aligned.append(parameter)
                arguments.append(value)
            elif isinstance(value, Sym):
                signature[parameter] = "i64" if self.limit(value) >= 1 << 31 else "i32"
                if is_multiple(value, ALIGNMENT):
                    aligned.append(parameter)
                arguments.append(value)
            else:
                signature[parameter] = "constexpr"
                constants[parameter] = value
        kernel = Kernel(module, function, signature, constants, tuple(aligned), warps, stages)
        self.program.kernels.setdefault(kernel.key, kernel)
        self.entry.launches.append(Launch(kernel.key, tuple(arguments), grid, self.loc))


def ceil_div(n: Dim, block: int) -> Dim:
    """N / block rounded up: the number of tiles."""
    return (n + (block - 1)) // block if block > 1 else n


def template(module: str) -> str:
    """The source text of a kernel family."""
    return _read(KERNELS / f"{module}.py")


@cache
def _read(path: Path) -> str:
    return path.read_text()


@cache
def parameters(source: str, function: str) -> tuple[str, ...]:
    """The parameter names of a kernel, from its text: lowering needs no triton."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.FunctionDef) and statement.name == function:
            return tuple(a.arg for a in statement.args.args)
    raise KeyError(function)


def _dense(buffer: int, type: TensorType) -> View:
    return View(buffer, type, views.dense_strides(type.shape))


def _symbols(dim: Dim) -> frozenset[str]:
    from dsc.ir.dims import free_symbols

    return free_symbols(dim)
