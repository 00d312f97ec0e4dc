"""dsc: a graph compiler for the DeepSeek-V3 family of models.

    import dsc

    exe = dsc.compile("path/to/checkpoint", backend="tvm")
    exe.save("out")
    session = dsc.load("out").session(max_batch=1, max_context=4096)
    logits = session.prefill(ids)

Every name below is loaded when it is first used: importing dsc imports neither torch nor any
compiler toolchain.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dsc._version import __version__

if TYPE_CHECKING:
    from dsc.api import CompiledModel, compile, load
    from dsc.errors import DscError
    from dsc.extend import register_op, register_rule
    from dsc.frontends.explain import explain
    from dsc.frontends.ops import (
        attention,
        embedding,
        experts,
        latent_attention,
        linear,
        matmul,
        mla_attention,
        rms_norm,
        rope,
        route,
        silu,
        softmax,
        swiglu,
    )
    from dsc.frontends.optimize import optimize
    from dsc.runtime.profiler import Profiler
    from dsc.runtime.session import Session
    from dsc.settings import set_debug_mode, set_memory_limit

__all__ = [
    "CompiledModel",
    "DscError",
    "Profiler",
    "Session",
    "__version__",
    "attention",
    "compile",
    "embedding",
    "experts",
    "explain",
    "latent_attention",
    "linear",
    "load",
    "matmul",
    "mla_attention",
    "optimize",
    "register_op",
    "register_rule",
    "rms_norm",
    "rope",
    "route",
    "set_debug_mode",
    "set_memory_limit",
    "silu",
    "softmax",
    "swiglu",
]

_LAZY = {
    "CompiledModel": "dsc.api:CompiledModel",
    "compile": "dsc.api:compile",
    "load": "dsc.api:load",
    "DscError": "dsc.errors:DscError",
    "explain": "dsc.frontends.explain:explain",
    "optimize": "dsc.frontends.optimize:optimize",
    "register_op": "dsc.extend:register_op",
    "register_rule": "dsc.extend:register_rule",
    "Profiler": "dsc.runtime.profiler:Profiler",
    "Session": "dsc.runtime.session:Session",
    "set_debug_mode": "dsc.settings:set_debug_mode",
    "set_memory_limit": "dsc.settings:set_memory_limit",
    "attention": "dsc.frontends.ops:attention",
    "embedding": "dsc.frontends.ops:embedding",
    "experts": "dsc.frontends.ops:experts",
    "latent_attention": "dsc.frontends.ops:latent_attention",
    "linear": "dsc.frontends.ops:linear",
    "matmul": "dsc.frontends.ops:matmul",
    "mla_attention": "dsc.frontends.ops:mla_attention",
    "rms_norm": "dsc.frontends.ops:rms_norm",
    "rope": "dsc.frontends.ops:rope",
    "route": "dsc.frontends.ops:route",
    "silu": "dsc.frontends.ops:silu",
    "softmax": "dsc.frontends.ops:softmax",
    "swiglu": "dsc.frontends.ops:swiglu",
}


if not TYPE_CHECKING:  # a checker reads the imports above instead, and so sees a misspelt name

    def __getattr__(name: str) -> object:
        """Load a public name when it is first used (PEP 562)."""
        place = _LAZY.get(name)
        if place is None:
            raise AttributeError(f"module 'dsc' has no attribute {name!r}")
        module, _, attribute = place.partition(":")
        value: object = getattr(import_module(module), attribute)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
