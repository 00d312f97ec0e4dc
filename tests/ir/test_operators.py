"""Every operator of the registry: its types are what its reference gives, at any sizes.

A row of CASES is an operator's operands and attributes with sizes left open: `{a}` and so on are
replaced by random numbers, and a case runs in fp32 and bf16 where the operator is generic.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from dsc.ir.analyses import row_operands
from dsc.ir.dims import symbol
from dsc.ir.graph import Graph, GraphBuilder, Value
from dsc.ir.interpreter import run_graph
from dsc.ir.op import OpDef, TypeMismatch, infer, lookup, op, registry
from dsc.ir.ops import FAMILIES
from dsc.ir.parser import parse_graph, parse_operands
from dsc.ir.printer import print_graph
from dsc.ir.samples import sample_inputs
from dsc.ir.traits import Form, Role, Traits
from dsc.ir.types import DType, TensorType
from tests.ir.strategies import call_graph

_POINTWISE2 = ["f32[{a},1,{b}], f32[{c},1]", "f32[], f32[{a}]", "f32[{a},{b}], f32[{a},{b}]"]
_LOGIC2 = ["bool[{a},1,{b}], bool[{c},1]"]
_ANY1 = ["f32[{a},{b}]", "f32[]"]
_ALONG = ["f32[{a},{b},{c}] {{axis=1}}", "f32[{a}] {{axis=-1}}"]
_REDUCE = ["f32[{a},{b},{c}] {{axes=[0,-1]}}", "f32[{a},{b}] {{axes=[1], keepdims=true}}"]
_ROUTE = (
    "f32[{a},{b},{d}], f32[12,{d}], f32[12] "
    '{{score="%s", groups=4, keep=2, group_score="%s", fill=%s, top_k=3, normalise=%s, scale=1.5}}'
)
CASES: dict[str, list[str]] = {
    **dict.fromkeys(
        ("add", "sub", "mul", "div", "remainder", "maximum", "minimum", "pow", "lt", "le", "gt",
         "ge", "eq", "ne"), _POINTWISE2),
    **dict.fromkeys(("logical_and", "logical_or"), _LOGIC2),
    "logical_not": ["bool[{a},{b}]", "bool[]"],
    **dict.fromkeys(
        ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "square", "sigmoid", "silu",
         "tanh", "cos", "sin", "erf", "relu", "gelu", "gelu_tanh"), _ANY1),
    "cast": ["f32[{a},{b}] {{dtype=i64}}", "f32[{a}] {{dtype=f8e4m3}}", "i64[{a}] {{dtype=bool}}"],
    "where": ["bool[{a},1], f32[{b}], f32[]", "bool[], f32[{a}], f32[{a}]"],
    "reshape": ["f32[{a},{b},6] {{shape=[{b},{a},2,3]}}", "f32[1] {{shape=[]}}"],
    "permute": ["f32[{a},{b},{c}] {{dims=[1,2,0]}}", "f32[] {{dims=[]}}"],
    "expand": ["f32[{a},1] {{shape=[{b},{a},{c}]}}", "f32[] {{shape=[{a}]}}"],
    "slice": ["f32[{a},9] {{axis=-1, start=2, end=9, step=3}}",
              "f32[{a},{b}] {{axis=0, start=0, end={a}}}"],
    "concat": ["f32[{a},{b}], f32[{a},{c}], f32[{a},{b}] {{axis=1}}", "f32[{a}] {{axis=0}}"],
    "stack": ["f32[{a},{b}], f32[{a},{b}], f32[{a},{b}]", "f32[]"],
    "split": ["f32[{a},9] {{sizes=[4,2,3]}}", "f32[5,{a}] {{sizes=[5], axis=0}}"],
    "gather": ["f32[7,{b}], i64[{a},{b}] {{axis=0}}"],
    "take": ["f32[{a},6,{b}], i64[{c},2] {{axis=1}}", "f32[{a}], i64[] {{axis=-1}}"],
    "select_rows": ["f32[{a},{b},{c}], i64[{a},{d}]"],
    "sample": ["f32[{a},{b},9], f32[{a},4]=1, i64[{a},2]"],
    "full": [" {{shape=[{a},{b}], value=-inf, dtype=bf16}}",
             " {{shape=[], value=3.0, dtype=i64}}"],
    "arange": [" {{start={a}, end={a}, dtype=i32}}", " {{start=0, end={b}, dtype=f32}}"],
    **dict.fromkeys(("sum", "mean", "amax", "amin"), _REDUCE),
    "argmax": ["f32[{a},{b}] {{axis=0}}"],
    **dict.fromkeys(("cumsum", "softmax"), _ALONG),
    "topk": ["f32[{a},9] {{k=4}}", "f32[{a},{b}] {{k={b}}}"],
    "linear": ["f32[{a},{b},{c}], f32[{d},{c}]", "f32[{c}], f32[{d},{c}], f32[{d}]"],
    "matmul": ["f32[{a},1,{b},{c}], f32[{d},{c},{b}]", "f32[{a},{b}], f32[{b},{c}]"],
    "einsum": ['f32[{a},{b},{c}], f32[{b},{c},{d}] {{eq="bhn,hnc->bhc"}}',
               'f32[{a},{b}] {{eq="ab->ba"}}', 'f32[{a},{a}] {{eq="ii->i"}}'],
    "embedding": ["i64[{a},{b}], f32[{c},{d}]", "i64[], f32[{c},{d}]"],
    "rms_norm": ["f32[{a},{b}], f32[{b}] {{eps=1e-20}}", "f32[{b}], f32[{b}] {{eps=0.5}}",
                 "bf16[{a},{b}], f32[{b}] {{eps=0.5}}"],
    "layer_norm": ["f32[{a},{b}], f32[{b}] {{eps=0.5}}", "f32[{b}], f32[{b}], f32[{b}] {{eps=0.5}}",
                   "bf16[{a},{b}], f32[{b}], f32[{b}] {{eps=0.5}}"],
    "rope": ['f32[{a},{b},{c},6], i64[{a},{b}], f32[3] {{layout="KIND"}}'.replace("KIND", kind)
             for kind in ("interleaved", "deinterleave", "half")]
            + ['f32[{a},{b},4], i64[{a},{b}], f32[2] {{layout="half", scale=2}}',
               'f32[{a},{b},{c},6], i64[{a},{b}], f32[2] {{layout="half", dims=4}}'],
    "swiglu": ["f32[{a},{b}], f32[{a},{b}]"],
    "attention": ["f32[{a},{b},6,{c}], f32[{a},9,2,{c}], f32[{a},9,2,{d}], i64[{a}]=1"
                  " {{scale=0.3, causal=true}}",
                  "f32[{a},{b},2,{c}], f32[{a},{b},2,{c}], f32[{a},{b},2,{d}]"
                  " {{scale=0.3, causal=true}}",
                  "f32[{a},{b},2,{c}], f32[{a},{d},1,{c}], f32[{a},{d},1,{c}]"
                  " {{scale=0.3, causal=false}}",
                  "f32[{a},{b},2,{c}], f32[40,4,1,{c}], f32[40,4,1,{c}], i64[{a}]=1, f32[2],"
                  " i64[{a},{d}] {{scale=0.3, causal=true}}"],
    "mla_attention": ["f32[{a},{b},2,5], f32[{a},{b},2,4], f32[{a},9,{c}], f32[{a},9,4],"
                      " f32[22,{c}], i64[{a}]=1 {{scale=0.3}}",
                      "f32[{a},{b},2,5], f32[{a},{b},2,4], f32[40,4,{c}], f32[40,4,4],"
                      " f32[22,{c}], i64[{a}]=1, i64[{a},{d}] {{scale=0.3}}"],
    "latent_attention": ["f32[{a},{b},3,{c}], f32[{a},{b},3,4], f32[{a},9,{c}], f32[{a},9,4],"
                         " i64[{a}]=1 {{scale=0.3}}",
                         "f32[{a},{b},3,{c}], f32[{a},{b},3,4], f32[40,4,{c}], f32[40,4,4],"
                         " i64[{a}]=1, i64[{a},{d}] {{scale=0.3}}"],
    "append": ["f32[{a},0,{c}], f32[{a},{d},{c}], i64[{a}]=0",
               "f32[{a},3,{c}], f32[{a},{d},{c}], i64[{a}]=3"],
    "cache_write": ["f32[{a},99,{c}], f32[{a},{d},{c}], i64[{a}]=2",
                    "f32[40,4,{c}], f32[{a},{d},{c}], i64[{a}]=1, i64[{a},{d}]"],
    "route": [_ROUTE % ("sigmoid", "top2", "-inf", "true"),
              _ROUTE % ("softmax", "max", "0.0", "false"),
              'f32[{d}], f32[{c},{d}] {{score="softmax", top_k=2, normalise=false}}',
              'f32[{a},{d}], f32[{c},{d}] {{score="sigmoid", top_k=2, normalise=true, shared=2}}',
              'f32[{a},{d}], f32[{c},{d}], f32[{c}], f32[{c}] {{score="softmax", top_k=2,'
              ' normalise=true}}'],
    "experts": ['f32[{a},{b}], i64[{a},2], f32[{a},2], f32[4,6,{b}], f32[4,{b},3] {{act="ACT"}}'
                .replace("ACT", a) for a in ("silu", "gelu", "gelu_tanh", "relu")]
               + ["f32[{a},{c},{b}], i64[{a},{c},2], f32[{a},{c},2], f32[1,2,{b}], f32[1,{b},1]",
                  "f32[{a},{b}], i64[{a},2], f32[{a},2], f32[4,6,{b}], f32[4,{b},3], f32[4,6],"
                  " f32[4,{b}] {{limit=0.5, alpha=1.702, shift=1.0}}"],
    "dispatch": ["f32[{a},{b}], i64[{a},{c}] {{experts={d}}}"],
    "grouped_linear": ["f32[{a},{b}], f32[{c},{d},{b}], i64[{c}+1]",
                       "f32[0,2], f32[1,3,2], i64[2]"],
    "combine": ["f32[12,{b}], i64[12], f32[4,3]"],
    "all_reduce": ["f32[{a},{b}] {{ranks=1}}", "f32[] {{ranks=1}}"],
    "all_gather": ["f32[{a},{b}] {{axis=1, ranks=1}}"],
    "reduce_scatter": ["f32[{a},{b}] {{axis=0, ranks=1}}"],
    "all_to_all": ["f32[{a},{b}] {{axis=-1, ranks=1}}"],
    "send": ["f32[{a},{b}] {{to=0}}"],
    "recv": ["f32[{a}] {{source=0}}"],
    "scaled": ["f8e4m3[{a},{b}], f32[1,1] {{block=[128,128]}}",
               "f8e4m3[{a},9,{b}], bf16[{a},5,{b}] {{block=[2,1]}}",
               'u8[{a},{b},48], f32[{a},{b},3] {{block=[1,16], columns=40, unsigned="i8"}}',
               'u8[{a},24], f32[{a},3], u8[{a},2] {{block=[1,16], columns=38, unsigned="i4"}}'],
    "block_scales": ["f32[{a},{b}] {{block=[1,2], codes=i8, dtype=bf16}}",
                     "bf16[{a},{b},9] {{block=[0,4], codes=f8e4m3, dtype=f8e8m0}}",
                     "f32[{a},6] {{block=[1,32], codes=i4, dtype=f16}}"],
    "tiled": ["f32[{a},5] {{tile=2, step=4}}", "i8[{a},3,4] {{tile=2, width=2, step=4}}"],
    "block_codes": ["f32[{a},9], f16[{a},5] {{block=[1,2], codes=i8}}",
                    "f32[{a},{b},6], f32[{a},1,2] {{block=[0,4], codes=i4}}"],
    "dequantize": ["f8e4m3{{128x128,f32}}[{a},{b}] {{dtype=bf16}}",
                   "f8e4m3{{2x1,bf16}}[{a},9,{b}] {{dtype=f32}}"],
    "word_bytes": ["i32[{a},{b}]", "i32[{a}]"],
    "bit_fields": ["i32[{a},{b}] {{order=[3,1,0,2]}}", "i32[{a}] {{order=[0,1,2,3,4,5,6,7]}}"],
    "join_nibbles": ["u8[{a},{b},6]", "u8[2]"],
    "above_least": ["i8[{a},{b}] {{bits=4}}", "i8[] {{bits=8}}"],
    "centre": ["u8[{a},{b}] {{bits=8}}", "u8[] {{bits=1, add={a}}}"],
    "sdpa": ["f32[{a},6,{b},4], f32[{a},2,{c},4], f32[{a},2,{c},{d}], bool[1,1,{b},{c}]"
             " {{scale=0.5, grouped=true}}",
             "f32[{a},{b},{c}], f32[{a},{b},{c}], f32[{a},{b},{d}] {{scale=0.5, causal=true}}"],
    "slice_scatter": ["f32[{a},9], f32[{a},4] {{axis=-1, start=3, end=7}}"],
    "scatter": ["f32[7,{b}], i64[{a},{b}], f32[{a},{b}] {{axis=0}}"],
    "index_put": ["f32[{a},{b}], i64[{c}], f32[{b}]",
                  "f32[{a}], i64[{c},2], f32[] {{accumulate=true}}"],
    "sort": ["f32[{a},{b}] {{axis=0, descending=true}}"],
    "histc": ["i64[{a}] {{bins={b}}}"],
    "grouped_mm": ["f32[{a},{b}], f32[{c},{b},{d}], i64[{c}]"],
}  # fmt: skip


def filled(template: str, seed: int, between: tuple[int, int] = (2, 6)) -> str:
    """A case with random sizes; `{c}+1` is computed."""
    rng = random.Random(seed)
    sizes = {letter: rng.randint(*between) for letter in "abcd"}
    text = template.replace("{c}+1", str(sizes["c"] + 1))
    return text.format(**sizes)


def test_without_a_block_table_there_are_as_many_pages_as_sequences() -> None:
    definition = registry()["cache_write"]
    cache, new, lengths, table = (
        TensorType(DType.f32, (3, 4, 8)), TensorType(DType.f32, (2, 1, 8)),
        TensorType(DType.i64, (2,)), TensorType(DType.i64, (2, 5)),
    )  # fmt: skip
    assert definition.infer([cache, new, lengths, table], {}) == (cache,)
    with pytest.raises(TypeMismatch, match="without block_table: n is 2 here and 3 before"):
        definition.infer([cache, new, lengths], {})


def operators(*, with_operands: bool = False) -> list[str]:
    return sorted(
        name
        for name, definition in registry().items()
        if definition.example and (definition.operands or not with_operands)
    )


def check_run(graph: Graph, text: str, bounds: list[int | None]) -> None:
    """Run a one-call graph on samples: the interpreter holds results to the inferred types."""
    inputs = sample_inputs(graph, {}, seed=len(text))
    for value, bound in zip(graph.inputs, bounds, strict=True):
        if bound is not None:  # numbers that the operator bounds otherwise than by a table
            inputs[value.name] = inputs[value.name].clamp(0, bound)
    run_graph(graph, list(inputs.values()))


def test_every_operator_has_cases() -> None:
    assert set(CASES) == set(operators())
    assert {"fused"} == set(registry()) - set(CASES)


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("dtype", [DType.f32, DType.bf16], ids=str)
def test_inferred_types_are_those_of_the_reference(name: str, dtype: DType) -> None:
    texts = [registry()[name].example]
    texts += [filled(t, seed) for t in CASES[name] for seed in range(3)]
    for text in texts:
        graph = call_graph(name, text, dtype)
        if registry()[name].traits.form is Form.WEIGHT:
            return  # they stand in no graph: test_formats.py
        check_run(graph, text, [bound for _, bound in parse_operands(text)[0]])


def test_which_operators_work_row_by_row() -> None:
    found = {name for name in operators() if row_operands(name)}
    assert {"add", "where", "linear", "rms_norm", "layer_norm", "route", "experts"} <= found
    assert found.isdisjoint(("softmax", "cumsum", "rope", "attention", "sdpa", "sum", "sort",
                             "all_reduce", "send", "dequantize", "reshape"))  # fmt: skip


@pytest.mark.parametrize("name", [n for n in operators() if row_operands(n)])
def test_rows_of_results_need_their_own_rows_alone(name: str) -> None:
    definition, tried = registry()[name], 0
    for text in [definition.example, *(filled(t, 5) for t in CASES[name])]:
        (node,) = (graph := call_graph(name, text)).nodes
        shape = node.outputs[0].type.shape
        if len(shape) < 2:
            continue
        given = list(sample_inputs(graph, {}, seed=3).values())
        chosen = torch.tensor([int(shape[0]) - 1, 0, 0])  # type: ignore[arg-type]
        rows = [
            x[chosen] if n in row_operands(name) and x.shape[:1] == shape[:1] and x.ndim >= 2 else x
            for n, x in zip(definition.operand_names(len(given)), given, strict=True)
        ]
        attrs = definition.with_defaults(node.attrs)
        whole, few = definition.run(given, attrs), definition.run(rows, attrs)
        pairs = zip(whole, few, strict=True) if isinstance(whole, tuple) else [(whole, few)]
        for all_rows, some in pairs:
            torch.testing.assert_close(some, all_rows[chosen], equal_nan=True)
        tried += 1
    assert tried


@pytest.mark.parametrize("name", operators())
def test_text_round_trips(name: str) -> None:
    for text in (registry()[name].example, *(filled(t, 7) for t in CASES[name])):
        graph = call_graph(name, text)
        printed = print_graph(graph)
        assert parse_graph(printed) == graph
        assert print_graph(parse_graph(printed)) == printed


@pytest.mark.parametrize("name", operators())
def test_a_declaration_is_complete(name: str) -> None:
    definition = registry()[name]
    assert definition.name == name
    assert definition.doc.endswith(".")
    assert definition.signature.startswith(f"{name}(")
    assert any(name in {v.name for v in vars(f).values() if isinstance(v, OpDef)}
               for f in FAMILIES.values())  # fmt: skip


# --- what is refused ------------------------------------------------------------------------------


def refused(name: str, types: list[TensorType | None], attrs: dict[str, Any]) -> str:
    operands = [None if t is None else Value(f"x{i}", t) for i, t in enumerate(types)]
    with pytest.raises(TypeMismatch) as caught:
        infer(name, operands, attrs)
    message = str(caught.value)
    assert message.startswith(f"{name}("), "the message names the operator"
    assert registry()[name].signature in message
    return message


def example(name: str) -> tuple[list[TensorType | None], dict[str, Any]]:
    operands, attrs = parse_operands(registry()[name].example)
    return [t for t, _ in operands], attrs


@pytest.mark.parametrize("name", operators())
def test_an_unknown_or_wrong_attribute_is_refused(name: str) -> None:
    types, attrs = example(name)
    assert "unknown attribute no_such" in refused(name, types, {**attrs, "no_such": 1})
    for declared in registry()[name].attrs:
        wrong: object = 5 if declared.kind in ("str", "bool", "dtype", "dims", "ints") else "text"
        assert declared.name in refused(name, types, {**attrs, declared.name: wrong})
        if declared.default is None:
            rest = {k: v for k, v in attrs.items() if k != declared.name}
            assert f"attribute {declared.name} is missing" in refused(name, types, rest)


@pytest.mark.parametrize("name", operators(with_operands=True))
def test_missing_and_surplus_operands_are_refused(name: str) -> None:
    types, attrs = example(name)
    refused(name, [], attrs)
    refused(name, [None, *types[1:]], attrs)
    if not registry()[name].operands[-1].variadic:
        refused(name, [*types, *[types[-1]] * 4], attrs)


@pytest.mark.parametrize("name", operators(with_operands=True))
def test_a_wrong_rank_is_refused(name: str) -> None:
    types, attrs = example(name)
    for index, t in enumerate(types):
        definition = registry()[name].operands[min(index, len(registry()[name].operands) - 1)]
        dims = definition.pattern.dims
        if dims != ("...",) and not any(d.startswith("*") for d in dims) and t is not None:
            worse = [*types]
            worse[index] = t.with_shape((1, *t.shape))
            refused(name, worse, attrs)


@pytest.mark.parametrize("name", operators(with_operands=True))
def test_a_wrong_element_type_is_refused(name: str) -> None:
    types, attrs = example(name)
    definition = registry()[name]
    declared = [
        definition.operands[min(i, len(definition.operands) - 1)].pattern.dtype
        for i in range(len(types))
    ]
    for index, t in enumerate(types):
        alone = declared.count(declared[index]) == 1 and declared[index] not in ("i64", "bool")
        if t is None or declared[index] == "any" or (alone and declared[index] != "f32"):
            continue
        worse = [*types]
        worse[index] = t.with_dtype(DType.u8)
        refused(name, worse, attrs)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("reshape", "f32[2,3] {shape=[7]}", "6 elements"),
        ("reshape", "f32[2,3] {shape=[-2,-3]}", "dimension"),
        ("permute", "f32[2,3] {dims=[0,0]}", "no permutation"),
        ("expand", "f32[2,3] {shape=[2,4]}", "does not expand"),
        ("slice", "f32[5] {axis=0, start=2, end=9}", "slice 2:9"),
        ("slice", "f32[5] {axis=0, start=0, end=4, step=0}", "step"),
        ("split", "f32[5] {sizes=[2,2]}", "sum to 4"),
        ("concat", "f32[2,3], f32[3,3] {axis=1}", "differ outside"),
        ("gather", "f32[2,3], i64[5,3]=1 {axis=1}", "larger"),
        ("softmax", "f32[2,3] {axis=2}", "axis 2"),
        ("cumsum", "f32[2,3] {axis=-3}", "axis -3"),
        ("sort", "f32[2] {axis=1}", "axis 1"),
        ("sum", "f32[2,3] {axes=[]}", "at least one"),
        ("sum", "f32[2,3] {axes=[1,-1]}", "each once"),
        ("mean", "i64[2,3] {axes=[0]}", "cast to a float"),
        ("exp", "i64[2]", "cast to a float"),
        ("sub", "bool[2], bool[2]", "truth values"),
        ("topk", "f32[2,3] {k=4}", "top 4 of 3"),
        ("matmul", "f32[2,3], f32[2,3]", "contracts"),
        ("einsum", 'f32[2,3], f32[4,5] {eq="ab,bc->ac"}', "b is"),
        ("einsum", 'f32[2,3] {eq="ab->aa"}', "einsum equation"),
        ("einsum", 'f32[2,3] {eq="ab"}', "einsum equation"),
        ("rope", 'f32[2,3,6], i64[2,3], f32[2] {layout="half"}', "frequencies"),
        ("layer_norm", "f32[2,6], bf16[6] {eps=0.1}", "the type of x, or f32"),
        ("rope", 'f32[2,3,6], i64[2,4], f32[3] {layout="half"}', "positions"),
        ("rope", 'f32[2,3,6], i64[2,3], f32[2] {layout="half", dims=6}', "frequencies"),
        ("rope", 'f32[2,3,6], i64[2,3], f32[4] {layout="half", dims=8}', "8 columns of"),
        ("rope", 'f32[2,3,7], i64[2,3], f32[2] {layout="half", dims=4}', "4 columns of"),
        ("rope", 'f32[2,3,6], i64[2,3], f32[3] {layout="spiral"}', "layout"),
        ("attention", "f32[1,2,5,4], f32[1,2,2,4], f32[1,2,2,4] {scale=1.0, causal=true}", "heads"),
        ("mla_attention", "f32[1,2,3,4], f32[1,2,3,2], f32[1,5,6], f32[1,5,2], f32[13,6], i64[1]"
         " {scale=1.0}", "kv_b"),
        ("mla_attention", "f32[1,2,3,4], f32[1,2,3,2], f32[1,5,6], f32[1,5,2], f32[16,6], i64[1]"
         " {scale=1.0}", "kv_b is f32[16,6] for 3 heads of 4 nope dims"),
        ("mla_attention", "f32[1,2,3,4], f32[1,2,3,2], f32[1,5,6], f32[1,5,2], f32[12,6], i64[1]"
         " {scale=1.0}", "kv_b is f32[12,6] for 3 heads of 4 nope dims"),
        ("route", 'f32[2,4], f32[6,4] {score="sigmoid", top_k=2, normalise=true, shared=-1}',
         "-1 shared"),
        ("route", 'f32[2,4], f32[6,4] {score="tanh", top_k=2, normalise=true}', "score"),
        ("route", 'f32[2,4], f32[6,4] {score="sigmoid", groups=4, top_k=2, normalise=true}',
         "groups"),
        ("route", 'f32[2,4], f32[8,4] {score="sigmoid", groups=4, keep=1, top_k=3, normalise=true}',
         "top 3"),
        ("route", 'f32[2,4], f32[4,4] {score="sigmoid", groups=4, keep=2, top_k=2, normalise=true}',
         "two best"),
        ("experts", "f32[2,4], i64[2,1], f32[2,1], f32[3,5,4], f32[3,4,3]", "gate and up"),
        ("grouped_linear", "f32[6,3], f32[4,2,3], i64[4]", "i64"),
        ("combine", "f32[6,3], i64[6], f32[2,2]", "weights"),
        ("dispatch", "f32[6,3], i64[6,2] {experts=0}", "0 experts"),
        ("scaled", "f8e4m3[5,7], f32[2,2] {block=[2,4]}", "f32[3,2] expected"),
        ("scaled", "f8e4m3[5,7], f32[2,2] {block=[2]}", "blocks"),
        ("scaled", "f8e4m3[5,7], f32[5,2] {block=[0,4]}", "f32[1,2] expected"),
        ("scaled", "f8e4m3[5,7], f32[1,1] {block=[-1,4]}", "blocks"),
        ("scaled", "f8e4m3[5,7] {block=[2,4]}", "codes and scales are due"),
        ("scaled", "f8e4m3[5,7], i32[3,2] {block=[2,4]}", "a float type"),
        ("scaled", "f16[5,7], f32[3,2] {block=[2,4]}", "no stored format of f16"),
        ("scaled", "u8[5,7], f32[3,2], i8[3,2] {block=[2,4]}",
         "u8[5,7], f32[3,4], i8[3,4] expected"),
        ("scaled", "u8[5,7], f32[3,4], f32[3,4] {block=[2,4]}", "an integer type"),
        ("scaled", "u8[5,7], f32[3,4], i8[3,4], i8[3,4] {block=[2,4]}", "i8[3,4] expected"),
        ("block_scales", "f32[4,7] {block=[1,2], codes=i4, dtype=f16}", "2 codes of i4 share"),
        ("block_scales", "i8[4,6] {block=[1,2], codes=i4, dtype=f16}", "numbers in i8"),
        ("block_scales", "f32[4,6] {block=[1,2], codes=i32, dtype=f16}", "codes in i32"),
        ("block_scales", "f32[4,6] {block=[1,2], codes=i8, dtype=i8}", "a float type"),
        ("block_scales", "f32[4,6] {block=[2], codes=i8, dtype=f16}", "blocks of"),
        ("block_codes", "f32[4,6], f16[4,2] {block=[1,2], codes=i8}", "f16[4,3] expected"),
        ("bit_fields", "i32[2,3] {order=[0,1,2,2]}", "no order of"),
        ("bit_fields", "i32[2,3] {order=[1,0]}", "no order of"),
        ("bit_fields", "i32[] {order=[0,1,2,3]}", "rows of words are due"),
        ("join_nibbles", "u8[2,3]", "an even number of columns"),
        ("centre", "u8[2] {bits=9}", "9 bits"),
        ("above_least", "i8[2] {bits=0}", "0 bits"),
        ("scaled", 'u8[5,16], f32[5,1] {block=[1,16], columns=9, unsigned="i9"}', "one of f8e4m3"),
        ("scaled", 'u8[5,16], f32[5,1] {block=[1,24], columns=9, unsigned="i8"}', "blocks of 24"),
        ("scaled", 'u8[5,16], f32[5,1] {block=[2,16], columns=9, unsigned="i8"}', "share no scale"),
        ("slice_scatter", "f32[7], f32[2] {axis=0, start=2, end=5}", "part"),
        ("scatter", "f32[2,4], i64[3,1], f32[] {axis=1}", "larger"),
        ("index_put", "f32[4,3], i64[2], f32[3,3]", "broadcast"),
        ("arange", " {start=3, end=2, dtype=i64}", "arange"),
        ("all_reduce", "f32[2,3] {ranks=0}", "0 ranks"),
        ("all_gather", "f32[2,3] {axis=2, ranks=2}", "axis 2"),
        ("reduce_scatter", "f32[2,3] {axis=1, ranks=2}", "axis of 3"),
        ("all_to_all", "f32[2,3] {axis=1, ranks=2}", "axis of 3"),
        ("send", "f32[2,3] {to=-1}", "rank -1"),
        ("recv", "f32[2,3] {source=-1}", "rank -1"),
        ("full", " {shape=[-1], value=0.0, dtype=f32}", "dimension"),
        ("stack", "f32[2], f32[3]", "(3)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name: str, text: str, words: str) -> None:
    operands, attrs = parse_operands(text)
    assert words in refused(name, [t for t, _ in operands], attrs)


def test_an_unknown_operator_is_refused() -> None:
    with pytest.raises(TypeMismatch, match="unknown operator frobnicate"):
        infer("frobnicate", [], {})


def test_fused_takes_what_its_body_takes() -> None:
    inner = GraphBuilder("body")
    x = inner.input("x", TensorType(DType.f32, (2, 3)))
    body = inner.finish([inner.neg(x)])
    assert infer("fused", [x], {"body": body}) == (x.type,)
    for wrong in ([x, x], [Value("y", TensorType(DType.f32, (3, 2)))]):
        with pytest.raises(TypeMismatch, match="fused"):
            infer("fused", wrong, {"body": body})


def test_symbolic_types_are_inferred() -> None:
    B, S, P = (symbol(n) for n in "BSP")
    graph = parse_graph(
        """graph g(%past: f32[B,P,4], %new: f32[B,S,4], %n: i64[B], %x: f32[B,S,6]) {
             %c = append %past, %new, %n
             %r = reshape %x {shape=[B*S,2,3]}
             %i, %w = route %x, @gate {score="sigmoid", top_k=2, normalise=true}
             %i2 = reshape %i {shape=[B*S,2]}
             %x2 = reshape %x {shape=[B*S,6]}
             %rows, %o, %p = dispatch %x2, %i2 {experts=8}
             %s = slice %new {axis=1, start=S-1, end=S}
             return %c, %r, %rows, %s
           }""".replace("%x: f32[B,S,6]", "%x: f32[B,S,6], @gate: f32[8,6]")
    )
    shapes = [x.type.shape for x in graph.outputs]
    assert shapes == [(B, P + S, 4), (B * S, 2, 3), (2 * B * S, 6), (B, 1, 4)]


def test_a_malformed_declaration_is_refused() -> None:
    for signature in ("f(x: T[a] -> T[a]", "f(x: T) -> T[a]", "f(x: T[a]; n: what) -> T[a]"):
        with pytest.raises(ValueError, match=r"malformed|unknown attribute kind"):
            op(signature, Traits(Role.OTHER), reference=lambda x: x, doc=".", example="f32[2]")


def test_whole_numbers_given_for_floats_are_floats() -> None:
    b = GraphBuilder()
    x = b.input("x", TensorType(DType.f32, (2,)))
    b.call("rms_norm", x, x, eps=1)
    assert repr(b.nodes[-1].attrs["eps"]) == "1.0"
    assert torch.equal(
        run_graph(b.finish(b.nodes[-1].outputs), [torch.ones(2)])[0], torch.full((2,), 0.5**0.5)
    )


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [("bool", 0, 1), ("u8", 0, 255), ("i8", -128, 127), ("i16", -(2**15), 2**15 - 1),
     ("i32", -(2**31), 2**31 - 1)],
)  # fmt: skip
def test_a_tensor_is_full_of_what_its_element_type_holds(dtype: str, least: int, most: int) -> None:
    attrs = {"shape": (), "dtype": DType(dtype)}
    for value in (least, most):
        (found,) = lookup("full").infer([], {**attrs, "value": value})
        assert found.dtype is DType(dtype)
    for value in (least - 1, most + 1):
        with pytest.raises(TypeMismatch, match=f"is no {dtype}"):
            lookup("full").infer([], {**attrs, "value": value})
