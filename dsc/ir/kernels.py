"""Kernels that an operator's declaration brings along, for operators from outside of this tree.

A backend has kernels for the operators that dsc declares; what `dsc.register_op` adds says itself
how backends run it: `kernels={"tvm": Formula(...), "triton": "tl.sqrt({0})"}`. A backend that finds
nothing under its name refuses the operator, as it does any that it has no kernel for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc.ir.types import DType


@dataclass(frozen=True)
class Formula:
    """A pointwise operator on register values: `function(*operands, **attributes)`.

    On tvm, values are TIR expressions of any number of lanes, in fp32 where elements are 16-bit
    floats. Such an operator joins regions like those of dsc. It is refused for integers unless
    `floats_only` is false.
    """

    function: Callable[..., Any]
    floats_only: bool = True


@dataclass(frozen=True)
class Lowering:
    """The backend's own way to lower a node: what its table of operators would hold.

    On tvm `function(node, machine)` gives a `Launch`; on triton `function(context, node)` appends
    launches; on onnxruntime `function(writer, node, *operands)` gives names of results.
    """

    function: Callable[..., Any]


@dataclass(frozen=True)
class Cpp:
    """C++ source of a kernel, compiled by the system's compiler when a program is.

        extern "C" void function(const T *operand, ..., T *result, ..., int64_t or double size, ...)

    Operands and results are dense and in the order of the signature, absent operands left out;
    `sizes` are letters of the signature whose extents follow, of a starred one the product, and all
    its attributes, which must be numbers: an `int64_t` each, a `double` each `float`. Element types
    are those of the signature, and those that `T` stands for are in `dtypes`.
    """

    source: str
    function: str
    sizes: tuple[str, ...] = ()
    dtypes: frozenset[DType] = frozenset({DType.f32})


@dataclass(frozen=True)
class Triton:
    """Source of a Triton kernel: a module's text, in which `function` is `@triton.jit`.

        def function(operand, ..., result, ..., size, ..., BLOCK: tl.constexpr, ...)

    Operands, results and `sizes` are as for `Cpp`; attributes of any kind are compile-time
    constants. One program runs for each element of `grid`,
    extents of up to three letters. `blocks` gives compile-time parameters by name, each the next
    power of two of a letter's extent, which must then be fixed.
    """

    source: str
    function: str
    sizes: tuple[str, ...] = ()
    grid: tuple[str, ...] = ()
    blocks: Mapping[str, str] = field(default_factory=dict)
