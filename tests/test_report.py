"""What a report holds: figures of the real model, layers, what fired where, tables."""

from __future__ import annotations

import io
import json
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import dsc
from dsc.cli.report_tables import SAME, print_report
from dsc.errors import ArtifactError, UsageError
from dsc.ir.costs import node_costs, total
from dsc.ir.dims import Range, symbol
from dsc.ir.graph import GraphBuilder, Weight
from dsc.ir.interface import State, Storage
from dsc.ir.layers import layer_of, runs
from dsc.ir.limits import Limits
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import MetaSource, Source
from dsc.passes.absorb_mla import AbsorbMla
from dsc.passes.lower_moe_dispatch import LowerMoeDispatch
from dsc.passes.shard import Shard
from dsc.passes.specialise_entries import SpecialiseEntries
from dsc.report import (
    build_report,
    cache_bytes,
    cache_layer,
    entry_report,
    packed_report,
    state_bytes,
)
from dsc.rewrite.base import PassReport
from dsc.runtime.packing import layout
from dsc.runtime.plan import EntryPlan, Launch, Plan
from tests.backends import canonical_lm as family
from tests.cli.conftest import Invoke
from tests.cli.conftest import invoke as invoke  # the fixture
from tests.runtime.test_session import small_lm

SMALL = Path(__file__).resolve().parent / "data" / "small_lm.dsc"
V3 = family.Sizes(
    vocab=129280, hidden=7168, layers=61, dense=3, heads=128, q_lora=1536, kv_lora=512, nope=128,
    rope=64, value=128, inner=18432, experts=256, expert_inner=2048, top_k=8, groups=8, keep=4,
    dtype=DType.bf16,
)  # fmt: skip


@pytest.fixture(scope="module")
def v3() -> Program:
    """The 671b model without weight values, as entries, absorbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "random_source", MetaSource)
        program = family.canonical_lm(V3, max_batch=1, max_context=163840)
    for each in (SpecialiseEntries(), AbsorbMla()):
        program = each.run(program, PassReport())
    return program


def test_the_figures_of_v3(v3: Program) -> None:
    report = build_report(v3, [], {}, [])
    assert report["cache_bytes_per_token"] == 61 * (512 + 64) * 2 == 70_272
    assert 670.5e9 < report["parameters"] < 671.5e9
    decode = report["entries"]["decode"]
    assert 36e9 < decode["parameters"] < 38e9
    assert decode["weight_bytes"] == pytest.approx(2 * decode["parameters"], rel=1e-3)
    assert [p["at"]["P"] for p in decode["points"]] == [1024, 4096]
    assert decode["at"]["S"] == 1
    assert decode["points"][1]["read_bytes"] > decode["points"][0]["read_bytes"]
    assert report["entries"]["prefill"]["at"]["S"] == 32  # what the program was bounded to
    json.dumps(report)


MLP = """graph main(%x: f32[N,8], @layers.0.gate: f32[6,8], @layers.0.up: f32[6,8],
  @layers.0.down: f32[8,6], @head: f8e4m3{4x*,f32}[10,8]) {
  %g = linear %x, @layers.0.gate
  %u = linear %x, @layers.0.up
  %h = swiglu %g, %u
  %d = linear %h, @layers.0.down
  %y = linear %d, @head
  return %y
}"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_rank_packs_is_told_by_layer_and_by_what_it_is_in(ranks: int) -> None:
    program = parse_program(MLP)
    if ranks > 1:
        program = Shard(ranks=ranks).run(program, PassReport())
    found = packed_report(program)
    assert found["ranks"] == ranks
    assert found["bytes"] == sum(size for _, size in layout(program)[1].values())
    plain = 3 * 6 * 8 * 4 // ranks
    head, layer = sorted(found["layers"], key=itemgetter("layer"))
    assert layer == {"layer": "layers.0", "bytes": plain, "formats": {"f32": plain}}
    assert found["bytes"] - plain == head["bytes"]
    if ranks == 1:
        assert head["formats"] == {"f8e4m3{4x*,f32}": 10 * 8 + 3 * 4}


def test_what_v3_packs_is_all_that_it_is_made_of(v3: Program) -> None:
    report = build_report(v3, [], {}, [])
    packed = report["packed"]
    assert packed["bytes"] == pytest.approx(2 * report["parameters"], rel=0.02)
    named = {layer["layer"]: layer for layer in packed["layers"]}
    assert named["model.layers.3"]["bytes"] == named["model.layers.60"]["bytes"] > 20e9
    assert named["model.layers.2"]["bytes"] < 2e9


def test_layers_add_up(v3: Program) -> None:
    decode = entry_report(v3, "decode")
    layers = decode["layers"]
    for key in ("nodes", "weight_bytes", "flops"):
        assert sum(layer[key] for layer in layers) == decode[key]
    named = {layer["layer"]: layer for layer in layers}
    assert len([n for n in named if n.startswith("model.layers.")]) == 61
    dense, sparse = named["model.layers.0"], named["model.layers.60"]
    assert dense["cache_bytes_per_token"] == sparse["cache_bytes_per_token"] == 1152
    # 8 of 256 experts and the shared one, against 18432 inner rows of a dense layer.
    router = 7168 * 256 + 256
    assert sparse["parameters"] - dense["parameters"] == 7168 * 3 * (9 * 2048 - 18432) + router
    alike = runs(layers, itemgetter("layer"), lambda x: [x.get(k) for k in SAME])
    assert [len(r) for r in alike] == [1, 3, 58, 1]


def test_grouped_experts_touch_as_many_parameters(v3: Program) -> None:
    grouped = LowerMoeDispatch().run(v3, PassReport())
    assert "grouped_linear" in {n.op for n in grouped.entries["decode"].nodes}
    stacked = entry_report(v3, "decode")["parameters"]
    assert entry_report(grouped, "decode")["parameters"] == stacked


def test_a_weight_that_is_read_twice_counts_once() -> None:
    b = GraphBuilder("main")
    x = b.input("x", TensorType(DType.f32, (symbol("B"), 4)))
    weight = Weight("w", TensorType(DType.f32, (4, 4)))
    graph = b.finish([b.linear(b.linear(x, weight), weight)])
    found = total(graph.nodes, node_costs(graph), {"B": 2})
    assert (found["parameters"], found["weight_bytes"]) == (16, 128)
    assert found["flops"] == 2 * (2 * 2 * 4 * 4)
    weights = {"w": Source("w", weight.type)}
    program = Program("p", {"main": graph}, weights, {"B": Range(1, 4)}, stage=Stage.CANONICAL)
    assert entry_report(program, "main")["at"] == {"B": 1}


@pytest.mark.parametrize(
    ("storage", "context", "page", "rows"),
    [
        ("grown", 100, None, 2 * 100 + 8),
        ("contiguous", 100, None, 100 + 8),
        ("paged", 128, 64, 128),
        ("paged", 129, 64, 192),
        ("ring", 100, None, 5),
        ("fixed", 100, None, 1),
    ],
)
def test_what_a_session_holds_at_most(
    storage: str, context: int, page: int | None, rows: int
) -> None:
    """Rows of 3 elements in fp32, of each of 2 sequences; only those of tokens grow with them."""
    state = State("past", "present", TensorType(DType.f32, (3,)), Storage(storage), 5)
    program: Any = SimpleNamespace(states=[state, state], page=page)
    assert state_bytes(program, Limits(2, context, 8)) == 2 * 2 * rows * 12
    assert cache_bytes(program) == (24 if storage in ("grown", "contiguous", "paged") else 0)


def test_a_plan_gives_launches_to_layers_and_the_rest_to_none() -> None:
    """Of an entry in segments memory is that of the largest, and launches are summed."""
    program = small_lm()
    (entry,) = program.entries
    nodes = program.entries[entry].nodes
    launches = [
        Launch("k", (), node=nodes[0].outputs[0].name, loc="elsewhere"),
        Launch("k", (), node="", loc="model.layers.3.mlp"),
        Launch("k", (), node="", loc="model.layers.3.attn"),
    ]
    plans = [
        EntryPlan((), (), (), tuple(launches), arena_bytes=64, lower_bound=60, allocator="one"),
        EntryPlan((), (), (), (launches[0],), arena_bytes=128, lower_bound=8, allocator="two"),
    ]
    of: Any = SimpleNamespace(of=lambda _: plans)
    found = entry_report(program, entry, of)
    assert (found["launches"], found["arena_bytes"], found["arena_lower_bound"]) == (4, 128, 60)
    assert found["allocator"] == "one"
    assert [layer["launches"] for layer in found["layers"]] == [2]
    assert found["other_launches"] == 2
    alone = entry_report(program, entry, Plan({entry: plans[1]}))
    assert (alone["launches"], alone["other_launches"]) == (1, 0)
    assert found["activation_bytes"] == (
        found["points"][0]["read_bytes"] + found["points"][0]["written_bytes"]
    )


def test_points_are_those_of_the_step_and_of_two_contexts() -> None:
    step = small_lm()
    (entry,) = step.entries
    report = entry_report(step, entry)
    assert report["at"] == {"B": 1, "S": 8, "P": 32, "L": 1}  # within its own bounds
    assert len(report["points"]) == 1  # both contexts are the same then


@pytest.mark.parametrize(("name", "layer"), [("past.12.latent", "12"), ("past.latent", "")])
def test_the_layer_of_a_cache(name: str, layer: str) -> None:
    assert cache_layer(name) == layer


def test_what_fired_where_and_what_did_not(v3: Program) -> None:
    report = PassReport()
    AbsorbMla().run(SpecialiseEntries().run(small_lm(), PassReport()), report)
    as_json = report.as_dict()
    assert as_json["fired"] == {"absorb": 2}
    ((rule, _, reason),) = as_json["missed"]
    assert rule == "absorb"
    assert "entry prefill keeps the expanded form" in reason
    text = (SMALL.parent / "traced" / "v3.dsc").read_text()
    from dsc import pipeline
    from dsc.ir.parser import parse_program

    norms = PassReport()
    pipeline.make("raise_rms_norm").run(parse_program(text), norms)
    assert "model.layers.0.input_layernorm" in norms.as_dict()["places"]["RmsNorm"]


@pytest.mark.parametrize(
    ("loc", "layer"),
    [
        ("model.layers.12.mlp.experts", "model.layers.12"),
        ("layers.3", "layers.3"),
        ("model.layers.norm", "model.layers.norm"),
        ("lm_head", "lm_head"),
        ("", "elsewhere"),
    ],
)
def test_the_layer_of_a_path(loc: str, layer: str) -> None:
    assert layer_of(loc) == layer


def shown(report: dict[str, object], entry: str | None = None) -> str:
    out = io.StringIO()
    print_report(Console(file=out, width=160, highlight=False), report, entry)
    return out.getvalue()


def test_the_table_of_v3(v3: Program) -> None:
    text = shown(build_report(v3, [], {}, []))
    assert "70,272 B" in text
    assert "671.0" in text
    assert "36.6" in text
    assert "model.layers.{3..60}" in text


def test_inspect_shows_the_report_of_model_and_artifact(invoke: Invoke, tmp_path: Path) -> None:
    text = invoke("inspect", str(SMALL), "--report").stdout
    assert "absorb x2" in text
    assert "absorb did not fire: entry prefill keeps" in text
    out = dsc.compile(str(SMALL), backend="null", max_context=32).save(tmp_path / "out")
    report = json.loads(invoke("inspect", str(out), "--report", "--json").stdout)
    assert report["cache_bytes_per_token"] == 40
    one = invoke("inspect", str(out), "--report", "--entry", "decode").stdout
    assert "decode by layer" in one
    assert "prefill by layer" not in one
    with pytest.raises(UsageError, match="no entry 'step'"):
        invoke("inspect", str(out), "--report", "--entry", "step")
    with pytest.raises(UsageError, match="--json goes with --report"):
        invoke("inspect", str(out), "--json")


@pytest.mark.parametrize("text", ["[1]", "{", '{"passes": [7]}', '{"entries": {"decode": []}}'])
def test_a_damaged_report_is_told(text: str, invoke: Invoke, tmp_path: Path) -> None:
    out = dsc.compile(str(SMALL), backend="null", max_context=32).save(tmp_path / "out")
    (out / "report.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"report"):
        invoke("inspect", str(out), "--report")


def test_a_report_is_shown_as_text_and_never_obeyed() -> None:
    text = shown({"notes": ["[red]x[/red] " + chr(27) + "[2J"], "passes": []})
    assert "[red]x[/red] ?[2J" in text
