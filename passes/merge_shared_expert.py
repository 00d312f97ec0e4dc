"""Make the shared expert of a layer one more of its experts, that every token chooses.

What           the gated MLP that is added to the routed experts' sum becomes n_shared more experts
               of the routed ones' width, appended to their weights; the router gives them to every
               token, with weight 1.
Why it pays    one kernel for gate and up and one for down and the weighted sum serve both: a decode
               step has a GEMM less each way, no activation, no sum of its own.
Preconditions  stage CANONICAL; both read the same value; the activation is silu; the shared
               expert's rows are a multiple of the routed experts'; all are kept in one element
               type or format, which a stack of both would lose; the choices come from a router
               and go nowhere else; no weight of either is read elsewhere (it would be stored
               twice). Runs before entries part: all read one stack.
Before         graph main(%x: f32[N,8], @r: f32[4,8], @e.gate_up: f32[4,6,8], @e.down: f32[4,8,3],
                 @s.gate: f32[3,8], @s.up: f32[3,8], @s.down: f32[8,3]) {
                 %idx, %w = route %x, @r {score="sigmoid", top_k=2, normalise=true}
                   : i64[N,2], f32[N,2]
                 %r = experts %x, %idx, %w, @e.gate_up, @e.down : f32[N,8]
                 %g = linear %x, @s.gate : f32[N,3]
                 %u = linear %x, @s.up : f32[N,3]
                 %h = swiglu %g, %u : f32[N,3]
                 %s = linear %h, @s.down : f32[N,8]
                 %y = add %r, %s : f32[N,8]
                 return %y
               }
After          graph main(%x: f32[N,8], @r: f32[4,8], @e.gate_up.with_shared: f32[5,6,8],
                 @e.down.with_shared: f32[5,8,3]) {
                 %route, %route_1 = route %x, @r
                   {score="sigmoid", top_k=2, normalise=true, shared=1} : i64[N,3], f32[N,3]
                 %y = experts %x, %route, %route_1, @e.gate_up.with_shared, @e.down.with_shared
                   {act="silu"} : f32[N,8]
                 return %y
               }

The scaling factor of routed experts is in their weights already (DeepSeek-V3, eq. 12-13), so the
shared ones weigh 1. The sum over all is in fp32, rounded once; apart it was rounded twice more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsc.ir.analyses import weight_uses
from dsc.ir.ops.moe import is_plain
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.weights import apply, kept_in
from dsc.rewrite import pattern as patterns
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.driver import apply_rules
from dsc.rewrite.rule import Facts, Match, Reject, Result, RewriteBuilder, Rule, reject

_PARTS = ("gate_up", "down", "gate", "up", "out")
_LAYER = """graph g(%x: f32[B,S,6], %v: f32[B,S,6], @r: f32[3,6], @b: f32[3], @gu: f32[3,8,6],
  @dn: f32[3,6,4], @g: f32[{rows},6], @u: f32[{rows},6], @d: f32[6,{rows}]) {{
  %g = linear %{read}, @g
  %u = linear %{read}, @u
  %h = swiglu %g, %u
  %s = linear %h, @d
  %idx, %w = route %x, @r{bias} {{score="softmax", top_k=2, normalise=true, scale=2.0}}
  %r = experts %x, %idx, {weights}, @gu, @dn {{act="{act}"}}
  %y = add {sum}
  return %y{more}
}}"""


def _layer(rows: int = 8, read: str = "x", act: str = "silu", more: str = "", **parts: str) -> str:
    given = {"bias": "", "weights": "%w", "sum": "%s, %r", **parts}
    return _LAYER.format(rows=rows, read=read, act=act, more=more, **given)


class SharedExpert(Rule):
    """experts(x, route(t), e) + mlp(x, s)  ==>  experts(x, route(t, shared=n), [e, s])."""

    tolerance = 1e-5
    examples = (_layer(4), _layer(12), _layer(sum="%r, %s"), _layer(bias=", @b"))
    near_misses: ClassVar[Mapping[str, str]] = {
        "its rows are no multiple of an expert's": _layer(6),
        "it reads another value": _layer(read="v"),
        "the experts' activation is another": _layer(act="gelu"),
        "its weights are read elsewhere": _layer(more=", @d"),
        "its result is read elsewhere": _layer(more=", %s"),
        "the choices are read elsewhere": _layer(more=", %idx"),
        "the weights of the choices are not the router's": _layer(weights="%idx").replace(
            "%r = experts %x, %idx, %idx", "%o = cast %idx {dtype=f32}\n  %r = experts %x, %idx, %o"
        ),
    }

    def pattern(self, p: patterns.Names) -> patterns.Pattern:
        """The sum of both, in either order."""
        gate_up, down, gate, up, out = (p.weight(name) for name in _PARTS)
        hidden = p.swiglu(p.linear(p.x, gate), p.linear(p.x, up))
        routers = [
            p.route(*given).named("route") for given in ((p.t, p.router), (p.t, p.router, p.bias))
        ]
        idx, w = (p.either(*(r[i] for r in routers)) for i in range(2))
        return p.add(p.experts(p.x, idx, w, gate_up, down).named("experts"), p.linear(hidden, out))

    def check(self, m: Match) -> Facts | Reject:
        """Widths divide, activations agree, and nobody else needs the weights."""
        inner, rows = m.down.type.shape[2], m.gate.type.shape[0]
        if m.experts.attrs["act"] != "silu":
            return reject(f"the experts' activation is {m.experts.attrs['act']}, not silu", m.down)
        if not is_plain(m.experts.attrs):
            return reject("the experts' gate has limits or factors", m.down)
        if m.down.type.shape[0] != m.router.type.shape[0] + m.route.attrs["shared"]:
            return reject("the stack holds other experts than the router's", m.router, m.down)
        if not (isinstance(inner, int) and isinstance(rows, int)) or rows % inner:
            return reject(f"{rows} rows are no multiple of an expert's {inner}", m.gate)
        if m.up.type != m.gate.type or m.out.type.shape[::-1] != m.gate.type.shape:
            return reject("the shared expert's weights are no gated MLP", m.up, m.out)
        if len({m.get(name).type.dtype for name in _PARTS}) > 1:
            return reject("the weights differ in element type", m.down, m.out)
        kinds = {kept_in(m.scope.program.weights[m.get(name).name]) for name in _PARTS}
        if len(kinds) > 1:
            return reject(f"the weights are kept as {', '.join(sorted(kinds))}", m.down, m.out)
        reads = weight_uses(m.scope.program.entries.values())
        for name in _PARTS:
            if len(reads[m.get(name).name]) != 1:
                return reject("a weight is also read elsewhere", m.get(name))
        return {"count": rows // inner, "inner": inner}

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        """Append their weights to the stacks, and give them to every token."""
        n, inner = facts["count"], facts["inner"]
        width = m.down.type.shape[1]
        gate, up = (apply("reshape", b.expr(w), shape=(n, inner, width)) for w in (m.gate, m.up))
        down = apply("reshape", b.expr(m.out), shape=(width, n, inner))
        added = (apply("concat", gate, up, axis=1), apply("permute", down, dims=(1, 0, 2)))
        stacks = [
            b.weight(f"{w.name}.with_shared", apply("concat", b.expr(w), more, axis=0))
            for w, more in zip((m.gate_up, m.down), added, strict=True)
        ]
        attrs = {**m.route.attrs, "shared": n + m.route.attrs["shared"]}
        idx, w = b.call("route", *m.route.inputs, loc=m.route.loc, **attrs)
        return b.call("experts", m.x, idx, w, *stacks, act="silu")


@dataclass(frozen=True)
class MergeSharedExpert(Pass):
    """Merge every layer's shared expert, and let go of the weights it had."""

    needs = frozenset({Stage.CANONICAL})
    tolerance = 1e-5

    def run(self, program: Program, report: PassReport) -> Program:
        """One sweep."""
        merged = apply_rules(program, (SharedExpert(),), report)
        return merged if merged is program else merged.pruned()
