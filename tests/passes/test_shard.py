"""Sharding: documents, meaning on all ranks, communication, and what cannot be shared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsc import pipeline
from dsc.backends.base import Capabilities
from dsc.backends.reference import ReferenceExecutable
from dsc.errors import UsageError, VerificationError
from dsc.ir.dims import Range
from dsc.ir.graph import Graph
from dsc.ir.interface import Mesh, Storage
from dsc.ir.interpreter import Interpreter
from dsc.ir.op import named
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.ranks import RankedInterpreter, at_rank, run_ranks
from dsc.ir.samples import sample_inputs
from dsc.ir.segments import cut
from dsc.ir.stages import Stage
from dsc.ir.traits import Role
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import Apply, Source, apply, evaluate, sources
from dsc.passes.cut_at_collectives import CutAtCollectives
from dsc.passes.eliminate_dead_code import EliminateDeadCode
from dsc.passes.shard import PARALLEL, Shard, check_parallel, check_parts
from dsc.passes.specialise_entries import SpecialiseEntries
from dsc.rewrite.base import PassReport
from dsc.rewrite.manager import Manager, Watch
from dsc.rewrite.twin import Twin
from dsc.rewrite.verify import compare_programs
from dsc.runtime.segmented import SegmentedExecutable
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.rewrite.harness import program_of

SIZES = Sizes(heads=4, vocab=52, experts=8, groups=4, expert_inner=16)


def model(sizes: Sizes = SIZES) -> Program:
    """A dense and a sparse layer; decode and extend absorbed."""
    return pipeline.apply(canonical_lm(sizes), ["specialise_entries", "absorb_mla"])


def shard(program: Program, ranks: int = 2, parallel: str = "tp+ep") -> tuple[Program, PassReport]:
    report = PassReport()
    done = Shard(ranks, parallel).run(program, report)
    verify(done)
    return done, report


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def of(text: str) -> Program:
    return program_of(text, Stage.CANONICAL)


@pytest.mark.parametrize("parallel", ["tp+ep", "tp", "ep"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_together_compute_the_same(ranks: int, parallel: str) -> None:
    before = model()
    after, report = shard(before, ranks, parallel)
    found = compare_programs(before, after, Shard.tolerance)
    assert found.ok, found.failure
    assert found.runs >= 9
    assert not report.missed


@pytest.mark.parametrize(
    "name", ["self_attn.o_proj.weight", "self_attn.q_b_proj.weight", "mlp.experts.down_proj"]
)
def test_a_wrong_part_of_a_weight_is_found_out(name: str) -> None:
    """Every rank with the first part: the comparison must not pass."""
    before = model()
    after, _ = shard(before)
    (key,) = (k for k in after.weights if k.startswith(f"model.layers.1.{name}.shard_"))
    cut = after.weights[key]
    assert isinstance(cut, Apply)
    first = apply("slice", *cut.args, **{**cut.attrs, "start": 0, "end": _extent(cut)})
    wrong = replace(after, weights={**after.weights, key: first})
    assert not compare_programs(before, wrong, Shard.tolerance).ok


def _extent(cut: Apply) -> Any:
    return cut.type.shape[cut.attrs["axis"]]


def test_a_layer_costs_two_sums_and_the_model_one_gather() -> None:
    after, report = shard(model())
    for graph in after.entries.values():
        assert ops(graph).count("all_reduce") == 2 * SIZES.layers
        assert ops(graph).count("all_gather") == 1
        assert graph.nodes[-1].op == "all_gather"
        assert graph.output_names[0] == "logits"
        sums = [n for n in graph.nodes if n.op == "all_reduce"]
        assert sums[0].loc == "model.layers.0"
    assert report.fired["all_reduce"] == 3 * 2 * SIZES.layers


def test_each_rank_holds_its_part() -> None:
    before = model()
    after, _ = shard(before, 4)
    whole = {k: e.type.numel for k, e in before.weights.items()}
    large = [k for k in whole if any(part in k for part in ("q_b", "o_proj", "gate_up", "lm_head"))]
    assert large
    for name in large:
        (cut,) = (e for k, e in after.weights.items() if k.startswith(f"{name}.shard_"))
        assert cut.type.numel * 4 == whole[name]
    for kept in ("embed_tokens", "mlp.gate.weight", "kv_a_proj_with_mqa"):
        assert any(kept in k and "shard" not in k for k in after.weights)
    caches = [v.type for v in after.entries["decode"].inputs]
    assert caches == [v.type for v in before.entries["decode"].inputs]


def test_the_parts_of_all_ranks_are_the_whole() -> None:
    after, _ = shard(model())
    for name, expr in after.weights.items():
        root, _, axis = name.rpartition(".shard_")
        if not root or "gate_up" in name:
            continue
        parts = [evaluate(at_rank(after, r).weights[name], after.source) for r in range(2)]
        assert isinstance(expr, Apply)
        whole = evaluate(expr.args[0], after.source)
        assert torch.equal(torch.cat(parts, int(axis)), whole), name


def test_one_text_serves_all_ranks() -> None:
    after, _ = shard(model())
    text = print_program(after)
    assert print_program(parse_program(text)) == text
    assert "rank=[0,1]" in text
    first, second = (print_program(at_rank(after, r)) for r in range(2))
    assert first != second, "the weights differ by rank"
    graphs = [text[text.index("graph decode") :] for text in (first, second)]
    assert graphs[0] == graphs[1], "the graphs do not"


def test_a_rank_reads_only_its_own_experts() -> None:
    each = [Source(f"e{i}", TensorType(DType.bf16, (6, 8))) for i in range(4)]
    stacked = apply("cast", apply("stack", *each), dtype=DType.f32)
    program = of(EXPERTS)
    after, _ = shard(replace(program, weights={**program.weights, "g": stacked}))
    for rank, own in enumerate([["e0", "e1"], ["e2", "e3"]]):
        cut = at_rank(after, rank).weights["g.shard_0"]
        assert [s.key for s in sources(cut)] == own


EXPERTS = """graph main(%x: f32[N,8], %i: i64[N,2], %w: f32[N,2], @g: f32[4,6,8], @d: f32[4,8,3]) {
  %y = experts %x, %i, %w, @g, @d {act="silu"} : f32[N,8]
  return %y
}"""
ATTENTION = """graph main(%x: f32[B,S,8], %c: f32[B,T,6], %r: f32[B,T,2], %n: i64[B],
  @q: f32[18,8], @kv_b: f32[21,6]) {
  %q = linear %x, @q : f32[B,S,18] loc "model.layers.0.self_attn.q_b_proj"
  %h = reshape %q {shape=[B,S,3,6]} : f32[B,S,3,6]
  %a, %b = split %h {sizes=[4,2]} : f32[B,S,3,4], f32[B,S,3,2]
  %o = mla_attention %a, %b, %c, %r, @kv_b, %n {scale=0.5} : f32[B,S,3,3]
    loc "model.layers.0.self_attn"
  return %o
}"""


def refused(text: str, ranks: int, parallel: str = "tp+ep") -> str:
    with pytest.raises(UsageError) as caught:
        shard(of(text), ranks, parallel)
    return str(caught.value)


def test_heads_that_do_not_part_are_refused() -> None:
    message = refused(ATTENTION, 2)
    assert "3 attention heads do not part into 2 ranks" in message
    assert "model.layers.0.self_attn" in message
    assert "divides 3: 1, 3" in message
    assert shard(of(ATTENTION), 3)[1].fired["heads"] == 1
    assert not shard(of(ATTENTION), 2, "ep")[1].fired, "without tp the heads stay together"


def test_experts_that_do_not_part_are_refused() -> None:
    assert "4 experts do not part into 3 ranks" in refused(EXPERTS, 3)
    assert shard(of(EXPERTS), 3, "tp")[1].fired["experts"] == 1, "each in three parts"


def test_options_that_cannot_be_are_refused() -> None:
    assert "shard: ranks is 0" in refused(EXPERTS, 0)
    assert "shard: parallel is pp" in refused(EXPERTS, 2, "pp")


def test_one_rank_changes_nothing() -> None:
    before = model()
    after, report = shard(before, 1)
    assert after.entries == before.entries
    assert not report.fired


def test_rows_that_do_not_part_stay_whole() -> None:
    text = """graph main(%x: f32[N,8], @gate: f32[5,8], @up: f32[5,8], @down: f32[8,5]) {
      %g = linear %x, @gate : f32[N,5]
      %u = linear %x, @up : f32[N,5]
      %h = swiglu %g, %u : f32[N,5]
      %d = linear %h, @down : f32[N,8]
      %y = add %x, %d : f32[N,8]
      return %y
    }"""
    program = of(text)
    after, report = shard(program)
    assert after.entries == program.entries
    assert "no linear that parts into 2" in report.missed[0][2]


AWKWARD = {
    "a norm over the split axis": "%z = rms_norm %h, @w {eps=1e-06} : f32[N,6]",
    "a softmax over it": "%z = softmax %h {axis=-1} : f32[N,6]",
    "a split of it": "%z, %rest = split %h {sizes=[2,4]} : f32[N,2], f32[N,4]",
    "a sum over it": "%z = sum %h {axes=[1]} : f32[N]",
    "a partial sum in a product": "%d = linear %h, @down : f32[N,8]\n"
    "%z = mul %d, %d : f32[N,8]",
    "a partial sum and a whole value": "%d = linear %h, @down : f32[N,8]\n"
    "%z = add %d, %x : f32[N,8]",
    "a bias after a partial sum": "%z = linear %h, @down, @b : f32[N,8]",
}  # fmt: skip
WHOLE = {
    "a norm over the split axis": "rms_norm takes %h whole: it works along the axis that is split",
    "a softmax over it": "softmax takes %h whole: softmax does not say how ranks share it",
    "a split of it": "split takes %h whole: it works along the axis that is split",
    "a sum over it": "sum takes %h whole: sum does not say how ranks share it",
    "a partial sum in a product": "",
    "a partial sum and a whole value": "",
    "a bias after a partial sum": "linear takes %h whole: its bias would be summed as often as",
}
"""What the report says of it; a sum that is due is no loss."""


@pytest.mark.parametrize("why", AWKWARD)
def test_what_has_no_rule_is_made_whole(why: str) -> None:
    before = of(f"""graph main(%x: f32[N,8], @gate: f32[6,8], @up: f32[6,8], @down: f32[8,6],
      @w: f32[6], @b: f32[8]) {{
      %g = linear %x, @gate : f32[N,6]
      %u = linear %x, @up : f32[N,6]
      %h = swiglu %g, %u : f32[N,6]
      {AWKWARD[why]}
      return %z
    }}""")
    after, report = shard(before)
    assert {"all_gather", "all_reduce"} & set(ops(after.entries["main"]))
    assert any(WHOLE[why] in reason for _, _, reason in report.missed) or not WHOLE[why]
    inputs = sample_inputs(before.entries["main"], {"N": 5})
    wanted = Interpreter(before).run("main", inputs)["z"]
    found = RankedInterpreter(after).run("main", inputs)["z"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_grouped_experts_can_follow() -> None:
    """Other passes run on a sharded program as on any."""
    before = model()
    after, _ = shard(before)
    lowered = pipeline.apply(after, ["lower_moe_dispatch", "merge_projections", "own_outputs"])
    inputs = sample_inputs(before.entries["extend"], {"B": 2, "S": 3, "P": 4, "L": 2})
    wanted = Interpreter(before).run("extend", inputs)
    found = RankedInterpreter(lowered).run("extend", inputs)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_segments_hold_no_collective_and_compute_the_same() -> None:
    """What a backend without collectives emits: stretches between them, called in turn."""
    after, _ = shard(model())
    pieces = cut(after)
    verify(pieces)
    assert not named(Role.COLLECTIVE) & {
        op for graph in pieces.entries.values() for op in ops(graph)
    }
    assert len(pieces.entries) == 3 * (2 * SIZES.layers + 1), "logits end in a gather"
    inputs = sample_inputs(after.entries["extend"], {"B": 2, "S": 3, "P": 4, "L": 2})

    def one(rank: int) -> dict[str, torch.Tensor]:
        segments = ReferenceExecutable(at_rank(pieces, rank))
        return SegmentedExecutable(segments, after).run("extend", inputs)

    wanted = RankedInterpreter(after).run("extend", inputs)
    for found in run_ranks(2, one):
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_cut_is_compared_as_a_whole() -> None:
    """`--verify-each` and bisect see what a segment loses or computes otherwise."""
    passes = ["specialise_entries", "absorb_mla", "append_cache_in_place", "shard", "fuse"]
    planned = pipeline.apply(canonical_lm(SIZES), [*passes, "own_outputs"])
    each = CutAtCollectives()
    made = each.run(planned, PassReport())
    assert len(made.entries) > len(planned.entries)
    found = Twin().compare(each, planned, made)
    assert found.ok, found
    name, piece = next((n, g) for n, g in made.entries.items() if n.startswith("prefill"))
    changed = [
        replace(n, attrs=n.attrs.updated(eps=0.5)) if n.op == "rms_norm" else n for n in piece.nodes
    ]
    wrong = replace(made, entries={**made.entries, name: piece.with_nodes(changed)})
    assert not Twin().compare(each, planned, wrong).ok
    short = replace(piece, outputs=piece.outputs[1:], output_names=piece.output_names[1:])
    lost = replace(made, entries={**made.entries, name: replace(short, aliases=())})
    with pytest.raises(VerificationError):
        verify(each.comparable(planned, lost))


def test_the_cut_of_a_program_too_wide_to_interpret_is_verified() -> None:
    manager = Manager(Watch(verify_each=True))
    manager.twin = Twin(widest=0)
    can = Capabilities(states=(Storage.CONTIGUOUS,))
    asked = pipeline.PipelineOptions(ranks=2, fusion_level=0)
    manager.run(canonical_lm(SIZES), pipeline.passes_for(canonical_lm(SIZES), can, asked))
    *_, last = manager.records
    assert last.name == "cut_at_collectives"
    assert last.verified.startswith("shrunk form")


def test_segments_are_for_the_steps_of_their_entry() -> None:
    before = Manager().run(canonical_lm(SIZES, 64), [SpecialiseEntries(few=4)])
    after, _ = shard(before)
    pieces = cut(after)
    assert pieces.choose_entry(1, 4, 9) == "decode_few_0"
    assert [name for name in pieces.entries if pieces.ranges(name)["B"].hi == 4] == [
        name for name in pieces.entries if name.startswith("decode_few")
    ]
    assert len(pieces.guards) == len(pieces.entries)


def test_segments_keep_caches_in_place() -> None:
    before = pipeline.apply(
        canonical_lm(SIZES), ["specialise_entries", "absorb_mla", "append_cache_in_place"]
    )
    after, _ = shard(before)
    aliased = [g for g in cut(after).entries.values() if g.aliases]
    caches = 2 * SIZES.layers * len(after.entries)
    assert sum(len(g.aliases) for g in aliased) == caches
    for graph in aliased:
        for output, source in graph.aliases:
            assert graph.outputs[output].type == graph.inputs[source].type


# --- what is told, and small programs -------------------------------------------------------------


def test_each_ranks_part_of_the_experts_is_what_it_says() -> None:
    """With `tp` a part of the gate and of the up rows, each; with `ep` whole experts."""
    before = of(EXPERTS)
    g, d = (evaluate(before.weights[name], before.source) for name in "gd")
    inner, _ = shard(before, 3, "tp")
    dealt, _ = shard(before, 2, "ep")
    for rank in range(3):
        own = at_rank(inner, rank)
        parts = {name: evaluate(e, own.source) for name, e in own.weights.items()}
        assert torch.equal(parts["g.shard_1"], g[:, [rank, 3 + rank]])
        assert torch.equal(parts["d.shard_2"], d[:, :, [rank]])
    places, present = [[0, 1, 0, 0], [0, 0, 0, 1]], [[1.0, 1, 0, 0], [0.0, 0, 1, 1]]
    for rank in range(2):
        own = at_rank(dealt, rank)
        parts = {name: evaluate(e, own.source) for name, e in own.weights.items()}
        assert torch.equal(parts["g.shard_0"], g[2 * rank : 2 * rank + 2])
        assert parts["rank.place_of_4"].tolist() == places[rank]
        assert parts["rank.has_of_4"].tolist() == present[rank]


def test_a_program_says_what_it_runs_on() -> None:
    after, report = shard(of(EXPERTS), 2, "ep")
    assert after.symbols["rank"] == Range(0, 1)
    assert after.mesh == Mesh(2, "ep")
    assert report.facts == {"ranks": 2, "parallel": "ep"}
    assert report.fired == {"experts": 1, "all_reduce": 1}
    assert after.stage is Stage.OPTIMIZED
    whole, _ = shard(of(EXPERTS), 1)
    assert whole.stage is Stage.OPTIMIZED
    assert "rank" not in whole.symbols


MLP = """graph main(%x: f32[N,8], @gate: f32[6,8], @up: f32[6,8], @down: f32[8,6]) {
  %g = linear %x, @gate
  %u = linear %x, @up
  %h = swiglu %g, %u
  %d = linear %h, @down loc "m.down"
  %y = neg %d
  %z = exp %y
  %o = mul %z, %y
  return RESULTS
}"""


@pytest.mark.parametrize(
    ("results", "nodes"),
    [
        ("%o", ["linear", "linear", "swiglu", "linear", "neg", "all_reduce", "exp", "mul"]),
        ("%o, %y", ["linear", "linear", "swiglu", "linear", "neg", "all_reduce", "exp", "mul"]),
        ("%d", ["linear", "linear", "swiglu", "linear", "all_reduce"]),
        ("%h", ["linear", "linear", "swiglu", "all_gather"]),
    ],
)
def test_what_is_summed_or_gathered_is_so_once(results: str, nodes: list[str]) -> None:
    before = of(MLP.replace("RESULTS", results))
    after, _ = shard(EliminateDeadCode().run(before, PassReport()))
    assert ops(after.entries["main"]) == nodes
    (told,) = (n for n in after.entries["main"].nodes if n.op.startswith("all_"))
    assert told.attrs["ranks"] == 2
    assert compare_programs(before, after, Shard.tolerance).ok


@pytest.mark.parametrize(("columns", "found"), [(6, ["linear", "all_gather"]), (7, ["linear"])])
def test_columns_that_an_entry_returns_are_made_in_parts(columns: int, found: list[str]) -> None:
    text = f"graph main(%x: f32[N,8], @w: f32[{columns},8]) {{ %y = linear %x, @w\n return %y }}"
    after, report = shard(of(text))
    assert ops(after.entries["main"]) == found
    why = [("columns", "", "what linear reads comes from no linear that parts into 2")]
    assert report.missed == ([] if columns == 6 else why)
    assert ops(shard(of(text), 2, "ep")[0].entries["main"]) == ["linear"]


def test_parts_are_checked_before_anything_is_compiled() -> None:
    check_parallel(1, "tp")
    for parallel in PARALLEL:
        check_parallel(3, parallel)
    with pytest.raises(UsageError, match=r"^0 ranks"):
        check_parallel(0, "tp")
    with pytest.raises(UsageError, match="no way to share called 'pp'"):
        check_parallel(2, "pp")
    check_parts(4, 6, 2, "tp+ep")
    check_parts(4, 5, 2, "tp")
    check_parts(5, 4, 2, "ep")
    for heads, experts, parallel, what in (
        (5, 4, "tp+ep", "5 attention heads"), (4, 5, "tp+ep", "5 experts"),
        (5, 4, "tp", "5 attention heads"), (4, 5, "ep", "5 experts"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"{what} do not part into 2 ranks"):
            check_parts(heads, experts, 2, parallel)
    with pytest.raises(UsageError) as caught:
        check_parts(128, 65, 3, "tp")
    assert "divides 128: 1, 2, 4, 8, 16, 32, 64\n" in f"{caught.value}\n"


def test_cuts_are_counted() -> None:
    report = PassReport()
    fused, _ = shard(of(EXPERTS), 2)
    planned = pipeline.apply(fused, ["fuse", "own_outputs"])
    done = CutAtCollectives().run(planned, report)
    assert report.fired["cut"] == 1
    assert list(done.entries) == ["main_0"]
