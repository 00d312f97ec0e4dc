"""`@dsc.optimize`: a Python function of tensors becomes compiled code on its first call.

    @dsc.optimize(memory_reuse=True, fusion_level=3)
    def attention_layer(q, k, v):
        scores = dsc.matmul(q, k.transpose(-2, -1)) / (q.shape[-1] ** 0.5)
        return dsc.softmax(scores, dim=-1) @ v

It is `torch.compile(function, backend="dsc")` with three differences. What cannot be compiled is an
error that names the user's line, unless `fallback="eager"` is asked for. Sizes that have changed
once become symbols that may be 0 and 1 as well, where the operators allow it. And what has been
compiled is on record: `dsc.explain(attention_layer)`.

Dynamo guards everything that a capture relies on: values of Python numbers, the tensors that a
function finds in globals, closures and modules, shapes, element types, whether gradients are on and
modules are in training. Code that no longer holds is not run; the function is captured again, up to
torch's limit (`torch._dynamo.config.recompile_limit`), after which new kinds of calls run eagerly.
Every capture after the first is logged at level INFO of the logger `dsc`, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, overload

from dsc.errors import UsageError
from dsc.frontends.calls import decorated_function
from dsc.frontends.options import Options, checked

P = ParamSpec("P")
R = TypeVar("R")

_MODES = (None, "default")


@overload
def optimize(function: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def optimize(
    function: None = None,
    /,
    *,
    memory_reuse: bool = True,
    fusion_level: int = 3,
    backend: str | None = None,
    fallback: str = "error",
    freeze: bool = False,
    fullgraph: bool | None = None,
    dynamic: bool | None = None,
    mode: str | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def optimize(
    function: Callable[..., Any] | None = None,
    /,
    *,
    memory_reuse: bool = True,
    fusion_level: int = 3,
    backend: str | None = None,
    fallback: str = "error",
    freeze: bool = False,
    fullgraph: bool | None = None,
    dynamic: bool | None = None,
    mode: str | None = None,
    **unknown: Any,
) -> Any:
    """Compile a function of tensors, or a module, on its first call.

    Args:
        function: what to compile; written `@dsc.optimize` or `@dsc.optimize(...)`.
        memory_reuse: let intermediate results share memory.
        fusion_level: 0 (one kernel an operator) to 3.
        backend: its name; the best that runs here by default.
        fallback: "error" refuses what cannot be compiled; "eager" runs it by PyTorch, around
            compiled parts.
        freeze: take parameters and buffers as constants, so that passes may fold and pack them.
            Another module, or a change in place, compiles again; one through `.data` or
            through another alias of the memory (NumPy) is not seen, and the old values stay.
        fullgraph: whether the whole function has to be one graph: with `fallback="error"` it has.
        dynamic: sizes become symbols once they have changed (`None`), at once (`True`) or never.
        mode: torch's; only "default" means something here.
        unknown: refused with a list of the options.

    Inference only: with inputs that require gradients the function runs eagerly, and warns once.

    Raises:
        UsageError: for arguments that cannot be; on a call, for what cannot be captured.
        UnsupportedOperator: on a call, naming all that cannot be compiled.
    """
    if unknown:
        taken = [n for n, p in signature(optimize).parameters.items() if p.kind is p.KEYWORD_ONLY]
        raise UsageError(
            f"unknown option {', '.join(sorted(unknown))} of dsc.optimize",
            hint=f"it takes {', '.join(taken)}",
        )
    if mode not in _MODES:
        raise UsageError(
            f"mode {mode!r}", hint="leave it out: dsc has no modes; see backend and fusion_level"
        )
    if fullgraph is False and fallback == "error":
        raise UsageError(
            'fullgraph=False and fallback="error"',
            hint='give fallback="eager": what is outside of a graph runs eagerly',
        )
    options = checked(Options(memory_reuse, fusion_level, backend, fallback, freeze))
    whole = fallback == "error" if fullgraph is None else fullgraph

    def decorate(target: Callable[..., Any]) -> Any:
        if isinstance(target, FunctionType):
            return decorated_function(target, options, whole=whole, dynamic=dynamic)
        from dsc.frontends.capture import decorated

        return decorated(target, options, whole=whole, dynamic=dynamic)

    return decorate if function is None else decorate(function)
