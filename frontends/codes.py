"""Codes of quantised weights, as checkpoints store them and as formats do.

A weight `X.weight` of `[N, K]` becomes codes, scales and zero points in the layout of
`dsc.ir.formats`, rearranged bit for bit by weight operators: nothing is dequantised to be quantised
again. With b bits a code and g columns a group it is stored as

* FP8 and int8: `X.weight` in `[N, K]` beside `X.weight_scale` or `X.weight_scale_inv`, which
  multiply both, and for asymmetric integers `X.weight_zero_point`, one a scale;
* compressed-tensors, packed: `X.weight_packed` in words of 32 bits along K, the first code lowest,
  each as how far it lies above the least; `X.weight_scale` `[N, K/g]`, `X.weight_shape`, and
  `X.weight_zero_point` packed alike, but along N;
* GPTQ: `X.qweight` `[K*b/32, N]`, packed along K, `X.scales` `[K/g, N]`, and `X.qzeros`, packed
  along N and in its first form one less than they are; `X.g_idx` says each column's group;
* AWQ: `X.qweight` `[K, N/8]` and `X.qzeros` `[K/g, N/8]`, packed along N, eight columns a word in
  the order 0 2 4 6 1 3 5 7; `X.scales` `[K/g, N]`.

Columns that an index puts into groups out of order have a scale each: what they stand for is exact,
and is packed dequantised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from dsc.frontends.checked import Holds
from dsc.frontends.quantisation import IntegerWeights, QuantizationConfig
from dsc.ir.dims import Dim
from dsc.ir.formats import WHOLE, grid
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Source, WeightExpr, WeightSource, apply

SCALE, ZERO, PACKED, SHAPE, INDEX = "_scale", "_zero_point", "_packed", "_shape", "_g_idx"
"""Behind the name of a weight."""
SCALE_SUFFIXES = ("_scale_inv", SCALE)
WORDS = ("qweight", "qzeros", "scales", "g_idx")
"""Behind the name of a module, where GPTQ and AWQ store its weight."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WORD = 32
SCALES = (DType.f16, DType.bf16, DType.f32)
"""Element types of scales beside integers, which stay as they are."""
FLOATS = tuple(dtype for dtype in DType if dtype.is_float)
Block = tuple[int, int]
Shape = tuple[Dim, ...]


class Unfit(Exception):
    """A tensor that is not what a weight is stored in, or is `missing`."""

    def __init__(self, key: str, why: str, missing: bool = False) -> None:
        super().__init__(key, why)
        self.key, self.why, self.missing = key, why, missing


@dataclass
class CodesReader:
    """Gives weights that are stored as codes their expressions.

    `checks`: what must hold of values that are read (`checked.py`), by key, filled on the way.
    """

    source: WeightSource
    quantization: QuantizationConfig | None
    checks: dict[str, Holds | None] = field(default_factory=dict)

    def names(self, key: str) -> set[str]:
        """The tensors that the weight `key` is stored in, or would be."""
        if self._is_packed(key):
            return {key + end for end in (PACKED, SCALE, ZERO, SHAPE, INDEX)}
        if self._in_words(key):
            stem = key.removesuffix("weight")
            return {stem + end for end in WORDS}
        ends = (*SCALE_SUFFIXES, ZERO) if self._kind(key) is DType.i8 else SCALE_SUFFIXES
        return {key, *(key + end for end in ends)}

    def weight_of(self, key: str) -> str:
        """The weight that a stored tensor is a part of; of all others the tensor itself."""
        if self.quantization is None:
            return key
        for end in (*WORDS, PACKED, INDEX, SHAPE, ZERO, *SCALE_SUFFIXES):
            stem = key.removesuffix(end)
            if stem == key or stem.endswith("input"):
                continue
            weight = stem + "weight" if end in WORDS else stem
            if key in self.names(weight) and (weight in self.source.types or self._is_part(weight)):
                return weight
        return key

    def _is_part(self, weight: str) -> bool:
        """Whether parts of a weight, of which the codes may be lost, are named after it."""
        return self._is_packed(weight) or self._in_words(weight) or weight.endswith(".weight")

    def is_stored(self, key: str) -> bool:
        """Whether the weight `key` is there in codes."""
        integers = self.quantization is not None and bool(self.quantization.integers)
        return (
            self._is_packed(key) or self._in_words(key) or self._kind(key) is DType.f8e4m3
            or (self._kind(key) is DType.i8 and integers)
        )  # fmt: skip

    def weight(self, key: str, declared: TensorType) -> WeightExpr:
        """The numbers of a weight. Raises `Unfit`."""
        told = self.quantization
        if told is None:
            found = self.source.types[key]
            raise Unfit(key, f": {found}, but config.json has no quantization_config")
        if self._is_packed(key):
            stored = _first_that_fits(
                [partial(self._packed, key, declared.shape, s) for s in told.integers],
                Unfit(key + PACKED, ": quantization_config says nothing of integers"),
            )
        elif self._in_words(key):
            stem = key.removesuffix("weight")
            stored = self._words(stem, declared.shape, told.integers[0], told)
        else:
            stored = self._plain(key, declared, told)
        return apply("dequantize", stored, dtype=declared.dtype)

    def _kind(self, key: str) -> DType | None:
        return self.source.types[key].dtype if key in self.source.types else None

    def _is_packed(self, key: str) -> bool:
        """Whether a weight is packed by compressed-tensors, or lacks no more than its codes."""
        there = self.source.types
        alone = key not in there and key + SCALE in there
        return self._method() == "compressed-tensors" and (key + PACKED in there or alone)

    def _in_words(self, key: str) -> bool:
        """Whether a weight is stored by GPTQ or AWQ, or lacks no more than its codes."""
        there, stem = self.source.types, key.removesuffix("weight")
        found = stem + "qweight" in there or (key not in there and stem + "scales" in there)
        return key.endswith(".weight") and self._method() in ("gptq", "awq") and found

    def _method(self) -> str:
        return self.quantization.quant_method if self.quantization is not None else ""

    # --- what is stored in `[N, K]` --------------------------------------------------------------

    def _plain(self, key: str, declared: TensorType, told: QuantizationConfig) -> WeightExpr:
        """FP8 or int8, a matrix or stacked `[E, N, K]`, each with its own scales."""
        found = self.source.types[key]
        if found.shape != declared.shape:
            raise Unfit(key, f": expected {declared}, found {found}")
        if found.rank not in (2, 3):
            raise Unfit(key, f": {found}, codes are read of matrices and stacked ones")
        scale = next((key + s for s in SCALE_SUFFIXES if key + s in self.source.types), None)
        if scale is None:
            end = SCALE_SUFFIXES[told.quant_method not in ("fp8", "blockwise_int8")]
            raise Unfit(key + end, f" (the scales of {key})", missing=True)
        if found.dtype is DType.f8e4m3:
            blocks = [*([told.block] if told.block else ()), (1, WHOLE), (WHOLE, WHOLE)]
            scales, block = self._scales_of(scale, found, blocks)
            if scales.type.dtype is not DType.f32:
                scales = apply("cast", scales, dtype=DType.f32)
            self.checks.setdefault(key)
            return apply("scaled", Source(key, found), scales, block=block)

        def in_scheme(scheme: IntegerWeights) -> WeightExpr:
            blocks = [_block(scheme, scale, found.shape[-1])]
            scales, block = self._scales_of(scale, found, blocks, SCALES)
            zeros = [self._leaf(key + ZERO, DType.i8, scales.type.shape)] if (
                key + ZERO in self.source.types or not scheme.symmetric
            ) else []  # fmt: skip
            return apply("scaled", Source(key, found), scales, *zeros, block=block)

        readers = [partial(in_scheme, scheme) for scheme in told.integers]
        return _first_that_fits(readers, Unfit(key, ": no integers are announced"))

    def _scales_of(
        self,
        key: str,
        weight: TensorType,
        blocks: Sequence[Block],
        kinds: Sequence[DType] = FLOATS,
    ) -> tuple[WeightExpr, Block]:
        """The scales of a weight in one of these blocks, and which; ones may be left out."""
        found = self._present(key)
        told = _without_ones(found.shape)
        block = next((b for b in blocks if _without_ones(grid(weight.shape, b)) == told), None)
        if block is None or found.dtype not in kinds:
            wanted = TensorType(DType.f32, grid(weight.shape, blocks[0]))
            raise Unfit(key, f": expected {wanted} for {weight} in {_words_of(blocks[0])}, "
                        f"found {found}")  # fmt: skip
        self.checks.setdefault(key)
        scales: WeightExpr = Source(key, found)
        shape = grid(weight.shape, block)
        return (scales if found.shape == shape else apply("reshape", scales, shape=shape)), block

    # --- compressed-tensors ----------------------------------------------------------------------

    def _packed(self, key: str, shape: Shape, scheme: IntegerWeights) -> WeightExpr:
        rows, columns = _matrix(key + PACKED, shape)
        bits, block = scheme.bits, _block(scheme, key + SCALE, columns)
        if columns * bits % 8:
            raise Unfit(key + PACKED, f": rows of {columns} codes, of which two share a byte")
        words = self._leaf(key + PACKED, DType.i32, (rows, -(-columns * bits // WORD)))
        whole = TensorType(DType.f32, (rows, columns))
        scales, block = self._scales_of(key + SCALE, whole, [block], SCALES)
        if key + SHAPE in self.source.types:
            meaning = f"it does not hold {rows}, {columns}, the shape of the weight"
            self._check_integers(key + SHAPE, (2,))
            self.checks[key + PACKED] = Holds(key + SHAPE, (rows, columns), meaning)
        codes: WeightExpr = apply("word_bytes", words)
        width = columns * bits // 8
        if codes.type.shape[-1] != width:
            codes = apply("slice", codes, axis=1, start=0, end=width)
        zeros = [] if scheme.symmetric and key + ZERO not in self.source.types else [
            self._packed_zeros(key + ZERO, scales.type.shape, bits)
        ]  # fmt: skip
        index = key + INDEX if scheme.ordered or key + INDEX in self.source.types else None
        return self._grouped(codes, bits, [scales, *zeros], block, index)

    def _packed_zeros(self, key: str, shape: Shape, bits: int) -> WeightExpr:
        """Zero points, packed along N, or as they are."""
        found = self._present(key)
        if found.dtype is DType.i8 and _without_ones(found.shape) == _without_ones(shape):
            return apply("reshape", Source(key, found), shape=shape)
        rows, *others = shape
        assert isinstance(rows, int)
        words = self._leaf(key, DType.i32, (-(-rows * bits // WORD), *others))
        apart = apply("bit_fields", words, order=_in_order(bits))
        if apart.type.shape[0] != rows:
            apart = apply("slice", apart, axis=0, start=0, end=rows)
        return apply("centre", apart, bits=bits)

    # --- GPTQ and AWQ ----------------------------------------------------------------------------

    def _words(
        self, stem: str, shape: Shape, scheme: IntegerWeights, told: QuantizationConfig
    ) -> WeightExpr:
        rows, columns = _matrix(stem + "qweight", shape)
        bits, block = scheme.bits, _block(scheme, stem + "scales", columns)
        a_word = WORD // bits
        along = (rows,) if told.quant_method == "awq" else (rows, columns)
        if any(extent % a_word for extent in along) or columns * bits % 8:
            raise Unfit(
                stem + "qweight", f": {rows} x {columns} codes of {bits} bits fill no words"
            )
        counts = (columns // block[1] if block[1] else 1, rows)
        if told.quant_method == "awq":
            order: tuple[int, ...] = AWQ_ORDER
            words = self._leaf(stem + "qweight", DType.i32, (columns, rows // a_word))
            codes = apply("join_nibbles", apply("bit_fields", _turned(words), order=order))
        else:
            order = _in_order(bits)
            words = self._leaf(stem + "qweight", DType.i32, (columns // a_word, rows))
            codes = apply("word_bytes", _turned(words))
        scales = self._leaf(stem + "scales", None, counts)
        zeros = self._leaf(stem + "qzeros", DType.i32, (counts[0], rows // a_word))
        shared: list[WeightExpr] = [_turned(scales)]
        self.checks.setdefault(stem + "scales")
        if scheme.symmetric:
            middle = (1 << bits - 1) - told.stored_zero
            meaning = (
                f"a zero point is not stored as {middle}, the middle, though quantization_config "
                "says sym: either that is wrong, or checkpoint_format is"
            )
            word = sum(middle << bits * place for place in range(a_word))
            signed = word - (1 << WORD) if word >> WORD - 1 else word
            self.checks[stem + "scales"] = Holds(stem + "qzeros", (signed,), meaning)
        else:
            apart = apply("bit_fields", _turned(zeros), order=order)
            shared.append(apply("centre", apart, bits=bits, add=told.stored_zero))
        index = stem + "g_idx" if scheme.ordered or stem + "g_idx" in self.source.types else None
        return self._grouped(codes, bits, shared, block, index)

    # --- what they share -------------------------------------------------------------------------

    def _grouped(
        self,
        codes: WeightExpr,
        bits: int,
        shared: Sequence[WeightExpr],
        block: Block,
        index: str | None,
    ) -> WeightExpr:
        """Codes as they are packed, with scales and zero points, by an index of groups if any."""
        if bits == 8:
            codes = apply("centre", codes, bits=8)
        if index is not None and self._is_out_of_order(index, codes, bits, block):
            groups = apply("cast", Source(index, self.source.types[index]), dtype=DType.i64)
            shared = [apply("take", each, groups, axis=1) for each in shared]
            block = (1, 1)
        return apply("scaled", codes, *shared, block=block)

    def _is_out_of_order(self, key: str, codes: WeightExpr, bits: int, block: Block) -> bool:
        """Whether an index puts a column into another group than its place does.

        It is read here, since what is stored depends on it: four bytes a column.
        """
        columns = codes.type.shape[-1] * 8 // bits
        assert isinstance(columns, int)
        self._check_integers(key, (columns,))
        if not self.source.has_values:
            return False
        found = np.asarray(self.source.array(key))
        size = block[1] or columns
        if np.array_equal(found, np.arange(columns) // size) or (found == -1).all():
            return False
        groups = columns // size
        if found.min() < 0 or found.max() >= groups:
            raise Unfit(
                key, f": groups {found.min()} to {found.max()}, 0 to {groups - 1} are there"
            )
        return True

    def _check_integers(self, key: str, shape: Shape) -> None:
        found = self._present(key)
        if found.shape != shape or found.dtype not in (DType.i32, DType.i64):
            raise Unfit(key, f": expected {TensorType(DType.i32, shape)}, found {found}")

    def _leaf(self, key: str, dtype: DType | None, shape: Shape) -> WeightExpr:
        """A tensor of this type; without one, of scales."""
        found = self._present(key)
        if found.shape != shape or found.dtype not in ((dtype,) if dtype else SCALES):
            wanted = TensorType(dtype or DType.f16, shape)
            raise Unfit(key, f": expected {wanted}, found {found}")
        return Source(key, found)

    def _present(self, key: str) -> TensorType:
        if key not in self.source.types:
            raise Unfit(key, "", missing=True)
        return self.source.types[key]


def _first_that_fits(readers: Sequence[Callable[[], WeightExpr]], none: Unfit) -> WeightExpr:
    """What the first reader gives that can. Raises the `Unfit` of the first."""
    faults = []
    for read in readers:
        try:
            return read()
        except Unfit as fault:
            faults.append(fault)
    raise faults[0] if faults else none


def _block(scheme: IntegerWeights, key: str, columns: Dim) -> Block:
    """Rows and columns that share a scale. Raises `Unfit` for groups that make no sense."""
    if scheme.strategy == "block":
        assert scheme.block_structure is not None
        return scheme.block_structure[0], scheme.block_structure[1]
    if scheme.strategy != "group":
        return (1 if scheme.strategy == "channel" else WHOLE), WHOLE
    size = scheme.group_size
    assert size is not None
    assert isinstance(columns, int)
    if not 0 < size <= columns or columns % size:
        raise Unfit(key, f": no whole groups of {size} (group_size) in {columns} columns")
    return 1, size


def _words_of(block: Block) -> str:
    if WHOLE not in block:
        return f"blocks of {list(block)}"
    return "one a row or one in all" if block[0] else "one in all"


def _without_ones(shape: Sequence[Dim]) -> Sequence[Dim]:
    """A shape without axes of one element behind the others, which scales may leave out."""
    return _without_ones(shape[:-1]) if shape and shape[-1] == 1 else shape


def _matrix(key: str, shape: Shape) -> tuple[int, int]:
    if len(shape) != 2:
        raise Unfit(key, f": packed codes are read of matrices, not of {len(shape)} axes")
    rows, columns = shape
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    return rows, columns


def _turned(x: WeightExpr) -> WeightExpr:
    return apply("permute", x, dims=(1, 0))


def _in_order(bits: int) -> tuple[int, ...]:
    return tuple(range(WORD // bits))
