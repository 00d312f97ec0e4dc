"""Types of values: an element type and a shape whose dims are integers or symbolic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dsc.ir.dims import MAX_DIM, Dim, Sym, free_symbols, product, substitute
from dsc.ir.formats import CODINGS, Format, is_whole
from dsc.ir.lazy import torch

if TYPE_CHECKING:
    import numpy as np
    from torch import dtype as TorchType

MAX_RANK = 8


class DType(StrEnum):
    """An element type; its value is its name in the text form."""

    f32 = "f32"
    f64 = "f64"
    bf16 = "bf16"
    f16 = "f16"
    f8e4m3 = "f8e4m3"
    f8e4m3fnuz = "f8e4m3fnuz"
    f8e5m2 = "f8e5m2"
    f8e8m0 = "f8e8m0"
    i64 = "i64"
    i32 = "i32"
    i16 = "i16"
    i8 = "i8"
    u8 = "u8"
    i4 = "i4"
    boolean = "bool"

    @property
    def bits(self) -> int:
        """Bits an element takes in memory."""
        return _BITS[self]

    @property
    def itemsize(self) -> int:
        """Bytes an element takes; i4 is packed two a byte and has no such number."""
        if self.bits % 8:
            raise ValueError(f"{self} elements are packed below a byte")
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        """Whether elements are floating-point numbers."""
        return self.value[0] in "fb" and self is not DType.boolean

    @property
    def is_int(self) -> bool:
        """Whether elements are integers (bool is not)."""
        return self.value[0] in "iu"

    @property
    def torch(self) -> TorchType:
        """The torch dtype of the same name. `KeyError` for i4, which has none."""
        return getattr(torch, _NAMES[self])  # type: ignore[no-any-return]

    @property
    def numpy(self) -> np.dtype[Any]:
        """NumPy's dtype, or that of ml_dtypes where NumPy has none. `KeyError` for i4."""
        return _numpy_type(_NAMES[self])

    @staticmethod
    def of(dtype: TorchType | np.dtype[Any]) -> DType:
        """The element type of a torch or NumPy dtype. `KeyError` when the IR has none."""
        name = str(dtype).removeprefix("torch.")
        for member, known in _NAMES.items():
            if known == name:
                return member
        raise KeyError(f"the IR has no element type for {dtype}")


_BITS = {
    DType.f32: 32, DType.f64: 64, DType.bf16: 16, DType.f16: 16, DType.f8e4m3: 8,
    DType.f8e4m3fnuz: 8, DType.f8e5m2: 8, DType.f8e8m0: 8, DType.i64: 64, DType.i32: 32,
    DType.i16: 16, DType.i8: 8, DType.u8: 8, DType.i4: 4, DType.boolean: 8,
}  # fmt: skip


SAFETENSORS: Mapping[str, DType] = MappingProxyType({
    "BOOL": DType.boolean, "U8": DType.u8, "I16": DType.i16, "I8": DType.i8, "I32": DType.i32,
    "I64": DType.i64, "F8_E4M3": DType.f8e4m3, "F8_E4M3FNUZ": DType.f8e4m3fnuz,
    "F8_E5M2": DType.f8e5m2, "F8_E8M0": DType.f8e8m0, "F16": DType.f16, "BF16": DType.bf16,
    "F32": DType.f32, "F64": DType.f64,
})  # fmt: skip
"""Element types by their name in a safetensors header."""


_NAMES = {
    DType.f32: "float32", DType.f64: "float64", DType.bf16: "bfloat16", DType.f16: "float16",
    DType.f8e4m3: "float8_e4m3fn", DType.f8e4m3fnuz: "float8_e4m3fnuz",
    DType.f8e5m2: "float8_e5m2", DType.f8e8m0: "float8_e8m0fnu", DType.i64: "int64",
    DType.i32: "int32", DType.i16: "int16", DType.i8: "int8", DType.u8: "uint8",
    DType.boolean: "bool",
}  # fmt: skip
"""What torch, NumPy and ml_dtypes call them."""


@cache
def _numpy_type(name: str) -> np.dtype[Any]:
    import numpy as np

    if hasattr(np, name):
        return np.dtype(name)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
PRECISIONS: Mapping[str, DType] = MappingProxyType(
    {"fp32": DType.f32, "bf16": DType.bf16, "fp16": DType.f16}
)
"""Element types that a model may be computed in, as options and reports call them."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of a value: `bf16[B,S,7168]`; a scalar is `f32[]`.

    In a stored format (`dsc.ir.formats`), `f8e4m3{128x128,f32}[N,K]`, the element type is that of
    the codes; a row alone has blocks of one row. Only operands that an operator declares so take
    one.
    """

    dtype: DType
    shape: tuple[Dim, ...]
    format: Format | None = None

    def __post_init__(self) -> None:
        if len(self.shape) > MAX_RANK:
            raise ValueError(f"rank {len(self.shape)} is above the limit of {MAX_RANK}")
        if self.format is not None:
            alone = self.format.block[0] == 1 and self.format.step == 0
            least = 1 if alone else 2
            if self.dtype not in CODINGS or self.rank < least:
                raise ValueError(f"no stored format of {self.dtype} codes along {self.rank} axes")
            if self.format.unsigned and self.dtype.is_float:
                raise ValueError(f"unsigned codes in {self.dtype}")
            together = CODINGS[self.dtype].together
            if not is_whole(self.shape[-1], together):
                told = f"rows of {self.shape[-1]}; {together} codes of {self.dtype} share a byte"
                raise ValueError(told)
        for dim in self.shape:
            if isinstance(dim, int) and not 0 <= dim <= MAX_DIM:
                raise ValueError(f"a dimension of {dim}")

    def __str__(self) -> str:
        return f"{self.spelled}[{','.join(str(d) for d in self.shape)}]"

    @property
    def spelled(self) -> str:
        """What its elements are, with the stored format: `f8e4m3{128x128,f32}`."""
        return f"{self.dtype}{self.format or ''}"

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def numel(self) -> Dim:
        """Number of elements."""
        return product(self.shape)

    @property
    def parts(self) -> tuple[tuple[str, TensorType], ...]:
        """What is stored of a tensor of this type, by what its name ends in: without a format it.

        Of one in a format they are in the order of `Format.parts`.
        """
        if self.format is None:
            return (("", self),)
        parts = self.format.parts(self.dtype)
        return tuple((p.suffix, TensorType(p.dtype, p.shape(self.shape))) for p in parts)

    @property
    def stored(self) -> TensorType:
        """What a tensor of this type is in memory where that is one tensor."""
        behind = self.format is not None and self.format.behind
        return self.parts[0][1] if behind else self

    def bytes_of(self, elements: Dim) -> Dim:
        """Bytes of some of the elements, with the share that they have of scales."""
        if self.format is None:
            return elements * self.dtype.itemsize
        block = self.with_shape(self.shape[-1 if self.format.behind else -2 :])
        return elements * block.nbytes // block.numel

    @property
    def nbytes(self) -> Dim:
        """Bytes of a dense tensor of this type."""
        if self.format is not None:
            return sum((part.nbytes for _, part in self.parts), start=0)
        bits = self.numel * self.dtype.bits
        return (bits + 7) // 8 if self.dtype.bits < 8 else self.numel * self.dtype.itemsize

    @property
    def is_static(self) -> bool:
        """Whether every dim is an integer."""
        return not any(isinstance(d, Sym) for d in self.shape)

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols in the shape."""
        return frozenset().union(*(free_symbols(d) for d in self.shape))

    def with_shape(self, shape: tuple[Dim, ...]) -> TensorType:
        """The same element type, and format, with another shape."""
        return TensorType(self.dtype, shape, self.format)

    def with_dtype(self, dtype: DType) -> TensorType:
        """The same shape with another element type, in no format."""
        return TensorType(dtype, self.shape)

    def substitute(self, env: Mapping[str, Dim]) -> TensorType:
        """The type with symbols replaced."""
        if not self.symbols:
            return self
        return self.with_shape(tuple(substitute(d, env) for d in self.shape))
