"""Arrays: inside they are NumPy's, whatever a caller has; what comes back is of the caller's kind.

Who gives a torch tensor has imported torch, so nothing here imports it before that. bf16 and the
8-bit floats, which NumPy lacks, are arrays of ml_dtypes' types; a tensor and its array are one
memory.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dsc.ir.lazy import torch
from dsc.ir.types import DType

Array: TypeAlias = NDArray[Any]
Kind: TypeAlias = Literal["numpy", "torch"]
ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vectors."""
FEW = 64
"""Values that are looked at one by one: for so few that takes less than an array operation."""


def is_tensor(x: object) -> bool:
    """Whether something is a torch tensor."""
    return isinstance(x, getattr(sys.modules.get("torch"), "Tensor", ()))


def array_of(x: Any) -> Array:
    """The array over the memory of a tensor, or of what speaks DLPack or the array interface.

    Lists become new arrays. Raises what their kind raises, such as `TypeError` for what has no
    values, or has them on another device.
    """
    if isinstance(x, np.ndarray):
        return x
    if is_tensor(x):
        return _of_tensor(x.detach())
    return np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)


def _of_tensor(x: torch.Tensor) -> Array:
    dtype = DType.of(x.dtype)
    if dtype.numpy.isbuiltin == 1:
        return x.numpy()
    return x.view(_bits(dtype.numpy).torch).numpy().view(dtype.numpy)


def tensor_of(x: Array) -> torch.Tensor:
    """The torch tensor over an array's memory, which may be a file's: writing to that faults."""
    if not x.flags.writeable:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return _over(x)
    return _over(x)


def _over(x: Array) -> torch.Tensor:
    if x.dtype.isbuiltin == 1:
        return torch.from_numpy(x)
    return torch.from_numpy(x.view(_bits(x.dtype).numpy)).view(DType.of(x.dtype).torch)


def _bits(dtype: np.dtype[Any]) -> DType:
    """The integers as wide as the elements of a type that only one of the two knows."""
    return DType.i16 if dtype.itemsize == 2 else DType.i8


def of_kind(x: Array, kind: Kind) -> Any:
    """An array as a caller's kind, over the same memory."""
    return tensor_of(x) if kind == "torch" else x


def empty(shape: Sequence[int], dtype: DType) -> Array:
    """An array on a boundary of `ALIGNMENT` bytes, with any values."""
    return _placed(np.empty, shape, dtype)


def zeros(shape: Sequence[int], dtype: DType) -> Array:
    """Zeros on such a boundary, in memory that the system gives when it is written."""
    return _placed(np.zeros, shape, dtype)


def _placed(make: Any, shape: Sequence[int], dtype: DType) -> Array:
    size = math.prod(shape) * dtype.itemsize
    raw: Array = make(size + ALIGNMENT, np.uint8)
    start = -address(raw) % ALIGNMENT
    return raw[start : start + size].view(dtype.numpy).reshape(shape)


def address(x: Array) -> int:
    """Where an array lies; `x.ctypes.data` makes three objects to say so."""
    return int(x.__array_interface__["data"][0])


def extremes(values: Array) -> tuple[int, int]:
    """The least and the largest of one integer or more."""
    if values.size > FEW:
        return int(values.min()), int(values.max())
    listed = values.reshape(-1).tolist()
    return min(listed), max(listed)
