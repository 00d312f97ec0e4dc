"""ONNX Runtime's own operators: which there are, who runs them, and what stands in their place.

In the dialect `ort` an emitter may write them (`GraphWriter.contrib`) where `GraphWriter.has` says
so; in `standard` it writes the fallback, which is always there. A provider that is known to compute
something else by an operator does not get it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

DOMAIN = "com.microsoft"
VERSION = 1
ORT, STANDARD = DIALECTS = ("ort", "standard")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Whom a model may be made for, and what ONNX Runtime calls it."""


def providers_of(provider: str) -> list[str]:
    """What a session is opened with: the provider, and the CPU's for what that lacks.

    >>> providers_of("cuda")
    ['CUDAExecutionProvider', 'CPUExecutionProvider']
    """
    return list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]]))


@dataclass(frozen=True)
class Contrib:
    """An operator: what it stands for, who has it, and who computes something else by it.

    `runtime` is the first ONNX Runtime whose operator takes what is written, as far as was tried.
    """

    fallback: str
    providers: frozenset[str]
    runtime: str
    wrong: Mapping[str, str] = field(default_factory=dict)
    source: str = "docs/ContribOperators.md of microsoft/onnxruntime"


CONTRIB: Mapping[str, Contrib] = MappingProxyType({
    "GatherBlockQuantized": Contrib(
        "Gather of codes and scales", frozenset({"cpu", "cuda"}), "1.23",
        source="contrib_ops/cpu/quantization/gather_block_quantized.cc",
    ),
    "MatMulNBits": Contrib(
        "DequantizeLinear and a product", frozenset({"cpu", "cuda"}), "1.23",
        source="contrib_ops/cpu/quantization/matmul_nbits.cc",
    ),
    "QMoE": Contrib(
        "a branch an expert", frozenset({"cpu", "cuda"}), "1.31",
        {"cuda": "it ignores router_weights"},
        source="contrib_ops/cpu/moe/moe_quantization_cpu.cc",
    ),
})  # fmt: skip
"""By the name of the operator, whose domain is `DOMAIN`."""


def is_offered(op_type: str, ops: str, provider: str) -> bool:
    """Whether a model in the dialect `ops` may use an operator on a provider."""
    known = CONTRIB[op_type]
    return ops == ORT and provider in known.providers and provider not in known.wrong


def least_runtime(usual: str, used: Iterable[str]) -> str:
    """The first ONNX Runtime that runs a model, which needs `usual` without these operators.

    >>> least_runtime("1.25", ["MatMulNBits"]), least_runtime("1.23", ["MatMulNBits", "QMoE"])
    ('1.25', '1.31')
    """
    return max([usual, *(CONTRIB[op_type].runtime for op_type in used)], key=release)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version by which releases are ordered.

    >>> release("1.25.0") > release("1.9.2") > release("")
    True
    """
    parts = itertools.takewhile(str.isdecimal, version.split("."))
    return tuple(int(part) for part in parts)


def notes(
    uses: Iterable[Mapping[str, int]], withheld: Iterable[str], provider: str
) -> tuple[str, ...]:
    """What to tell of the operators that models use, and of those that the provider did not get."""
    most: dict[str, int] = {}
    for each in uses:
        for op_type, count in each.items():
            most[op_type] = max(count, most.get(op_type, 0))
    told = [
        f"ONNX Runtime's own {op_type}: {count} in a model; in standard operators"
        f" {CONTRIB[op_type].fallback}"
        for op_type, count in sorted(most.items())
    ]
    wrong = [
        f"{op_type} is not used on {provider}: {CONTRIB[op_type].wrong[provider]}"
        for op_type in sorted(withheld)
    ]
    return (*told, *wrong)
