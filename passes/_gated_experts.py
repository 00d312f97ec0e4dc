"""The proof that a region computes the weighted sum of gated experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import inf
from typing import Any, TypeAlias

from dsc.errors import DscError
from dsc.ir.dims import symbol
from dsc.ir.graph import GraphBuilder, Operand, Value
from dsc.ir.lazy import torch
from dsc.ir.op import TypeMismatch
from dsc.ir.ops.moe import ACTIVATIONS
from dsc.ir.types import DType
from dsc.rewrite import lift
from dsc.rewrite.rule import Match
from dsc.rewrite.widen import widened

DENSE = """graph g(%x: f32[B,S,4], %idx: i64[N,2], %w: f32[N,2],
  @gu: f32[5,6,4], @dn: f32[5,4,3]) {{
  %t = reshape %x {{shape=[N,4]}}
  %a = full {{shape=[N,5], value=0.0, dtype=f32}}
  %b = scatter %a, %idx, %w {{axis=1}}
  %c = expand %t {{shape=[5,N,4]}}
  %d = permute @gu {{dims=[0,2,1]}}
  %e = matmul %c, %d
  %f, %g = split %e {{axis=2, sizes=[3,3]}}
  %u = {act} %f
  %h = {gated}
  %i = permute @dn {{dims=[0,2,1]}}
  %j = matmul %h, %i
  %k = permute %b {{dims=[1,0]}}
  %l = reshape %k {{shape=[5,N,1]}}
  %m = mul %j, %l
  %y = sum %m {{axes=[0]}}
  return %y
}}"""
BATCHED = """graph g(%x: bf16[N,4], %idx: i64[N,2], %w: f32[N,2],
  @gu: bf16[5,6,4], @dn: bf16[5,4,3]) {
  %o = reshape %x {shape=[N,1,4]}
  %p = expand %o {shape=[N,2,4]}
  %q = reshape %p {shape=[2*N,4,1]}
  %i = reshape %idx {shape=[2*N]}
  %a = take @gu, %i {axis=0}
  %b = matmul %a, %q
  %c = reshape %b {shape=[2*N,6]}
  %f, %g = split %c {sizes=[3,3]}
  %h = swiglu %f, %g
  %d = take @dn, %i {axis=0}
  %e = reshape %h {shape=[2*N,3,1]}
  %j = matmul %d, %e
  %k = reshape %j {shape=[2*N,4]}
  %l = cast %k {dtype=f32}
  %m = reshape %w {shape=[2*N,1]}
  %n = mul %l, %m
  %r = reshape %n {shape=[N,2,4]}
  %s = sum %r {axes=[1]}
  %y = cast %s {dtype=bf16}
  return %y
}"""
GROUPED = """graph g(%x: f32[N,4], %idx: i64[N,2], %w: f32[N,2],
  @gu: f32[5,4,6], @dn: f32[5,3,4]) {
  %i = reshape %idx {shape=[2*N]}
  %s, %o = sort %i {axis=0}
  %two = full {shape=[], value=2, dtype=i64}
  %t = div %o, %two
  %a = take %x, %t {axis=0}
  %c = histc %s {bins=5}
  %e = cumsum %c {axis=0}
  %b = grouped_mm %a, @gu, %e
  %f, %g = split %b {sizes=[3,3]}
  %h = swiglu %f, %g
  %j = grouped_mm %h, @dn, %e
  %v = reshape %w {shape=[2*N]}
  %u = take %v, %o {axis=0}
  %k = reshape %u {shape=[2*N,1]}
  %m = mul %j, %k
  %z = full {shape=[2*N], value=0, dtype=i64}
  %r = arange {start=0, end=2*N, dtype=i64}
  %inv = index_put %z, %o, %r
  %n = take %m, %inv {axis=0}
  %q = reshape %n {shape=[N,2,4]}
  %y = sum %q {axes=[1]}
  return %y
}"""
BIASED = """graph g(%x: f32[N,4], %idx: i64[N,2], %w: f32[N,2],
  @gu: f32[5,4,6], @gb: f32[5,6], @dn: f32[5,3,4], @db: f32[5,4]) {{
  %o = reshape %x {{shape=[N,1,4]}}
  %p = expand %o {{shape=[N,2,4]}}
  %q = reshape %p {{shape=[2*N,1,4]}}
  %i = reshape %idx {{shape=[2*N]}}
  %a = take @gu, %i {{axis=0}}
  %b = matmul %q, %a
  %c = reshape %b {{shape=[2*N,6]}}
  %ab = take @gb, %i {{axis=0}}
  %cb = add %c, %ab
  {parts}
  %seven = full {{shape=[], value=7.0, dtype=f32}}
  %less = full {{shape=[], value={least}, dtype=f32}}
  %alpha = full {{shape=[], value=1.702, dtype=f32}}
  %one = full {{shape=[], value=1.0, dtype=f32}}
  %fc = minimum %f, %seven
  %gl = maximum %g, %less
  %gc = minimum %gl, %seven
  %s = mul %fc, %alpha
  %t = sigmoid %s
  %u = mul %fc, %t
  %v = add %gc, %one
  %h = mul %v, %u
  %e = reshape %h {{shape=[2*N,1,3]}}
  %d = take @dn, %i {{axis=0}}
  %j = matmul %e, %d
  %k = reshape %j {{shape=[2*N,4]}}
  %kb = take @db, %i {{axis=0}}
  %l = add %k, %kb
  %m = reshape %w {{shape=[2*N,1]}}
  %n = mul %l, %m
  %r = reshape %n {{shape=[N,2,4]}}
  %y = sum %r {{axes=[1]}}
  return %y
}}"""
INTERLEAVED = """%f = slice %cb {axis=1, start=0, end=5, step=2}
  %g = slice %cb {axis=1, start=1, end=6, step=2}"""
"""Four spellings: every expert under a mask, weights gathered, rows sorted by expert, biases."""


LARGE = 1e4
"""Numbers beyond stand for what is masked, and limit nothing."""
BIG = 1 << 18
"""Expert weights of more elements are proved at reduced widths."""


def emit(
    b: GraphBuilder, m: Mapping[str, Any], weights: Sequence[Any], facts: Any, y: Value
) -> Operand:
    """experts over weights as `arranged` gives them, under the shape of what it replaces."""
    gate_up, down, *biases = weights
    w = b.as_type(m["w"], DType.f32)
    gate = facts["gate"]
    (out,) = b.call(
        "experts", m["x"], m["idx"], w, gate_up, down, *biases, act=facts["act"], **gate
    )
    return b.as_shape(out, y.type.shape)


Apply: TypeAlias = Callable[..., Any]
"""An operator on values of a graph, or on weight expressions."""


def arranged(
    call: Apply, gate_up: Sequence[Any], down: Any, biases: Sequence[Any], facts: Mapping[str, Any]
) -> list[Any]:
    """Weights as the operator wants them: [e,2i,d] and [e,d,i], then their biases, if any."""
    parts = [*gate_up, down]
    if facts["transposed"]:
        parts = [call("permute", each, dims=(0, 2, 1)) for each in parts]
    *first, last = parts
    if facts["swapped"]:
        first.reverse()
    both = call("concat", *first, axis=1) if len(first) == 2 else first[0]
    given = [None if at is None else biases[at] for at in facts["biases"]]
    if facts["interleaved"]:
        both = _parted(call, both)
        given[:1] = [each if each is None else _parted(call, each) for each in given[:1]]
    return [both, last, *given]


def _parted(call: Apply, rows: Any) -> Any:
    """Rows gate, up, gate, up, ... of each expert as all of the gate's, then all of up's."""
    experts, both, *rest = rows.type.shape
    pairs = call("reshape", rows, shape=(experts, both // 2, 2, *rest))
    apart = call("permute", pairs, dims=(0, 2, 1, *range(3, 3 + len(rest))))
    return call("reshape", apart, shape=(experts, both, *rest))


def _written(region: lift.Region) -> set[float]:
    """The numbers of a region: what limits and factors can be."""
    fills = (n for n in region.nodes if n.op == "full" and n.output.type.dtype.is_float)
    return {float(n.attrs["value"]) for n in fills if abs(n.attrs["value"]) < LARGE}


def _variants(region: lift.Region, count: int, biases: int) -> Iterator[dict[str, Any]]:
    """Activations, arrangements and gates to try; the numbers of a gate are there for something."""
    written = _written(region)
    limits = [inf, *sorted(x for x in written if x > 0 and -x in written)]
    factors = [1.0, *sorted(x for x in written if x > 0 and x not in (1.0, *limits))]
    shifts = [0.0, *sorted(x for x in written if x != 0.0 and abs(x) not in limits)]
    gates = [
        {"limit": limit, "alpha": alpha, "shift": shift}
        for limit, alpha, shift in product(limits[::-1], factors[::-1], shifts[::-1])
    ]
    apart = any(n.op == "slice" and n.attrs["step"] == 2 for n in region.nodes)
    both = (False, True)
    orders: list[tuple[int | None, ...]] = [()]
    if biases:
        orders = [(0,), (None, 0)] if biases == 1 else [(0, 1), (1, 0)]
    arrangements = product(orders, both, both[:count])
    for gate, act, (order, transposed, swapped) in product(gates, ACTIVATIONS, [*arrangements]):
        yield {
            "gate": gate, "biases": order, "act": act, "transposed": transposed,
            "swapped": swapped, "interleaved": apart,
        }  # fmt: skip


def prove(m: Match, place: Sequence[int]) -> dict[str, Any] | str:
    """The activation and arrangement under which the region is experts, or why there is none.

    `place` tells which leaves are x, idx, w, down, gate and up (one or two), and the biases.
    """
    region: lift.Region = m.region
    e, a, d = m.down.type.shape
    hidden = m.x.type.shape[-1]
    inner = a if d == hidden else d
    small: dict[int, int] | None = {}
    if e * a * d > BIG:
        i = symbol("i")
        least = {"e": int(m.idx.type.shape[-1])}
        ends = [2 * i - 1] if any(n.op == "slice" for n in region.nodes) else []
        small = lift.shrunk_sizes({"e": e, "i": inner, "d": hidden}, [2 * i, *ends], least)
    if small is None:
        return "no small widths are consistent with its own"
    graph = lift.resized(widened(region.graph), small)
    inputs = [*graph.inputs]
    y = graph.outputs[0]
    assert isinstance(y, Value)
    experts = small.get(e, e)
    why = "its weights are not [e,2i,d] and [e,d,i], nor their transposes"
    count = len(m.gate_up)
    spread = 2 * max(map(abs, _written(region)), default=0.5)
    cases = [
        lift.Case(sizes, _tensors(inputs, place, sizes, experts, seed, spread))
        for seed, sizes in enumerate(lift.assignments(graph))
    ]
    try:
        wanted = lift.run(graph, cases[0])
    except (DscError, RuntimeError, LookupError, TypeError, ValueError) as problem:
        return f"it does not run: {str(problem).splitlines()[0]}"
    for facts in _variants(region, count, len(m.biases)):

        def body(b: GraphBuilder, *xs: Value, facts: Any = facts) -> Operand:
            x, idx, w, down, *others = (xs[i] for i in place)

            def call(op: str, *operands: Operand, **attrs: Any) -> Operand:
                return b.call(op, *operands, **attrs)[0]

            weights = arranged(call, others[:count], down, others[count:], facts)
            return emit(b, {"x": x, "idx": idx, "w": w}, weights, facts, y)

        try:
            candidate = lift.build(inputs, body)
        except TypeMismatch:
            continue
        found = lift.run(candidate, cases[0])
        why = lift.differ(wanted[0], found[0]) or lift.prove(graph, candidate, cases)
        if not why:
            return facts
    return f"it is no sum of gated experts ({why})"


def _tensors(
    inputs: Sequence[Value],
    place: Sequence[int],
    sizes: Mapping[str, int],
    experts: int,
    seed: int,
    spread: float,
) -> list[torch.Tensor]:
    """Random inputs; every other time the tokens are as large as `spread`, so that limits bite."""
    found = []
    for i, value in enumerate(inputs):
        if i == place[1]:
            found.append(distinct(lift.at_sizes(value, sizes), experts, seed))
            continue
        scale = spread if seed % 2 and i == place[0] else 1.0
        if value.type.rank == 3 and i in place[3:]:
            scale = int(value.type.shape[-1]) ** -0.5  # type: ignore[arg-type]
        found.append(lift.normal(value, sizes, 10 * seed + i, scale))
    return found


def distinct(shape: tuple[int, ...], experts: int, seed: int) -> torch.Tensor:
    """Random choices of experts, no expert twice for one token."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand((*shape[:-1], experts), generator=generator).argsort(-1)
    return order[..., : shape[-1]].contiguous()
