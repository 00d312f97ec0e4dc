"""How a function is to be compiled: the options of `dsc.optimize` and of the backend of Dynamo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from dsc.errors import UsageError

if TYPE_CHECKING:
    from dsc.api import CompiledModel
    from dsc.ir.program import Program

BACKEND_OF_CARDS = "triton"
_FALLBACKS = ("eager", "error")


@dataclass(frozen=True)
class Options:
    """How to compile: a backend by name (the best here by default), and what its passes may do.

    `fallback` says what becomes of operators that cannot be compiled: "eager" or "error". With
    `freeze`, parameters and buffers are constants, which passes may fold and pack. Graphs over
    tensors of a card are made for a `target`, which is no user's option.
    """

    memory_reuse: bool = True
    fusion_level: int = 3
    backend: str | None = None
    fallback: str = "eager"
    freeze: bool = False
    target: str = ""

    def on_card(self, target: str) -> Options:
        """The options for graphs over tensors of a card; parameters stay where they are."""
        return replace(self, backend=BACKEND_OF_CARDS, freeze=False, target=target)

    def compile(self, program: Program) -> CompiledModel:
        """Compile a traced program."""
        from dsc.api import compile_program

        return compile_program(
            program,
            backend=self.backend,
            fusion_level=self.fusion_level,
            memory_reuse=self.memory_reuse,
            target=self.target or "cpu",
        )


def checked(options: Options) -> Options:
    """The options. Raises `UsageError` for an impossible value, before anything is captured."""
    from dsc import backends
    from dsc.asked import check_fusion_level

    check_fusion_level(options.fusion_level)
    if options.fallback not in _FALLBACKS:
        raise UsageError(f"fallback {options.fallback!r}", hint=f"one of {', '.join(_FALLBACKS)}")
    if options.backend is not None:
        backends.get(options.backend)
    return options


def options_by_name(given: Mapping[str, Any]) -> Options:
    """Options as a user of `torch.compile` gives them. Raises `UsageError`."""
    known = [f.name for f in fields(Options) if f.name != "target"]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise UsageError(
            f"unknown option {', '.join(unknown)} of the dsc backend",
            hint=f"it takes {', '.join(known)}",
        )
    return checked(Options(**given))
