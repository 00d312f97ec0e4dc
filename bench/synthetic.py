"""A checkpoint of any size that lies nowhere: tensors are made when they are read.

Names and types are those of published checkpoints (`shapes.py`); values are cut out of one table of
random numbers, at a place that depends on the tensor's name, so that any rows of it can be given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from bench.shapes import PRESETS, STD, Tensor, tensors
from dsc.ir.arrays import Array, tensor_of
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, LayeredSource, Source, WeightSource, source_types

TABLE = 1 << 23
"""Random numbers that there are."""


@dataclass(frozen=True)
class SyntheticSource(WeightSource):
    """Tensors of a configuration, made anew each time that they are read."""

    tensors: Mapping[str, Tensor]
    types: Mapping[str, TensorType]
    table: Array

    @staticmethod
    def of(config: Mapping[str, Any]) -> SyntheticSource:
        """All tensors of a configuration."""
        found = {each.name: each for each in tensors(config)}
        kinds = {"F32": DType.f32, "BF16": DType.bf16}
        types = {name: TensorType(kinds[each.dtype], each.shape) for name, each in found.items()}
        numbers = np.random.default_rng(0).standard_normal(TABLE, np.float32) * np.float32(STD)
        return SyntheticSource(found, types, numbers.astype(DType.bf16.numpy))

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(each.bytes for each in self.tensors.values())

    def load(self, key: str) -> Any:
        """The tensor. `KeyError`."""
        return tensor_of(self.array(key))

    def array(self, key: str, rows: slice = slice(None)) -> Array:
        """Rows of the tensor. `KeyError`."""
        height, *others = self.tensors[key].shape
        start, stop, _ = rows.indices(height)
        row = int(np.prod(others))
        made = np.ones((stop - start) * row, self.table.dtype)
        at, done = (crc32(key.encode()) + start * row) % TABLE, 0
        while done < made.size and self.tensors[key].std:
            piece = self.table[at : at + made.size - done]
            made[done : done + piece.size] = piece
            at, done = 0, done + piece.size
        return made.astype(self.types[key].dtype.numpy, copy=False).reshape(stop - start, *others)


def synthetic(preset: str, layers: int | None = None) -> Program:
    """A preset's model over a synthetic checkpoint, with as many layers as asked."""
    from dsc.frontends.conversions import conversions_of
    from dsc.frontends.family import parse_config
    from dsc.frontends.huggingface import CheckpointModel, stock_causal_lm
    from dsc.frontends.load import load_program
    from dsc.frontends.stock import clean

    raw = json.loads((PRESETS / f"{preset}.json").read_text())
    raw |= {"num_hidden_layers": layers or raw["num_hidden_layers"]}
    raw.pop("quantization_config", None)
    stock = stock_causal_lm(parse_config(raw, preset), DType.bf16)
    traced = load_program(stock).program
    named = {
        name: expr.type for name, expr in traced.weights.items()
        if isinstance(expr, Source) and expr.key == name
    }  # fmt: skip
    weights = SyntheticSource.of(raw)
    opened = CheckpointModel(Path(preset), raw, clean(raw, preset), DType.bf16, weights)
    found = opened.mapped(named, conversions=conversions_of(stock))
    own = source_types(traced.weights.values()).keys() - named.keys()
    constants = DictSource({key: traced.source.load(key) for key in own})
    source = LayeredSource((constants, found.source))
    return replace(traced, name=preset, weights={**traced.weights, **found.weights}, source=source)
