"""The engines that are measured, each in a process of its own.

An engine is a class with `prefill(batch, tokens)`, seconds of a prompt into empty caches;
`start(batch, context, room)`, which fills the caches with `context` tokens and leaves room for so
many more; and `steps(count)`, seconds of that many decode steps with random tokens. `units` tells
which instructions it computes with, tiles included, as far as it says. The module says in `NEEDS`
which packages it imports. Modules import nothing else but numpy when they are loaded: an engine may
live in another environment than dsc.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

ENGINES = {
    "dsc": "compiled",
    "onnxruntime": "compiled",
    "stock": "onnx_stock",
    "transformers": "transformers_eager",
    "torch.compile": "torch_compiled",
    "llama.cpp": "llama_cpp_python",
    "vllm": "vllm_cpu",
    "probe": "probe",
}
"""Modules by the engine's name. `onnxruntime` runs what dsc exports by dsc, `stock` without it."""
PEERS = ("transformers", "torch.compile", "onnxruntime", "llama.cpp", "vllm")
SLOW = ("transformers", "torch.compile")
"""They expand the whole latent cache again in every step."""
CHUNK = 512
"""Tokens of a prompt that are processed at once, by every engine."""


class Engine(Protocol):
    """What the worker drives."""

    units: str

    def prefill(self, batch: int, tokens: int) -> float:
        """Seconds of a prompt."""
        ...

    def start(self, batch: int, context: int, room: int) -> None:
        """Fill the caches."""
        ...

    def steps(self, count: int) -> list[float]:
        """Seconds of decode steps."""
        ...


def module_of(name: str) -> Any:
    """The module of an engine."""
    return import_module(f"bench.engines.{ENGINES[name]}")


def open_engine(name: str, options: Mapping[str, Any]) -> Any:
    """Load an engine; `options` are what the command was asked, as JSON values."""
    return module_of(name).Engine({**options, "engine": name})
