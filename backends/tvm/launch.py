"""A call of a kernel: what it is specialised to, what it is told at run time, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from dsc.ir.dims import Dim, product
from dsc.ir.graph import Node, Operand
from dsc.ir.kernels import Cpp
from dsc.ir.types import DType, TensorType


@dataclass(frozen=True, slots=True)
class Launch:
    """How to run a node.

    `maker(*static)` builds the kernel; launches with equal `key` share one, so compile time does
    not grow with the number of layers. The kernel's arguments are the addresses of the node's
    present operands and its results, the address of `scratch` bytes when there are any, then
    `sizes`. `flops` are what the work costs at least. `sources` are C++ that the kernel calls.
    `title` is what listings call the kernel, if not by its maker.
    """

    maker: Callable[..., Any]
    static: tuple[Hashable, ...]
    sizes: tuple[Dim, ...] = ()
    scratch: Dim = 0
    flops: Dim = 0
    sources: tuple[Cpp, ...] = ()
    title: str = ""

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What identifies the kernel."""
        return (self.maker.__module__, self.maker.__qualname__, *self.static)

    @property
    def name(self) -> str:
        """The kernel's name in listings."""
        return self.title or self.maker.__name__


def rows_of(type: TensorType, trailing: int = 1) -> Dim:
    """The number of rows when the last `trailing` axes are a row."""
    return product(type.shape[: type.rank - trailing])


def static_dim(dim: Dim, what: str) -> int:
    """`dim` as an integer. Raises `Unsupported` when it is symbolic."""
    if not isinstance(dim, int):
        raise Unsupported(f"{what} is {dim}; this kernel needs a fixed size")
    return dim


def operand(node: Node, index: int) -> Operand:
    """Operand `index` of a node that must have it."""
    found = node.inputs[index]
    if found is None:
        raise Unsupported(f"operand {index} is missing")
    return found


def fp32_only(node: Node) -> None:
    """Raise `Unsupported` unless all floats of a node are computed with in fp32."""
    plain = [x.type.dtype for x in (*node.operands, *node.outputs) if x.type.format is None]
    floats = {dtype for dtype in plain if not dtype.is_int}
    if node.operands[0].type.dtype.is_int or not floats <= {DType.f32, DType.bf16, DType.f16}:
        raise Unsupported(f"{node.op} of {node.operands[0].type.dtype}; f32, bf16 and f16 have it")


class Unsupported(Exception):
    """A node has no kernel; the message is the reason."""
