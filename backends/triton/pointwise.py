"""The generator for pointwise regions: a list of operators becomes one kernel's source text.

A region has one iteration shape. Operands are addressed by broadcast strides; axes that all walk
alike are merged first; values live in registers, 16-bit floats widened to fp32. The text depends
only on the structure of the region, so regions that differ in sizes share a source file.

    swiglu on bf16[M,1024], the two halves of bf16[M,2048], becomes

    def pointwise_swiglu_5d2e(in0, in1, out0, n, d1, in0_s0, in1_s0, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        keep = i < n
        i1 = i % d1
        i0 = i // d1
        v0 = tl.load(in0 + i0 * in0_s0 + i1, mask=keep, other=0).to(tl.float32)
        …
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsc.ir import views
from dsc.ir.dims import Dim, product
from dsc.ir.op import kernel_of, traits_of
from dsc.ir.traits import Role
from dsc.ir.types import DType
from dsc.ir.views import View

if TYPE_CHECKING:
    from dsc.backends.triton.context import Context, Given

TYPES = {
    DType.f32: "tl.float32", DType.f64: "tl.float64", DType.bf16: "tl.bfloat16",
    DType.f16: "tl.float16", DType.i64: "tl.int64", DType.i32: "tl.int32", DType.i16: "tl.int16",
    DType.i8: "tl.int8",
    DType.u8: "tl.uint8", DType.boolean: "tl.int1", DType.f8e4m3: "tl.float8e4nv",
    DType.f8e5m2: "tl.float8e5",
}  # fmt: skip
_NAN = "propagate_nan=tl.PropagateNan.ALL"

# Operator to expression over {0}, {1}, {2}; the second entry is for integers where that differs.
EXPRESSIONS: dict[str, tuple[str, str | None]] = {
    "copy": ("{0}", None),
    "add": ("{0} + {1}", None),
    "sub": ("{0} - {1}", None),
    "mul": ("{0} * {1}", None),
    "div": ("{0} / {1}", "{0} // {1} - (({0} % {1} != 0) & (({0} < 0) != ({1} < 0)))"),
    "remainder": (
        "{0} - {1} * tl.floor(tl.div_rn({0}, {1}))",  # a GPU's `/` takes 6 / 3 below 2
        "{0} % {1} + tl.where(({0} % {1} != 0) & (({0} < 0) != ({1} < 0)), {1}, 0)",
    ),
    "maximum": (f"tl.maximum({{0}}, {{1}}, {_NAN})", "tl.maximum({0}, {1})"),
    "minimum": (f"tl.minimum({{0}}, {{1}}, {_NAN})", "tl.minimum({0}, {1})"),
    "lt": ("{0} < {1}", None),
    "le": ("{0} <= {1}", None),
    "gt": ("{0} > {1}", None),
    "ge": ("{0} >= {1}", None),
    "eq": ("{0} == {1}", None),
    "ne": ("{0} != {1}", None),
    "logical_and": ("{0} & {1}", None),
    "logical_or": ("{0} | {1}", None),
    "logical_not": ("{0} == 0", None),
    "where": ("tl.where({0}, {1}, {2})", None),
    "neg": ("-{0}", None),
    "abs": ("tl.abs({0})", None),
    "exp": ("tl.exp({0})", None),
    "log": ("tl.log({0})", None),
    "sqrt": ("tl.sqrt({0})", None),
    "rsqrt": ("tl.rsqrt({0})", None),
    "reciprocal": ("1.0 / {0}", None),
    "square": ("{0} * {0}", None),
    "sigmoid": ("1.0 / (1.0 + tl.exp(-{0}))", None),
    "silu": ("{0} / (1.0 + tl.exp(-{0}))", None),
    "swiglu": ("{0} / (1.0 + tl.exp(-{0})) * {1}", None),
    "tanh": ("2.0 / (1.0 + tl.exp(-2.0 * {0})) - 1.0", None),
    "cos": ("tl.cos({0})", None),
    "sin": ("tl.sin({0})", None),
    "erf": ("tl.erf({0})", None),
    "relu": (f"tl.maximum({{0}}, 0.0, {_NAN})", "tl.maximum({0}, 0)"),
    "gelu": ("0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))", None),
    # |a|^b by logarithm; a negative base keeps its sign for odd b and has no value for fractions.
    "pow": (
        "tl.where({1} == 0.0, 1.0, tl.exp({1} * tl.log(tl.abs({0}))) * tl.where({0} >= 0.0, 1.0,"
        ' tl.where({1} == tl.floor({1}), 1.0 - 2.0 * tl.abs({1} % 2.0), float("nan"))))',
        None,
    ),
}
FLOAT_ONLY = frozenset(
    {"exp", "log", "sqrt", "rsqrt", "reciprocal", "sigmoid", "silu", "swiglu", "tanh", "cos"}
    | {"sin", "erf", "gelu", "pow"}
)


def has_formula(op: str) -> bool:
    """Whether a pointwise operator has an expression: one of these, or one that it brings along."""
    if op in EXPRESSIONS or op == "cast":
        return True
    return isinstance(kernel_of(op, "triton"), str) and traits_of(op).role is Role.POINTWISE


def expressions(op: str) -> tuple[str, str | None]:
    """What an operator computes of floats, and of integers where that differs."""
    own = kernel_of(op, "triton")
    return (own, None) if isinstance(own, str) else EXPRESSIONS[op]


@dataclass(frozen=True, slots=True)
class Step:
    """One operator of a region: its operands are numbers of earlier values, inputs first."""

    op: str
    args: tuple[int, ...]
    dtype: DType
    value: float | int | bool = 0  # of `full` and `iota` (its start)


@dataclass(frozen=True, slots=True)
class Region:
    """Inputs, operators in order, and the numbers of the values that are results."""

    inputs: tuple[DType, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]

    def dtype(self, number: int) -> DType:
        """The element type of a value."""
        known = len(self.inputs)
        return self.inputs[number] if number < known else self.steps[number - known].dtype


def copy_region(source: View, dtype: DType) -> Region:
    """The region that copies (and casts) one operand."""
    op = "copy" if source.dtype is dtype else "cast"
    return Region((source.dtype,), (Step(op, (0,), dtype),), (1,))


def constant_region(value: float, dtype: DType) -> Region:
    """The region that writes one value."""
    return Region((), (Step("full", (), dtype, value),), (0,))


def emit(ctx: Context, region: Region, inputs: Sequence[View], outputs: Sequence[View]) -> None:
    """Append the launch of a region; operands broadcast to the shape of the outputs."""
    shape = outputs[0].shape
    operands = [views.expand(v, shape) for v in inputs] + list(outputs)
    dims, strides = collapse(shape, [v.strides for v in operands])
    n = product(shape)
    wide = max(ctx.limit(ctx_reach(v)) for v in operands) >= 1 << 31
    module, text = source(region, strides, wide)
    ctx.sources.setdefault(module, text)
    names = [f"in{k}" for k in range(len(inputs))] + [f"out{k}" for k in range(len(outputs))]
    given: dict[str, Given] = dict(zip(names, operands, strict=True))
    given |= {f"d{axis}": dims[axis] for axis in range(1, len(dims))}
    for name, steps in zip(names, strides, strict=True):
        given |= {f"{name}_s{a}": s for a, s in enumerate(steps) if _is_parameter(s)}
    block = ctx.blocks.flat(ctx.limit(n))
    grid = ((n + (block - 1)) // block if block > 1 else n,)
    ctx.launch(f"{module}:{module}", grid, {"n": n, "BLOCK": block, **given})


def ctx_reach(view: View) -> Dim:
    """An upper bound of the element offsets that a view touches, counted from its start."""
    reach: Dim = 1
    for dim, stride in zip(view.shape, view.strides, strict=True):
        reach = reach + dim * stride
    return reach


def collapse(
    shape: Sequence[Dim], strides: Sequence[Sequence[Dim]]
) -> tuple[list[Dim], list[list[Dim]]]:
    """Drop axes of one element and merge neighbours that every operand walks as one."""
    axes = [(d, [s[a] for s in strides]) for a, d in enumerate(shape) if d != 1]
    merged: list[tuple[Dim, list[Dim]]] = []
    for dim, steps in axes:
        if merged:
            outer, before = merged[-1]
            if all(b == s * dim for b, s in zip(before, steps, strict=True)):
                merged[-1] = (outer * dim, steps)
                continue
        merged.append((dim, steps))
    per_operand = [[steps[k] for _, steps in merged] for k in range(len(strides))]
    return [d for d, _ in merged], per_operand


def _is_parameter(stride: Dim) -> bool:
    return not (isinstance(stride, int) and stride in (0, 1))


def source(region: Region, strides: Sequence[Sequence[Dim]], wide: bool) -> tuple[str, str]:
    """The module name and text of a region over operands with these (collapsed) strides."""
    names = [f"in{k}" for k in range(len(region.inputs))]
    names += [f"out{k}" for k in range(len(region.results))]
    rank = len(strides[0]) if strides else 0
    parameters = [*names, "n", *(f"d{a}" for a in range(1, rank))]
    for name, steps in zip(names, strides, strict=True):
        parameters += [f"{name}_s{a}" for a, s in enumerate(steps) if _is_parameter(s)]
    start = "tl.program_id(0).to(tl.int64)" if wide else "tl.program_id(0)"
    body = [f"i = {start} * BLOCK + tl.arange(0, BLOCK)", "keep = i < n", *_indices(rank)]
    for number, dtype in enumerate(region.inputs):
        at = _address(names[number], strides[number])
        body.append(f"v{number} = tl.load({at}, mask=keep, other=0){widen(dtype)}")
    for number, step in enumerate(region.steps, start=len(region.inputs)):
        body.append(f"v{number} = {expression(region, step)}")
    for number, name, steps in zip(
        region.results, names[len(region.inputs) :], strides[len(region.inputs) :], strict=True
    ):
        body.append(f"tl.store({_address(name, steps)}, v{number}, mask=keep)")
    ops = "_".join(dict.fromkeys(s.op for s in region.steps if s.op not in ("full", "cast")))
    ops = ops or "_".join(dict.fromkeys(s.op for s in region.steps)) or "copy"
    digest = hashlib.sha256("\n".join([*parameters, *body]).encode()).hexdigest()[:8]
    function = f"pointwise_{ops[:40].rstrip('_')}_{digest}"
    arguments = "".join(f"    {p},\n" for p in parameters)
    lines = "\n".join(f"    {line}" for line in body)
    summary = " ".join(s.op for s in region.steps)
    doc = f'    """{summary}; one element a lane, operands by strides."""\n'
    return function, (
        f'"""Generated: a pointwise kernel."""\n\nimport triton\nimport triton.language as tl\n\n\n'
        f"@triton.jit\ndef {function}(\n{arguments}    BLOCK: tl.constexpr,\n):\n{doc}{lines}\n"
    )


def _indices(rank: int) -> list[str]:
    """The index of each axis from the flat index, innermost first."""
    if rank <= 1:
        return ["i0 = i"] if rank else []
    lines, rest = [], "i"
    for axis in range(rank - 1, 0, -1):
        lines.append(f"i{axis} = {rest} % d{axis}")
        target = "i0" if axis == 1 else f"r{axis}"
        lines.append(f"{target} = {rest} // d{axis}")
        rest = target
    return lines


def _address(name: str, strides: Sequence[Dim]) -> str:
    terms = [name]
    for axis, stride in enumerate(strides):
        if stride == 1:
            terms.append(f"i{axis}")
        elif _is_parameter(stride):
            terms.append(f"i{axis} * {name}_s{axis}")
    return " + ".join(terms) if len(terms) > 1 else f"{name} + i * 0"


def widen(dtype: DType) -> str:
    """The conversion of a loaded value to the type it is computed in."""
    return ".to(tl.float32)" if dtype.is_float and dtype.bits < 32 else ""


def expression(region: Region, step: Step, tile: str = "(BLOCK,)") -> str:
    """The expression of one operator over registers of earlier values of shape `tile`."""
    if step.op == "full":
        return f"tl.full({tile}, {literal(step.value, step.dtype)}, {wide_type(step.dtype)})"
    if step.op == "iota":
        return f"(i + {int(step.value)}).to({wide_type(step.dtype)})"
    of = region.dtype(step.args[0])
    return formula(step.op, step.dtype, [f"v{a}" for a in step.args], of)


def formula(op: str, dtype: DType, args: Sequence[str], of: DType) -> str:
    """What an operator on elements of type `of` computes, as an expression over names."""
    if op == "cast":
        return f"{args[0]} != 0" if dtype is DType.boolean else _narrowed(args[0], dtype)
    first, integer = expressions(op)
    return (first if integer is None or of.is_float else integer).format(*args)


def rounded(value: str, dtype: DType) -> str:
    """A value as it would come back from memory."""
    return _narrowed(f"({value})", dtype) if widen(dtype) else value


def _narrowed(value: str, dtype: DType) -> str:
    return f"{value}.to({TYPES[dtype]}){widen(dtype)}"


def wide_type(dtype: DType) -> str:
    """The type that values are computed in."""
    return "tl.float32" if widen(dtype) else TYPES[dtype]


def literal(value: Any, dtype: DType) -> str:
    """A constant as source text."""
    if dtype.is_float:
        number = float(value)
        return repr(number) if math.isfinite(number) else f'float("{number}")'
    return str(int(value))
