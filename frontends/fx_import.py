"""FX graphs of ATen operators to the IR, node by node: what every way into dsc from PyTorch shares.

`FxImporter` holds the graph under construction; who uses it says what the inputs, the weights and
the outputs are (`torch_export.py` for an exported program, `aten_graph.py` for what Dynamo
captured). A node without a translation is noted with its reason and the user's line, and stands in
for itself as a value of its type, so that one walk finds everything that has none.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import dsc
from dsc.errors import UnsupportedOperator
from dsc.frontends.aten import COMPLEX, DROPPED, VIEWS, row_of
from dsc.frontends.lowering import Complex, Lowering, SymbolicNumber, Unsupported
from dsc.frontends.symbolic import NotADim, SizeReader
from dsc.ir.dims import Sym
from dsc.ir.graph import Operand, Value, Weight
from dsc.ir.op import TypeMismatch
from dsc.ir.types import DType

PLACEMENT = frozenset({"device", "layout", "memory_format", "pin_memory", "non_blocking"})

GETITEM = "<built-in function getitem>"
SYMBOLIC_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Problem:
    """A node that has no translation: its operator, why, and the user's line."""

    operator: str
    reason: str
    line: str

    def told(self, places: Sequence[str]) -> str:
        """One line of the error: what, why, the first module, how often, the source line."""
        why = f" ({self.reason})" if self.reason else ""
        where = f"in {places[0]}" if places[0] else ""
        if len(places) > 1:
            where += f" and {len(places) - 1} more" if where else f"{len(places)} times"
        place = ", ".join(p for p in (where, self.line) if p)
        return f"  {self.operator}{why}{': ' if place else ''}{place}"


def told(problems: Mapping[fx.Node, Problem]) -> list[str]:
    """One line a kind of problem: the operator, why, in which module and line."""
    places: dict[Problem, list[str]] = {}
    for node, problem in problems.items():
        places.setdefault(problem, []).append(module_path(node))
    return [p.told(found) for p, found in places.items()]


class FxImporter:
    """Translates the nodes of one FX graph."""

    def __init__(self, name: str) -> None:
        self.sizes = SizeReader()
        self.lowering = Lowering(name, self.sizes)
        self.values: dict[fx.Node, Any] = {}
        self.problems: dict[fx.Node, Problem] = {}

    def refuse_problems(self) -> None:
        """Raise `UnsupportedOperator` naming all nodes without a translation, if there are any."""
        if self.problems:
            raise UnsupportedOperator(
                "operators without a translation:\n" + "\n".join(told(self.problems)),
                hint="write them with supported operators, or add rows to frontends/aten.py",
            )

    def node(self, node: fx.Node) -> None:
        """Translate one node of kind `call_function`; a problem is noted."""
        target = str(node.target)
        if target in DROPPED:
            return
        value = node.meta.get("val")
        if isinstance(value, (*SYMBOLIC_NUMBERS, int, float, bool)):
            self.guarded(node, lambda: self._size(value))
            return
        if target == GETITEM:
            whole, position = node.args
            self.values[node] = self.values[whole][position]  # type: ignore[index]
            return
        if value is None:
            return
        self.lowering.builder.loc = self.place(node)
        self.guarded(node, lambda: self._translated(node, target))

    def _size(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self.sizes.read(value)
        if isinstance(value, torch.SymFloat):
            return SymbolicNumber(value.node.expr)
        if isinstance(value, torch.SymBool):
            return None
        return value

    def _translated(self, node: fx.Node, target: str) -> Any:
        fakes = node.meta["val"]
        fakes = tuple(fakes) if isinstance(fakes, (tuple, list)) else (fakes,)
        if not all(isinstance(f, torch.Tensor) for f in fakes):
            raise Unsupported("a result that is no tensor")
        self.lowering.outs = tuple(self.lowering.type_of(f) for f in fakes)
        args = tuple(self._argument(a) for a in node.args)
        dropped = PLACEMENT if target.startswith("aten.") else frozenset()
        kwargs = {k: self._argument(v) for k, v in node.kwargs.items() if k not in dropped}
        row = row_of(target)
        complex_row = COMPLEX.get(target)
        if any(isinstance(a, Complex) for a in _flat((*args, *kwargs.values()))):
            if complex_row is None and (row is None or target not in VIEWS):
                raise Unsupported("on complex numbers")
            result = (complex_row or _partwise(row))(self.lowering, *args, **kwargs)
        elif row is None:
            raise Unsupported("")
        else:
            try:
                result = row(self.lowering, *args, **kwargs)
            except (IndexError, ZeroDivisionError):
                if any(isinstance(a, (Value, Weight)) and not a.type.rank for a in args):
                    raise Unsupported("an axis of a single number") from None
                raise
        return self._checked(node, result)

    def _checked(self, node: fx.Node, result: Any) -> Any:
        """The result, once the types of what is read are those that the tracer recorded."""
        if isinstance(result, Complex):
            return result
        single = isinstance(node.meta["val"], torch.Tensor)
        results = result if isinstance(result, tuple) else (result,)
        read = {0} if single else {u.args[1] for u in node.users if str(u.target) == GETITEM}
        for i, (found, wanted) in enumerate(zip(results, self.lowering.outs, strict=True)):
            if i in read and not isinstance(found, Complex) and found.type != wanted:
                raise Unsupported(f"translated to {found.type}, the tracer has {wanted}")
        return results[0] if single else results

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument not in self.values:
                raise Unsupported(f"needs %{argument.name}, which has no value")
            found = self.values[argument]
            if found is None and isinstance(argument.meta.get("val"), _TRANSLATED):
                raise Unsupported(f"needs %{argument.name}, which has no translation")
            return found
        if isinstance(argument, (list, tuple)):
            return [self._argument(a) for a in argument]
        if isinstance(argument, complex):
            raise Unsupported("a complex number")
        if isinstance(argument, torch.dtype):
            return _dtype(argument)
        return self._size(argument) if isinstance(argument, SYMBOLIC_NUMBERS) else argument

    def place(self, node: fx.Node) -> str:
        """Where a node comes from, as the IR keeps it: the path of its module."""
        return module_path(node)

    def output(self, value: Any) -> Operand | None:
        """A translated value as an output: sizes become tensors; `None` for what is neither."""
        if isinstance(value, Complex):
            raise UnsupportedOperator("a complex output", hint="return torch.view_as_real of it")
        if isinstance(value, (int, Sym)) and not isinstance(value, bool):
            return self.lowering.number(value, DType.i64)
        return value if isinstance(value, (Value, Weight)) else None

    def guarded(self, node: fx.Node, translate: Callable[[], Any]) -> None:
        """Translate one node; on failure note the problem and go on with values of its type."""
        try:
            self.values[node] = translate()
        except (Unsupported, TypeMismatch, NotADim, KeyError) as problem:
            self.problem(node, str(node.target), str(problem))
            self.values[node] = self._placeholder(node)

    def problem(self, node: fx.Node, operator: str, reason: str) -> None:
        """Note that a node has no translation."""
        self.problems[node] = Problem(operator, reason, source_line(node))

    def _placeholder(self, node: fx.Node) -> Any:
        def stand_in(fake: Any) -> Any:
            try:
                value = Value(self.lowering.builder.fresh("missing"), self.lowering.type_of(fake))
            except (Unsupported, AttributeError):
                return None
            return Complex(value, value) if fake.is_complex() else value

        fakes = node.meta.get("val")
        if isinstance(fakes, (tuple, list)):
            return tuple(stand_in(f) for f in fakes)
        return stand_in(fakes)


def hint(number: Any) -> Any:
    """A number as it was when the graph was captured, be it symbolic; `None` where nobody knows."""
    return number.node.hint if isinstance(number, SYMBOLIC_NUMBERS) else number


def module_path(node: fx.Node) -> str:
    """The path of the module that a node comes from, as `model.layers.3.self_attn`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if not path.startswith("_empty_nn")]
    return re.sub(r"@\d+|^L\['\w+'\]\.?", "", paths[-1]).removesuffix(".") if paths else ""


def source_line(node: fx.Node) -> str:
    """`folder/file:line: code` of the user's innermost frame, as far as the tracer noted it."""
    return users_line(_frames(node))


def source_place(node: fx.Node) -> str:
    """`file:line` of the user's innermost frame."""
    frame = _users_frame(_frames(node))
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" if frame else ""


def users_line(stack: Iterable[traceback.FrameSummary] | None) -> str:
    """`folder/file:line: code` of the innermost frame outside of torch and of dsc."""
    frame = _users_frame(stack or ())
    if frame is None:
        return ""
    file = "/".join(frame.filename.split("/")[-2:])
    return f"{file}:{frame.lineno}: {(frame.line or '').strip()}"


def is_users(file: str) -> bool:
    """Whether a file of code is neither torch's nor dsc's."""
    return not file.startswith(_NOT_THE_USERS)


_TRANSLATED = (torch.Tensor, torch.SymInt, torch.SymFloat)
"""What a node gives that has a translation: `None` in its place is a problem that was noted."""
_NOT_THE_USERS = tuple(f"{p}/" for p in (*torch.__path__, *dsc.__path__))


def _users_frame(stack: Iterable[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    frames = [*stack][::-1]
    return next((f for f in frames if is_users(f.filename)), frames[0] if frames else None)


def _frames(node: fx.Node) -> list[traceback.FrameSummary]:
    """The stack that the tracer noted for a node, outermost frame first."""
    noted = re.findall(
        r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', node.meta.get("stack_trace") or ""
    )
    return [
        traceback.FrameSummary(file, int(number), name, lookup_line=False, line=line)
        for file, number, name, line in noted
    ]


def _partwise(row: Any) -> Any:
    """A row that moves elements, applied to both parts of a complex operand."""

    def both(t: Lowering, *args: Any, **kwargs: Any) -> Any:
        results = [
            row(t, *(_part(a, i) for a in args), **{k: _part(v, i) for k, v in kwargs.items()})
            for i in (0, 1)
        ]
        if isinstance(results[0], tuple):
            return tuple(Complex(*pair) for pair in zip(*results, strict=True))
        return Complex(*results)

    return both


def _part(argument: Any, part: int) -> Any:
    if isinstance(argument, Complex):
        return argument[part]
    return [_part(a, part) for a in argument] if isinstance(argument, list) else argument


def _flat(arguments: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for a in arguments:
        found.extend(_flat(a) if isinstance(a, list) else [a])
    return found


def _dtype(dtype: torch.dtype) -> DType | None:
    try:
        return DType.of(dtype)
    except KeyError:
        return None
