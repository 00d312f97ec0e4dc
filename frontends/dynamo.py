"""The backend that Dynamo calls: `torch.compile(model, backend="dsc")` and `@dsc.optimize`.

    fast = torch.compile(model.eval(), backend="dsc", options={"fusion_level": 3})
    with torch.no_grad():
        y = fast(x)

Dynamo captures graphs and guards what they hold for; AOTAutograd makes them functional, so that
views, aliases and changes in place are what they are in PyTorch; what is left is a graph of ATen
operators, which `aten_graph.py` compiles. Parameters are inputs like all others and read at every
call, unless `freeze` makes constants of them.

dsc compiles inference: where an input requires gradients the graph runs eagerly, after one warning.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsc.errors import UsageError
from dsc.frontends.aten_graph import CompiledGraph, refusal
from dsc.frontends.fx_import import Problem, is_users, source_line, users_line
from dsc.frontends.on_card import device_of, reason_on_card, target_of
from dsc.frontends.options import Options, options_by_name
from dsc.frontends.overlaps import is_refused, shared
from dsc.frontends.regions import Witness
from dsc.frontends.whole import kept_whole
from dsc.frontends.wording import input_name, size_names, told_inputs
from dsc.runtime.executable import StandIn

_FROZEN = 8
"""Sets of frozen parameters that code is kept for."""


def dsc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that `torch.compile` calls with each graph it captures.

    `options` are those of `dsc.optimize`: memory_reuse, fusion_level, backend, fallback and freeze.
    `mode` is torch's and says nothing here. Raises `UsageError` on an unknown option.
    """
    del mode
    compiler = GraphCompiler("a graph of torch.compile", options_by_name(options or {}))
    return compiler(gm, example_inputs)


@dataclass
class Capture:
    """One graph that Dynamo handed over and what was made of it; eager for a reason, or compiled.

    `inputs` says what each is called and what it is: `x float32[any, 3]`, `sizes` what the user
    calls symbolic numbers. `same` are inputs that have to be one object. `parts` holds one compiled
    graph, or one a set of frozen parameters. `changes` says of each input whether it is changed in
    place; of the memory behind it, where inputs share some.
    """

    gm: fx.GraphModule
    inputs: tuple[str, ...]
    sizes: Mapping[str, str]
    same: list[tuple[str, str]] = field(default_factory=list)
    parts: list[CompiledGraph] = field(default_factory=list)
    eager: str = ""
    changes: tuple[bool, ...] = ()
    options: Options = field(default_factory=Options)

    @property
    def broken(self) -> str:
        """Why the capture ended before the function did; empty where it did not."""
        reason = getattr(self.gm, "compile_subgraph_reason", None)
        if reason is None or not reason.graph_break:
            return ""
        text = str(reason.reason).strip().partition("\n")[0]
        what = "branches on the values of a tensor" if text.startswith("generic_jump") else text
        return f"{what}: {users_line(reason.user_stack)}"


class GraphCompiler:
    """Compiles graphs for one decorated function, or for one call of `torch.compile`'s backend.

    `witness` is given to the regions that are made; `earlier` says that other code for the function
    is there.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.__name__ = "dsc"
        self.name = name
        self.options = options
        self.captures: list[Capture] = []
        self.warned: set[str] = set()
        self.witness: Witness | None = None
        self.earlier = False

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any
    ) -> Callable[..., Any]:
        """What runs a captured graph. Raises `DscError` where that is asked for."""
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        sizes = size_names(inputs)
        capture = Capture(gm, told_inputs(inputs, sizes), sizes, options=self.options)
        self.captures.append(capture)
        capture.eager = _reason_for_eager(example_inputs, self.options)
        if capture.eager:
            self.warn(f"{self.name} runs eagerly, because {capture.eager}")
            return _forward(gm)
        moved = [n for n in gm.graph.nodes if n.target is torch.Tensor.set_]
        if moved:  # AOTAutograd cannot take it
            why = "a tensor is given other memory (`x.data = y`)"
            problems = {n: Problem("set_", why, source_line(n)) for n in moved}
            if self.options.fallback == "error":
                raise refusal(problems)
            capture.eager = f"{why}: {source_line(moved[0])}"
            self.warn(f"{self.name} runs eagerly, because {capture.eager}")
            return _forward(gm)
        device = device_of(example_inputs)
        if device is not None:
            capture.options = self.options.on_card(target_of(device))
        from dsc.api import warm

        warm(capture.options.backend)
        from torch._dynamo.backends.common import aot_autograd

        compiler = functools.partial(self._compiled, capture)
        with kept_whole():
            run = aot_autograd(
                fw_compiler=compiler,
                inference_compiler=compiler,
                decompositions=decompositions(),
                keep_inference_input_mutations=False,
            )(gm, example_inputs)
        return self._watched(capture, run, example_inputs) if any(capture.changes) else run

    def _watched(
        self, capture: Capture, run: Callable[..., Any], example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Code that changes inputs, run where they share memory as they did when it was made."""
        eager, known = _forward(capture.gm), shared(example_inputs)
        apart = len(capture.changes) == len(example_inputs)
        repeated = any(i == j and (capture.changes[i] or not apart) for i, j, *_ in known)
        if repeated or (known and is_refused(eager, example_inputs)):
            capture.eager = "it changes an input in place that shares memory with itself or others"
            return eager

        def watched(*args: Any) -> Any:
            if shared(args) == known:
                return run(*args)
            self.warn(
                f"{self.name} runs eagerly where its inputs share memory in another way than when"
                " it was compiled, since it changes some of them in place"
            )
            return eager(*args)

        return watched

    def warn(self, message: str) -> None:
        """Say something once, of the user's line that runs."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(f"dsc: {message}", stacklevel=_users_level())

    def _compiled(
        self, capture: Capture, aten: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Any:
        del example_inputs
        facts: Any = torch._guards.TracingContext.get().fw_metadata
        capture.changes = tuple(bool(each.mutates_data) for each in facts.input_info)
        names, weights = _named_inputs(capture.gm, aten)
        if capture.options.freeze and weights:
            return Frozen(self, capture, aten, names, weights)
        return self.compile(capture, aten, names, {})

    def compile(
        self,
        capture: Capture,
        aten: fx.GraphModule,
        names: Mapping[fx.Node, str],
        constants: Mapping[fx.Node, Tensor],
    ) -> CompiledGraph:
        """The functional graph of a capture, compiled; what is not is warned of once."""
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes(), torch._C._DisablePythonDispatcher(), torch.no_grad():
            done = CompiledGraph(aten, capture.options, self.name, names, constants)
            for region in done.regions.values():
                region.witness = self.witness
                self._tell_stand_in(region.executable)
        capture.parts.append(done)
        for line in done.eager_lines():
            self.warn(f"{self.name} runs eagerly in part: {line}")
        return done

    def _tell_stand_in(self, model: Any) -> None:
        """Say what runs in the place of compiled code. Raises `UsageError` where nothing does."""
        executable = getattr(model, "executable", None)
        if not isinstance(executable, StandIn):
            return
        if not executable.computes:
            raise UsageError(
                f"{self.name} would have no results: {executable.stand_in}",
                hint="choose another backend: tvm, onnxruntime or reference",
            )
        self.warn(f"{self.name}: {executable.stand_in}")


class Frozen:
    """A graph whose parameters are constants, compiled for each set of them that comes.

    They are told apart by address and version, so changes through `.data`
    or through other aliases of their memory (NumPy) stay unseen.
    """

    _boxed_call = True

    def __init__(
        self,
        compiler: GraphCompiler,
        capture: Capture,
        aten: fx.GraphModule,
        names: Mapping[fx.Node, str],
        weights: Mapping[fx.Node, int],
    ) -> None:
        self.made_for: dict[tuple[tuple[int, int], ...], CompiledGraph] = {}
        self.positions = tuple(weights.values())
        self.make: Callable[[Sequence[Tensor]], CompiledGraph] = lambda tensors: compiler.compile(
            capture, aten, names, dict(zip(weights, tensors, strict=True))
        )

    def __call__(self, args: list[Any]) -> list[Any]:
        """Run with the parameters among `args`."""
        weights = [args[i] for i in self.positions]
        key = tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)
        found = self.made_for.get(key)
        if found is None:
            while len(self.made_for) >= _FROZEN:
                self.made_for.pop(next(iter(self.made_for)))
            found = self.made_for[key] = self.make(weights)
        return found(args)


@functools.cache
def decompositions() -> Mapping[Any, Any]:
    """The tracer's table of decompositions, made once a process.

    What draws random numbers stays whole, so that it draws those that it draws eagerly; so does
    `lift_fresh`, by which AOTAutograd brings in a constant.
    """
    from dsc.frontends.torch_export import decompositions

    whole = {torch.ops.aten.lift_fresh.default}
    random = torch.Tag.nondeterministic_seeded
    return {
        k: v
        for k, v in decompositions(composite=False).items()
        if k not in whole and random not in getattr(k, "tags", ())
    }


def _forward(gm: fx.GraphModule) -> Callable[..., Any]:
    """A captured graph run by PyTorch: made now, since in the making it prints what it raises."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    _LazyGraphModule.force_recompile(gm)
    return gm.forward


def _users_level() -> int:
    """The `stacklevel` at which the caller's warning points at the user's code."""
    library = sysconfig.get_paths()["stdlib"]  # torch's decorators stand on contextlib and such
    frames = [f for f, _ in traceback.walk_stack(sys._getframe(1))]
    for level, frame in enumerate(frames, 1):
        file = frame.f_code.co_filename
        own = file.startswith(library) and "site-packages" not in file
        if is_users(file) and not own:
            return level
    return 1


def _reason_for_eager(example_inputs: Sequence[Any], options: Options) -> str:
    """Why a graph on these inputs cannot be compiled at all; empty where it can."""
    tensors = [x for x in example_inputs if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "its inputs require gradients (call it under torch.no_grad())"
    if any(x.device.type not in ("cpu", "cuda") for x in tensors):
        return "its inputs are neither on the CPU nor on a CUDA device"
    if device_of(tensors) is not None and (why := reason_on_card(tensors, options.backend)):
        return why
    if any(x.layout != torch.strided or x.is_quantized for x in tensors):
        return "its inputs are sparse or quantised"
    if any(torch.is_neg(x) or torch.is_conj(x) for x in tensors):
        return "its inputs are negated or conjugated views"
    return ""


def _named_inputs(
    captured: fx.GraphModule, aten: fx.GraphModule
) -> tuple[dict[fx.Node, str], dict[fx.Node, int]]:
    """Names of the functional graph's inputs, and the positions of those that are parameters.

    AOTAutograd keeps the order of what Dynamo captured; where it merged aliased inputs there are no
    names to be had.
    """
    ours = [n for n in aten.graph.nodes if n.op == "placeholder"]
    theirs = [n for n in captured.graph.nodes if n.op == "placeholder"]
    if len(ours) != len(theirs):
        return {}, {}
    names = {a: input_name(b) for a, b in zip(ours, theirs, strict=True)}
    return names, {a: i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if _is_weight(b)}


def _is_weight(node: fx.Node) -> bool:
    """Whether an input of a captured graph is a parameter or a buffer."""
    marks = node.meta.get("tensor_dict") or {}
    fake = node.meta.get("example_value")
    static = marks.get("_dynamo_static_input_type") is not None
    return isinstance(fake, Tensor) and (isinstance(fake, nn.Parameter) or static)
