"""What each operator demands of the extents around it, for `shrink`.

The dim names of an operator's signature say most of it: equal names are equal extents. A table of
short functions adds what signatures cannot say: products of a reshape, sums of a concat, halves of
a rotary embedding, groups that divide the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsc.ir.dims import Dim, Sym, parse_dim, terms
from dsc.ir.extents import Extent, System
from dsc.ir.op import OpDef, lookup
from dsc.ir.ops.core import einsum_terms
from dsc.ir.ops.shape import axis_of
from dsc.ir.traits import Role
from dsc.ir.types import TensorType

Shape = list[Extent]
DIM_ATTRS = frozenset({("dispatch", "experts"), ("histc", "bins")})
"""Attributes of kind `int` that are extents; those of the kinds `dim` and `dims` always are."""


@dataclass
class Call:
    """One use of an operator: types as they are, and the extents that stand for their dims."""

    system: System
    op: str
    types: Sequence[TensorType | None]
    results: Sequence[TensorType]
    ins: Sequence[Shape | None]
    outs: Sequence[Shape]
    attrs: Mapping[str, Any]
    extents: Mapping[str, Any]
    in_weights: bool = False

    def operand(self, index: int) -> Shape:
        """The extents of an operand that is present."""
        shape = self.ins[index]
        assert shape is not None
        return shape

    def type(self, index: int) -> TensorType:
        """The type of an operand that is present."""
        found = self.types[index]
        assert found is not None
        return found

    def same(self, a: Sequence[Extent], b: Sequence[Extent]) -> None:
        """Equate extents pairwise."""
        for x, y in zip(a, b, strict=True):
            self.system.equate(x, y)


def dim_attrs(op: str, attrs: Mapping[str, Any]) -> list[str]:
    """The names of the given attributes that hold extents."""
    definition = lookup(op)
    kinds = {a.name: a.kind for a in definition.attrs}
    return [name for name in attrs if kinds.get(name) in ("dim", "dims") or (op, name) in DIM_ATTRS]


def demand(call: Call) -> None:
    """State in the system what the operator of `call` demands."""
    definition = lookup(call.op)
    scope = _by_signature(call, definition)
    special = _SPECIAL.get(call.op)
    if special is not None:
        special(call, scope)
    elif definition.traits.role is Role.POINTWISE:
        _pointwise(call, scope)
    elif any(o.pattern.dims == ("...",) for o in definition.operands):
        _by_value(call)


Scope = dict[str, Any]


def _by_signature(call: Call, definition: OpDef) -> Scope:
    """Equate the extents that one name of the signature stands for."""
    scope: Scope = {}
    for name, value in call.attrs.items():
        if isinstance(value, int) and not isinstance(value, bool):
            scope[name] = call.extents.get(name, Extent.number(value))
    later: list[tuple[str, Extent]] = []
    patterns = [o.pattern.dims for o in definition.operands]
    if definition.operands and definition.operands[-1].variadic:
        patterns += [patterns[-1]] * (len(call.ins) - len(patterns))
    shapes: list[Shape | None] = [*call.ins, *[None] * (len(patterns) - len(call.ins))]
    pairs = [*zip(patterns, shapes, strict=True)]
    pairs += zip((r.dims for r in definition.results), call.outs, strict=False)
    for dims, shape in pairs:
        if shape is not None and dims != ("...",):
            _name_dims(call, dims, shape, scope, later)
    for text, extent in later:
        wanted = _expression(parse_dim(text), scope)
        if wanted is not None:
            call.system.equate(wanted, extent)
    return scope


def _name_dims(
    call: Call,
    dims: tuple[str, ...],
    shape: Shape,
    scope: Scope,
    later: list[tuple[str, Extent]],
) -> None:
    star = next((i for i, d in enumerate(dims) if d.startswith("*")), None)
    if star is not None:
        end = len(shape) - (len(dims) - star - 1)
        middle = shape[star:end]
        call.same(scope.setdefault(dims[star], middle), middle)
        dims, shape = dims[:star] + dims[star + 1 :], shape[:star] + shape[end:]
    for text, extent in zip(dims, shape, strict=True):
        if not text.isidentifier():
            later.append((text, extent))
        else:
            call.system.equate(scope.setdefault(text, extent), extent)


def _expression(dim: Dim, scope: Scope) -> Extent | None:
    total = Extent.number(0)
    for monomial, coefficient in terms(dim).items():
        term = Extent.number(coefficient)
        for atom in monomial:
            if not isinstance(atom, str) or atom not in scope:
                return None
            term = term * scope[atom]
        total = total + term
    return total


def _by_value(call: Call) -> None:
    """For an operator that nothing is known of: equal dims around it stay equal."""
    first: dict[Dim, Extent] = {}
    given = [(t, s) for t, s in zip(call.types, call.ins, strict=True) if t and s is not None]
    for t, shape in [*given, *zip(call.results, call.outs, strict=True)]:
        for dim, extent in zip(t.shape, shape, strict=True):
            call.system.equate(first.setdefault(dim, extent), extent)


def _numel(shape: Sequence[Extent]) -> Extent:
    total = Extent.number(1)
    for extent in shape:
        total = total * extent
    return total


def _broadcast(call: Call, operands: Sequence[int], out: Shape, result: TensorType) -> None:
    for index in operands:
        t, shape = call.type(index), call.operand(index)
        for i in range(1, len(shape) + 1):
            if t.shape[-i] != 1 or result.shape[-i] == 1:
                call.system.equate(shape[-i], out[-i])


def _pointwise(call: Call, scope: Scope) -> None:
    _broadcast(call, range(len(call.ins)), call.outs[0], call.results[0])


def _reshape(call: Call, scope: Scope) -> None:
    x, out = call.operand(0), call.outs[0]
    call.same(call.extents["shape"], out)
    before, after = call.type(0).shape, call.results[0].shape
    for side in (1, -1):  # equal axes at either end are the same axes
        pairs = zip(before[::side], after[::side], x[::side], out[::side], strict=False)
        for given, wanted, mine, theirs in pairs:
            if given != wanted:
                break
            call.system.equate(mine, theirs)
    call.system.equate(_numel(x), _numel(out))


def _permute(call: Call, scope: Scope) -> None:
    call.same([call.operand(0)[d] for d in call.attrs["dims"]], call.outs[0])


def _expand(call: Call, scope: Scope) -> None:
    call.same(call.extents["shape"], call.outs[0])
    _broadcast(call, [0], call.outs[0], call.results[0])


def _slice(call: Call, scope: Scope) -> None:
    axis = axis_of(call.attrs["axis"], call.type(0).rank)
    x, out = call.operand(0), call.outs[0]
    call.same(x[:axis] + x[axis + 1 :], out[:axis] + out[axis + 1 :])
    start, end, step = call.extents["start"], call.extents["end"], call.attrs["step"]
    call.system.at_most(end, x[axis])
    first, last, taken = call.attrs["start"], call.attrs["end"], call.results[0].shape[axis]
    over = taken * step - (last - first)  # 0:63:2 takes 32 elements, one step beyond its end
    spare = Extent.number(over if isinstance(over, int) else 0)
    call.system.equate(end + spare, start + Extent.number(step) * out[axis])


def _slice_scatter(call: Call, scope: Scope) -> None:
    axis = axis_of(call.attrs["axis"], call.type(0).rank)
    x, part = call.operand(0), call.operand(1)
    call.same(x, call.outs[0])
    call.same(x[:axis] + x[axis + 1 :], part[:axis] + part[axis + 1 :])
    call.system.at_most(call.extents["end"], x[axis])
    call.system.equate(call.extents["end"], call.extents["start"] + part[axis])


def _concat(call: Call, scope: Scope) -> None:
    axis = axis_of(call.attrs["axis"], call.type(0).rank)
    total = Extent.number(0)
    out = call.outs[0]
    for index in range(len(call.ins)):
        x = call.operand(index)
        call.same(x[:axis] + x[axis + 1 :], out[:axis] + out[axis + 1 :])
        total = total + x[axis]
    call.system.equate(total, out[axis])


def _split(call: Call, scope: Scope) -> None:
    axis = axis_of(call.attrs["axis"], call.type(0).rank)
    x = call.operand(0)
    total = Extent.number(0)
    for size, out in zip(call.extents["sizes"], call.outs, strict=True):
        call.same(x[:axis] + x[axis + 1 :], out[:axis] + out[axis + 1 :])
        call.system.equate(size, out[axis])
        total = total + size
    call.system.equate(total, x[axis])


def _stack(call: Call, scope: Scope) -> None:
    out = call.outs[0]
    for index in range(len(call.ins)):
        call.same(call.operand(index), out[1:])
    if not call.in_weights:  # in a weight expression, operands are dropped
        call.system.equate(out[0], Extent.number(len(call.ins)))


def _gather(call: Call, scope: Scope) -> None:
    x, index = call.operand(0), call.operand(1)
    axis = axis_of(call.attrs["axis"], call.type(0).rank)
    call.same(index, call.outs[0] if call.op == "gather" else index)
    for i, (wanted, there) in enumerate(zip(index, x, strict=True)):
        if i != axis:
            call.system.at_most(wanted, there)
    if call.op == "scatter":
        call.same(x, call.outs[0])
        _broadcast_into(call, 2, index, call.type(1))


def _broadcast_into(call: Call, operand: int, out: Shape, result: TensorType) -> None:
    _broadcast(call, [operand], out, result)


def _take(call: Call, scope: Scope) -> None:
    x, index, out = call.operand(0), call.operand(1), call.outs[0]
    axis = axis_of(call.attrs["axis"], call.type(0).rank)
    call.same([*x[:axis], *index, *x[axis + 1 :]], out)


def _index_put(call: Call, scope: Scope) -> None:
    x, index = call.operand(0), call.operand(1)
    call.same(x, call.outs[0])
    target = call.type(0).with_shape((*call.type(1).shape, *call.type(0).shape[1:]))
    _broadcast(call, [2], [*index, *x[1:]], target)


def _full(call: Call, scope: Scope) -> None:
    call.same(call.extents["shape"], call.outs[0])


def _arange(call: Call, scope: Scope) -> None:
    call.system.equate(call.extents["end"], call.extents["start"] + call.outs[0][0])


def _matmul(call: Call, scope: Scope) -> None:
    a, b, out = call.operand(0), call.operand(1), call.outs[0]
    call.system.equate(a[-1], b[-2])
    call.same([a[-2], b[-1]], out[-2:])
    batch = call.results[0].with_shape(call.results[0].shape[:-2])
    for index, shape in ((0, a), (1, b)):
        dims = call.type(index).shape[:-2]
        for i in range(1, len(dims) + 1):
            if dims[-i] != 1 or batch.shape[-i] == 1:
                call.system.equate(shape[-2 - i], out[-2 - i])


def _einsum(call: Call, scope: Scope) -> None:
    operands, result = einsum_terms(call.attrs["eq"])
    letters: dict[str, Extent] = {}
    shapes = [call.operand(i) for i in range(len(call.ins))]
    for term, shape in zip((*operands, result), (*shapes, call.outs[0]), strict=True):
        for letter, extent in zip(term, shape, strict=True):
            call.system.equate(letters.setdefault(letter, extent), extent)


def _reduce(call: Call, scope: Scope) -> None:
    rank = call.type(0).rank
    axes = call.attrs["axes"] if "axes" in call.attrs else (call.attrs["axis"],)
    gone = {axis_of(a, rank) for a in axes}
    keep = bool(call.attrs["keepdims"])
    kept = [x for i, x in enumerate(call.operand(0)) if i not in gone]
    out = [x for i, x in enumerate(call.outs[0]) if not (keep and i in gone)]
    call.same(kept, out)


def _rope(call: Call, scope: Scope) -> None:
    x, positions = call.operand(0), call.operand(1)
    call.same(x, call.outs[0])
    call.same(x[:2], positions)
    call.system.equate(x[-1], Extent.number(2) * scope["r"])


def _heads_over_groups(call: Call, many: Extent, few: Extent, ratio: tuple[Dim, Dim]) -> None:
    """Keep the number of query heads that share a key head."""
    heads, groups = ratio
    if isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups == 0:
        call.system.equate(many, Extent.number(heads // groups) * few)


def _attention(call: Call, scope: Scope) -> None:
    ratio = (call.type(0).shape[2], call.type(1).shape[2])
    _heads_over_groups(call, scope["h"], scope["g"], ratio)


def _sdpa(call: Call, scope: Scope) -> None:
    q, k = call.type(0).shape[:-2], call.type(1).shape[:-2]
    for i, (mine, theirs) in enumerate(zip(scope["*b"], scope["*c"], strict=True)):
        if q[i] == k[i]:
            call.system.equate(mine, theirs)
        else:
            _heads_over_groups(call, mine, theirs, (q[i], k[i]))
    if len(call.ins) > 3 and call.ins[3] is not None:
        scores = call.type(0).with_shape((*q, call.type(0).shape[-2], call.type(1).shape[-2]))
        _broadcast(call, [3], [*scope["*b"], scope["s"], scope["t"]], scores)


def _mla(call: Call, scope: Scope) -> None:
    call.system.equate(scope["m"], scope["h"] * scope["n"] + scope["h"] * scope["v"])


def _paged_mla(call: Call, scope: Scope) -> None:
    call.system.equate(scope["w"], scope["h"] * scope["d"] + scope["h"] * scope["v"])


def _route(call: Call, scope: Scope) -> None:
    groups, keep = call.attrs["groups"], call.attrs["keep"]
    needed = -(-call.attrs["top_k"] // keep)
    if call.attrs["group_score"] == "top2" and keep < groups:
        needed = max(needed, 2)
    call.system.divisible(scope["e"], groups, needed * groups)


def _topk(call: Call, scope: Scope) -> None:
    call.system.divisible(scope["d"], 1, call.attrs["k"])


def _experts(call: Call, scope: Scope) -> None:
    call.system.equate(scope["g"], Extent.number(2) * scope["i"])


def _dispatch(call: Call, scope: Scope) -> None:
    call.system.equate(scope["r"], scope["m"] * scope["k"])


def _dequantize(call: Call, scope: Scope) -> None:
    for extent, count, block in zip("nk", "pq", call.attrs["block"], strict=True):
        call.system.counted(scope[count], scope[extent], block)


_SPECIAL: dict[str, Callable[[Call, Scope], None]] = {
    **dict.fromkeys(("sum", "mean", "amax", "amin", "argmax"), _reduce),
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "slice": _slice,
    "slice_scatter": _slice_scatter,
    "concat": _concat,
    "split": _split,
    "stack": _stack,
    "gather": _gather,
    "scatter": _gather,
    "take": _take,
    "index_put": _index_put,
    "full": _full,
    "arange": _arange,
    "matmul": _matmul,
    "einsum": _einsum,
    "rope": _rope,
    "attention": _attention,
    "sdpa": _sdpa,
    "mla_attention": _mla,
    "paged_mla_attention": _paged_mla,
    "route": _route,
    "topk": _topk,
    "experts": _experts,
    "dispatch": _dispatch,
    "combine": _dispatch,
    "dequantize_block": _dequantize,
    "histc": lambda call, scope: None,
}


def sizes_of(value: Any, system: System, label: str = "") -> Any:
    """Extents for the dims of an attribute: one, or a list."""
    if isinstance(value, tuple):
        return [sizes_of(v, system, label) for v in value]
    assert isinstance(value, (int, Sym))
    return system.extent(value, label)
