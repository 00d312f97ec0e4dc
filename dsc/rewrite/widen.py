"""The same program in fp32: what a tolerance in fp32 is measured on.

A pass that reorders a sum is held to 1e-5 in fp32; in bf16 the rounding of every intermediate would
drown it. So for such a pass both programs are compared with 16-bit floats widened (`runnable`).
Kernels are held to the numbers that they are given: weights as they are stored, rounded to 16 bits
or to codes, and only what is computed with them in fp32 (`in_fp32`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsc.errors import UsageError
from dsc.ir.graph import Attrs, Graph
from dsc.ir.lazy import torch
from dsc.ir.program import Program
from dsc.ir.types import PRECISIONS, DType, TensorType
from dsc.ir.weights import (
    LayeredSource,
    Source,
    WeightExpr,
    WeightSource,
    apply,
    evaluate,
    random_tensor,
    source_types,
)

NARROW = frozenset({DType.bf16, DType.f16})
FP32_ROUNDINGS = 16.0 * 2.0**-23
"""In fp32: the error of a result for a root of the depth, as a share of its size."""
PLAIN = "plain "
"""How the key of a weight that `Plain` gives begins: no checkpoint calls a tensor so."""


@dataclass(frozen=True)
class Filled(WeightSource):
    """A source whose missing values are random, seeded by key; 16-bit floats widened on demand."""

    source: WeightSource
    types: Mapping[str, TensorType]
    widen: bool

    def load(self, key: str) -> torch.Tensor:
        """The tensor, or a random one where the source has types alone."""
        try:
            tensor = self.source.load(key)
        except (UsageError, KeyError):
            tensor = random_tensor(self.types[key], key)
        narrow = self.widen and DType.of(tensor.dtype) in NARROW
        return tensor.float() if narrow else tensor

    def release(self) -> None:
        """Release the source below."""
        self.source.release()


@dataclass(frozen=True)
class Plain(WeightSource):
    """The weights of a program that are no codes, in fp32, each moved by chance by a share of it.

    Which way depends on a weight's name alone.
    """

    program: Program
    types: Mapping[str, TensorType]
    moved: float

    def load(self, key: str) -> torch.Tensor:
        """The weight, evaluated."""
        name = key.removeprefix(PLAIN)
        found: torch.Tensor = evaluate(self.program.weights[name], self.program.source).float()
        if self.moved:
            seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            found = found * (1 + self.moved * torch.randn(found.shape, generator=seed))
        return found

    def release(self) -> None:
        """Release the source below."""
        self.program.source.release()


def in_fp32(program: Program, moved: float = 0.0) -> Program:
    """The program over the very weights that it stores, and all that it computes in fp32.

    Codes and their scales stay as they are: made from widened numbers they would be others. With
    `moved` each number that is no code is off by so large a share of it, as rounding might have it.
    """
    plain = {
        name: _wide(expr.type) for name, expr in program.weights.items()
        if expr.type.format is None and expr.type.dtype in PRECISIONS.values()
    }  # fmt: skip
    known = {PLAIN + name: kind for name, kind in plain.items()}
    entries = {name: widened(graph) for name, graph in program.entries.items()}
    return replace(
        program,
        entries=entries,
        weights={**program.weights, **{n: Source(PLAIN + n, t) for n, t in plain.items()}},
        source=LayeredSource((Plain(program, known, moved), program.source)),
        interface=program.interface.fitted(entries.values()),
    )


def runnable(program: Program, widen: bool) -> Program:
    """The program over a source that has all values, in fp32 when `widen`."""
    types = source_types(program.weights.values())
    filled = replace(program, source=Filled(program.source, types, widen))
    if not widen:
        return filled
    entries = {name: widened(graph) for name, graph in program.entries.items()}
    weights = {name: _expr(expr) for name, expr in program.weights.items()}
    return replace(filled, entries=entries, weights=weights)


def widened(graph: Graph) -> Graph:
    """The same computation with 16-bit floats as fp32: casts to them become no-ops."""
    return graph.retyped(_wide, _attr)


def _wide(t: TensorType) -> TensorType:
    return t.with_dtype(DType.f32) if t.dtype in NARROW else t


def _attr(value: Any) -> Any:
    if isinstance(value, DType):
        return DType.f32 if value in NARROW else value
    return widened(value) if isinstance(value, Graph) else value


def _expr(expr: WeightExpr) -> WeightExpr:
    if isinstance(expr, Source):
        return Source(expr.key, _wide(expr.type))
    attrs = Attrs({k: _attr(v) for k, v in expr.attrs.items()})
    return apply(expr.op, *map(_expr, expr.args), **attrs)
