"""The same program in fp32: what a tolerance in fp32 is measured on.

A pass that reorders a sum is held to 1e-5 in fp32; in bf16 the rounding of every intermediate would
drown it. So for such a pass both programs are compared with 16-bit floats widened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsc.errors import UsageError
from dsc.ir.graph import Attrs, Graph
from dsc.ir.lazy import torch
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Source, WeightExpr, WeightSource, apply, random_tensor, source_types

NARROW = frozenset({DType.bf16, DType.f16})


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
