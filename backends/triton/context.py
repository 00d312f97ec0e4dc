"""The state of lowering one entry: views of values so far, and the launches that make them.

Operator lowerings (in `lower/`) read operands with `view`, ask for the layout they need (`dense`,
`rows`), make results with `make` and append kernels with `launch`. They never see a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dsc.backends.triton.blocks import AnyTile, Blocks, Choice, RowTile
from dsc.backends.triton.effects import access, parameters
from dsc.backends.triton.launch import POINTER_TYPES, Kernel, LaunchProgram, is_multiple
from dsc.backends.triton.rows import elementwise
from dsc.backends.triton.slots import ALL_PLAIN, Slots, written
from dsc.ir import views
from dsc.ir.dims import Dim, Range, Sym, bounds, free_symbols, product
from dsc.ir.graph import Node, Operand, Weight
from dsc.ir.region_steps import Literal
from dsc.ir.types import TensorType
from dsc.ir.views import View
from dsc.runtime.plan import ARENA, WEIGHT, Argument, Draft, Launch, Ref

if TYPE_CHECKING:
    from dsc.backends.triton.wanted import Wanted

KERNELS = Path(__file__).parent / "kernels"
ALIGNMENT = 16
UNBOUNDED = 1 << 20  # taken for a symbol without a range: only block sizes depend on it

Given = View | Dim | float | str | bool | None
NONE: Mapping[str, Dim] = {}
ANY = RowTile(1, 1)
"""Stands for the tile of a kernel that has none."""


class Later(Protocol):
    """A value that its reader makes as it reads it, or else a launch."""

    def made(self, ctx: Context) -> View:
        """Where it lies, once a launch has made it."""
        ...


@dataclass(frozen=True, slots=True)
class Gather:
    """Row p is row order[p] // slots of `source`; `copied` makes them where rows are wanted."""

    source: View
    order: View
    slots: int
    copied: Callable[[Context], View]

    def made(self, ctx: Context) -> View:
        """A copy of the rows."""
        return self.copied(ctx)


@dataclass(slots=True)
class Context:
    """Lowering of one entry for one target."""

    program: LaunchProgram
    blocks: Blocks
    ranges: Mapping[str, Range]
    sources: dict[str, str]
    entry: Draft = field(default_factory=Draft)
    views: dict[str, View] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    parts: dict[int, tuple[View, ...]] = field(default_factory=dict)
    row_codes: dict[tuple[object, ...], tuple[View, View]] = field(default_factory=dict)
    """Codes and scales of rows that were made codes, by what tells rows and codes from others."""
    wanted: Mapping[str, Wanted] = field(default_factory=dict)
    """By name the values that products want as codes."""
    constants: dict[str, tuple[float, TensorType]] = field(default_factory=dict)
    later: dict[str, Later] = field(default_factory=dict)
    """By name the values that no launch has made yet."""
    merges: Mapping[str, bool] = field(default_factory=dict)
    """By name the values that their first reader may make, and whether others read them too."""
    places: dict[int, View] = field(default_factory=dict)
    """By the buffer of an order, its inverse."""
    loc: str = ""
    node: Node | None = None

    def view(self, operand: Operand | None) -> View:
        """Where an operand lies; a weight becomes a buffer when it is first read.

        One in a stored format becomes several, of which the view is that of the codes, with the
        type and the strides of the numbers: `stored` has them all.
        """
        if operand is None:
            raise ValueError("an operand that this operator needs is absent")
        if not isinstance(operand, Weight):
            if operand.name not in self.views:
                later = self.later.get(operand.name)
                self.views[operand.name] = (
                    self.reshaped(later.made(self), operand.type.shape)
                    if later is not None
                    else self._constant(*self.constants[operand.name])
                )
            return self.views[operand.name]
        if operand.name not in self.weights:
            parts = operand.type.parts
            made = tuple(self.make(part, WEIGHT, f"{operand.name}{end}") for end, part in parts)
            self.weights[operand.name] = made[0].buffer
            self.parts[made[0].buffer] = made
        return _dense(self.weights[operand.name], operand.type)

    def stored(self, weight: View) -> tuple[View, ...]:
        """What is stored of the weight that a view is of, in the order of its type's parts."""
        return self.parts[weight.buffer]

    def _constant(self, value: float, type: TensorType) -> View:
        """One element of memory, broadcast by stride 0."""
        one = self.make(type.with_shape(()))
        elementwise("copy", [Literal(value)], one).launch(self)
        return views.expand(one, type.shape)

    def operands(self, node: Node) -> list[View]:
        """The views of all operands of a node."""
        return [self.view(x) for x in node.operands]

    def make(self, type: TensorType, region: str = ARENA, name: str = "") -> View:
        """A new dense buffer."""
        return _dense(self.entry.add(region, name, type.nbytes), type)

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
        known = {s: self.ranges.get(s, Range(0, UNBOUNDED)) for s in free_symbols(dim)}
        return bounds(dim, known).hi

    def copy(self, source: View, target: View) -> None:
        """Copy elements between two layouts of one shape."""
        op = "copy" if source.dtype is target.dtype else "cast"
        elementwise(op, [source], target).launch(self)

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
        tile: AnyTile = ANY,
        flops: Dim = 0,
        touched: Mapping[str, Dim] = NONE,
        slots: Slots = ALL_PLAIN,
        beside: Choice | None = None,
    ) -> None:
        """Append a launch of `module:function`; `given` names its parameters, in any order.

        The `tile` has its warps and stages. The plan names what was chosen: the tile, and `beside`
        it what was chosen elsewhere and shapes this launch. Where `slots` say something, it is one
        of a text that is written for them.

        Static numbers, strings and absent operands become compile-time constants; symbolic
        numbers and pointers are passed at run time, those that are multiples of 16 under that
        promise: without it loads of 16 bytes become one load an element. A grid with a zero dim
        launches nothing. What the launch costs goes into the plan: `flops` are the operations of
        its products, `touched` bytes by parameter where it moves less than the view has.
        """
        module, function = name.split(":")
        if slots.filled:
            function, made = written(template(module), function, slots)
            module, given = function, {**given, **slots.arguments}
            touched = {**touched, **slots.touched}
            self.sources.setdefault(module, made)
        text = self.sources.get(module) or template(module)
        order, accesses = parameters(text, function), access(text, function)
        if set(order) != set(given):
            raise TypeError(f"{name}: {sorted(set(order) ^ set(given))} missing or unknown")
        signature: dict[str, str] = {}
        constants: dict[str, object] = {}
        aligned: list[str] = []
        arguments: list[Argument] = []
        for parameter in order:
            value = given[parameter]
            if isinstance(value, View):
                signature[parameter] = POINTER_TYPES[value.dtype]
                start = value.offset * value.dtype.itemsize
                if is_multiple(start, ALIGNMENT):
                    aligned.append(parameter)
                size = views.extent(value) * value.dtype.itemsize
                moved = touched.get(parameter, _distinct_bytes(value))
                some = None if moved == size else moved
                arguments.append(Ref(value.buffer, accesses[parameter], size, start, some))
            elif isinstance(value, Sym):
                signature[parameter] = "i64" if self.limit(value) >= 1 << 31 else "i32"
                if is_multiple(value, ALIGNMENT):
                    aligned.append(parameter)
                arguments.append(value)
            else:
                signature[parameter] = "constexpr"
                constants[parameter] = value
        chosen = {each.key: each for each in (tile.choice, beside) if each is not None}
        self.program.choices |= chosen
        kernel = Kernel(
            module, function, signature, constants, tuple(aligned), tile.warps, tile.stages
        )
        key = kernel.key
        self.program.kernels.setdefault(key, kernel)
        self.entry.launches.append(
            Launch(
                key, tuple(arguments), grid, loc=self.loc,
                op=self.node.op if self.node is not None else "cast",
                node=self.node.outputs[0].name if self.node is not None else "",
                flops=flops, choices=tuple(chosen),
            )
        )  # fmt: skip


def _distinct_bytes(view: View) -> Dim:
    """Bytes of the elements that a view has; an axis without a stride repeats them."""
    axes = zip(view.shape, view.strides, strict=True)
    return product(tuple(d for d, s in axes if s != 0)) * view.dtype.itemsize


def template(module: str) -> str:
    """The source text of a kernel family."""
    return _read(KERNELS / f"{module}.py")


@cache
def _read(path: Path) -> str:
    return path.read_text()


def _dense(buffer: int, type: TensorType) -> View:
    return View(buffer, type, views.dense_strides(type.shape))
