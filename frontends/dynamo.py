"""`torch.compile(model, backend="dsc")`.

    fast = torch.compile(model.eval(), backend="dsc", options={"fusion_level": 3})
    with torch.no_grad():
        y = fast(x)

Dynamo hands over FX graphs whose inputs are the caller's tensors, sizes that it keeps symbolic, and
the parameters. Parameters become weights of a program, under their own names, so that passes may
fold and pack them; the rest goes the way of `@dsc.optimize`. A graph is traced on its first run,
with the real tensors at hand.

What cannot be compiled runs eagerly after one warning that names it. So do calls that need
gradients: dsc compiles inference.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsc.errors import DscError, UsageError
from dsc.frontends.optimize import Optimized, Options

_OPTIONS = ("memory_reuse", "fusion_level", "backend")


def dsc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that `torch.compile` calls with each graph it captures.

    `options` are those of `dsc.optimize`: memory_reuse, fusion_level, backend. `mode` is torch's
    and says nothing here. Raises `UsageError` on an unknown option.
    """
    del example_inputs, mode
    unknown = set(options or {}) - set(_OPTIONS)
    if unknown:
        raise UsageError(
            f"unknown option {', '.join(sorted(unknown))} of the dsc backend",
            hint=f"it takes {', '.join(_OPTIONS)}",
        )
    return _Captured(gm, Options(**dict(options or {})))


class _Captured:
    """A captured graph, callable as it is, compiled for each set of parameters it meets."""

    def __init__(self, gm: fx.GraphModule, options: Options) -> None:
        self.gm = gm
        self.options = options
        self.eager = False
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.weights = {i: _weight_path(n, i) for i, n in enumerate(placeholders) if _is_weight(n)}
        self.tensors = [
            i for i, n in enumerate(placeholders)
            if i not in self.weights and isinstance(n.meta.get("example_value"), Tensor)
        ]  # fmt: skip
        self.symbolic = {i: _symbolic_axes(placeholders[i]) for i in self.tensors}
        self._runners: dict[tuple[int, ...], Optimized[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        if self.eager:
            return self.gm(*args)
        try:
            return self._runner(args)(*(args[i] for i in self.tensors))
        except DscError as problem:
            self.eager = True
            warnings.warn(f"dsc: this graph runs eagerly: {problem}", stacklevel=2)
            return self.gm(*args)

    def _runner(self, args: Sequence[Any]) -> Optimized[..., Any]:
        """The graph with these very parameters: Dynamo may call it with another module's."""
        key = tuple(id(args[i]) for i in self.weights)
        if key not in self._runners:
            module = _Graph(self, {path: args[i] for i, path in self.weights.items()})
            axes = [self.symbolic[i] for i in self.tensors]
            self._runners[key] = Optimized(module, self.options, axes)
        return self._runners[key]


class _Graph(nn.Module):
    """A captured graph as a module of its tensor inputs, with parameters of its own."""

    def __init__(self, captured: _Captured, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.__name__ = "a graph of torch.compile"
        self._tensors = captured.tensors
        self._weights = captured.weights
        self._count = sum(n.op == "placeholder" for n in captured.gm.graph.nodes)
        self._run = fx.Interpreter(_sizes_from_tensors(captured.gm)).run
        for path, tensor in weights.items():
            _attach(self, path.split("."), tensor)

    def forward(self, *tensors: Tensor) -> Any:
        """Run the graph, with the notes on where each node comes from kept for the tracer."""
        from torch.fx.traceback import preserve_node_meta

        given: dict[int, Any] = dict(zip(self._tensors, tensors, strict=True))
        for position, path in self._weights.items():
            given[position] = _read(self, path.split("."))
        with preserve_node_meta():
            return self._run(*(given.get(i, 0) for i in range(self._count)))


def _sizes_from_tensors(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with every size input replaced by a query of the tensor that it is a size of."""
    copied = fx.GraphModule(gm, _copy(gm.graph))
    graph = copied.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    last = placeholders[-1]
    for node in placeholders:
        size = node.meta.get("example_value")
        if not isinstance(size, torch.SymInt) or not node.users:
            continue
        owner, axis = _owner(placeholders, size)
        with graph.inserting_after(last):
            query = graph.call_function(torch.ops.aten.sym_size.int, (owner, axis))
        node.replace_all_uses_with(query)
    copied.recompile()
    return copied


def _copy(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    output = copied.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    copied.output(output[0])
    return copied


def _owner(placeholders: Sequence[fx.Node], size: torch.SymInt) -> tuple[fx.Node, int]:
    """A tensor input and its axis whose size this is."""
    for node in placeholders:
        tensor = node.meta.get("example_value")
        sizes: Sequence[Any] = tensor.shape if isinstance(tensor, Tensor) else ()
        for axis, extent in enumerate(sizes):
            if isinstance(extent, torch.SymInt) and extent.node.expr == size.node.expr:
                return node, axis
    raise UsageError(
        f"the graph takes the number {size}, which is no tensor's size",
        hint="pass it as a tensor, or call torch.compile(..., dynamic=False)",
    )


def _is_weight(node: fx.Node) -> bool:
    """Whether a graph input is a parameter or a buffer, the same object in every call."""
    marks = node.meta.get("tensor_dict") or {}
    return isinstance(node.meta.get("example_value"), Tensor) and (
        isinstance(node.meta["example_value"], nn.Parameter)
        or marks.get("_dynamo_static_input_type") is not None
    )


def _weight_path(node: fx.Node, position: int) -> str:
    """The path of a parameter in its model: `layers.0.weight`."""
    source = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    name = str(source() if callable(source) else source)
    keys = re.findall(r"\[['\"](\w+)['\"]\]", re.sub(r"^L\[[^]]*\]|^G\[[^]]*\]", "", name))
    path = [k for k in keys if k not in ("_modules", "_parameters", "_buffers")]
    return ".".join(path) or f"weight{position}"


def _symbolic_axes(node: fx.Node) -> list[int]:
    shape: Sequence[Any] = node.meta["example_value"].shape
    return [axis for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)]


def _attach(module: nn.Module, path: Sequence[str], tensor: Tensor) -> None:
    """Register a tensor at a dotted path, making the modules on the way."""
    for name in path[:-1]:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module._modules[name]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(path[-1], tensor)
    else:
        module.register_buffer(path[-1], tensor)


def _read(module: nn.Module, path: Sequence[str]) -> Any:
    for name in path:
        module = getattr(module, name)
    return module
