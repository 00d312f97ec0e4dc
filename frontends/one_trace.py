"""A module traced in one run, to the graph that `torch.export` takes three for.

`torch.export` runs a module once, and what it captured twice more: to make it functional, and to
take operators apart. Here one run does it all. A dispatch mode sees every operator on fake tensors
of symbolic sizes, takes it apart as it is told, and notes what is left in an FX graph. It knows
which tensor is a view of which, so that a write through a view becomes a new value:

    key[..., :4].copy_(x)    becomes    slice, copy, slice_scatter

That is the plain case. What is beyond it raises, and is left to `torch.export`: arguments that
nest, writes to inputs or through other views, attributes that the module changes, and all that
makes a trace hold for some sizes alone, which the guards of the shape environment tell.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import graph_signature as signatures
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dsc.frontends.aten import KEPT_WHOLE
from dsc.frontends.whole import fake_linear, fake_matmul

aten = torch.ops.aten
SCATTERS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
"""Views that may be written through, and what puts the new value into what they are views of."""
FAKES: Mapping[Any, Any] = {aten.matmul.default: fake_matmul, aten.linear.default: fake_linear}
"""Operators whose fake result is told without taking them apart."""


class NotPlain(Exception):
    """The module needs more than one plain run; why."""


@dataclass
class Captured:
    """What is read of a `torch.export.ExportedProgram`."""

    graph: fx.Graph
    graph_signature: signatures.ExportGraphSignature
    state_dict: dict[str, Tensor]
    constants: dict[str, Tensor]
    range_constraints: Mapping[Any, Any] = field(default_factory=dict)


@dataclass
class _Value:
    """A tensor and the node that makes it; of a view, how it is made of its `parent`.

    A write gives the root a new node and makes all views of it stale: `seen` is the count of writes
    to the root that the node of a view knows of.
    """

    tensor: Tensor
    node: fx.Node
    parent: _Value | None = None
    view: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
    seen: int = 0
    writes: int = 0

    @property
    def root(self) -> _Value:
        return self if self.parent is None else self.parent.root


def capture(
    module: nn.Module,
    args: Sequence[Any],
    dims: Sequence[Mapping[int, Any]],
    table: Mapping[Any, Any],
) -> Captured:
    """Trace `module` on tensors, symbolic along the axes in `dims`, by the names of those.

    `table` says how operators are taken apart; those that the dispatcher takes apart by itself are
    too, but for what the IR knows. Raises `NotPlain`, or whatever the module does on fake tensors.
    """
    _check_sizes(args, dims)
    sizes = ShapeEnv()
    mode = FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=True, export=True)
    mode.cache_enabled = False  # each operator once: to look it up takes longer than to run it
    recorder = _Recorder(mode, table)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
    once = {id(t): mode.from_tensor(t.detach(), static_shapes=True) for t in state.values()}
    fakes: dict[str, Tensor] = {name: once[id(tensor)] for name, tensor in state.items()}
    for number, (name, fake) in enumerate(fakes.items()):  # of several names the last one holds
        kind = "PARAMETER" if name in parameters else "BUFFER"
        recorder.placeholder(f"state_{number}", fake, kind, name)
    inputs = []
    for number, (tensor, axes) in enumerate(zip(args, dims, strict=True)):
        symbolic = [
            DimDynamic.DUCK if axis in axes else DimDynamic.STATIC for axis in range(tensor.dim())
        ]
        inputs.append(
            mode.from_tensor(
                tensor,
                source=ConstantSource(f"input_{number}"),
                symbolic_context=StatelessSymbolicContext(dynamic_sizes=symbolic),
            )
        )
        recorder.placeholder(f"input_{number}", inputs[-1], "USER_INPUT", None)
    with (
        _unchanged(module), _places(module, recorder.place), warnings.catch_warnings(),
        torch.no_grad(), torch._C._AutoDispatchBelowAutograd(),  # where composites are whole
        _compiling_state_context(), enable_python_dispatcher(), mode, recorder,
    ):  # fmt: skip
        warnings.filterwarnings("ignore", "Raw SymInt")
        results = torch.func.functional_call(module, fakes, tuple(inputs))
    if sizes.guards or sizes.replacements:
        raise NotPlain(f"it holds for some sizes alone: {[str(g.expr) for g in sizes.guards]}")
    outputs = [results] if isinstance(results, Tensor) else list(results)
    nodes = [recorder.read(x) for x in outputs]
    recorder.graph.output(tuple(nodes))
    recorder.graph.eliminate_dead_code()
    given = signatures.OutputKind.USER_OUTPUT
    specs = [signatures.OutputSpec(given, signatures.TensorArgument(n.name), None) for n in nodes]
    signature = signatures.ExportGraphSignature(recorder.specs, specs)
    return Captured(recorder.graph, signature, state, recorder.constants)


def _check_sizes(args: Sequence[Any], dims: Sequence[Mapping[int, Any]]) -> None:
    """Raise `NotPlain` unless sizes are one symbol where, and only where, they have one name."""
    names: dict[str, int] = {}
    for tensor, axes in zip(args, dims, strict=True):
        if not isinstance(tensor, Tensor):
            raise NotPlain("an argument is no tensor")
        for axis, dim in axes.items():
            if type(dim) is not torch.export.Dim or dim.min > 0 or str(dim.max) != "int_oo":
                raise NotPlain(f"a size that is {dim}")
            if names.setdefault(dim.__name__, tensor.shape[axis]) != tensor.shape[axis]:
                raise NotPlain(f"two sizes are called {dim.__name__}")
    if len({*names.values()}) < len(names) or min(names.values(), default=2) < 2:
        raise NotPlain("sizes that are alike, or 0 or 1")


class _Recorder(TorchDispatchMode):
    """Notes every operator; those of torch that write, as what makes a new value."""

    def __init__(self, mode: FakeTensorMode, table: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode, self.table = mode, table
        self.graph = fx.Graph()
        self.place = [""]
        self.values: dict[int, _Value] = {}
        self.specs: list[signatures.InputSpec] = []
        self.constants: dict[str, Tensor] = {}

    def placeholder(self, name: str, value: Tensor, kind: str, target: str | None) -> None:
        """Add an input of the graph, which stands for `target` of the module's state."""
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        argument = signatures.TensorArgument(node.name)
        persistent = True if kind == "BUFFER" else None
        spec = signatures.InputSpec(signatures.InputKind[kind], argument, target, persistent)
        self.specs.append(spec)
        self.values[id(value)] = _Value(value, node)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._written(func, args, kwargs)
        apart = self.table.get(func)
        if func._can_decompose():
            apart = None if func._schema.name in KEPT_WHOLE else func.decompose
        if apart is not None:
            with self:
                result = apart(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._noted(func, args, kwargs)

    def _noted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator and add its node."""
        fake = FAKES.get(func)
        result = fake(self.mode, func, *args) if fake else func(*args, **kwargs)
        node = self._node(func, args, kwargs, result)
        is_view = any(each.alias_info is not None for each in func._schema.returns)
        parent = self.values.get(id(args[0])) if is_view else None
        if isinstance(result, Tensor):
            self._known(result, node, parent, (func, args, kwargs))
            return result
        for position, part in enumerate(result if isinstance(result, (list, tuple)) else ()):
            if isinstance(part, Tensor):
                item = self._node(operator.getitem, (node, position), {}, part)
                self._known(part, item, parent, None)
        return result

    def _node(self, func: Any, args: Any, kwargs: Any, result: Any) -> fx.Node:
        args, kwargs = tree_map_only(Tensor, self.read, (args, kwargs))
        node = self.graph.call_function(func, args, kwargs)
        node.meta |= {"val": result, "nn_module_stack": {"": (self.place[-1], None)}}
        return node

    def _known(self, tensor: Tensor, node: fx.Node, parent: _Value | None, view: Any) -> None:
        if id(tensor) not in self.values:  # an operator may return what it is given
            seen = parent.root.writes if parent is not None else 0
            self.values[id(tensor)] = _Value(tensor, node, parent, view, seen)

    def read(self, tensor: Tensor) -> fx.Node:
        """The node of what a tensor holds now. Raises `NotPlain` for one of unknown origin."""
        if not isinstance(tensor, Tensor):
            raise NotPlain(f"an output is a {type(tensor).__name__}")
        if id(tensor) not in self.values:
            if isinstance(tensor, FakeTensor) or tensor.dim():
                raise NotPlain(f"a tensor of shape {list(tensor.shape)} comes from nowhere")
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor
            self.placeholder(name, tensor, "CONSTANT_TENSOR", name)
        value = self.values[id(tensor)]
        if value.parent is not None and value.seen != value.root.writes:
            if value.view is None:
                raise NotPlain("one of several views is read after a write")
            value.node = self._node(*value.view, tensor)
            value.seen = value.root.writes
        return value.node

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What writes to its first operand: the value of that, and of what it is a view of."""
        name = func._schema.name.removeprefix("aten::")
        packet = getattr(aten, name.removesuffix("_"), None)
        functional = getattr(packet, func._overloadname, None)
        value = self.values.get(id(args[0])) if args else None
        if not name.endswith("_") or functional is None or value is None:
            raise NotPlain(f"{func} writes")
        if name == "detach_":
            return args[0]
        if value.root.node.op == "placeholder":
            raise NotPlain(f"{func} writes to an input")
        with self:
            new = functional(*args, **kwargs)
        if (new.dtype, *new.shape) != (args[0].dtype, *args[0].shape):
            raise NotPlain(f"{func} writes another type than it makes")
        while value.parent is not None:
            view, operands, options = value.view or (None, (), {})
            if view not in (*SCATTERS, aten.alias.default):
                raise NotPlain(f"{func} writes through {view}")
            if view in SCATTERS:
                with self:
                    new = SCATTERS[view](value.parent.tensor, new, *operands[1:], **options)
            value = value.parent
        value.node = self.read(new)
        value.writes += 1
        return args[0]


@contextmanager
def _places(module: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep on `stack` the paths of the submodules that are running, innermost last."""

    def starts(path: str, *_: Any) -> None:
        stack.append(path)

    def ends(*_: Any) -> None:
        stack.pop()

    inside = [(path, part) for path, part in module.named_modules() if path]
    hooks = [part.register_forward_pre_hook(partial(starts, path)) for path, part in inside]
    hooks += [part.register_forward_hook(ends) for _, part in inside]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Take back attributes that the module sets meanwhile, and raise `NotPlain` if it did."""
    before = [(part, dict(vars(part))) for part in module.modules()]
    changed = False
    try:
        yield
    finally:
        for part, attributes in before:
            now = vars(part)
            if [*map(id, now.values())] != [*map(id, attributes.values())]:
                changed = True
                now.clear()
                now.update(attributes)
    if changed:
        raise NotPlain("it sets attributes of itself")
