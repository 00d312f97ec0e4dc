"""PyTorch modules to the IR.

    program = trace(module, (x,), {"x": {0: Dim("B")}}, name="mlp", input_names=("x",))

A module is traced in one run where it is plain (`one_trace.py`), else by `torch.export` in
non-strict mode, decomposed to the operators that `aten.py` has rows for, and translated node by
node. Everything that has no translation is reported at once, with the module and the source line it
comes from: in one run no lines are noted, so `torch.export` is asked for them too.

Shapes stay symbolic: named dims say what the sizes of the inputs are called (`B`, `S`, `P`); every
other size is an expression over them. Parameters and buffers become weights under their own
names and are read only when an artifact is packed. A module on the `meta` device gives types alone.
"""

from __future__ import annotations

import inspect
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from dsc.errors import UnsupportedOperator, UsageError
from dsc.frontends.aten import COMPLEX, DROPPED, HARMLESS, KEPT_WHOLE, row_of
from dsc.frontends.fx_import import GETITEM, SYMBOLIC_NUMBERS, FxImporter, users_line
from dsc.frontends.lowering import Complex, Unsupported
from dsc.frontends.one_trace import Captured, capture
from dsc.frontends.whole import is_composite
from dsc.ir.analyses import live
from dsc.ir.dims import Range
from dsc.ir.graph import Graph, Operand, Weight
from dsc.ir.limits import OPEN
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, LayeredSource, MetaSource, Source, WeightSource

Exported: TypeAlias = torch.export.ExportedProgram | Captured

log = logging.getLogger(__name__)

DATA = "data-dependent"
"""How torch says that a number would have to be known which a tensor holds."""
UNPLACED = ("torch.fx.experimental.symbolic_shapes", "Unable to find user code")
"""Where torch logs that it does not know the line of such a number, and how that begins."""
ANY_SIZE = Range(0, OPEN)
"""The range of a symbol that nobody bounds."""


@contextmanager
def without_log(logger: str, beginning: str) -> Iterator[None]:
    """Keep out of a log of torch's what begins so: what failed is raised, and told once."""
    torchs = logging.getLogger(logger)

    def wanted(record: logging.LogRecord) -> bool:
        return not record.msg.startswith(beginning)

    torchs.addFilter(wanted)
    try:
        yield
    finally:
        torchs.removeFilter(wanted)


def decompositions(*, composite: bool = True) -> dict[Any, Any]:
    """What is taken apart, and how: torch's tables, without the operators that we want whole.

    To those of `torch.export` come decompositions of core operators for which there is no row.
    Without `composite`, operators that the dispatcher takes apart by itself are left out: of all
    traces `torch.export` alone keeps those that it is not told of, and listing them is slow.
    """
    from torch._decomp import _core_aten_decompositions_post_autograd, decomposition_table
    from torch.export import default_decompositions

    table = default_decompositions() if composite else _core_aten_decompositions_post_autograd()
    for operator, decomposition in decomposition_table.items():
        if not isinstance(operator, torch._ops.OpOverload) or row_of(str(operator)) is not None:
            continue
        if operator not in table and (composite or not is_composite(operator)):
            table[operator] = decomposition
    for operator in list(table):
        schema = getattr(operator, "_schema", None)
        if schema is not None and schema.name in KEPT_WHOLE:
            del table[operator]
    return table


def trace(
    module: nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: Any = None,
    *,
    name: str = "main",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    symbols: Mapping[str, Range] | None = None,
    aliases: Sequence[tuple[str, str]] = (),
) -> Program:
    """Trace `module` on example arguments, to a `Program` at stage TRACED with one entry.

    Args:
        module: what to trace: in one run (`one_trace.py`), or else by `torch.export`.
        args: its arguments; tensors may nest in lists, tuples and mappings.
        dynamic_shapes: as of `torch.export`; a named `Dim("B")` keeps its name in the program.
        name: of the program and of its entry.
        input_names: one a tensor input, in order; `input_0`, `input_1`, ... by default.
        output_names: one a tensor output, in order; `out`, or `out.0`, `out.1`, ... by default.
        symbols: ranges of the symbols; what the tracer knows where one is missing.
        aliases: pairs (output name, input name): the output is that input's next state.

    Raises:
        UsageError: the module cannot be exported so.
        UnsupportedOperator: naming every operator without a translation, its module and its line.
    """
    dims = _dims(module, args, dynamic_shapes)

    def imported(exported: Exported) -> Program:
        return _imported(exported, name, dims, input_names, output_names, symbols, aliases)

    try:
        return imported(capture(module, args, dims, decompositions(composite=False)))
    except Exception as reason:  # torch.export judges, and tells it with the user's lines
        log.info("left to torch.export: %s", reason)
    return imported(export(module, args, dynamic_shapes, name))


def _imported(
    exported: Exported,
    name: str,
    dims: Sequence[Mapping[int, Any]],
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    symbols: Mapping[str, Range] | None,
    aliases: Sequence[tuple[str, str]],
) -> Program:
    importer = _Importer(exported, name, dims)
    graph = importer.graph(input_names, output_names, aliases)
    ranges = {n: _known_range(exported, s, n, symbols) for s, n in importer.sizes.names.items()}
    weights, source = importer.weights()
    program = Program(name, {name: graph}, weights, ranges, source, {}, Stage.TRACED)
    return program.pruned()


def export(
    module: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any, name: str = "main"
) -> torch.export.ExportedProgram:
    """`torch.export` for inference, decomposed as far as needed; `name` is a function's.

    Decomposing traces the graph twice more, so a graph that writes nothing in place and has a row
    for every operator is left as it is. Raises `UsageError` with torch's own reason.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings(), ListsOnCpu(), without_log(*UNPLACED):
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            exported = torch.export.export(
                module, args, dynamic_shapes=dynamic_shapes, strict=False
            )
            if not _is_translatable(exported):
                exported = exported.run_decompositions(decompositions())
            return exported
    except Exception as problem:
        if not type(problem).__module__.startswith("torch"):
            raise
        kind = type(module).__name__
        name = name if kind == torch.nn.Module.__name__ else kind
        if DATA in str(problem):
            raise UsageError(
                f"{name} takes a number out of a tensor, as a branch on data does; what is traced"
                " goes one way for all data",
                where=users_line(traceback.extract_tb(problem.__traceback__)),
                hint="choose between tensors by torch.where, or leave that part outside",
            ) from problem
        raise UsageError(
            f"torch.export cannot trace {name}: {_first_lines(problem)}",
            hint="remove what depends on the data, or pass other dynamic shapes",
        ) from problem


def _is_translatable(exported: torch.export.ExportedProgram) -> bool:
    """Whether every operator has a row already, and none writes to its operands."""
    for node in exported.graph.nodes:
        target = str(node.target)
        if node.op == "call_function" and isinstance(node.meta.get("val"), SYMBOLIC_NUMBERS):
            continue
        if node.op == "call_function" and target in (GETITEM, *DROPPED, *HARMLESS):
            continue
        known = row_of(target) is not None or target in COMPLEX
        if node.op == "call_function" and known and not node.target._schema.is_mutable:
            continue
        if node.op not in ("placeholder", "output"):
            return False
    return True


class _Importer(FxImporter):
    """Translates one exported program."""

    def __init__(
        self,
        exported: Exported,
        name: str,
        dims: Sequence[Mapping[int, Any]],
    ) -> None:
        """`dims` name sizes of axes, an item a tensor input; others are called D0, D1, ..."""
        super().__init__(name)
        self.exported = exported
        self.dims = dims
        self.states: dict[str, tuple[TensorType, torch.Tensor]] = {}

    # Inputs and weights.

    def graph(
        self,
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
        aliases: Sequence[tuple[str, str]],
    ) -> Graph:
        """The whole graph. Raises `UnsupportedOperator`, `UsageError`."""
        self._refuse_mutation()
        self._placeholders(input_names)
        for node in self.exported.graph.nodes:
            if node.op == "call_function":
                self.node(node)
            elif node.op not in ("placeholder", "output"):
                self.problem(node, f"{node.op} {node.target}", "control flow")
        self.refuse_problems()
        outputs = self._outputs()
        names = tuple(output_names or _default_names(len(outputs)))
        if len(names) != len(outputs):
            raise UsageError(f"{len(names)} output names for {len(outputs)} outputs")
        builder = self.lowering.builder
        inputs = [v.name for v in builder.inputs]
        pairs = tuple((names.index(out), inputs.index(into)) for out, into in aliases)
        return live(builder.finish(outputs, names, pairs))

    def _refuse_mutation(self) -> None:
        signature = self.exported.graph_signature
        mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        if mutated:
            raise UnsupportedOperator(
                f"the program changes {', '.join(map(str, mutated))} in place",
                hint="return the new value instead",
            )

    def _placeholders(self, input_names: Sequence[str] | None) -> None:
        placeholders = {n.name: n for n in self.exported.graph.nodes if n.op == "placeholder"}
        user = [
            placeholders[spec.arg.name]
            for spec in self.exported.graph_signature.input_specs
            if spec.kind.name == "USER_INPUT" and hasattr(spec.arg, "name")
            and isinstance(placeholders[spec.arg.name].meta.get("val"), torch.Tensor)
        ]  # fmt: skip
        names = list(input_names or [f"input_{i}" for i in range(len(user))])
        if len(names) != len(user):
            raise UsageError(f"{len(names)} input names for {len(user)} tensor inputs")
        self._name_sizes(user)
        for node, name in zip(user, names, strict=True):
            self.guarded(node, partial(self._input, node, name))
        for spec in self.exported.graph_signature.input_specs:
            node = placeholders.get(getattr(spec.arg, "name", ""))
            if node is None or node in self.values:
                continue
            if spec.target is None:
                self.values[node] = getattr(spec.arg, "value", None)
                continue
            self.guarded(node, partial(self._weight, node, spec.target, spec.kind.name))

    def _name_sizes(self, user: Sequence[fx.Node]) -> None:
        for node, axes in zip(user, self.dims, strict=False):
            for axis, dim in axes.items():
                size = node.meta["val"].shape[axis]
                if isinstance(size, int) or not isinstance(dim, torch.export.Dim):
                    continue
                if size.node.expr.is_Symbol:
                    self.sizes.names.setdefault(str(size.node.expr), dim.__name__)

    def _input(self, node: fx.Node, name: str) -> Any:
        fake = node.meta["val"]
        if fake.is_complex():
            raise Unsupported("a complex input; pass torch.view_as_real of it")
        return self.lowering.builder.input(name, self.lowering.type_of(fake))

    def _weight(self, node: fx.Node, target: str, kind: str) -> Any:
        """A parameter, a buffer or a lifted constant. A constant of shape [] becomes a number."""
        state = self.exported.state_dict
        tensor = state[target] if target in state else self.exported.constants[target]
        if not isinstance(tensor, torch.Tensor):
            raise Unsupported(f"the constant {target} is a {type(tensor).__name__}")
        tensor = tensor.detach()
        if kind == "CONSTANT_TENSOR" and tensor.device.type != "meta":
            if not tensor.is_complex() and tensor.dim() == 0:
                return self.lowering.number(tensor.item(), DType.of(tensor.dtype))
            if not tensor.is_complex():
                return self.lowering.constant(target, tensor)
        if tensor.is_complex():
            parts = ((".re", tensor.real), (".im", tensor.imag))
            return Complex(*(self._state(target + suffix, part) for suffix, part in parts))
        return self._state(target, tensor)

    def _state(self, name: str, tensor: torch.Tensor) -> Weight:
        weight_type = self.lowering.type_of(tensor)
        self.states[name] = (weight_type, tensor)
        return Weight(name, weight_type)

    def weights(self) -> tuple[dict[str, Any], Any]:
        """Weight expressions, and the source that they read."""
        states = dict(self.states)
        for name, tensor in self.lowering.constants.items():
            states[name] = (self.lowering.type_of(tensor), tensor)
        real = {k: v for k, (_, v) in states.items() if v.device.type != "meta"}
        absent = {k: t for k, (t, v) in states.items() if v.device.type == "meta"}
        layers: tuple[WeightSource, ...] = (DictSource(real), MetaSource(absent))
        source = LayeredSource(layers) if real and absent else layers[bool(absent)]
        return {k: Source(k, t) for k, (t, _) in states.items()}, source

    def _outputs(self) -> list[Operand]:
        by_name = {n.name: v for n, v in self.values.items()}
        specs = self.exported.graph_signature.output_specs
        found = [self.output(by_name.get(getattr(s.arg, "name", ""))) for s in specs]
        return [x for x in found if x is not None]


class ListsOnCpu(TorchFunctionMode):
    """`x[..., [-2]]` reads a list that keeps its numbers where `x` is on meta.

    PyTorch makes a tensor of it on the device of `x`, and a tensor on meta has none.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The call, with lists of numbers in an index as tensors."""
        if func is torch.Tensor.__getitem__:
            x, index = args
            parts = index if isinstance(index, tuple) else (index,)
            args = (x, tuple(_index(part) for part in parts))
        return func(*args, **(kwargs or {}))


def _index(part: Any) -> Any:
    is_list = isinstance(part, list) and part and all(type(each) is int for each in part)
    return torch.tensor(part, device="cpu") if is_list else part


def _default_names(count: int) -> list[str]:
    return ["out"] if count == 1 else [f"out.{i}" for i in range(count)]


def _first_lines(problem: Exception) -> str:
    lines = [line for line in str(problem).splitlines() if line.strip()]
    return "\n".join(lines[:6])


def _known_range(
    exported: Exported,
    symbol: str,
    name: str,
    given: Mapping[str, Range] | None,
) -> Range:
    if given and name in given:
        return given[name]
    for known, bounds in exported.range_constraints.items():
        if str(known) == symbol:
            lo, hi = (max(0, min(x, ANY_SIZE.hi)) for x in (bounds.lower, bounds.upper))
            return Range(int(lo), int(hi))
    return ANY_SIZE


def _dims(module: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any) -> list[dict[int, Any]]:
    """For each tensor among the arguments, what `dynamic_shapes` has of its axes."""
    bound = inspect.signature(module.forward).bind(*args).arguments
    given = dynamic_shapes or {}
    if not isinstance(given, Mapping):
        given = dict(zip(bound, given, strict=False))
    found: list[Any] = []
    for parameter, argument in bound.items():
        _collect_shapes(argument, given.get(parameter), found)
    axes = (s.items() if isinstance(s, Mapping) else enumerate(s or ()) for s in found)
    return [{axis: dim for axis, dim in each if dim is not None} for each in axes]


def _collect_shapes(argument: Any, shapes: Any, found: list[Any]) -> None:
    """Append what `dynamic_shapes` says of each tensor in an argument, in order."""
    if isinstance(argument, torch.Tensor):
        found.append(shapes)
    elif isinstance(argument, (list, tuple)):
        for i, item in enumerate(argument):
            _collect_shapes(item, shapes[i] if shapes else None, found)
    elif isinstance(argument, Mapping):
        for key, item in argument.items():
            _collect_shapes(item, shapes.get(key) if shapes else None, found)
