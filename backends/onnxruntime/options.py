"""What may be asked of an ONNX model: opset, dialect, provider, and the type of caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsc.backends.onnxruntime.contrib import DIALECTS, ORT, PROVIDERS, STANDARD, release
from dsc.errors import UsageError, one_of
from dsc.ir.program import Program
from dsc.ir.types import PRECISIONS, DType

OPSETS = {ORT: 23, STANDARD: 24}
"""Written by default, by dialect. 24 has TensorScatter, by which caches in place are no faster on
CPUs."""
LEAST_RUNTIME = {23: "1.23", 24: "1.25"}
"""For each opset that is written, the first ONNX Runtime that runs it on CPUs."""


def older_forms(meta: Mapping[str, Any], least: str, here: str) -> str:
    """The options by which a model that needs `least` would run on an older ONNX Runtime, `here`.

    `meta` is what was asked for; empty where nothing would help.

    >>> older_forms({"opset": 23, "onnx_ops": "ort"}, "1.31", "1.27")
    '--onnx-ops standard'
    >>> older_forms({"opset": 24, "onnx_ops": "standard"}, "1.25", "1.24")
    '--opset 23'
    """
    opset, ops = int(meta.get("opset", 0)), meta.get("onnx_ops", ORT)
    asked: list[str] = []
    if ops == ORT and release(least) > release(LEAST_RUNTIME.get(opset, least)):
        asked, opset = [f"--onnx-ops {STANDARD}"], OPSETS[STANDARD]
    oldest = min(LEAST_RUNTIME)
    if release(here) < release(LEAST_RUNTIME.get(opset, least)) and opset != oldest:
        asked, opset = [*asked, f"--opset {oldest}"], oldest
    runs = release(here) >= release(LEAST_RUNTIME.get(opset, least))
    return " ".join(asked) if runs else ""


@dataclass(frozen=True)
class Form:
    """What may be chosen of a model: the opset, and whether caches are fp32 at the border.

    `numpy`: NumPy has a type for all that goes in and comes out. `ops` is the dialect, standard
    operators alone or ONNX Runtime's own beside them, `provider` whom the model is made for.
    """

    opset: int = OPSETS[ORT]
    wide_caches: bool = True
    numpy: bool = True
    ops: str = ORT
    provider: str = "cpu"

    @property
    def runtime(self) -> str:
        """The first ONNX Runtime that runs it."""
        return LEAST_RUNTIME[self.opset]


def chosen_form(program: Program, given: Mapping[str, Any]) -> Form:
    """The form asked for by backend options; by default caches are what NumPy has a type for.

    Raises `UsageError` for an opset or a dialect that is not written, for a provider that nothing
    is known of, or for caches that would lose bits.
    """
    ops, provider = given.get("onnx_ops") or ORT, given.get("provider") or "cpu"
    if ops not in DIALECTS:
        raise UsageError(f"no operators are called {ops!r}", hint=one_of(ops, DIALECTS))
    if provider not in PROVIDERS:
        raise UsageError(f"no provider is called {provider!r}", hint=one_of(provider, PROVIDERS))
    opset, caches = given.get("opset"), given.get("caches")
    opset = OPSETS[ops] if opset is None else opset
    if opset not in LEAST_RUNTIME:
        known = ", ".join(map(str, LEAST_RUNTIME))
        raise UsageError(
            f"opset {opset} is not written",
            hint=f"one of {known}: older ones lack RMSNormalization and RotaryEmbedding",
        )
    own = {g.inputs[at].type.dtype for g in program.entries.values() for _, at in g.aliases}
    if caches is None:
        return Form(opset, wide_caches=DType.bf16 in own, ops=ops, provider=provider)
    wanted = PRECISIONS.get(caches)
    if wanted is not DType.f32 and own != {wanted}:
        shown = ", ".join(name for name, dtype in PRECISIONS.items() if dtype in {DType.f32, *own})
        raise UsageError(f"caches in {caches} would not hold the model's", hint=f"one of {shown}")
    wide, numpy = wanted is DType.f32, wanted is not DType.bf16
    return Form(opset, wide, numpy, ops, provider)
