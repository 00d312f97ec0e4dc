"""`@dsc.optimize`: a Python function of tensors becomes compiled code on its first call.

    @dsc.optimize(memory_reuse=True, fusion_level=3)
    def attention_layer(q, k, v):
        scores = dsc.matmul(q, k.transpose(-2, -1)) / (q.shape[-1] ** 0.5)
        return dsc.softmax(scores, dim=-1) @ v

The function is traced by `torch.export` with batch and sequence sizes symbolic, so that other sizes
re-use the compiled code; where the function does not allow that, each set of sizes gets code of its
own. What is not a tensor is a constant: another value compiles again.

Memory is planned for sizes up to the next power of two; a larger call compiles once more. A trace
is re-used for a call when element types and ranks agree, the same sizes are 0 or 1 (which
broadcast), sizes that the trace took as constants are equal, and every condition on sizes that the
tracer met (`if x.shape[0] > 3`) holds.
"""

from __future__ import annotations

import functools
import threading
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, ParamSpec, Protocol, TypeAlias, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dsc.errors import UnsupportedOperator, UsageError
from dsc.frontends.torch_export import export, import_exported
from dsc.ir.dims import Range
from dsc.ir.graph import Graph
from dsc.ir.interpreter import bind_symbols
from dsc.ir.program import Program

P = ParamSpec("P")
R = TypeVar("R")

WRAPPED = "function."
"""Where the wrapper that is traced holds the function: cut off names of weights and modules."""


ROOM = 8
"""The least bound of a symbolic size: batches of up to 8 share one compilation."""

State: TypeAlias = tuple[tuple[int, int, int], ...]
"""A stamp of each weight: code that packed other values is not re-used."""

Guard: TypeAlias = Callable[[Sequence[Tensor]], bool]

_TENSOR = object()


class Compiled(Protocol):
    """What `dsc.api.compile_program` returns, as far as it is used here."""

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the only entry on tensors by name."""
        ...


@dataclass(frozen=True)
class Options:
    """How to compile: a backend by name (the best here by default), and what its passes may do."""

    memory_reuse: bool = True
    fusion_level: int = 3
    backend: str | None = None

    def compile(self, program: Program) -> Compiled:
        """Compile a traced program."""
        from dsc.api import compile_program

        return cast(
            Compiled,
            compile_program(
                program,
                backend=self.backend,
                fusion_level=self.fusion_level,
                memory_reuse=self.memory_reuse,
            ),
        )


class _Call(nn.Module):
    """The function as a module of its tensor arguments alone; the rest is held as constants."""

    def __init__(
        self, function: Callable[..., Any], layout: TreeSpec, leaves: list[Any], result: _Result
    ) -> None:
        super().__init__()
        self.function = function
        self.layout = layout
        self.constants = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]
        self.result = result

    def forward(self, *tensors: Tensor) -> list[Any]:
        """Call the function; return the tensors and the symbolic sizes among its results."""
        given = iter(tensors)
        leaves = [next(given) if x is _TENSOR else x for x in self.constants]
        args, kwargs = tree_unflatten(leaves, self.layout)
        found, self.result.layout = tree_flatten(self.function(*args, **kwargs))
        computed = (Tensor, torch.SymInt)
        self.result.leaves[:] = [None if isinstance(x, computed) else x for x in found]
        self.result.kinds[:] = [
            "tensor" if isinstance(x, Tensor) else "size" if isinstance(x, torch.SymInt) else ""
            for x in found
        ]
        return [x for x in found if isinstance(x, computed)]


@dataclass
class _Result:
    """How the function's result is put together from what the program computes."""

    layout: TreeSpec | None = None
    leaves: list[Any] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def assemble(self, outputs: Sequence[Tensor]) -> Any:
        assert self.layout is not None
        computed = iter(outputs)
        leaves = [
            int(next(computed)) if kind == "size" else next(computed) if kind else constant
            for kind, constant in zip(self.kinds, self.leaves, strict=True)
        ]
        return tree_unflatten(leaves, self.layout)


@dataclass(frozen=True)
class Trace:
    """A traced call: the program, how results are put together, and the calls it holds for."""

    program: Program
    result: _Result
    guard: Callable[[Sequence[Tensor]], bool]

    @property
    def graph(self) -> Graph:
        """The only entry."""
        (graph,) = self.program.entries.values()
        return graph

    def sizes(self, tensors: Sequence[Tensor]) -> dict[str, int] | None:
        """What the symbols are for these tensors; `None` where the trace does not hold."""
        try:
            sizes = bind_symbols(self.graph, tensors)
        except UsageError:
            return None
        known = self.program.symbols
        if any(not known[s].lo <= n <= known[s].hi for s, n in sizes.items()):
            return None
        return sizes if self.guard(tensors) else None


@dataclass(frozen=True)
class Specialisation:
    """A trace, compiled for sizes within `program.symbols`."""

    trace: Trace
    program: Program
    compiled: Compiled
    state: State

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether these sizes are within the bounds that memory was planned for."""
        ranges = self.program.symbols
        return all(ranges[symbol].lo <= n <= ranges[symbol].hi for symbol, n in sizes.items())

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """The function's result."""
        names = (v.name for v in self.trace.graph.inputs)
        dense = (x.detach().contiguous() for x in tensors)
        outputs = self.compiled.run(dict(zip(names, dense, strict=True)))
        return self.trace.result.assemble([outputs[n] for n in self.trace.graph.output_names])


class Optimized(Generic[P, R]):
    """A function that compiles itself, one specialisation for each kind of call."""

    def __init__(
        self,
        function: Callable[P, R],
        options: Options,
        axes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """`axes` names the symbolic axes of each tensor; `symbolic_choices` has them otherwise."""
        functools.update_wrapper(self, function, updated=())
        self.__name__: str = getattr(function, "__name__", type(function).__name__)
        self.function = function
        self.options = options
        self.axes = axes
        self._cache: dict[Any, list[Specialisation]] = {}
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    @property
    def specialisations(self) -> tuple[Specialisation, ...]:
        """All that has been compiled so far."""
        return tuple(s for found in self._cache.values() for s in found)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run compiled; eagerly inside another trace, with gradients, or off the CPU."""
        leaves, layout = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if torch.compiler.is_compiling() or any(_is_traced(x) for x in tensors):
            return self.function(*args, **kwargs)
        reason = self._reason_for_eager(tensors)
        if reason:
            self._warn(reason)
            return self.function(*args, **kwargs)
        return cast(R, self._specialisation(leaves, layout, tensors).run(tensors))

    def _reason_for_eager(self, tensors: Sequence[Tensor]) -> str:
        if any(x.device.type != "cpu" for x in tensors):
            return "its inputs are not on the CPU"
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *self._weights())):
            return "its inputs require gradients (call it under torch.no_grad())"
        return ""

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"dsc: {self.__name__} runs eagerly, because {reason}", stacklevel=3)

    def _weights(self) -> list[Tensor]:
        if not isinstance(self.function, nn.Module):
            return []
        return [*self.function.parameters(), *self.function.buffers()]

    def _specialisation(
        self, leaves: list[Any], layout: TreeSpec, tensors: Sequence[Tensor]
    ) -> Specialisation:
        key = (str(layout), tuple(map(_constant, leaves)), tuple(map(kind_of_call, tensors)))
        state = tuple(map(_stamp, self._weights()))
        with self._lock:
            known = self._cache.setdefault(key, [])
            known[:] = [s for s in known if s.state == state]
            for i, candidate in enumerate(known):
                sizes = candidate.trace.sizes(tensors)
                if sizes is None:
                    continue
                if not candidate.fits(sizes):
                    known[i] = self._compiled(candidate.trace, tensors, state, candidate.program)
                return known[i]
            known.insert(0, self._traced(leaves, layout, tensors, state))
            return known[0]

    def _traced(
        self, leaves: list[Any], layout: TreeSpec, tensors: Sequence[Tensor], state: State
    ) -> Specialisation:
        """Trace and compile, with fewer symbolic sizes where the tracer or the backend objects."""
        result = _Result()
        call = _Call(self.function, layout, leaves, result)
        name = self.__name__ if self.__name__.isidentifier() else "main"
        for axes in [self.axes] if self.axes is not None else symbolic_choices(tensors):
            try:
                trace = _trace(call, tensors, axes, name)
            except (UsageError, UnsupportedOperator):
                break
            try:
                return self._compiled(trace, tensors, state)
            except UnsupportedOperator:
                continue
        constant = _trace(call, tensors, [()] * len(tensors), name)
        return self._compiled(constant, tensors, state)

    def _compiled(
        self, trace: Trace, tensors: Sequence[Tensor], state: State, smaller: Program | None = None
    ) -> Specialisation:
        """Compile for these sizes and those up to the next power of two.

        Memory is planned for the largest sizes, so they are bounded by what has been seen, and
        grow by doubling: `smaller` is the program that these tensors have outgrown.
        """
        symbols = {}
        for symbol, known in trace.program.symbols.items():
            size = (trace.sizes(tensors) or {}).get(symbol, known.hi)
            roof = max(ROOM, 1 << (size - 1).bit_length())
            seen = smaller.symbols[symbol].hi if smaller is not None else 0
            symbols[symbol] = Range(known.lo, min(known.hi, max(roof, seen)))
        program = replace(trace.program, symbols=symbols)
        return Specialisation(trace, program, self.options.compile(program), state)


def _trace(
    call: _Call, tensors: Sequence[Tensor], axes: Sequence[Sequence[int]], name: str
) -> Trace:
    """Trace `call(*tensors)` with these axes symbolic."""
    args = tuple(x.detach() for x in tensors)
    shapes = tuple(dict.fromkeys(chosen, torch.export.Dim.AUTO) for chosen in axes)
    exported = export(call, args, {"tensors": shapes} if any(shapes) else None)
    return Trace(_program(exported, name), call.result, _guard(exported))


def _program(exported: torch.export.ExportedProgram, name: str) -> Program:
    specs = exported.graph_signature.input_specs
    tensors = [s.arg.name for s in specs if s.kind.name == "USER_INPUT"]
    names = [n.replace("tensors_", "x") for n in tensors]
    return import_exported(exported, name=name, input_names=names, prefix=WRAPPED)


def _guard(exported: torch.export.ExportedProgram) -> Guard:
    """The conditions on sizes that the tracer relied on, as one predicate over the inputs."""
    conditions: list[str] = list(getattr(exported, "_guards_code", None) or [])
    if not conditions:
        return lambda tensors: True
    source = " and ".join(f"({c})" for c in conditions)
    code = compile(source, "<conditions of the trace>", "eval")
    return lambda tensors: bool(eval(code, {"torch": torch}, {"L": {"tensors": tuple(tensors)}}))


def symbolic_choices(tensors: Sequence[Tensor]) -> list[list[list[int]]]:
    """Which axes of each tensor to keep symbolic, in the order in which to try.

    All but the features; then without the axis that holds the heads, [b,h,s,d] or [b,s,h,d], whose
    number a kernel may have to know. What remains is to take every size as a constant.
    """
    every = [dynamic_axes(x) for x in tensors]
    choices = [every]
    for heads in (1, 2):
        fewer = [
            [a for a in axes if a != heads or x.dim() < 4]
            for x, axes in zip(tensors, every, strict=True)
        ]
        if fewer not in choices:
            choices.append(fewer)
    return choices


def dynamic_axes(tensor: Tensor) -> list[int]:
    """The axes that may be symbolic: all but the features (the last axis of a float matrix).

    Sizes 0 and 1 broadcast and vanish; they stay constants.
    """
    features = tensor.is_floating_point() and tensor.dim() >= 2
    axes = range(tensor.dim() - 1 if features else tensor.dim())
    return [axis for axis in axes if tensor.shape[axis] > 1]


def kind_of_call(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors must have in common to run the same code, as far as known before tracing."""
    return tensor.dtype, tuple(min(n, 2) for n in tensor.shape)


def _stamp(weight: Tensor) -> tuple[int, int, int]:
    """Identity, place and version: another stamp, other values. Writes through `.data` hide."""
    return id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _constant(leaf: Any) -> Any:
    """A leaf of the arguments as part of a key; tensors count elsewhere."""
    if isinstance(leaf, Tensor):
        return Tensor
    try:
        hash(leaf)
    except TypeError:
        raise UsageError(
            f"an argument of type {type(leaf).__name__} can be neither a tensor nor a constant",
            hint="pass a tensor, a number, a string, or a nest of them",
        ) from None
    return type(leaf), leaf


def _is_traced(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


@overload
def optimize(function: Callable[P, R], /) -> Optimized[P, R]: ...


@overload
def optimize(
    function: None = None,
    /,
    *,
    memory_reuse: bool = True,
    fusion_level: int = 3,
    backend: str | None = None,
) -> Callable[[Callable[P, R]], Optimized[P, R]]: ...


def optimize(
    function: Callable[..., Any] | None = None,
    /,
    *,
    memory_reuse: bool = True,
    fusion_level: int = 3,
    backend: str | None = None,
) -> Any:
    """Compile a function of tensors, or a module, on its first call.

    Args:
        function: what to compile; written `@dsc.optimize` or `@dsc.optimize(...)`.
        memory_reuse: let intermediate results share memory.
        fusion_level: 0 (one kernel an operator) to 3.
        backend: its name; the best that runs here by default.

    Inference only: with inputs that require gradients the function runs eagerly, and warns once.
    Raises `UnsupportedOperator` on the first call, naming all that cannot be compiled.
    """
    if not 0 <= fusion_level <= 3:
        raise UsageError(f"fusion_level {fusion_level}", hint="one of 0, 1, 2, 3")
    options = Options(memory_reuse, fusion_level, backend)
    if function is not None:
        return Optimized(function, options)
    return lambda decorated: Optimized(decorated, options)
