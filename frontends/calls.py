"""Calls of a decorated function: by code that was kept, else by Dynamo, whose first code is kept.

Where a function was compiled before, by any process of this user, Dynamo need not run: the key
holds all that its capture and its code depend on (`dsc.frontends.reach`, the kinds of arguments,
torch's state, options, versions, our own sources, the machine). It is kept only where one graph
without effects was the whole function, and that graph one region of fixed sizes; then what went
into the region were arguments, and what came out of it stands in the result, which is seen by
identity in the call that compiled it. Code of which anything no longer holds is not run: the call
goes to Dynamo, as do all calls from then on of which no code was kept.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch._C._dynamo.guards import GlobalStateGuard

from dsc import kept
from dsc.errors import DscError
from dsc.frontends.fingerprint import Unknown
from dsc.frontends.options import BACKEND_OF_CARDS, Options
from dsc.frontends.placed import results
from dsc.frontends.reach import PLAIN, Reach, Watch, holds
from dsc.hardware import gpus, processor

if TYPE_CHECKING:
    from dsc.api import CompiledModel
    from dsc.frontends.capture import FrameCompiler
    from dsc.frontends.regions import Region, Witness

KIND = "functions"
CONSTANTS = 64 << 10
"""Bytes of the constants in code that is kept, at most."""
_CONFIGS = ("torch._dynamo.config", "torch.fx.experimental._config")
_CONSTANT = (type(None), bool, int, float, str)


def decorated_function(
    function: FunctionType, options: Options, *, whole: bool, dynamic: bool | None
) -> Callable[..., Any]:
    """The function with its calls looked after; Dynamo sees the function itself inside others."""
    calls = Calls(function, options, whole, dynamic)
    c: Any = eval_frame

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        prior = c.set_eval_frame(None)  # what looks calls up is not to be captured
        try:
            return calls(args, kwargs)
        finally:
            c.set_eval_frame(prior)

    c.set_code_exec_strategy(
        wrapper.__code__, c._FrameExecStrategy(c._FrameAction.SKIP, c._FrameAction.DEFAULT)
    )
    marked: Any = functools.wraps(function)(wrapper)
    marked._torchdynamo_inline = marked._torchdynamo_orig_callable = function
    marked.dsc_calls = calls
    return cast(Callable[..., Any], marked)


class Calls:
    """What is known of one decorated function, and what compiles it."""

    def __init__(
        self, function: FunctionType, options: Options, whole: bool, dynamic: bool | None
    ) -> None:
        self.function = function
        self.settings = (options, whole, dynamic)
        self.known: dict[Any, Known] = {}
        self._traced = False
        self._lock = threading.RLock()
        self._recording = threading.Lock()

    @cached_property
    def compiler(self) -> FrameCompiler:
        """What compiles the function where no code is kept."""
        from dsc.frontends.capture import FrameCompiler

        return FrameCompiler(self.function.__name__, *self.settings)

    @cached_property
    def _dynamo(self) -> Callable[..., Any]:
        return cast(Callable[..., Any], self.compiler.decorator()(self.function))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function's result."""
        if self._traced and not self.known:
            return self._dynamo(*args, **kwargs)
        kind = kind_of(args, kwargs)
        known = self.known.get(kind)
        if known is not None and known.holds():
            return known(args, kwargs)
        if kind is None or (self._traced and known is None):
            return self._trace(None, args, kwargs)
        sought = self._sought(kind)
        if sought is not None:
            if known is None or known.key != sought.key:
                known = sought.load()
            if known is not None:
                known.sought = sought
                self.known[kind] = known
                return known(args, kwargs)
        self.known.pop(kind, None)
        return self._trace(sought, args, kwargs)

    def _sought(self, kind: Any) -> Sought | None:
        """Under which key code for this kind of call is kept; `None` where it cannot be."""
        from dsc.ir.op import added
        from dsc.rewrite.registered import any_rules
        from dsc.settings import debug_mode, memory_limit

        if kept.refused() or debug_mode() or added() or any_rules() or _configured():
            return None
        state = GlobalStateGuard()
        try:
            reach = Reach(self.function)
        except Unknown:
            return None
        key = {
            "function": reach.digest,
            "arguments": repr(kind),
            "state": cast(Any, state).__getstate__(),
            "settings": repr(self.settings),
            "memory": memory_limit("cpu"),
            "gpus": _gpus(self.settings[0]),
            "environment": _environment(),
            **_surroundings(),
            **kept.surroundings(),
        }
        return Sought(key, reach.watches, state)

    def _trace(self, sought: Sought | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call by Dynamo, which is kept where it is the first and `sought` says under what."""
        with self._lock:
            first, self._traced = not self._traced, True
            if first:
                from dsc.api import warm

                warm(self.settings[0].backend)
                self._tell_dynamo()
            run = self._dynamo
        if not first or sought is None or self.known or not self._recording.acquire(False):
            return run(*args, **kwargs)
        witness: Witness = []
        self.compiler.graphs.witness = witness
        try:
            value = run(*args, **kwargs)
            with suppress(DscError, OSError, Unknown):
                self._keep(sought, value, witness, [*args, *kwargs.values()])
            return value
        finally:
            self.compiler.graphs.witness = None
            for region in self._regions():
                region.witness = None
            self._recording.release()

    def _tell_dynamo(self) -> None:
        """Sizes that kept code was for count as seen, so that others become symbols."""
        if not self.known:
            return
        from torch._dynamo import pgo

        self.compiler.graphs.earlier = True
        place = pgo.CodeId.make(self.function.__code__, self.function.__closure__)
        seen = pgo.get_code_state()[place].automatic_dynamic
        names = self.function.__code__.co_varnames
        for parts, count, keywords in self.known:
            for name, part in zip((*names[:count], *keywords), parts, strict=False):
                if isinstance(part[0], int):
                    entry = seen[f"L['{name}']"]
                    entry |= pgo.FrameStateSizeEntry.make_tensor(tuple(part[2]), part[3])

    def _regions(self) -> list[Region]:
        captures = self.compiler.graphs.captures
        return [r for c in captures for part in c.parts for r in part.regions.values()]

    def _keep(self, sought: Sought, value: Any, witness: Witness, leaves: Sequence[Any]) -> None:
        """Keep the code of a first call. Raises `Unknown` where its result is no tree of it."""
        from dsc.backends import get
        from dsc.frontends.explain import graph_of
        from dsc.rewrite.registered import any_rules
        from dsc.targets import Target

        graphs, regions = self.compiler.graphs, self._regions()
        if graphs.warned or any_rules() or not len(witness) == len(graphs.captures) == 1:
            return
        (capture,) = graphs.captures
        if capture.eager or capture.broken or any(capture.changes) or len(regions) != 1:
            return
        ((region,), (part,), ((given, made),)) = regions, capture.parts, witness
        model = region.executable
        if part.steps != 1 or model is None or model.program.symbols or not sought.holds():
            return
        if "cpu" not in get(model.backend).capabilities(Target("cpu")).targets:
            return
        if sum(cast(int, t.nbytes) for t in model.program.weight_types().values()) > CONSTANTS:
            return
        told = graph_of(capture)
        facts = {
            "inputs": [_position(x, leaves) for x in given],
            "layouts": [region.layouts[name] for name in region.graph.output_names],
            "result": _tree(value, made, leaves, []),
            "told": [told.inputs, told.operations, list(dict.fromkeys(self.compiler.guards))],
        }
        with tempfile.TemporaryDirectory(prefix="dsc-") as base:
            folder = model.save(Path(base) / "artifact")
            files = {
                str(p.relative_to(folder)): p.read_bytes()
                for p in sorted(folder.rglob("*")) if p.is_file()
            }  # fmt: skip
        facts["files"] = [(name, len(data)) for name, data in files.items()]
        head = json.dumps(facts).encode()
        body = len(head).to_bytes(8, "little") + head + b"".join(files.values())
        kept.put(KIND, sought.key, body)


@dataclass(frozen=True)
class Sought:
    """A key in full, what shows at a glance that it still holds, and torch's state."""

    key: Mapping[str, Any]
    watches: Sequence[Watch]
    state: GlobalStateGuard

    def holds(self) -> bool:
        """Whether nothing that the function reaches is another object, and torch's state is."""
        return self.state.check() and holds(self.watches)

    def load(self) -> Known | None:
        """The code that is kept, ready to run; `None` where there is none."""
        start = time.perf_counter()
        data = kept.get(KIND, self.key)
        if data is None:
            return None
        from dsc.api import load

        size = int.from_bytes(data[:8], "little")
        facts, at = json.loads(data[8 : 8 + size]), 8 + size
        base = Path(tempfile.mkdtemp(prefix="dsc-"))
        try:
            for name, length in facts["files"]:
                path = base / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data[at : at + length])
                at += length
            model = load(base, trust=True)
            weakref.finalize(model.executable, shutil.rmtree, base, True)
        except (DscError, OSError):
            shutil.rmtree(base, ignore_errors=True)
            return None
        model.report = json.loads((base / "report.json").read_bytes())
        (graph,) = model.program.entries.values()
        inputs, operations, guards = facts["told"]
        return Known(
            self, model, [v.name for v in graph.inputs], facts["inputs"],
            dict(zip(graph.output_names, facts["layouts"], strict=True)), facts["result"],
            tuple(inputs), operations, guards, time.perf_counter() - start,
        )  # fmt: skip


@dataclass
class Known:
    """Kept code for one kind of call: how arguments become inputs, and outputs the result.

    `inputs`, `operations` and `guards` are what was told of its capture.
    """

    sought: Sought
    model: CompiledModel
    names: Sequence[str]
    places: Sequence[int]
    layouts: Mapping[str, Sequence[int] | None]
    result: Any
    inputs: tuple[str, ...]
    operations: int
    guards: Sequence[str]
    seconds: float
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def key(self) -> Mapping[str, Any]:
        """What it is kept under."""
        return self.sought.key

    def holds(self) -> bool:
        """Whether it may be run."""
        return self.sought.holds()

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The function's result on a call of the kind."""
        leaves = [*args, *kwargs.values()]
        with self._lock:  # an arena serves one call at a time
            made = results(self.model, self.names, [leaves[i] for i in self.places], self.layouts)
        return _built(self.result, made, leaves)


def kind_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What capture sees of a call's arguments; `None` for a call that is not like any other.

    A tuple (arguments, number of positional ones, names of the others). A tensor is told by which
    of the arguments is the same one, element type, sizes and strides.
    """
    if not _is_ordinary():
        return None
    same: dict[int, int] = {}
    parts: list[tuple[Any, ...]] = []
    for position, value in enumerate((*args, *kwargs.values())):
        kind = type(value)
        if kind is Tensor:
            if (
                value.requires_grad or value.__dict__ or value.layout is not torch.strided
                or not value.is_cpu or value.is_quantized or value.is_neg() or value.is_conj()
                or value.is_nested
            ):  # fmt: skip
                return None
            first = same.setdefault(id(value), position)
            parts.append((first, value.dtype, value.shape, value.stride(), value.is_inference()))
        elif kind in PLAIN:
            parts.append((kind.__name__, repr(value)))
        else:
            return None
    return tuple(parts), len(args), tuple(kwargs)


def _is_ordinary() -> bool:
    """Whether nothing stands between a call and its operators: modes, transforms, a stance."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    c: Any = torch._C
    return (
        c._len_torch_function_stack() == 0
        and c._len_torch_dispatch_stack() == 0
        and c._functorch.peek_interpreter_stack() is None
        and c._get_tracing_state() is None
        and (dynamo is None or dynamo._stance.stance == "default")
    )


def _configured() -> bool:
    """Whether somebody set one of torch's settings for captures."""
    loaded = [cast(Any, sys.modules[name]) for name in _CONFIGS if name in sys.modules]
    return any(
        not each._is_default(name) and getattr(each, name) != entry.default
        for each in loaded
        for name, entry in each._config.items()
    )


def _environment() -> dict[str, str]:
    given = sorted(os.environ.items())
    return {k: v for k, v in given if k.startswith(("DSC_", "TORCH")) and "CACHE" not in k}


def _gpus(options: Options) -> list[str]:
    """What a backend of cards makes code for where no tensor lies on one."""
    return [gpu.target for gpu in gpus()] if options.backend == BACKEND_OF_CARDS else []


@cache
def _surroundings() -> dict[str, Any]:
    """What code depends on beside the function and the call: torch, our sources, the machine."""
    return {
        "ours": kept.sources("", "frontends", "passes", "backends"),
        "torch": [torch.__version__, str(torch.version.git_version)],
        "machine": [processor(), len(os.sched_getaffinity(0))],
    }


def _position(tensor: Tensor, leaves: Sequence[Any]) -> int:
    for position, leaf in enumerate(leaves):
        if leaf is tensor:
            return position
    raise Unknown("an input that is no argument")


def _tree(value: Any, made: Sequence[Tensor], leaves: Sequence[Any], above: list[Any]) -> Any:
    """A result as data: outputs and arguments by number, constants by value, containers."""
    for number, each in enumerate(made):
        if each is value:
            return ["output", number]
    if isinstance(value, Tensor):
        return ["argument", _position(value, leaves)]
    kind = type(value)
    if kind in _CONSTANT:
        return ["constant", value]
    if any(each is value for each in above):
        raise Unknown("a container that stands in a result twice")
    above.append(value)
    if kind in (tuple, list):
        return [kind.__name__, [_tree(x, made, leaves, above) for x in value]]
    if kind is dict and all(type(k) is str for k in value):
        return ["dict", [[k, _tree(x, made, leaves, above)] for k, x in value.items()]]
    raise Unknown(f"a result of type {kind.__qualname__}")


def _built(tree: Any, made: Sequence[Tensor], leaves: Sequence[Any]) -> Any:
    """The result that `_tree` tells."""
    what, held = tree
    match what:
        case "output":
            return made[held]
        case "argument":
            return leaves[held]
        case "constant":
            return held
        case "dict":
            return {key: _built(each, made, leaves) for key, each in held}
    parts = [_built(each, made, leaves) for each in held]
    return tuple(parts) if what == "tuple" else parts
