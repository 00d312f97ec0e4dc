"""Contractions, reductions and selections."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsc.ir.calls import Call
from dsc.ir.dims import Dim, product
from dsc.ir.extents import Extent
from dsc.ir.graph import Graph
from dsc.ir.interpreter import run_graph
from dsc.ir.lazy import torch
from dsc.ir.op import OpDef, TypeMismatch, op
from dsc.ir.ops.pointwise import broadcast
from dsc.ir.ops.quant import activation_type, product_of
from dsc.ir.ops.shape import axis_of
from dsc.ir.placement import COLUMNS, PARTIAL, Part, PlacedCall, Placing, Split
from dsc.ir.sized import Sized
from dsc.ir.traits import Form, Role, Traits, Within
from dsc.ir.types import DType, TensorType

Types = Sequence[TensorType]
Result = tuple[TensorType, ...]


def _infer_matmul(types: Types, attrs: Mapping[str, Any]) -> Result:
    a, b = types
    if a.rank < 2 or b.rank < 2:
        raise TypeMismatch("both operands need two axes or more")
    if a.shape[-1] != b.shape[-2]:
        raise TypeMismatch(f"contracts an axis of {a.shape[-1]} with one of {b.shape[-2]}")
    batch = broadcast(a.shape[:-2], b.shape[:-2])
    return (a.with_shape((*batch, a.shape[-2], b.shape[-1])),)


def _infer_linear(types: Types, attrs: Mapping[str, Any]) -> Result:
    x, weight = types[:2]
    if attrs["activations"]:
        activation_type(x, attrs["activations"])
    return (x.with_shape((*x.shape[:-1], weight.shape[0])),)


def einsum_terms(eq: str) -> tuple[tuple[str, ...], str]:
    """The operand subscripts and the result's of `bshd,hdc->bshc`."""
    left, arrow, right = eq.replace(" ", "").partition("->")
    letters = (left + right).replace(",", "")
    plain = all(c.isascii() and c.isalpha() for c in letters)
    if not arrow or not plain or "," in right or len(set(right)) != len(right):
        raise TypeMismatch(f"einsum equation {eq!r}; write every letter, as bsd,dc->bsc")
    return tuple(left.split(",")), right


def _infer_einsum(types: Types, attrs: Mapping[str, Any]) -> Result:
    terms, result = einsum_terms(attrs["eq"])
    if len(terms) != len(types):
        raise TypeMismatch(f"{len(types)} operands for {attrs['eq']}")
    sizes: dict[str, Dim] = {}
    for term, t in zip(terms, types, strict=True):
        if len(term) != t.rank:
            raise TypeMismatch(f"{t} for the subscripts {term}")
        for letter, dim in zip(term, t.shape, strict=True):
            if sizes.setdefault(letter, dim) != dim:
                raise TypeMismatch(f"{letter} is {dim} and {sizes[letter]}")
    if not set(result) <= sizes.keys():
        raise TypeMismatch(f"a result letter of {attrs['eq']} is in no operand")
    return (types[0].with_shape(tuple(sizes[c] for c in result)),)


def _einsum_flops(call: Call) -> Dim:
    sizes: dict[str, Dim] = {}
    for term, t in zip(einsum_terms(call.attrs["eq"])[0], call.operands.values(), strict=True):
        sizes.update(zip(term, t.shape, strict=True))
    return 2 * product(tuple(sizes.values()))


def _demand_matmul(call: Sized) -> None:
    a, b, out = call["a"], call["b"], call.outs[0]
    call.system.equate(a[-1], b[-2])
    call.same([a[-2], b[-1]], out[-2:])
    for t, shape in call.given():
        leading = t.with_shape(t.shape[:-2])
        call.broadcast(leading, shape[:-2], out[:-2], call.results[0].shape[:-2])


def _demand_einsum(call: Sized) -> None:
    operands, result = einsum_terms(call.attrs["eq"])
    letters: dict[str, Extent] = {}
    shapes = [shape for _, shape in call.given()]
    for term, shape in zip((*operands, result), (*shapes, call.outs[0]), strict=True):
        for letter, extent in zip(term, shape, strict=True):
            call.system.equate(letters.setdefault(letter, extent), extent)


def _place_einsum(call: PlacedCall) -> Placing | str:
    """A contraction over a split letter is partial; a split letter that stays, splits the result.

    The other operand must be a weight that has the letter: it is cut along it.
    """
    lies = call.lies.get("xs[0]")
    if not isinstance(lies, Split) or len(call.operands) != 2 or "xs[1]" not in call.weights:
        return "only a value in parts times a weight is shared"
    (first, second), result = einsum_terms(call.attrs["eq"])
    letter = first[lies.axis]
    if second.count(letter) != 1 or first.count(letter) != 1:
        return f"{letter} is not once in each of {first} and {second}"
    placement = Split(result.index(letter)) if letter in result else PARTIAL
    return Placing((placement,), {"xs[1]": Part(second.index(letter))})


def _place_linear(call: PlacedCall) -> Placing | str:
    """By columns where these are wished for and x is whole; by rows where x is split so."""
    last = call["x"].rank - 1
    parts = [name for name in ("weight", "bias") if name in call.operands]
    if not call.weights.issuperset(parts):
        return "its weight is computed"
    if not call.lies and call.wish == COLUMNS:
        rows = call["weight"].shape[0]
        if not call.divides(rows):
            return f"{rows} columns do not part into {call.ranks}"
        return Placing((Split(last),), dict.fromkeys(parts, Part(0)), kind="columns")
    if call.lies.get("x") != Split(last):
        return "only the last axis of x may be split"
    if "bias" in parts:
        return "its bias would be summed as often as there are ranks"
    return Placing((PARTIAL,), {"weight": Part(1)}, kind="rows")


def reduced_shape(shape: tuple[Dim, ...], axes: tuple[int, ...], keepdims: bool) -> tuple[Dim, ...]:
    """The shape after reducing `axes`, at least one and each once."""
    gone = {axis_of(a, len(shape)) for a in axes}
    if not axes or len(gone) != len(axes):
        raise TypeMismatch(f"axes {list(axes)}: name at least one, and each once")
    if keepdims:
        return tuple(1 if i in gone else d for i, d in enumerate(shape))
    return tuple(d for i, d in enumerate(shape) if i not in gone)


def _demand_reduction(call: Sized) -> None:
    rank = call.operands["x"].rank
    axes = call.attrs["axes"] if "axes" in call.attrs else (call.attrs["axis"],)
    gone = {axis_of(a, rank) for a in axes}
    keep = bool(call.attrs.get("keepdims"))
    kept = [x for i, x in enumerate(call["x"]) if i not in gone]
    call.same(kept, [x for i, x in enumerate(call.outs[0]) if not (keep and i in gone)])


def _reduction(
    name: str,
    reference: Callable[..., Any],
    doc: str,
    elements: str = "T",
    of_nothing: float | None = None,
) -> OpDef:
    def infer(types: Types, attrs: Mapping[str, Any]) -> Result:
        (x,) = types
        return (x.with_shape(reduced_shape(x.shape, attrs["axes"], attrs["keepdims"])),)

    return op(
        f"{name}(x: {elements}[...]; axes: ints, keepdims: bool = false) -> {elements}[...]",
        Traits(Role.REDUCTION, of_nothing=of_nothing, demand=_demand_reduction),
        reference=reference,
        doc=doc,
        example="f32[2,3,4] {axes=[-1], keepdims=true}",
        infer=infer,
    )


def _accumulate(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sum 16-bit floats in fp32 and round once."""

    def reference(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
        wide = x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x
        return function(wide, axes, keepdims).to(x.dtype)

    return reference


sum = _reduction(
    "sum", _accumulate(lambda x, a, k: x.sum(a, keepdim=k)), "Sum over axes.", of_nothing=0.0
)
mean = _reduction(
    "mean",
    _accumulate(lambda x, a, k: x.mean(a, keepdim=k)),
    "Mean over axes.",
    elements="F",
    of_nothing=math.nan,
)
amax = _reduction("amax", lambda x, axes, keepdims: x.amax(axes, keepdims), "Largest over axes.")
amin = _reduction("amin", lambda x, axes, keepdims: x.amin(axes, keepdims), "Smallest over axes.")

argmax = op(
    "argmax(x: T[...]; axis: int) -> i64[...]",
    Traits(Role.OTHER, demand=_demand_reduction),
    reference=lambda x, axis: x.argmax(axis),
    doc="Index of the largest element of an axis; of equals, any.",
    example="f32[2,3] {axis=-1}",
    infer=lambda types, attrs: (
        TensorType(DType.i64, reduced_shape(types[0].shape, (attrs["axis"],), False)),
    ),
    gives={0: Within("0", "extent-1")},
)


def _infer_along(types: Types, attrs: Mapping[str, Any]) -> Result:
    axis_of(attrs["axis"], types[0].rank)
    return (types[0],)


def _cumsum(x: Any, axis: int) -> Any:
    wide = x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x
    return wide.cumsum(axis).to(x.dtype)


def _softmax(x: Any, axis: int) -> Any:
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.softmax(wide, axis).to(x.dtype)


def _infer_topk(types: Types, attrs: Mapping[str, Any]) -> Result:
    (x,), k = types, attrs["k"]
    if k < 0 or (isinstance(x.shape[-1], int) and k > x.shape[-1]):
        raise TypeMismatch(f"the top {k} of {x.shape[-1]}")
    shape = (*x.shape[:-1], k)
    return x.with_shape(shape), TensorType(DType.i64, shape)


cumsum = op(
    "cumsum(x: T[*n]; axis: int) -> T[*n]",
    Traits(Role.OTHER),
    reference=_cumsum,
    doc="Running sum along an axis; 16-bit floats accumulate in fp32.",
    example="f32[2,3] {axis=-1}",
    infer=_infer_along,
)
softmax = op(
    "softmax(x: F[*n]; axis: int = -1) -> F[*n]",
    Traits(Role.REDUCTION),
    reference=_softmax,
    doc="exp(x - max) / sum along an axis, in fp32.",
    example="f32[2,3] {axis=-1}",
    infer=_infer_along,
)
topk = op(
    "topk(x: T[*n, d]; k: int) -> (T[*n, k], i64[*n, k])",
    Traits(Role.OTHER, demand=lambda c: c.system.divisible(c.dims["d"], 1, c.attrs["k"])),
    reference=lambda x, k: tuple(torch.topk(x, k, dim=-1)),
    doc="The k largest of the last axis, largest first, with their indices.",
    example="f32[2,5] {k=2}",
    infer=_infer_topk,
    gives={1: Within("0", "d-1")},
)
linear = op(
    'linear(x: T[*n, k], weight: T[m, k], bias: T[m]?; activations: str = "") -> T[*n, m]',
    Traits(
        Role.PRODUCT,
        flops=lambda c: 2 * c["x"].numel * c.dim("m"),
        stored=("weight",),
        of_nothing=0.0,
        place=_place_linear,
        grants=COLUMNS,
    ),
    reference=product_of,
    doc="x @ weight^T + bias; products accumulate in fp32. With activations, as `i8:32`, rows of x"
    " are taken as the nearest codes of so many columns each, with a scale in fp32.",
    example="f32[2,5,3], f32[4,3], f32[4]",
    infer=_infer_linear,
)
matmul = op(
    "matmul(a: T[...], b: T[...]) -> T[...]",
    Traits(
        Role.PRODUCT,
        flops=lambda c: 2 * c.results[0].numel * c["a"].shape[-1],
        of_nothing=0.0,
        demand=_demand_matmul,
    ),
    reference=lambda a, b: torch.matmul(a, b),
    doc="Matrix product of the last two axes; leading axes broadcast.",
    example="f32[2,1,3,4], f32[5,4,2]",
    infer=_infer_matmul,
)
einsum = op(
    "einsum(xs: T[...]...; eq: str) -> T[...]",
    Traits(
        Role.PRODUCT,
        flops=_einsum_flops,
        stored=("xs",),
        of_nothing=0.0,
        demand=_demand_einsum,
        place=_place_einsum,
    ),
    reference=lambda *xs, eq: torch.einsum(eq, *xs),
    doc="Sum of products over named axes, a letter each (b s t h d c r e g).",
    example='f32[2,3,4], f32[4,5] {eq="bsd,dc->bsc"}',
    infer=_infer_einsum,
)


def _run_body(*operands: Any, body: Graph) -> Any:
    outputs = run_graph(body, operands)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _infer_fused(types: Types, attrs: Mapping[str, Any]) -> Result:
    body: Graph = attrs["body"]
    if len(types) != len(body.inputs):
        raise TypeMismatch(f"{len(types)} operands for a body of {len(body.inputs)} inputs")
    for given, declared in zip(types, body.inputs, strict=True):
        if given != declared.type:
            raise TypeMismatch(f"{declared} is {declared.type} in the body, {given} given")
    return tuple(v.type for v in body.outputs)


fused = op(
    "fused(xs: any[...]...; body: graph) -> any[...]",
    Traits(Role.REGION, Form.REGION),
    reference=_run_body,
    doc="Run a body as one kernel: at most one anchor (GEMM, attention, …). It means its body.",
    example="",
    infer=_infer_fused,
)
