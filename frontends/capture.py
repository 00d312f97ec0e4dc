"""How a function gets to Dynamo: capturing with sizes of 0 and 1 open, errors in the user's words.

Dynamo compiles a frame when none of the code it has holds, by a callback that `FrameCompiler`
stands in for.

Where sizes have become symbolic, Dynamo sets 0 and 1 apart, for they broadcast and vanish, and so
captures again for a batch of one. Many functions do not care. So a frame is first captured with
such sizes open (torch's `backed_size_oblivious`), which holds only for functions whose operators
all do the same for them; failing that, in the ordinary way.

What Dynamo refuses becomes one `UsageError` with the function, its line and what to write instead.
A mistake in the function itself, as shapes that do not fit, raises what it raises eagerly.
"""

from __future__ import annotations

import inspect
import logging
import operator
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import fx

from dsc.errors import DscError, InternalError, UsageError
from dsc.frontends.dynamo import GraphCompiler
from dsc.frontends.fx_import import users_line
from dsc.frontends.options import Options
from dsc.frontends.whole import kept_whole
from dsc.frontends.wording import condition, same_object, unchanged
from dsc.ir.op import lookup

log = logging.getLogger("dsc")
FAILED = ("torch._subclasses.fake_tensor", "failed while attempting to run meta")
"""Where torch logs what failed while tracing, and how that begins: the call raises or captures it.
"""

FRAME_COMPILERS: weakref.WeakKeyDictionary[Any, FrameCompiler] = weakref.WeakKeyDictionary()
"""What compiles the frames of each decorated function and module."""

_SIZE_OBLIVIOUS = frozenset(
    """
    abs add addmm baddbmm bfloat16 bmm clamp cos div embedding eq erf exp float floordiv ge gelu gt
    half layer_norm le linear log logical_and logical_not logical_or lt masked_fill matmul mm mul ne
    neg permute pow relu rms_norm rsqrt rsub scaled_dot_product_attention sigmoid silu sin size
    softmax sqrt square sub sym_size sym_sqrt t tanh to transpose tril triu truediv type_as view
    where
    """.split()
)
"""Names of torch's functions and methods that do the same for sizes of 0 and 1 as for others.

Broadcasting does not belong to what they do the same: Dynamo guards that sizes are equal where two
tensors meet. Reductions do not stand here, since some have no value for no elements, nor does
`reshape`, which is a view for some sizes and a copy for others, nor `squeeze`.
"""

_FUNCTIONS = frozenset(
    getattr(place, name)
    for place in (torch, torch.nn.functional, torch.special, operator)
    for name in _SIZE_OBLIVIOUS
    if hasattr(place, name)
)
"""The functions of these names: another library's of such a name is none of them."""

_FAILS_EAGERLY_TOO = frozenset(
    {
        "Assertion failed on symbolic shapes",
        "Data-dependent assertion failed (cannot compile partial graph)",
        "Observed exception",
        "Observed exception (EXCEPT_HANDLER)",
        "RuntimeError when making fake tensor call",
        "TypeError when making fake tensor call",
    }
)
"""Dynamo's kinds of refusals where the function fails without it as well (its `gb_type`).

The assertions are those whose condition is known to be false.
"""
_BRANCHES_ON_DATA = frozenset(
    {"Data-dependent branching", "Data-dependent branching with non-constant __bool__"}
)
_INTERNAL = re.compile("_dynamo_|___check_|_functorch|utils_device")
_BUILTIN = "Failed to trace builtin operator"


class FrameCompiler:
    """Compiles the frames of one decorated function by Dynamo, and keeps the record of it."""

    def __init__(self, name: str, options: Options, whole: bool, dynamic: bool | None) -> None:
        self.name = name
        self.options = options
        self.whole = whole
        self.dynamic = dynamic
        self.graphs = GraphCompiler(name, options)
        self.reasons: list[str] = []
        self._failed: list[str] = []
        self.guards: list[str] = []
        self._narrow: set[Any] = set()
        self._strict: Callable[..., Any]
        self._lenient: Callable[..., Any]

    def decorator(self) -> Any:
        """Dynamo's decorator, with this in the place of its callback."""
        arguments: dict[str, Any] = {
            "guard_fail_fn": lambda failed: self._failed.append(condition(str(failed.reason))),
            "guard_export_fn": self._keep_guards,
            "dynamic": self.dynamic,
        }
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            arguments["isolate_recompiles"] = True
        found: Any = torch._dynamo.optimize(self._backend, nopython=False, **arguments)
        if not hasattr(found, "callback"):  # TORCHDYNAMO_DISABLE is set
            return found
        strict: Any = torch._dynamo.optimize(self._backend, nopython=True, **arguments)
        self._strict, self._lenient = strict.callback, found.callback
        found.callback = _Callback(self)
        return found

    def _keep_guards(self, found: Any) -> None:
        """Note the conditions that a capture holds for.

        Those on tensors are told by the inputs of the captured graph; those on addresses of
        objects and on torch's own state say nothing to a user.
        """
        for guard in found:
            texts = [condition(t) for t in guard.code_list or () if not _INTERNAL.search(t)]
            if guard.create_fn_name() == "GRAD_MODE":
                texts = [f"gradients are {'on' if torch.is_grad_enabled() else 'off'}"]
            elif guard.name and not guard.code_list:
                texts = [unchanged(guard.name)]
            self.guards += texts
            if self.graphs.captures:
                self.graphs.captures[-1].same += filter(None, map(same_object, texts))

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        if _sizes_are_open() and not _is_size_oblivious(gm):
            raise _SizesMatter
        return self.graphs(gm, example_inputs)

    def compile(self, *arguments: Any) -> Any:
        """Compile a frame, as Dynamo's own callback does; `arguments` are that one's."""
        frame, cache_entry, frame_state = arguments
        earlier = cache_entry is not None or self.graphs.earlier
        varied = earlier or bool(self.dynamic) or len(frame_state) > 1
        self._failed.clear()
        from dsc.frontends.torch_export import without_log

        with without_log(*FAILED):
            found = self._converted(frame.f_code, varied, arguments)
        if self._failed and found.guarded_code is not None:
            self.reasons.append("; ".join(dict.fromkeys(self._failed)))
            log.info("%s is compiled again: %s", self.name, self.reasons[-1])
        return found

    def _converted(self, code: Any, varied: bool, arguments: tuple[Any, ...]) -> Any:
        """`varied` says that there may be symbolic sizes."""
        try:
            if varied and code not in self._narrow:
                try:
                    with _open_sizes(), kept_whole():
                        return self._strict(*arguments)
                except _CAPTURE_FAILED as failed:
                    if isinstance(getattr(failed, "inner_exception", None), DscError):
                        raise
                    self._narrow.add(code)
            return (self._strict if self.whole else self._lenient)(*arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self._tell_limit()
            return self._lenient(*arguments)
        except torch._dynamo.exc.BackendCompilerFailed as failed:
            inner = failed.inner_exception
            if isinstance(inner, DscError):
                raise inner.with_traceback(None) from None
            raise inner if isinstance(inner, InternalError) else failed from None
        except torch._dynamo.exc.TorchDynamoException as refused:
            if _is_the_users(refused):
                return _run_eagerly()
            raise self._refusal(refused) from None

    def _tell_limit(self) -> None:
        limit = torch._dynamo.config.recompile_limit
        self.graphs.warn(
            f"{self.name} has been compiled {limit} times and runs eagerly for other kinds of"
            f" calls; the last reason was: {'; '.join(dict.fromkeys(self._failed))}"
        )

    def _refusal(self, refused: Any) -> UsageError:
        """What Dynamo refuses, in words."""
        kind = str(getattr(refused, "gb_type", "") or type(refused).__name__)
        first = next((t.strip() for t in str(refused).splitlines() if t.strip()), kind)
        where = users_line(getattr(refused, "real_stack", None))
        if _depends_on_data(refused):
            what = f"{self.name} branches on the values of a tensor"
            hint = "write torch.where(condition, a, b)"
        elif kind == _BUILTIN:
            called = re.search(r"builtin operator `([^`]+)`", str(refused))
            name = called[1] if called else "a builtin"
            what = f"{self.name} calls {name}, which no graph has"
            hint = "take the call out of the function"
        else:
            what, hint = f"{self.name} cannot be captured as one graph: {first}", ""
        hint += f'{"; or " if hint else ""}give fallback="eager" to run this line by PyTorch'
        return UsageError(what, where=where or None, hint=hint)


class _SizesMatter(Exception):
    """A graph has operators for which 0 and 1 are no sizes like others."""


class _Callback:
    """Dynamo's callback for frames. A copy, or what is unpickled, gets a compiler of its own."""

    def __init__(self, compiler: FrameCompiler) -> None:
        self.compiler = compiler
        self._torchdynamo_orig_backend = compiler._lenient

    def __call__(self, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        return self.compiler.compile(frame, cache_entry, frame_state)

    def __reduce__(self) -> tuple[Any, ...]:
        mine = self.compiler
        return _callback, (mine.name, mine.options, mine.whole, mine.dynamic)


def _callback(*settings: Any) -> _Callback:
    return cast(_Callback, FrameCompiler(*settings).decorator().callback)


@contextmanager
def _open_sizes() -> Iterator[None]:
    with _shape_config().patch(backed_size_oblivious=True):
        yield


def _sizes_are_open() -> bool:
    return bool(_shape_config().backed_size_oblivious)


def _shape_config() -> Any:
    from torch.fx.experimental import _config

    return _config


def _is_size_oblivious(gm: fx.GraphModule) -> bool:
    """Whether nothing in a captured graph does something else for sizes of 0 and 1."""
    return all(_does_the_same(n) for n in gm.graph.nodes)


def _does_the_same(node: fx.Node) -> bool:
    target = node.target
    if node.op == "call_method":
        return target in _SIZE_OBLIVIOUS
    if node.op != "call_function":
        return node.op in ("placeholder", "output", "get_attr")
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "dsc":
        return lookup(target._opname).named_sizes
    return target in _FUNCTIONS


_CAPTURE_FAILED = (torch._dynamo.exc.TorchDynamoException, AssertionError, RuntimeError, ValueError)


def _run_eagerly() -> Any:
    """Dynamo's answer that this call, and what it calls, is not to be compiled."""
    types: Any = torch._dynamo.types
    skip = types.FrameExecStrategy(types.FrameAction.SKIP, types.FrameAction.SKIP)
    return types.ConvertFrameReturn(frame_exec_strategy=skip, apply_to_code=False)


def _is_the_users(refused: Exception) -> bool:
    """Whether the function fails as it would eagerly, which running it shows best."""
    fails = isinstance(refused, torch._dynamo.exc.TorchRuntimeError)
    return fails or getattr(refused, "gb_type", None) in _FAILS_EAGERLY_TOO


def _depends_on_data(refused: Exception) -> bool:
    """Whether a condition on values of tensors, or on a number made of them, was in the way."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if getattr(refused, "gb_type", None) in _BRANCHES_ON_DATA:
        return True
    return isinstance(refused.__cause__ or refused.__context__, GuardOnDataDependentSymNode)


def decorated(
    target: Callable[..., Any], options: Options, *, whole: bool, dynamic: bool | None
) -> Any:
    """The function or module with a compiler of its own."""
    name = getattr(target, "__name__", type(target).__name__)
    compiler = FrameCompiler(name, options, whole, dynamic)
    found = compiler.decorator()(target)
    FRAME_COMPILERS[found] = compiler
    return found
