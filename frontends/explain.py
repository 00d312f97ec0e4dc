"""`dsc.explain`: what became of a function, as data and as text.

print(dsc.explain(attention_layer))           # what has been compiled so far
print(dsc.explain(attention_layer, q, k, v))  # after one more call
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import getclosurevars, isfunction
from typing import Any

from dsc.errors import UsageError
from dsc.frontends.calls import Known
from dsc.frontends.capture import FRAME_COMPILERS, FrameCompiler, decorated
from dsc.frontends.dynamo import Capture
from dsc.frontends.options import Options, options_by_name
from dsc.frontends.regions import Region


@dataclass(frozen=True)
class CompiledRegion:
    """A compiled part: its operators once optimised, and the bounds of sizes such as `x.shape[0]`.

    `model` is the `CompiledModel`, whose program and report say the rest.
    """

    model: Any
    operators: tuple[str, ...]
    symbols: dict[str, tuple[int, int]]
    compilations: int
    seconds: float

    def __str__(self) -> str:
        sizes = ", ".join(f"{n} {lo}..{hi}" for n, (lo, hi) in self.symbols.items())
        return (
            f"{len(self.operators)} steps on {self.model.backend}: {' '.join(self.operators)}"
            f"{f'; sizes {sizes}' if sizes else ''}; {self.seconds:.2f} s"
            f"{f' in {self.compilations} compilations' if self.compilations > 1 else ''}"
        )


@dataclass(frozen=True)
class CapturedGraph:
    """What Dynamo captured at once: how much of it is compiled, and what is not.

    `inputs` says what tensors and numbers it takes; code runs for no others. `eager` says why none
    of it is compiled, `fallbacks` what runs eagerly around the regions, `broken` why the capture
    ended before the function did.
    """

    inputs: tuple[str, ...]
    operations: int
    regions: tuple[CompiledRegion, ...]
    fallbacks: tuple[str, ...]
    eager: str
    broken: str


@dataclass(frozen=True)
class FunctionReport:
    """Everything on record about a function under `@dsc.optimize`.

    `recompiles` gives the reason of each capture after the first; `guards` the conditions that
    captures hold for.
    """

    name: str
    graphs: tuple[CapturedGraph, ...]
    guards: tuple[str, ...]
    recompiles: tuple[str, ...]

    @property
    def breaks(self) -> tuple[str, ...]:
        """Where capturing was interrupted, and why."""
        return tuple(g.broken for g in self.graphs if g.broken)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What runs eagerly."""
        return tuple(t for g in self.graphs for t in (*g.fallbacks, g.eager) if t)

    @property
    def regions(self) -> tuple[CompiledRegion, ...]:
        """All that is compiled."""
        return tuple(r for g in self.graphs for r in g.regions)

    def __str__(self) -> str:
        counted = {
            "graph": self.graphs,
            "break": self.breaks,
            "fallback": self.fallbacks,
            "recompile": self.recompiles,
        }
        told = [f"{len(found)} {what}{'s' * (len(found) != 1)}" for what, found in counted.items()]
        lines = [f"{self.name}: {', '.join(told)}"]
        for number, graph in enumerate(self.graphs):
            lines.append(f"  graph {number}: {graph.operations} operations captured")
            lines.append(f"    inputs    {', '.join(graph.inputs)}")
            lines += [f"    compiled  {r}" for r in graph.regions]
            lines += [
                f"    eager     {t}" for t in (*graph.fallbacks, *filter(None, [graph.eager]))
            ]
            lines += [f"    break     {graph.broken}"] * bool(graph.broken)
        lines += [f"  recompiled because {t}" for t in self.recompiles]
        lines += [f"  guard  {t}" for t in self.guards]
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> FunctionReport:
    """Say what was compiled of a function, what runs eagerly, and what the code holds for.

    Arguments are those of one call, made first. A function that is not under `@dsc.optimize` is
    compiled for that call with the options that `torch.compile` was given, if it was for dsc; what
    cannot be compiled runs eagerly.
    """
    if not callable(function):
        raise UsageError(f"explain takes a function, not {type(function).__name__}")
    calls = getattr(getattr(function, "__func__", function), "dsc_calls", None)
    compiler = _compiler(function) if calls is None else calls.compiler
    if compiler is None:
        plain = getattr(function, "_torchdynamo_orig_callable", function)
        options = _options_of(function)
        function = decorated(plain, options, whole=False, dynamic=None)
        compiler = FRAME_COMPILERS[function]
        function(*args, **kwargs)
    elif args or kwargs:
        function(*args, **kwargs)
    known = list(calls.known.values()) if calls is not None else []
    return FunctionReport(
        compiler.name,
        (*map(_kept, known), *map(graph_of, compiler.graphs.captures)),
        tuple(dict.fromkeys([*(text for k in known for text in k.guards), *compiler.guards])),
        tuple(compiler.reasons),
    )


def _compiler(function: Any) -> FrameCompiler | None:
    function = getattr(function, "__func__", function)
    try:
        return FRAME_COMPILERS.get(function)
    except TypeError:  # an object that allows no weak reference is no decorated function
        return None


def _options_of(function: Any) -> Options:
    """The options that `torch.compile(function, backend="dsc", options=...)` was given."""
    context = getattr(function, "dynamo_ctx", None)  # of a module
    if context is None and isfunction(function):
        context = getclosurevars(function).nonlocals.get("self")
    backend: Any = getattr(context, "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    if getattr(backend, "compiler_name", None) != "dsc":
        return Options()
    return options_by_name(getattr(backend, "kwargs", {}).get("options") or {})


def graph_of(capture: Capture) -> CapturedGraph:
    """What was captured at once."""
    return CapturedGraph(
        tuple(_with_names(told, capture.same) for told in capture.inputs),
        sum(n.op.startswith("call") for n in capture.gm.graph.nodes),
        tuple(_region(r, capture.sizes) for p in capture.parts for r in p.regions.values()),
        tuple(dict.fromkeys(t for p in capture.parts for t in p.eager_lines())),
        capture.eager,
        capture.broken,
    )


def _kept(known: Known) -> CapturedGraph:
    """The capture that kept code is from."""
    (graph,) = known.model.program.entries.values()
    operators = tuple(n.op for n in graph.nodes)
    region = CompiledRegion(known.model, operators, {}, 1, known.seconds)
    return CapturedGraph(known.inputs, known.operations, (region,), (), "", "")


def _with_names(told: str, same: Sequence[tuple[str, str]]) -> str:
    """An input under all names that it was given by: `q = k = v float32[2, 3]`."""
    name, _, rest = told.partition(" ")
    names = dict.fromkeys(n for pair in same if name in pair for n in pair)
    return f"{' = '.join(names or [name])} {rest}"


def _region(region: Region, sizes: Mapping[str, str]) -> CompiledRegion:
    model = region.executable
    assert model is not None
    (graph,) = model.program.entries.values()
    names = {n: sizes.get(str(region.numbers[n]), n) for n in model.program.symbols}
    return CompiledRegion(
        model,
        tuple(n.op for n in graph.nodes),
        {names[n]: (r.lo, r.hi) for n, r in model.program.symbols.items()},
        region.compilations,
        region.seconds,
    )
