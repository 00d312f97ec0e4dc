"""ATen to the IR: one row per operator.

`ROWS` maps the name of an operator overload (`aten.add.Tensor`) to a function of a `Lowering` and
the operator's own arguments, with tensors already translated. It appends IR operators and returns
the result. Keyword arguments that say where a tensor lies (device, layout, ...) never reach a row.

What torch itself takes apart (`torch_export.decompositions`) needs no row, but for what the model
of `models/` is written with: its trace is translated as it comes. To support another operator,
write its row. A row that cannot translate a certain use raises `Unsupported` with the reason; the
converter reports all of them together. Rows that compute are in `aten_math.py` and
`aten_reduce.py`, rows that move elements in `aten_shape.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from dsc.frontends import aten_math as m
from dsc.frontends import aten_reduce as r
from dsc.frontends import aten_shape as s
from dsc.frontends.aten_math import COMPLEX, Row, declared_row
from dsc.frontends.lowering import Complex, Lowering
from dsc.ir.graph import Operand
from dsc.ir.op import registry
from dsc.ir.types import DType

__all__ = ["COMPLEX", "DROPPED", "HARMLESS", "KEPT_WHOLE", "ROWS", "VIEWS", "row_of"]

KEPT_WHOLE = (
    "aten::einsum",
    "aten::lift",
    "aten::lift_fresh",
    "aten::lift_fresh_copy",
    "aten::linear",
    "aten::matmul",
    "aten::one_hot",
    "aten::rms_norm",
    "aten::roll",
    "aten::scaled_dot_product_attention",
    "aten::silu",
)
"""Operators that are not decomposed: the IR knows them, or something close; or a tracer does, as
those that bring a constant in."""

DROPPED = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_async.msg",
        "aten._assert_scalar.default",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
    }
)
"""Checks that hold by construction once shapes and types are inferred."""

HARMLESS = frozenset({"aten.detach_.default"})
"""In-place operators that change no value."""

UNARY = "neg abs exp log sqrt rsqrt reciprocal sigmoid silu tanh cos sin erf relu"
"""Functions of one tensor that the IR calls as ATen does."""


def overloads(names: str) -> Iterator[str]:
    """ATen's overloads: `add.Tensor|Scalar exp` are two of add, and `aten.exp.default`."""
    for name in names.split():
        operator, _, listed = name.partition(".")
        yield from (f"aten.{operator}.{each}" for each in (listed or "default").split("|"))


def _rows(table: Mapping[str, Row]) -> dict[str, Row]:
    return {name: row for names, row in table.items() for name in overloads(names)}


def to_shape(t: Lowering, x: Operand, *_: Any) -> Operand:
    """The same elements under the traced shape."""
    return t.reshape(x, t.out.shape)


def same(t: Lowering, x: Operand, *_: Any, **__: Any) -> Operand:
    """Nothing to do without mutation."""
    return x


ROWS: Mapping[str, Row] = MappingProxyType(
    _rows(
        {
            # arithmetic
            "add.Tensor|Scalar": m.sum_of_two,
            "sub.Tensor|Scalar": m.difference,
            "mul.Tensor|Scalar": m.product_of_two,
            "div.Tensor|Scalar|Tensor_mode|Scalar_mode": m.quotient,
            "remainder.Tensor|Scalar": m.remainder,
            "fmod.Tensor|Scalar": m.fmod,
            "pow.Tensor_Scalar|Tensor_Tensor|Scalar": m.power,
            "maximum": m.arithmetic("maximum"),
            "minimum": m.arithmetic("minimum"),
            "clamp.default|Tensor": m.clamp,
            # comparisons and logic
            "logical_and": m.logical("logical_and"),
            "logical_or": m.logical("logical_or"),
            "logical_not": m.logical("logical_not"),
            "logical_xor": m.logical("ne"),
            "bitwise_and.Tensor": m.bitwise("logical_and"),
            "bitwise_or.Tensor": m.bitwise("logical_or"),
            "bitwise_not": m.bitwise("logical_not"),
            "bitwise_xor.Tensor": m.bitwise("ne"),
            "isnan": lambda t, x: t.call("ne", x, x),
            "isinf": m.is_infinite,
            "where.self": m.where,
            "masked_fill.Scalar": lambda t, x, mask, value: m.where(t, mask, value, x),
            **{f"{op}.Tensor|Scalar": m.comparison(op) for op in "lt le gt ge eq ne".split()},
            # functions of one tensor
            "gelu": m.gelu,
            "exp2": m.with_factor("exp", before=m.LN_2),
            "log2": m.with_factor("log", after=1 / m.LN_2),
            "log10": m.with_factor("log", after=1 / m.LN_10),
            "log1p": m.log1p,
            "expm1": m.expm1,
            "sign": m.sign,
            "trunc": m.trunc,
            "floor": m.floor,
            "ceil": m.ceil,
            "round.default|decimals": m.round_half_to_even,
            "copy": m.copy,
            "_to_copy to.dtype|dtype_layout": m.to,
            **{op: m.unary(op) for op in UNARY.split()},
            # reductions and selections
            "sum.dim_IntList": r.reduction("sum"),
            "mean.default|dim": r.reduction("mean"),
            "amax max": r.reduction("amax"),
            "amin min": r.reduction("amin"),
            "max.dim": r.extreme("amax", 1),
            "min.dim": r.extreme("amin", -1),
            "any.default|dim|dims": r.any_of,
            "argmax": r.arg(1),
            "argmin": r.arg(-1),
            "var.correction": r.variance,
            "cumsum": lambda t, x, dim, **_: t.call("cumsum", t.cast(x, t.out.dtype), axis=dim),
            "_softmax": r.softmax,
            "_log_softmax": r.log_softmax,
            "topk": r.topk,
            "sort": r.sort,
            "sort.stable": lambda t, x, *, stable=True, **how: r.sort(t, x, **how),
            "histc": r.histogram,
            # contractions and layers
            "mm bmm matmul": m.matmul,
            "addmm addmv": m.matmul_plus,
            "einsum": m.einsum,
            "_grouped_mm": m.grouped_mm,
            "linear": m.linear,
            "scaled_dot_product_attention": m.sdpa,
            "rms_norm": m.rms_norm,
            "native_layer_norm": m.native_layer_norm,
            "embedding": m.embedding,
            # complex numbers
            "polar": m.polar,
            "complex": lambda t, re, im: Complex(re, im),
            "view_as_complex": m.view_as_complex,
            # views
            "view reshape view_as flatten.using_ints unsqueeze squeeze.dim|dims": to_shape,
            "expand": lambda t, x, *_, **__: t.expand(x, t.out.shape),
            "clone alias detach_ lift lift_fresh lift_fresh_copy": same,
            "permute": lambda t, x, dims: t.permute(x, dims),
            "transpose.int t": s.transpose,
            "slice.Tensor": s.slice_axis,
            "select.int": s.select,
            "slice_scatter": s.slice_scatter,
            "split_with_sizes chunk": s.split,
            "cat": s.concat,
            "repeat": s.repeat,
            "flip": s.flip,
            "roll": s.roll,
            "constant_pad_nd": s.pad,
            # fills
            "empty.memory_format empty_permuted zeros_like new_zeros": s.zeros,
            "full full_like": s.fill,
            "scalar_tensor": lambda t, value, **_: t.number(value, t.out.dtype),
            "arange.default|start_step": s.arange,
            # indexing
            "index.Tensor": s.index,
            "index_select": s.take,
            "gather": lambda t, x, dim, index, **_: t.call(
                "gather", x, t.cast(index, DType.i64), axis=dim % x.type.rank
            ),
            "index_put": s.index_put,
            "scatter.value|src": s.scatter,
            "one_hot": s.one_hot,
        }
    )
    | {
        # what torch's own decompositions leave of norms, and transformers of experts
        "prims.convert_element_type.default": m.to,
        "prims.var.default": r.variance,
        "prims.sum.default": r.reduction("sum"),
        "prims.div.default": m.quotient,
        "prims.broadcast_in_dim.default": s.broadcast_in_dim,
        "transformers.grouped_mm_fallback.default": m.grouped_mm,
    }
)


def row_of(target: str) -> Row | None:
    """What makes nodes of a call of ATen, or of an operator of the IR by its name (`dsc.rope`)."""
    namespace, _, name = target.removesuffix(".default").partition(".")
    if namespace != "dsc":
        return ROWS.get(target)
    definition = registry().get(name)
    return None if definition is None else declared_row(definition)


VIEWS = frozenset(
    overloads(
        "_to_copy alias cat clone expand index.Tensor index_select lift_fresh_copy permute repeat "
        "select.int slice.Tensor split_with_sizes squeeze.dims transpose.int unsqueeze view"
    )
)
"""Rows that only move elements: a complex operand passes through as two real ones."""
