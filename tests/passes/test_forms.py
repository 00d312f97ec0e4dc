"""Forms beyond the evidence that rules carry: what each becomes, or stays and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dsc.ir.graph import Node
from dsc.passes.raise_append import Append
from dsc.passes.raise_mla import MlaAttention
from dsc.passes.raise_router import Route
from dsc.rewrite.rule import Rule
from tests.rewrite.harness import compare, fire, run_example


def raised(rule: Rule, text: str, op: str, attrs: Mapping[str, Any]) -> Node:
    """The one node that a text becomes, which computes the same and has these attributes."""
    before, after, report = fire(rule, text)
    assert report.fired == {rule.name: 1}, report.missed
    (found,) = (n for n in after.entries["main"].nodes if n.op == op)
    assert {key: found.attrs[key] for key in attrs} == attrs
    for seed in range(2):
        wanted, got = (run_example(p, rule.sample, seed) for p in (before, after))
        assert not compare(wanted, got, rule.tolerance)
    return found


def stays(rule: Rule, text: str, reason: str) -> None:
    """Nothing is raised, and that for one reason; for none where it is not even nearly the form."""
    before, after, report = fire(rule, text)
    assert after is before
    reasons = [why for _, _, why in report.missed]
    assert all(reason in why for why in reasons), reasons
    assert bool(reasons) == bool(reason)


# --- routers --------------------------------------------------------------------------------------

ROUTE = """graph g(%x: {dtype}[{rows},8], @gate: f32[6,8]{more}) {{
  %t = {tokens}
  %l = linear %t, @gate{bias}
  %s = {score}
  %c = {choice}
  %v, %idx = topk %c {{k={k}}}
  %w = {weights}
  %two = full {{shape=[], value=2.0, dtype=f32}}
  %sum = sum %w {{axes=[-1], keepdims=true}}
  %share = div %w, %sum
  {last}
  return {out}
}}"""
PLAIN: dict[str, Any] = {
    "dtype": "f32", "rows": "N", "more": "", "bias": "", "k": 2, "out": "%idx, %y",
    "tokens": "cast %x {dtype=f32}", "score": "softmax %l {axis=-1}", "choice": "abs %s",
    "weights": "gather %s, %idx {axis=1}", "last": "%y = mul %w, %two",
}  # fmt: skip
SIGMOID: dict[str, Any] = {"score": "sigmoid %l"}
BIASED: dict[str, Any] = {"more": ", %b: f32[6]", "choice": "add %s, %b"}
ROUTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "softmax": ({}, {"score": "softmax", "normalise": False, "scale": 2.0}),
    "sigmoid": (SIGMOID, {"score": "sigmoid", "normalise": False, "scale": 2.0}),
    "shares": ({"last": "%y = mul %share, %two"}, {"normalise": True, "scale": 2.0}),
    "shares of sigmoids": (
        {**SIGMOID, "last": "%y = mul %two, %share"}, {"score": "sigmoid", "normalise": True},
    ),
    "a bias": ({**SIGMOID, **BIASED}, {"score": "sigmoid", "top_k": 2}),
    "a bias of logits": ({"more": ", %b: f32[6]", "bias": ", %b"}, {"score": "softmax"}),
    "one expert": ({"k": 1}, {"top_k": 1, "scale": 2.0, "normalise": False}),
    "every expert": ({"k": 6}, {"top_k": 6, "groups": 1, "keep": 1}),
    "16-bit tokens": ({"dtype": "bf16"}, {"score": "softmax"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_are_read_off(name: str) -> None:
    changes, attrs = ROUTERS[name]
    route = raised(Route(), ROUTE.format(**PLAIN | changes), "route", attrs)
    assert len(route.operands) == (3 if name.startswith("a bias") else 2)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "a bias for each token": (
        {"more": ", %b: f32[N,6]", "choice": "add %s, %b"},
        "the choice depends on more than x, gate and bias",
    ),
    "two biases": (
        {
            "more": ", %b: f32[6], %d: f32[6]",
            "score": "sigmoid %l\n  %e = add %s, %b",
            "choice": "add %e, %d",
        },
        "the choice depends on more than x, gate and bias",
    ),
    "another gate as well": (
        {"more": ", @other: f32[6,8]", "choice": "linear %t, @other"},
        "no variant chooses the same experts (2 of 6 experts)",
    ),
    "two gates": (
        {"more": ", @other: f32[6,8]", "score": "linear %t, @other", "choice": "add %l, %s"},
        "",
    ),
    "no gate": ({"choice": "cast %x {dtype=f32}"}, ""),
    "the smallest scores": ({"choice": "neg %s"}, "no variant chooses the same experts (2 of 6"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_router_stays(name: str) -> None:
    changes, reason = OTHERS[name]
    stays(Route(), ROUTE.format(**PLAIN | changes), reason)


# --- caches ---------------------------------------------------------------------------------------

GROWN = """graph g(%lengths: {lengths}, %past: f32[{past}], %new: f32[{new}]{more}) {{
  {before}
  %y = {grown}
  return %y as "present" updates %past
}}"""
CONCAT: dict[str, Any] = {
    "lengths": "i64[B]", "past": "B,P,4", "new": "B,S,4", "more": "", "before": "",
    "grown": "concat %past, %new {axis=1}",
}  # fmt: skip
SCATTER: dict[str, Any] = {
    "before": """%l = reshape %lengths {shape=[B,1]}
  %r = arange {start=0, end=S, dtype=i64}
  %p = add %l, %r
  %q = reshape %p {shape=[B,S,1]}
  %i = expand %q {shape=[B,S,4]}
  %z = full {shape=[B,S,4], value=0.0, dtype=f32}
  %g = concat %past, %z {axis=1}""",
    "grown": "scatter %g, %i, %new {axis=1}",
}
MORE = "what is appended depends on more than cache, new rows and lengths"
CACHES: dict[str, tuple[dict[str, Any], str]] = {
    "lengths of 32 bits": ({"lengths": "i32[B]"}, "the graph has no input lengths: i64[b]"),
    "lengths of another batch": ({"lengths": "i64[N]"}, "the graph has no input lengths: i64[b]"),
    "rows of several axes": ({"past": "B,P,2,4", "new": "B,S,2,4"}, ""),
    "two parts": (
        {"more": ", %also: f32[B,S,4]", "grown": "concat %past, %new, %also {axis=1}"}, ""
    ),
    "another axis": (
        {"new": "B,P,4", "grown": "concat %past, %new {axis=2}"}, "a difference of"
    ),
    "rows of an input": (
        {**SCATTER, "more": ", %at: i64[B,S,4]", "grown": "scatter %g, %at, %new {axis=1}"}, MORE
    ),
    "fewer rows than there is room": (
        {
            "before": SCATTER["before"].replace("full {shape=[B,S,4]", "full {shape=[B,S+1,4]"),
            "grown": SCATTER["grown"],
        },
        "cache and new rows do not add up",
    ),
}  # fmt: skip


def test_new_rows_after_the_cached_are_appended() -> None:
    raised(Append(), GROWN.format(**CONCAT), "append", {})
    raised(Append(), GROWN.format(**CONCAT | SCATTER), "append", {})


@pytest.mark.parametrize("name", CACHES)
def test_what_is_no_append_stays(name: str) -> None:
    changes, reason = CACHES[name]
    stays(Append(), GROWN.format(**CONCAT | changes), reason)


# --- latent attention -----------------------------------------------------------------------------

MLA = """graph g(%qn: f32[B,S,2,{nope}], %qr: f32[B,S,2,{rope}], %c: f32[B,T,6], %r: f32[B,T,4],
  %lengths: i64[B], {weight}kv_b: f32[16,6]{more}) {{
  %a = linear %c, {weight}kv_b{bias}
  %b = reshape %a {{shape=[B,T,2,8]}}
  %kn, %v = split %b {{sizes=[3,5]}}
  %d = reshape %r {{shape=[B,T,1,4]}}
  %kr = expand %d {{shape=[B,T,2,4]}}
  %q = concat {queries}
  %k = concat {keys}
  %y = attention %q, %k, {values}, %lengths {{causal=true, scale=0.25}}
  return %y
}}"""
LATENT: dict[str, Any] = {
    "nope": 3, "rope": 4, "weight": "@", "more": "", "bias": "", "queries": "%qn, %qr {axis=3}",
    "keys": "%kn, %kr {axis=-1}", "values": "%v",
}  # fmt: skip
ELSEWHERE = "keys and values are not parts of one projection"
LATENTS: dict[str, tuple[dict[str, Any], str]] = {
    "parts of other widths": (
        {"nope": 4, "rope": 3}, "queries and keys are concatenated from parts of different widths"
    ),
    "a bias": ({"more": ", @b: f32[16]", "bias": ", @b"}, ELSEWHERE),
    "no weight": ({"weight": "%"}, ELSEWHERE),
    "other values": ({"more": ", %other: f32[B,T,2,5]", "values": "%other"}, ELSEWHERE),
    "values of their own": (
        {"more": ", @w: f32[10,6]", "values": "%vv",
         "queries": "%qn, %qr {axis=3}\n %o = linear %c, @w\n %vv = reshape %o {shape=[B,T,2,5]}"},
        ELSEWHERE,
    ),
    "keys for each head": (
        {"more": ", %other: f32[B,T,2,4]", "keys": "%kn, %other {axis=3}"},
        "no value of the shape of rope leads to it",
    ),
    "the rope comes first": (
        {"nope": 4, "rope": 3, "queries": "%qn, %qr {axis=3}", "keys": "%kr, %kn {axis=3}"},
        ELSEWHERE,
    ),
}  # fmt: skip


def test_latent_attention_is_one_operator() -> None:
    found = raised(MlaAttention(), MLA.format(**LATENT), "mla_attention", {"scale": 0.25})
    assert [str(x) for x in found.operands] == ["%qn", "%qr", "%c", "%r", "@kv_b", "%lengths"]


@pytest.mark.parametrize("name", LATENTS)
def test_what_is_no_latent_attention_stays(name: str) -> None:
    changes, reason = LATENTS[name]
    stays(MlaAttention(), MLA.format(**LATENT | changes), reason)
