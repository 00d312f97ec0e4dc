"""Whole models: every traced spelling of the family becomes one canonical form, with one meaning.

`tests/data/traced` holds traces of stock transformers models and of models/v3.py, one decoder layer
with random weights, in the variants of the family; three more are traced here and now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.parity import randomise
from dsc import pipeline
from dsc.frontends.family import ModelConfig, states_of
from dsc.frontends.torch_export import trace
from dsc.ir.dims import substitute
from dsc.ir.graph import Graph
from dsc.ir.interpreter import Interpreter
from dsc.ir.op import traits_of
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_node, print_program
from dsc.ir.program import Program
from dsc.ir.samples import sample_inputs
from dsc.ir.stages import Stage
from dsc.ir.traits import Role
from dsc.ir.weights import random_source, sources
from dsc.models import v3
from dsc.rewrite.manager import Manager, Watch
from dsc.rewrite.verify import compare_programs
from dsc.rewrite.widen import runnable
from tests.family import small, small_v2, stock

TRACED = Path(__file__).resolve().parent.parent / "data" / "traced"
VARIANTS = sorted(path.stem for path in TRACED.glob("*.dsc"))
SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
LAYER = Counter(
    rms_norm=4, linear=7, reshape=2, split=2, rope=2, append=2, mla_attention=1, add=3, route=1,
    experts=1, swiglu=1,
)  # fmt: skip
"""The operators of one MoE layer with a low-rank query, whatever it was traced from."""


def stored(name: str) -> Program:
    """Read a stored trace, with seeded random weights."""
    program = parse_program((TRACED / f"{name}.dsc").read_text("utf-8"))
    types = {s.key: s.type for expr in program.weights.values() for s in sources(expr)}
    return replace(program, source=random_source(types))


def raised(program: Program, **watch: bool) -> Program:
    return Manager(Watch(**watch)).run(program, [pipeline.make(n) for n in pipeline.RAISE])  # type: ignore[arg-type]


def only(program: Program) -> Graph:
    (graph,) = program.entries.values()
    return graph


def shown(program: Program) -> list[str]:
    """Print a graph without locations and with numbers rounded, as a person compares them."""
    nodes = [replace(node, loc="") for node in only(program).nodes]
    rounded = [
        replace(n, attrs=n.attrs.updated(scale=round(n.attrs["scale"], 12)))
        if "scale" in n.attrs
        else n
        for n in nodes
    ]
    return [print_node(node) for node in rounded]


def layer(program: Program, index: int) -> Counter[str]:
    return Counter(n.op for n in only(program).nodes if f"layers.{index}" in n.loc)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_becomes_one_short_layer_that_computes_the_same(name: str) -> None:
    before = stored(name)
    after = raised(before)
    expected = LAYER.copy()
    if "no_q_lora" in name or name == "v2_greedy":
        expected -= Counter(rms_norm=1, linear=1)
    assert after.stage is Stage.CANONICAL
    assert layer(after, 1 if "two_layers" in name else 0) == expected
    compared = compare_programs(before, after, tolerance=1e-5)
    assert compared.ok, str(compared)


@pytest.mark.parametrize("name", ["v3", "v2_bf16"])
def test_every_single_pass_keeps_the_meaning(name: str) -> None:
    assert raised(stored(name), verify_each=True).stage is Stage.CANONICAL


def test_logits_and_caches_are_those_of_the_trace() -> None:
    before = stored("v3")
    after = raised(before)
    inputs = sample_inputs(only(before), {"B": 2, "S": 3, "P": 5, "L": 2}, seed=3)
    name = next(iter(before.entries))
    wanted = Interpreter(runnable(before, True)).run(name, inputs)
    found = Interpreter(runnable(after, True)).run(name, inputs)
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        assert (found[key] - value).abs().max() <= 1e-5 * max(1.0, value.abs().max().item()), key


def traced(module: torch.nn.Module, config: ModelConfig) -> Program:
    inputs, outputs = states_of(config).input_names(), states_of(config).output_names()
    return trace(
        module.eval(),
        states_of(config).example_inputs(),
        states_of(config).dynamic_shapes(),
        name="step",
        input_names=inputs,
        output_names=outputs,
        aliases=list(zip(outputs[1:], inputs[4:], strict=True)),
    )


@pytest.fixture(scope="module")
def live() -> Mapping[str, Program]:
    """Trace a stock V3, a stock V2 and models/v3.py as they are installed."""
    one = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    config = small(**SIGMOID, **one)
    other = small_v2(
        scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False, **one
    )
    return {
        "stock v3": traced(stock(config), config),
        "models/v3.py": traced(randomise(v3.build(config)), config),
        "stock v2": traced(stock(other), other),
    }


def test_the_stock_model_and_ours_become_one_text(live: Mapping[str, Program]) -> None:
    stock_text, own_text = (shown(raised(live[name])) for name in ("stock v3", "models/v3.py"))
    assert stock_text == own_text
    assert len(own_text) == 30


def test_what_is_traced_today_raises_and_computes_the_same(live: Mapping[str, Program]) -> None:
    for program in live.values():
        after = raised(program)
        assert layer(after, 0) == LAYER
        compared = compare_programs(program, after, tolerance=1e-5)
        assert compared.ok, str(compared)


def test_the_variant_of_the_router_is_read_off(live: Mapping[str, Program]) -> None:
    by_name = {
        name: next(n for n in only(raised(p)).nodes if n.op == "route") for name, p in live.items()
    }
    v3_route, v2_route = by_name["stock v3"].attrs, by_name["stock v2"].attrs
    assert (v3_route["score"], v3_route["groups"], v3_route["keep"]) == ("sigmoid", 4, 2)
    assert (v3_route["normalise"], v3_route["scale"]) == (True, 2.5)
    assert (v2_route["score"], v2_route["group_score"]) == ("softmax", "max")
    assert (v2_route["normalise"], v2_route["scale"], v2_route["groups"]) == (False, 1.0, 4)


def test_rope_layouts_are_told_apart(live: Mapping[str, Program]) -> None:
    layouts = {
        name: {n.attrs["layout"] for n in only(raised(p)).nodes if n.op == "rope"}
        for name, p in live.items()
    }
    assert layouts["stock v3"] == {"deinterleave"}
    assert layouts["stock v2"] == {"interleaved"}
    half = raised(stored("v3_half_rope_no_groups"))
    assert {n.attrs["layout"] for n in only(half).nodes if n.op == "rope"} == {"half"}


def test_a_decode_step_by_substitution_raises_too() -> None:
    program = stored("v3")
    step = program.map_entries(lambda graph: graph.substitute({"S": 1, "L": 1}))
    after = raised(step)
    assert layer(after, 0) == LAYER
    assert compare_programs(step, after, tolerance=1e-5).ok
    assert substitute(only(after).input("input_ids").type.shape[1], {}) == 1


def windowed(width: int) -> Program:
    """Build a V3 trace whose mask also hides what lies `width` rows back."""
    text = print_program(stored("v3"))
    mask = next(line for line in text.splitlines() if " = le " in line)
    name, operands = mask.strip().split(" = le ")[0], mask.split(" = le ")[1].split(" : ")[0]
    keys, query = operands.split(", ")
    shape = mask.split(" : ")[1].split(" loc")[0]
    lines = f"""  %seen = le {operands}
  %width = full {{shape=[], value={width}, dtype=i64}}
  %first = sub {query}, %width
  %near = gt {keys}, %first
  {name} = logical_and %seen, %near : {shape}"""
    return replace(parse_program(text.replace(mask, lines)), source=stored("v3").source)


@pytest.mark.parametrize("width", [2, 64, 1000])
def test_a_sliding_window_is_never_dropped(width: int) -> None:
    """Latent attention has none, so keys and values are rebuilt."""
    program = windowed(width)
    after = raised(program)
    found = [n for n in only(after).nodes if traits_of(n.op).role is Role.ATTENTION]
    assert {(n.op, n.attrs["window"]) for n in found} == {("attention", width)}
    assert compare_programs(program, after, tolerance=1e-5).ok


def test_every_value_has_a_readable_name() -> None:
    names = {v.name for n in only(raised(stored("v3"))).nodes for v in n.outputs}
    assert {
        "l0.q_a_proj",
        "l0.q_nope",
        "l0.q_rope",
        "present.0.latent",
        "l0.idx",
        "logits",
    } <= names
