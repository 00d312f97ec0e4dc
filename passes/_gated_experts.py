"""The proof that a region computes the weighted sum of gated experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

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
"""Three spellings: every expert under a mask, weights gathered, rows sorted by expert."""


BIG = 1 << 18
"""Expert weights of more elements are proved at reduced widths."""


def emit(
    b: GraphBuilder,
    x: Operand,
    idx: Operand,
    w: Operand,
    gate_up: Operand,
    down: Operand,
    act: str,
    y: Value,
) -> Operand:
    (out,) = b.call("experts", x, idx, b.as_type(w, DType.f32), gate_up, down, act=act)
    return b.as_shape(out, y.type.shape)


def prove(m: Match, place: Sequence[int]) -> dict[str, Any] | str:
    """The activation and arrangement under which the region is experts, or why there is none."""
    region: lift.Region = m.region
    e, a, d = m.down.type.shape
    hidden = m.x.type.shape[-1]
    inner = a if d == hidden else d
    small: dict[int, int] | None = {}
    if e * a * d > BIG:
        i = symbol("i")
        least = {"e": int(m.idx.type.shape[-1])}
        small = lift.shrunk_sizes({"e": e, "i": inner, "d": hidden}, [2 * i], least)
    if small is None:
        return "no small widths are consistent with its own"
    graph = lift.resized(widened(region.graph), small)
    inputs = [*graph.inputs]
    y = graph.outputs[0]
    assert isinstance(y, Value)
    experts = small.get(e, e)
    cases = [
        lift.Case(sizes, _tensors(inputs, place, sizes, experts, seed))
        for seed, sizes in enumerate(lift.assignments(graph))
    ]
    why = "its weights are not [e,2i,d] and [e,d,i], nor their transposes"
    count = len(m.gate_up)
    for act, transposed, swapped in product(ACTIVATIONS, (False, True), (False, True)[:count]):
        facts = {"act": act, "transposed": transposed, "swapped": swapped}

        def body(b: GraphBuilder, *xs: Value, facts: Any = facts) -> Operand:
            x, idx, w, down, *gate_up = (xs[i] for i in place)
            parts: list[Operand] = [*gate_up, down]
            if facts["transposed"]:
                parts = [b.call("permute", p, dims=(0, 2, 1))[0] for p in parts]
            *first, last = parts[::-1][1:] + parts[-1:] if facts["swapped"] else parts
            (both,) = b.call("concat", *first, axis=1) if len(first) == 2 else first
            return emit(b, x, idx, w, both, last, facts["act"], y)

        try:
            candidate = lift.build(inputs, body)
        except TypeMismatch:
            continue
        why = lift.prove(graph, candidate, cases)
        if not why:
            return facts
    return f"it is no sum of gated experts ({why})"


def _tensors(
    inputs: Sequence[Value], place: Sequence[int], sizes: Mapping[str, int], experts: int, seed: int
) -> list[torch.Tensor]:
    found = []
    for i, value in enumerate(inputs):
        if i == place[1]:
            found.append(distinct(lift.at_sizes(value, sizes), experts, seed))
            continue
        fan_in = int(value.type.shape[-1]) if i in place[3:] else 1  # type: ignore[arg-type]
        found.append(lift.normal(value, sizes, 10 * seed + i, fan_in**-0.5))
    return found


def distinct(shape: tuple[int, ...], experts: int, seed: int) -> torch.Tensor:
    """Random choices of experts, no expert twice for one token."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand((*shape[:-1], experts), generator=generator).argsort(-1)
    return order[..., : shape[-1]].contiguous()
