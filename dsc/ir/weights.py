"""Weights are lazy: a name in a source, or an expression over such names.

A pass that changes a weight (stacks experts, splits kv_b, dequantises) writes a `WeightExpr`; it is
evaluated tensor by tensor when an artifact is packed, so that a program of any size compiles with
no weight in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dsc.errors import UsageError
from dsc.ir.arrays import Array, array_of
from dsc.ir.graph import Attrs
from dsc.ir.lazy import torch
from dsc.ir.op import OpDef, TypeMismatch, concrete, defaults, lookup, type_of
from dsc.ir.types import DType, TensorType


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the weight source, by key."""

    key: str
    type: TensorType


@dataclass(frozen=True, slots=True)
class Apply:
    """An operator applied to weight expressions. Build it with `apply`, which infers the type."""

    op: str
    args: tuple[WeightExpr, ...]
    attrs: Attrs
    type: TensorType

    def __post_init__(self) -> None:
        object.__setattr__(self, "attrs", self.attrs.of(self.op))


WeightExpr: TypeAlias = Source | Apply


def apply(op: str, *args: WeightExpr, **attrs: Any) -> Apply:
    """The expression `op(args) {attrs}`, one result. Raises `TypeMismatch`."""
    frozen = Attrs({**defaults(op), **lookup(op).widened(attrs)})
    return Apply(op, args, frozen, _result(op, tuple(a.type for a in args), frozen))


def _result(op: str, types: tuple[TensorType, ...], attrs: Attrs) -> TensorType:
    """The type of an expression. Experts are thousands of the same, so that it is kept."""
    definition, key = lookup(op), (op, types, attrs)
    known = _RESULTS.get(key)
    if known is not None and known[0] is definition:
        return known[1]
    results = definition.infer(types, attrs)
    if len(results) != 1:
        raise TypeMismatch(f"{op} has {len(results)} results; a weight is one tensor")
    if len(_RESULTS) >= KEPT:
        _RESULTS.clear()
    _RESULTS[key] = definition, results[0]
    return results[0]


KEPT = 4096
"""Types of results that are kept."""
_RESULTS: dict[tuple[str, tuple[TensorType, ...], Attrs], tuple[OpDef, TensorType]] = {}


def leaf(key: str, type: TensorType) -> WeightExpr:
    """The tensor called `key` of a source; one in a format is put together from its parts."""
    if type.format is None:
        return Source(key, type)
    parts = (Source(key + suffix, part) for suffix, part in type.parts)
    return scaled(parts, type)


def scaled(parts: Iterable[WeightExpr], type: TensorType) -> Apply:
    """A tensor of a type in a format from its parts."""
    assert type.format is not None
    block, tile = type.format.block, type.format.tile
    if type.format.unsigned:
        codes, columns = type.dtype.value, type.shape[-1]
        return apply("scaled", *parts, block=block, unsigned=codes, columns=columns)
    if tile == 1:
        return apply("scaled", *parts, block=block)
    rows, columns = type.shape[-2:]
    return apply("scaled", *parts, block=block, tile=tile, rows=rows, columns=columns)


def parts(name: str, expr: WeightExpr) -> Iterator[tuple[str, WeightExpr]]:
    """What is stored of a weight, by name: itself; of one in a format its parts."""
    stored = (expr,) if isinstance(expr, Source) or expr.type.format is None else expr.args
    return zip((name + suffix for suffix, _ in expr.type.parts), stored, strict=True)


def sources(expr: WeightExpr) -> Iterator[Source]:
    """The sources that an expression reads, in order."""
    if isinstance(expr, Source):
        yield expr
        return
    for arg in expr.args:
        yield from sources(arg)


def stored_type(expr: WeightExpr) -> TensorType | None:
    """The type in a format of the first part of a weight that is stored in one."""
    if expr.type.format is not None:
        return expr.type
    args = () if isinstance(expr, Source) else expr.args
    return next((t for arg in args if (t := stored_type(arg)) is not None), None)


def kept_in(expr: WeightExpr) -> str:
    """What a weight is kept in: its format, else the element type of its largest source."""
    found = stored_type(expr)
    if found is not None:
        return f"{found.dtype}{found.format}"
    known = [s.type for s in sources(expr) if isinstance(s.type.numel, int)]
    return max(known, key=lambda t: (t.rank, t.numel)).dtype if known else ""


class WeightSource(ABC):
    """Where the tensors of a program lie; `types` are those of all of them, by name."""

    types: Mapping[str, TensorType]

    @property
    def has_values(self) -> bool:
        """Whether it gives values, not types alone."""
        return True

    @abstractmethod
    def load(self, key: str) -> torch.Tensor:
        """The tensor itself, without a copy where the source allows. `KeyError`."""

    def array(self, key: str, rows: slice = slice(None)) -> Array:
        """The array over its memory, or over rows of its leading axis. `KeyError`."""
        found = array_of(self.load(key))
        return found if rows == slice(None) else found[rows]

    def release(self) -> None:
        """Let go of memory that holds nothing but copies of what is on disk."""
        return


class DictSource(WeightSource):
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.types = {key: type_of(tensor) for key, tensor in tensors.items()}

    def load(self, key: str) -> torch.Tensor:
        """The tensor."""
        return self.tensors[key]


@dataclass(frozen=True)
class MetaSource(WeightSource):
    """Types without values: a program that is compiled with no weights."""

    types: Mapping[str, TensorType]

    @property
    def has_values(self) -> bool:
        """Where nothing is asked for, nothing is missing."""
        return not self.types

    def load(self, key: str) -> torch.Tensor:
        """Nothing to load: an error."""
        raise UsageError(
            "this program has no weight values",
            where=key,
            hint="compile it with weights (--weights FOLDER)",
        )


class LayeredSource(WeightSource):
    """Several sources, the first that has a key wins: a checkpoint with constants over it."""

    def __init__(self, layers: Sequence[WeightSource]) -> None:
        self.layers = layers
        self.types = {k: t for layer in reversed(layers) for k, t in layer.types.items()}

    @property
    def has_values(self) -> bool:
        """Whether all layers give values."""
        return all(layer.has_values for layer in self.layers)

    def _layer(self, key: str) -> WeightSource:
        for layer in self.layers:
            if key in layer.types:
                return layer
        raise KeyError(key)

    def load(self, key: str) -> torch.Tensor:
        """The tensor from the first layer that has it."""
        return self._layer(key).load(key)

    def array(self, key: str, rows: slice = slice(None)) -> Array:
        """The array from the first layer that has it."""
        return self._layer(key).array(key, rows)

    def release(self) -> None:
        """Release all layers."""
        for layer in self.layers:
            layer.release()


def source_types(exprs: Iterable[WeightExpr]) -> dict[str, TensorType]:
    """The types of all tensors that some expressions read, by key."""
    return {s.key: s.type for expr in exprs for s in sources(expr)}


def random_source(types: Mapping[str, TensorType], seed: int = 0) -> DictSource:
    """Seeded random tensors of the given types, for verification. Each depends on its key alone."""
    return DictSource({key: random_tensor(t, f"{seed}:{key}") for key, t in types.items()})


def random_tensor(t: TensorType, seed: str, high: int = 2) -> torch.Tensor:
    """A seeded random tensor: floats are normal times 0.5, integers lie in 0..high-1."""
    import zlib

    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    shape = tuple(int(d) for d in t.shape)  # type: ignore[arg-type]
    if t.dtype is DType.f8e8m0:  # powers of two: no sign, no zero
        exponents = torch.randint(-2, 3, shape, generator=generator)
        return torch.exp2(exponents.float()).to(t.dtype.torch)
    if t.dtype.is_float:
        return (torch.randn(shape, generator=generator) * 0.5).to(t.dtype.torch)
    return torch.randint(0, high, shape, generator=generator).to(t.dtype.torch)


def evaluate(expr: WeightExpr, source: WeightSource) -> Any:
    """The value of an expression: a tensor, or `Packed`.

    Raises `TypeMismatch` when a tensor is not of the declared type.
    """
    if isinstance(expr, Source):
        tensor = source.load(expr.key)
        check_tensor(f"source {expr.key}", tensor, expr.type)
        return tensor
    args = [evaluate(a, source) for a in expr.args]
    definition = lookup(expr.op)
    result = definition.run(args, concrete(expr.attrs, {}))
    check_tensor(expr.op, result, expr.type)
    return result


def check_tensor(name: str, tensor: Any, declared: TensorType) -> None:
    """Raise `TypeMismatch` when the type of a tensor is not what is declared."""
    if type_of(tensor) != declared:
        raise TypeMismatch(f"{name} is {type_of(tensor)}, {declared} is declared")
