"""dsc: a graph compiler for the decoders of transformers, made first for DeepSeek-V3.

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
    from dsc.exporting import export
    from dsc.extend import register_op, register_rule
    from dsc.frontends.convert import convert
    from dsc.frontends.explain import explain
    from dsc.frontends.ops import (
        attention,
        embedding,
        experts,
        latent_attention,
        layer_norm,
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
    from dsc.quantized import QuantizedModel
    from dsc.runtime.profiler import Profiler
    from dsc.runtime.session import Session
    from dsc.settings import set_debug_mode, set_memory_limit

__all__ = [
    "CompiledModel",
    "DscError",
    "Profiler",
    "QuantizedModel",
    "Session",
    "__version__",
    "attention",
    "compile",
    "convert",
    "embedding",
    "experts",
    "explain",
    "export",
    "latent_attention",
    "layer_norm",
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

_PLACES = {
    "dsc.api": "CompiledModel compile load",
    "dsc.errors": "DscError",
    "dsc.exporting": "export",
    "dsc.extend": "register_op register_rule",
    "dsc.frontends.convert": "convert",
    "dsc.frontends.explain": "explain",
    "dsc.frontends.ops": "attention embedding experts latent_attention layer_norm linear matmul"
    " mla_attention rms_norm rope route silu softmax swiglu",
    "dsc.frontends.optimize": "optimize",
    "dsc.quantized": "QuantizedModel",
    "dsc.runtime.profiler": "Profiler",
    "dsc.runtime.session": "Session",
    "dsc.settings": "set_debug_mode set_memory_limit",
}
_LAZY = {name: module for module, names in _PLACES.items() for name in names.split()}
"""Where each public name is."""


if not TYPE_CHECKING:  # a checker reads the imports above instead, and so sees a misspelt name

    def __getattr__(name: str) -> object:
        """Load a public name when it is first used (PEP 562)."""
        module = _LAZY.get(name)
        if module is None:
            raise AttributeError(f"module 'dsc' has no attribute {name!r}")
        value: object = getattr(import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
