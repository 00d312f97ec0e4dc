"""ATen to the IR: one row per operator.

`ROWS` maps the name of an operator overload (`aten.add.Tensor`) to a function of a `Lowering` and
the operator's own arguments, with tensors already translated. It appends IR operators and returns
the result. Keyword arguments that say where a tensor lies (device, layout, ...) never reach a row.

To support another operator, write its row. A row that cannot translate a certain use raises
`Unsupported` with the reason; the converter reports all of them together. Rows that compute are in
`aten_math.py` and `aten_reduce.py`, rows that move elements in `aten_shape.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dsc.frontends import aten_math as m
from dsc.frontends import aten_reduce as r
from dsc.frontends import aten_shape as s
from dsc.frontends.aten_math import COMPLEX, Row, declared_row
from dsc.frontends.lowering import Complex
from dsc.ir.op import registry

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

ROWS: Mapping[str, Row] = MappingProxyType(
    {
        # arithmetic
        "aten.add.Tensor": m.sum_of_two,
        "aten.add.Scalar": m.sum_of_two,
        "aten.sub.Tensor": m.difference,
        "aten.sub.Scalar": m.difference,
        "aten.rsub.Tensor": m.reversed_difference,
        "aten.rsub.Scalar": m.reversed_difference,
        "aten.mul.Tensor": m.product_of_two,
        "aten.mul.Scalar": m.product_of_two,
        "aten.div.Tensor": m.quotient,
        "aten.div.Scalar": m.quotient,
        "aten.div.Tensor_mode": m.quotient,
        "aten.div.Scalar_mode": m.quotient,
        "aten.floor_divide.default": m.floor_quotient,
        "aten.remainder.Tensor": m.remainder,
        "aten.remainder.Scalar": m.remainder,
        "aten.fmod.Tensor": m.fmod,
        "aten.fmod.Scalar": m.fmod,
        "aten.pow.Tensor_Scalar": m.power,
        "aten.pow.Tensor_Tensor": m.power,
        "aten.pow.Scalar": m.power,
        "aten.maximum.default": m.arithmetic("maximum"),
        "aten.minimum.default": m.arithmetic("minimum"),
        "aten.clamp.default": m.clamp,
        "aten.clamp.Tensor": m.clamp,
        "aten.clamp_min.default": m.clamp,
        "aten.clamp_max.default": lambda t, x, high: m.clamp(t, x, None, high),
        # comparisons and logic
        "aten.lt.Tensor": m.comparison("lt"),
        "aten.lt.Scalar": m.comparison("lt"),
        "aten.le.Tensor": m.comparison("le"),
        "aten.le.Scalar": m.comparison("le"),
        "aten.gt.Tensor": m.comparison("gt"),
        "aten.gt.Scalar": m.comparison("gt"),
        "aten.ge.Tensor": m.comparison("ge"),
        "aten.ge.Scalar": m.comparison("ge"),
        "aten.eq.Tensor": m.comparison("eq"),
        "aten.eq.Scalar": m.comparison("eq"),
        "aten.ne.Tensor": m.comparison("ne"),
        "aten.ne.Scalar": m.comparison("ne"),
        "aten.logical_and.default": m.logical("logical_and"),
        "aten.logical_or.default": m.logical("logical_or"),
        "aten.logical_not.default": m.logical("logical_not"),
        "aten.logical_xor.default": m.logical("ne"),
        "aten.bitwise_and.Tensor": m.bitwise("logical_and"),
        "aten.bitwise_or.Tensor": m.bitwise("logical_or"),
        "aten.bitwise_not.default": m.bitwise("logical_not"),
        "aten.bitwise_xor.Tensor": m.bitwise("ne"),
        "aten.__and__.Tensor": m.bitwise("logical_and"),
        "aten.__or__.Tensor": m.bitwise("logical_or"),
        "aten.__xor__.Tensor": m.bitwise("ne"),
        "aten.isnan.default": lambda t, x: t.call("ne", x, x),
        "aten.isinf.default": m.is_infinite,
        "aten.where.self": m.where,
        "aten.where.ScalarSelf": m.where,
        "aten.where.ScalarOther": m.where,
        "aten.where.Scalar": m.where,
        "aten.masked_fill.Scalar": m.masked_fill,
        "aten.masked_fill.Tensor": m.masked_fill,
        # functions of one tensor
        "aten.neg.default": m.unary("neg"),
        "aten.abs.default": m.unary("abs"),
        "aten.exp.default": m.unary("exp"),
        "aten.log.default": m.unary("log"),
        "aten.sqrt.default": m.unary("sqrt"),
        "aten.rsqrt.default": m.unary("rsqrt"),
        "aten.reciprocal.default": m.unary("reciprocal"),
        "aten.square.default": m.unary("square"),
        "aten.sigmoid.default": m.unary("sigmoid"),
        "aten.silu.default": m.unary("silu"),
        "aten.tanh.default": m.unary("tanh"),
        "aten.cos.default": m.unary("cos"),
        "aten.sin.default": m.unary("sin"),
        "aten.erf.default": m.unary("erf"),
        "aten.relu.default": m.unary("relu"),
        "aten.gelu.default": m.gelu,
        "aten.exp2.default": m.with_factor("exp", before=m.LN_2),
        "aten.log2.default": m.with_factor("log", after=1 / m.LN_2),
        "aten.log10.default": m.with_factor("log", after=1 / m.LN_10),
        "aten.log1p.default": m.log1p,
        "aten.expm1.default": m.expm1,
        "aten.sign.default": m.sign,
        "aten.trunc.default": m.trunc,
        "aten.floor.default": m.floor,
        "aten.ceil.default": m.ceil,
        "aten.round.default": m.round_half_to_even,
        "aten.round.decimals": m.round_half_to_even,
        "aten.copy.default": m.copy,
        "aten._to_copy.default": m.to,
        "aten.to.dtype": m.to,
        "prims.convert_element_type.default": m.to,
        "aten.to.dtype_layout": m.to,
        "aten.to.device": m.to,
        "aten.type_as.default": m.to,
        # reductions and selections
        "aten.sum.default": r.reduction("sum"),
        "aten.sum.dim_IntList": r.reduction("sum"),
        "aten.mean.default": r.reduction("mean"),
        "aten.mean.dim": r.reduction("mean"),
        "aten.amax.default": r.reduction("amax"),
        "aten.amin.default": r.reduction("amin"),
        "aten.max.default": r.reduction("amax"),
        "aten.min.default": r.reduction("amin"),
        "aten.max.dim": r.extreme("amax", 1),
        "aten.min.dim": r.extreme("amin", -1),
        "aten.any.default": r.truth_reduction("amax"),
        "aten.any.dim": r.truth_reduction("amax"),
        "aten.any.dims": r.truth_reduction("amax"),
        "aten.all.default": r.truth_reduction("amin"),
        "aten.all.dim": r.truth_reduction("amin"),
        "aten.all.dims": r.truth_reduction("amin"),
        "aten.argmax.default": r.arg(1),
        "aten.argmin.default": r.arg(-1),
        "aten.var.correction": r.variance,
        "aten.std.correction": r.deviation,
        # what torch's own decompositions leave of norms
        "prims.var.default": r.primitive_variance,
        "prims.sum.default": r.reduction("sum"),
        "prims.div.default": m.quotient,
        "prims.broadcast_in_dim.default": s.broadcast_in_dim,
        "aten.cumsum.default": r.cumulative_sum,
        "aten.softmax.int": r.softmax,
        "aten._softmax.default": r.softmax,
        "aten._log_softmax.default": r.log_softmax,
        "aten.log_softmax.int": r.log_softmax,
        "aten.topk.default": r.topk,
        "aten.sort.default": r.sort,
        "aten.sort.stable": r.stable_sort,
        "aten.argsort.default": r.argsort,
        "aten.histc.default": r.histogram,
        # contractions and layers
        "aten.mm.default": m.matmul,
        "aten.bmm.default": m.matmul,
        "aten.mv.default": m.matmul,
        "aten.dot.default": m.matmul,
        "aten.matmul.default": m.matmul,
        "aten.addmm.default": m.matmul_plus,
        "aten.addmv.default": m.matmul_plus,
        "aten.baddbmm.default": m.matmul_plus,
        "aten.einsum.default": m.einsum,
        "aten._grouped_mm.default": m.grouped_mm,
        "transformers.grouped_mm_fallback.default": m.grouped_mm,
        "aten.linear.default": m.linear,
        "aten.scaled_dot_product_attention.default": m.sdpa,
        "aten.rms_norm.default": m.rms_norm,
        "aten.native_layer_norm.default": m.native_layer_norm,
        "aten.layer_norm.default": m.layer_norm,
        "aten.embedding.default": m.embedding,
        # complex numbers
        "aten.polar.default": m.polar,
        "aten.complex.default": lambda t, re, im: Complex(re, im),
        "aten.view_as_complex.default": m.view_as_complex,
        # views
        "aten.view.default": s.to_shape,
        "aten._unsafe_view.default": s.to_shape,
        "aten.reshape.default": s.to_shape,
        "aten.flatten.using_ints": s.to_shape,
        "aten.unflatten.int": s.to_shape,
        "aten.squeeze.default": s.to_shape,
        "aten.squeeze.dim": s.to_shape,
        "aten.squeeze.dims": s.to_shape,
        "aten.unsqueeze.default": s.to_shape,
        "aten.expand.default": s.to_expanded,
        "aten.expand_as.default": s.to_expanded,
        "aten.reshape_as.default": s.to_shape,
        "aten.view_as.default": s.to_shape,
        "aten.clone.default": s.same,
        "aten.contiguous.default": s.same,
        "aten.alias.default": s.same,
        "aten.detach.default": s.same,
        "aten.detach_.default": s.same,
        "aten.lift.default": s.same,
        "aten.lift_fresh.default": s.same,
        "aten.lift_fresh_copy.default": s.same,
        "aten.dropout.default": m.dropout,
        "aten.permute.default": s.permute,
        "aten.transpose.int": s.transpose,
        "aten.t.default": s.transpose,
        "aten.mT.default": lambda t, x: s.transpose(t, x, -2, -1),
        "aten.numpy_T.default": s.transpose,
        "aten.movedim.int": s.move_axis,
        "aten.movedim.intlist": s.move_axis,
        "aten.slice.Tensor": s.slice_axis,
        "aten.narrow.default": s.narrow,
        "aten.select.int": s.select,
        "aten.slice_scatter.default": s.slice_scatter,
        "aten.select_scatter.default": s.select_scatter,
        "aten.split.Tensor": s.split,
        "aten.split_with_sizes.default": s.split,
        "aten.chunk.default": s.split,
        "aten.unbind.int": s.unbind,
        "aten.cat.default": s.concat,
        "aten.stack.default": s.stack,
        "aten.repeat.default": s.repeat,
        "aten.repeat_interleave.self_int": s.repeat_interleave,
        "aten.flip.default": s.flip,
        "aten.roll.default": s.roll,
        "aten.constant_pad_nd.default": s.pad,
        "aten.tril.default": s.triangle("le"),
        "aten.triu.default": s.triangle("ge"),
        # fills
        "aten.empty.memory_format": s.filled(0),
        "aten.empty_permuted.default": s.filled(0),
        "aten.empty_like.default": s.filled(0),
        "aten.new_empty.default": s.filled(0),
        "aten.zeros.default": s.filled(0),
        "aten.zeros_like.default": s.filled(0),
        "aten.new_zeros.default": s.filled(0),
        "aten.ones.default": s.filled(1),
        "aten.ones_like.default": s.filled(1),
        "aten.new_ones.default": s.filled(1),
        "aten.full.default": s.fill,
        "aten.full_like.default": s.fill,
        "aten.new_full.default": lambda t, _, size, value, **__: s.fill(t, size, value),
        "aten.fill.Scalar": s.fill,
        "aten.fill.Tensor": s.fill,
        "aten.scalar_tensor.default": s.scalar,
        "aten.arange.default": s.arange,
        "aten.arange.start": s.arange,
        "aten.arange.start_step": s.arange,
        # indexing
        "aten.index.Tensor": s.index,
        "aten.index_select.default": s.take,
        "aten.gather.default": s.gather,
        "aten.index_put.default": s.index_put,
        "aten.index_add.default": s.index_add,
        "aten.index_copy.default": s.index_copy,
        "aten.scatter.value": s.scatter,
        "aten.scatter.src": s.scatter,
        "aten.one_hot.default": s.one_hot,
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
    {
        "aten._to_copy.default",
        "aten.alias.default",
        "aten.cat.default",
        "aten.clone.default",
        "aten.detach.default",
        "aten.expand.default",
        "aten.index.Tensor",
        "aten.index_select.default",
        "aten.lift_fresh_copy.default",
        "aten.permute.default",
        "aten.repeat.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.split.Tensor",
        "aten.split_with_sizes.default",
        "aten.squeeze.dims",
        "aten.stack.default",
        "aten.transpose.int",
        "aten.unsqueeze.default",
        "aten.view.default",
    }
)
"""Rows that only move elements: a complex operand passes through as two real ones."""
