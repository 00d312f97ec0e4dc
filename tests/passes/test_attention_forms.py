"""Attention in the IR: spellings that become one operator, and what is refused in which words."""

from __future__ import annotations

import pytest

from dsc.ir.types import MAX_RANK, DType
from dsc.passes.raise_attention import Attention
from tests.rewrite.harness import compare, fire, run_example

HEAD = "%q: f32[B,2,S,4], %k: f32[B,2,T,4], %v: f32[B,2,T,6]"
CONSTANTS = """%half = full {shape=[], value=0.5, dtype=f32}
 %minus = full {shape=[], value=-0.5, dtype=f32}
 %inf = full {shape=[], value=-inf, dtype=f32}
 %low = full {shape=[], value=-10000.0, dtype=f32}
 %cap = full {shape=[], value=3.0, dtype=f32}
 %bias = full {shape=[], value=-9999.0, dtype=f32}
 %nought = full {shape=[], value=0.0, dtype=f32}
 %i = arange {start=T-S, end=T, dtype=i64}
 %c = reshape %i {shape=[S,1]}
 %j = arange {start=0, end=T, dtype=i64}
 %seen = le %j, %c
 %hidden = gt %j, %c
 %added = where %seen, %nought, %inf"""
PRODUCT = "%t = permute %k {dims=[0,1,3,2]}\n %s = matmul %q, %t"


def attention(
    between: str = "%u = mul %s, %half",
    *,
    head: str = HEAD,
    product: str = PRODUCT,
    softmax: str = "%p = softmax %u {axis=-1}",
    result: str = "%y = matmul %p, %v\n return %y",
) -> str:
    text = f"graph g({head}) {{ {CONSTANTS}\n {product}\n {between}\n {softmax}\n {result} }}"
    return text.replace("T", "S+P") if "T-S" in text else text


SIXTEEN = HEAD.replace("f32", "bf16")
COLUMN = "%k2 = reshape @k0 {shape=[1,2,1,1]}\n %k1 = expand %k2 {shape=[B,2,S,1]}\n "
SINKS = "%p1 = softmax %u {axis=-1}\n %p = slice %p1 {axis=3, start=0, end=T}"
WIDENED = "%qw = cast %q {dtype=f32}\n %kw = cast %k {dtype=f32}\n" + PRODUCT.replace(
    "%k", "%kw"
).replace("%q,", "%qw,")
ALIKE: dict[str, tuple[str, dict[str, object]]] = {
    "times a factor": (attention(), {"scale": 0.5}),
    "a factor first": (attention("%u = mul %half, %s"), {"scale": 0.5}),
    "divided": (attention("%u = div %s, %half"), {"scale": 2.0}),
    "two factors": (attention("%w = mul %s, %half\n %u = div %w, %minus"), {"scale": -1.0}),
    "queries and keys scaled": (
        attention(
            product="%qs = mul %half, %q\n %ks = div %k, %minus\n"
            + PRODUCT.replace("%k", "%ks").replace("%q,", "%qs,")
        ),
        {"scale": -0.5},
    ),
    "shown where": (attention("%u = where %seen, %s, %inf"), {"causal": True, "scale": 1.0}),
    "shown where, least": (attention("%u = where %seen, %s, %low"), {"causal": True}),
    "hidden where": (attention("%u = where %hidden, %inf, %s"), {"causal": True}),
    "a mask added": (attention("%u = add %s, %added"), {"causal": True, "scale": 1.0}),
    "scores added to a mask": (attention("%u = add %added, %s"), {"causal": True}),
    "a mask, then a factor": (
        attention("%w = add %s, %added\n %u = mul %w, %half"),
        {"causal": True, "scale": 0.5},
    ),
    "the keys' letters first": (
        attention(
            "", product='%s = einsum %k, %q {eq="bhtd,bhsd->bhst"}',
            softmax="%p = softmax %s {axis=3}",
            result='%y = einsum %v, %p {eq="bhte,bhst->bhse"}\n return %y',
        ),
        {"scale": 1.0},
    ),
    "capped": (attention("%w = div %s, %cap\n %a = tanh %w\n %u = mul %a, %cap"),
               {"scale": 1.0, "softcap": 3.0}),
    "scaled, capped, then masked": (
        attention("%h = mul %s, %half\n %w = div %h, %cap\n %a = tanh %w\n %x = mul %cap, %a\n"
                  " %u = where %seen, %x, %inf"),
        {"scale": 0.5, "softcap": 3.0, "causal": True},
    ),
    "capped, with other factors": (
        attention("%w = mul %s, %half\n %a = tanh %w\n %x = mul %a, %cap\n %u = add %x, %added"),
        {"scale": 1.5, "softcap": 3.0, "causal": True},
    ),
    "with sinks": (
        attention("%u = concat %s, %k1 {axis=3}", softmax=SINKS, head=HEAD + ", @k0: f32[2]",
                  product=COLUMN + PRODUCT), {"scale": 1.0},
    ),
    "with sinks behind a mask": (
        attention("%w = mul %s, %half\n %x = add %w, %added\n %u = concat %x, %k1 {axis=-1}",
                  softmax=SINKS, head=HEAD + ", @k0: f32[2]", product=COLUMN + PRODUCT),
        {"scale": 0.5, "causal": True},
    ),
    "weights narrowed twice": (
        attention(
            head=SIXTEEN, product=WIDENED,
            softmax="%p0 = softmax %u {axis=-1}\n %p1 = cast %p0 {dtype=f16}\n"
            " %p = cast %p1 {dtype=bf16}",
        ),
        {"scale": 0.5},
    ),
    "the result narrowed": (
        attention(
            head=SIXTEEN, product=WIDENED,
            result="%w = cast %v {dtype=f32}\n %z = matmul %p, %w\n %y = cast %z {dtype=bf16}\n"
            " return %y",
        ),
        {"scale": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_a_spelling_becomes_one_operator_that_computes_the_same(name: str) -> None:
    text, attrs = ALIKE[name]
    before, after, report = fire(Attention(), text)
    assert report.fired == {"Attention": 1}, report.missed
    nodes = after.entries["main"].nodes
    (found,) = (n for n in nodes if n.op == "attention")
    assert {key: found.attrs[key] for key in attrs} == attrs
    assert found.attrs["causal"] == attrs.get("causal", False)
    left = {x.name for n in nodes for x in n.operands}
    assert not {"s", "u", "p", "qw", "kw", "qs", "ks"} & left, "nothing else is read"
    wanted, got = (run_example(p, Attention().sample, 0) for p in (before, after))
    assert not compare(wanted, got, 2e-2 if "bf16" in text else 1e-5)


MISSED: dict[str, tuple[str, str]] = {
    "the weights are a result": (attention(result="return %p"), ""),
    "the weights are read by no product": (attention(result="%y = neg %p\n return %y"), ""),
    "the weights are read twice": (
        attention(result="%y = matmul %p, %v\n %z = neg %p\n return %y, %z"), ""
    ),
    "a factor of zero": (attention("%u = mul %s, %nought"), ""),
    "a factor divided by the scores": (attention("%u = div %half, %s"), ""),
    "something else in between": (attention("%u = neg %s"), ""),
    "the softmax of an input": (
        attention(
            "", product="", softmax="%p = softmax %x {axis=-1}", head=HEAD + ", %x: f32[B,2,S,T]"
        ),
        "",
    ),
    "hidden by a bias": (attention("%u = where %seen, %s, %bias"), ""),
    "the mask upside down": (attention("%u = where %seen, %inf, %s"), "hides row 0"),
    "two masks": (
        attention("%w = add %s, %added\n %u = where %seen, %w, %inf"), "the scores are masked twice"
    ),
    "the mask is negated": (
        attention("%w = add %s, %added\n %u = mul %w, %minus"),
        "the mask is multiplied by a negative number",
    ),
    "capped after the mask": (
        attention("%w = where %seen, %s, %inf\n %a = tanh %w\n %u = mul %a, %cap"),
        "the scores are capped after the mask",
    ),
    "capped twice": (
        attention("%w = tanh %s\n %a = tanh %w\n %u = mul %a, %cap"),
        "the scores are capped twice",
    ),
    "capped to a negative number": (
        attention("%a = tanh %s\n %u = mul %a, %minus"), "capped to a negative number"
    ),
    "sinks that stay": (
        attention("%u = concat %s, %k1 {axis=3}", softmax="%p = softmax %u {axis=-1}",
                  product="%v1 = slice %v {axis=2, start=0, end=1}\n %vs = concat %v, %v1 {axis=2}"
                  "\n " + COLUMN + PRODUCT, head=HEAD + ", @k0: f32[2]",
                  result="%y = matmul %p, %vs\n return %y"),
        "the sinks are not dropped",
    ),
    "sinks over two columns": (
        attention("%u = concat %s, %k1, %k1 {axis=3}", softmax=SINKS, head=HEAD + ", @k0: f32[2]",
                  product=COLUMN + PRODUCT), "",
    ),
    "a mask that widens": (
        attention(
            "%w = expand %added {shape=[1,2,S,T]}\n %u = add %s, %w",
            head=HEAD.replace("B,2", "B,1"), result="%y = matmul %p, %vv\n return %y",
            product="%vv = expand %v {shape=[B,2,T,6]}\n" + PRODUCT,
        ),
        "a mask or a factor widens the scores",
    ),
    "fp64": (attention("", head=HEAD.replace("f32", "f64"), softmax="%p = softmax %s {axis=-1}"),
             "attention is computed in fp32"),
    "a mask over scores in another order": (
        attention(
            "%m = permute %added {dims=[1,0]}\n %u = add %s, %m",
            product='%s = einsum %k, %q {eq="bhtd,bhsd->bhts"}',
            softmax="%p = softmax %u {axis=2}",
            result='%y = einsum %v, %p {eq="bhte,bhts->bhse"}\n return %y',
        ),
        "the mask is over scores in another order",
    ),
}  # fmt: skip
ONES = "the softmax in front of a product is not over the axis that it sums"
EINSUMS: dict[str, tuple[str, str, int, str, str]] = {
    "one axis of both": ("q[B,S,4] k[B,S,4] v[B,S,6]", "bsd,bsd->bs", 1, "bs,bse->be",
                         "queries and keys share the axis of the softmax"),
    "no axis of the queries": ("q[B,4] k[B,T,4] v[B,T,6]", "bd,btd->bt", 1, "bt,bte->be",
                               "the scores are no product of queries and keys"),
    "two axes are summed": ("q[B,S,4,3] k[B,T,4,3] v[B,T,6]", "bsdx,btdx->bst", 2, "bst,bte->bse",
                            "the scores are no product of queries and keys"),
    "the keys are summed": ("q[B,S,4] k[B,T,4,3] v[B,T,6]", "bsd,btdx->bst", 2, "bst,bte->bse",
                            "the scores are no product of queries and keys"),
    "the queries are summed": ("q[B,S,4,3] k[B,T,4] v[B,T,6]", "bsdx,btd->bst", 2, "bst,bte->bse",
                               "the scores are no product of queries and keys"),
    "the sum is left out": ("q[B,S,4] k[B,T,4] v[B,T,6]", "bsd,btd->bst", 2, "bst,bte->bste", ONES),
    "the queries are summed up": ("q[B,S,4] k[B,T,4] v[B,T,6]", "bsd,btd->bst", 2, "bst,bte->be",
                                  ONES),
    "the softmax over queries": ("q[B,S,4] k[B,T,4] v[B,T,6]", "bsd,btd->bst", 1, "bst,bte->bse",
                                 ONES),
    "values of no batch": ("q[B,S,4] k[B,T,4] v[T,6]", "bsd,btd->bst", 2, "bst,te->bse",
                           "keys and values differ in their batch axes"),
    "values of two widths": ("q[B,S,4] k[B,T,4] v[B,T,6,3]", "bsd,btd->bst", 2, "bst,btef->bsef",
                             "keys and values differ in their batch axes"),
    "weights by weights": ("q[B,S,4] k[B,S,4] v[B,S,6]", "bsd,btd->bst", 2, "", ONES),
}  # fmt: skip


def einsums(shapes: str, first: str, axis: int, second: str) -> str:
    head = ", ".join(f"%{x[0]}: f32{x[1:]}" for x in shapes.split())
    last = f'%y = einsum %p, %v {{eq="{second}"}}' if second else "%y = matmul %p, %p"
    return (
        f'graph g({head}) {{ %s = einsum %q, %k {{eq="{first}"}}\n'
        f" %p = softmax %s {{axis={axis}}}\n {last}\n return %y }}"
    )


MISSED |= {name: (einsums(*given), why) for name, (*given, why) in EINSUMS.items()}  # type: ignore[arg-type]
MISSED |= {
    "another rank": (
        "graph g(%q: f32[B,S,4], %k: f32[1,B,T,4], %v: f32[1,B,T,6]) {"
        " %y = sdpa %q, %k, %v {scale=0.5}\n return %y }",
        "queries, keys and values differ in rank",
    ),
    "another batch": (
        "graph g(%q: f32[B,2,S,4], %k: f32[1,2,T,4], %v: f32[1,2,T,6]) {"
        " %y = sdpa %q, %k, %v {scale=0.5}\n return %y }",
        "queries, keys and values differ in their batch axes",
    ),
}


@pytest.mark.parametrize("name", MISSED)
def test_what_is_no_attention_stays_and_says_why(name: str) -> None:
    text, reason = MISSED[name]
    before, after, report = fire(Attention(), text)
    assert after is before
    reasons = [why for _, _, why in report.missed]
    assert any(reason in why for why in reasons) if reason else not reasons, reasons


@pytest.mark.parametrize(
    "result",
    [
        "%y = cast %z {dtype=bf16}\n %e = neg %z\n return %y, %e",
        "%y = cast %z {dtype=bf16}\n return %y, %z",
        "%y = cast %z {dtype=f16}\n return %y",
        "%y = neg %z\n return %y",
        "return %z",
    ],
)
def test_operands_stay_wide_where_the_result_is_read_so(result: str) -> None:
    """The operator itself rounds its result to the type of its operands."""
    product = f"%w = cast %v {{dtype=f32}}\n %z = matmul %p, %w\n {result}"
    text = attention(head=SIXTEEN, product=WIDENED, result=product)
    before, after, report = fire(Attention(), text)
    assert report.fired == {"Attention": 1}
    (found,) = (n for n in after.entries["main"].nodes if n.op == "attention")
    assert found.output.type.dtype is DType.f32
    wanted, got = (run_example(p, Attention().sample, 0) for p in (before, after))
    assert not compare(wanted, got, 1e-2)


def test_attention_of_the_highest_rank_is_raised() -> None:
    ones = "1," * (MAX_RANK - 2)
    text = (
        f"graph g(%q: f32[{ones}S,4], %k: f32[{ones}4,T], %v: f32[{ones}T,4]) {{"
        " %s = matmul %q, %k\n %p = softmax %s {axis=-1}\n %y = matmul %p, %v\n return %y }"
    )
    assert fire(Attention(), text)[2].fired == {"Attention": 1}
