"""Products with weights in codes, and rows of tables in them.

Products are MatMulNBits, or DequantizeLinear before a MatMul; rows are looked up by
GatherBlockQuantized, or codes and scales are, and multiplied.

The stored parts of a weight (`i8{1x32,f32,unsigned}`) are the initializers, as they lie in the
packed file. In the dialect `standard` each is turned where it is used, so that blocks lie along
axis 0: ONNX Runtime folds that when it loads a model and makes MatMulNBits of all. It does so in a
branch only where all three were turned in it; with one from outside it fails, or leaves it out.

Rows that are taken as codes are so by MatMulNBits itself, which has scales for the columns of a
weight's block at `accuracy_level` 4. In standard operators they are rounded before the product.
Where rows stay numbers a standard model says nothing that ONNX Runtime makes MatMulNBits of: by
default it would be of level 4, and round them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto

from dsc.backends.onnxruntime.graph import GraphWriter, Shape, static
from dsc.ir.dims import product
from dsc.ir.formats import CODINGS
from dsc.ir.graph import Node, Weight
from dsc.ir.types import DType

INT8_ROWS = 4
"""The `accuracy_level` of rows as 8-bit codes."""
PRODUCTS = frozenset({"linear", "experts", "grouped_linear"})
"""What multiplies by weights in codes."""
LOOKUPS = frozenset({"embedding"})
"""What looks up rows of them."""
UNSIGNED = {8: TensorProto.UINT8, 4: TensorProto.UINT4}
"""ONNX's types of codes, by bits."""
LARGEST = CODINGS["i8"].largest


@dataclass(frozen=True)
class Matrix:
    """A weight f32[rows, columns] in codes, or matrix `part` of a stack of them.

    `numbers` is what a matrix stands for, f32[rows, columns in whole blocks], once it is computed.
    """

    weight: Weight
    part: int | None = None
    numbers: str = ""

    @property
    def rows(self) -> int:
        """Columns of the product."""
        return static(self.weight.type.shape[-2])

    @property
    def columns(self) -> int:
        """Columns of the rows that it multiplies."""
        return static(self.weight.type.shape[-1])

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.weight.type.dtype.bits

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        assert self.weight.type.format is not None
        return self.weight.type.format.block[1]

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return -(-self.columns // self.block)

    @property
    def layouts(self) -> tuple[tuple[int, ...], ...]:
        """Codes, scales and zero points as ONNX Runtime's own operators take them: bytes."""
        blob, zeros = self.block * self.bits // 8, -(-self.blocks * self.bits // 8)
        scales = (self.rows, self.blocks)
        return (*scales, blob), scales, (self.rows, zeros)


def takes(node: Node) -> bool:
    """Whether there is a product or a lookup for a node that reads weights in codes.

    Rows that are codes too have scales for the columns of the weights' blocks.
    """
    weights = [x for x in node.operands if x.type.format is not None]
    if node.op not in PRODUCTS | LOOKUPS or not all(map(is_coded, weights)):
        return False
    blocks = {w.type.format.block[1] for w in weights if w.type.format is not None}
    asked = node.attrs.get("activations")
    return not asked or {asked} == {f"i8:{block}" for block in blocks}


def is_coded(weight: object) -> bool:
    """Whether an operand is a weight in codes that these read."""
    if not isinstance(weight, Weight) or weight.type.format is None:
        return False
    return weight.type.format.unsigned and weight.type.format.scales is DType.f32


def times(
    g: GraphWriter, x: str, shape: Shape, matrix: Matrix, bias: str = "", activations: str = ""
) -> str:
    """x [*n, columns] in fp32 times the transpose of the matrix, plus bias [rows]."""
    if matrix.numbers or not g.has("MatMulNBits"):
        return _in_standard(g, x, shape, matrix, bias, activations)
    parts = [*_parts(g, matrix, matrix.layouts), ""][:3]
    given = [*parts, "", bias] if bias else parts
    while not given[-1]:
        given.pop()
    return g.contrib(
        "MatMulNBits",
        x,
        *given,
        K=matrix.columns,
        N=matrix.rows,
        bits=matrix.bits,
        block_size=matrix.block,
        accuracy_level=INT8_ROWS if activations else 0,
    )


def _in_standard(
    g: GraphWriter, x: str, shape: Shape, matrix: Matrix, bias: str, activations: str
) -> str:
    """The same by DequantizeLinear and MatMul."""
    filled = matrix.blocks * matrix.block
    if filled != matrix.columns:
        ends = g.i64(*[0] * (2 * len(shape) - 1), filled - matrix.columns)
        x, shape = g.op("Pad", x, ends, g.scalar(0.0)), (*shape[:-1], filled)
    if activations:
        x = rounded(g, x, shape, matrix.block)
    elif not matrix.numbers:
        matrix = replace(matrix, numbers=_row_by_row(g, matrix))
    if matrix.numbers and len(shape) == 2:
        return g.op("Gemm", x, matrix.numbers, *((bias,) if bias else ()), transB=1)
    turned = g.here("Transpose", matrix.numbers, perm=[1, 0]) if matrix.numbers else ""
    y = g.op("MatMul", x, turned or dequantised(g, matrix))
    return g.op("Add", y, bias) if bias else y


def rounded(g: GraphWriter, x: str, shape: Shape, block: int) -> str:
    """Rows as what 8-bit codes say of each block of columns; they are whole blocks."""
    parted = (*shape[:-1], static(shape[-1]) // block, block)
    apart = g.reshape(x, shape, parted)
    most = g.op("ReduceMax", g.op("Abs", apart), g.i64(-1), keepdims=1)
    scale = g.op("Div", most, g.scalar(LARGEST))
    scale = g.op("Where", g.op("Equal", scale, g.scalar(0.0)), g.scalar(1.0), scale)
    near = g.op("Mul", g.op("Round", g.op("Div", apart, scale)), scale)
    return g.reshape(near, parted, shape)


def looked_up(g: GraphWriter, ids: str, shape: Shape, table: Matrix) -> str:
    """Rows of a table, f32[*shape, columns]; of what is stored no others are read.

    GatherBlockQuantized keeps zero points in another order than MatMulNBits.
    """
    if g.has("GatherBlockQuantized") and len(table.weight.type.parts) == 2:
        codes, scales = _parts(g, table, table.layouts)
        how = {"bits": table.bits, "block_size": table.block, "gather_axis": 0, "quantize_axis": 2}
        each = g.here("Unsqueeze", scales, g.i64(2))
        rows, given = g.contrib("GatherBlockQuantized", codes, ids, each, **how), shape
    else:
        rows, given = _multiplied(g, g.op("Reshape", ids, g.i64(-1)), table), (product(shape),)
    filled = table.blocks * table.block
    rows = g.reshape(rows, (*given, table.blocks, table.block), (*shape, filled))
    if filled == table.columns:
        return rows
    return g.op("Slice", rows, g.i64(0), g.i64(table.columns), g.i64(-1))


def _multiplied(g: GraphWriter, ids: str, table: Matrix) -> str:
    """Rows of a table, f32[n, blocks, columns of a block], of ids [n]."""
    found = []
    own = tuple(tuple(map(static, part.shape)) for _, part in table.weight.type.parts)
    layouts = table.layouts if g.has("MatMulNBits") else own
    for (suffix, _), name in zip(table.weight.type.parts, _parts(g, table, layouts), strict=True):
        one = g.op("Gather", name, ids, axis=0)
        if suffix == ".scale":
            found.append(g.op("Unsqueeze", one, g.i64(2)))
            continue
        width = table.blocks if suffix else table.blocks * table.block
        flat = g.op("Reshape", one, g.i64(0, -1))
        apart = _nibbles(g, flat, width) if table.bits < 8 else flat
        wide = g.op("Cast", apart, to=TensorProto.FLOAT)
        found.append(g.op("Reshape", wide, g.i64(0, table.blocks, -1)))
    codes, scale, *zero = found
    least = zero[0] if zero else g.scalar(float(1 << table.bits - 1))
    return g.op("Mul", g.op("Sub", codes, least), scale)


def gathered(g: GraphWriter, stack: Weight, group: str) -> Matrix:
    """A matrix of a stack whose place there is only known when the model runs."""
    matrix, numbers = Matrix(stack), []
    widths = (matrix.blocks * matrix.block, matrix.blocks, matrix.blocks)
    for (suffix, part), width in zip(stack.type.parts, widths, strict=False):
        shape = tuple(map(static, part.shape))
        one = g.op("Gather", g.stored(stack, suffix, part, shape), group, axis=0)
        apart = suffix != ".scale" and matrix.bits < 8
        numbers.append(_nibbles(g, one, width) if apart else one)
    codes, scale, *zero = numbers
    zero = zero or [g.transpose(_middle(g, matrix, UNSIGNED[8]), 1, 0)]
    wide = g.op("DequantizeLinear", codes, scale, *zero, axis=1, block_size=matrix.block)
    return replace(matrix, numbers=wide)


def dequantised(g: GraphWriter, matrix: Matrix) -> str:
    """The numbers of a matrix, f32[columns, rows], the columns filled up to whole blocks."""
    kind = UNSIGNED[matrix.bits]
    filled = matrix.blocks * matrix.block
    scales = (matrix.rows, matrix.blocks)
    layouts = ((matrix.rows, filled), scales, scales)
    codes, scale, *zero = _parts(g, matrix, layouts, kind)
    turned = [g.here("Transpose", x, perm=[1, 0]) for x in (codes, scale, *zero)]
    if not zero:
        turned.append(_middle(g, matrix, kind))
    return g.op("DequantizeLinear", *turned, axis=0, block_size=matrix.block)


def _row_by_row(g: GraphWriter, matrix: Matrix) -> str:
    """The same as f32[rows, columns], of which ONNX Runtime makes no MatMulNBits."""
    kind = UNSIGNED[matrix.bits]
    filled = matrix.blocks * matrix.block
    scales = (matrix.rows, matrix.blocks)
    codes, scale, *zero = _parts(g, matrix, ((matrix.rows, filled), scales, scales), kind)
    zero = zero or [g.here("Transpose", _middle(g, matrix, kind), perm=[1, 0])]
    return g.here("DequantizeLinear", codes, scale, *zero, axis=1, block_size=matrix.block)


def _middle(g: GraphWriter, matrix: Matrix, kind: int) -> str:
    """The zero point of every block where there are none of its own, [blocks, rows]."""
    middle = np.array([1 << matrix.bits - 1], np.uint8)
    every = g.here("Expand", g.constant(middle), g.i64(matrix.blocks, matrix.rows))
    return every if kind == UNSIGNED[8] else g.here("Cast", every, to=kind)


def _parts(
    g: GraphWriter, matrix: Matrix, layouts: Sequence[tuple[int, ...]], kind: int | None = None
) -> list[str]:
    """What is stored of a matrix, as initializers of these shapes; codes are of ONNX type `kind`.

    Zero points of 4 bits fill up a byte at the end of each row, which ONNX's own type does not: of
    an odd number of blocks they are taken apart. So is all of a table whose rows are looked up too:
    Gather takes no 4-bit type.
    """
    found = []
    tied = matrix.weight.name in g.pool.tables
    for (suffix, part), layout in zip(matrix.weight.type.parts, layouts, strict=False):
        is_scale = suffix == ".scale"
        stored = None if is_scale else kind
        odd = stored == TensorProto.UINT4 and (tied or part.shape[-1] * 2 != layout[-1])
        width = layout[-1]
        if odd:
            stored, layout = None, (layout[0], static(part.shape[-1]))
        name = g.stored(matrix.weight, suffix, part, layout, matrix.part, stored)
        if odd:
            name = g.here("Cast", _nibbles(g, name, width), to=TensorProto.UINT4)
        found.append(name)
    return found


def _nibbles(g: GraphWriter, packed: str, width: int) -> str:
    """The first `width` 4-bit numbers of each row of bytes, u8[rows, width]."""
    low = g.here("BitwiseAnd", packed, g.constant(np.array(15, np.uint8)))
    high = g.here("BitShift", packed, g.constant(np.array(4, np.uint8)), direction="RIGHT")
    pairs = g.here("Concat", *(g.here("Unsqueeze", x, g.i64(2)) for x in (low, high)), axis=2)
    flat = g.here("Reshape", pairs, g.i64(0, -1))
    return g.here("Slice", flat, g.i64(0), g.i64(width), g.i64(1))
