"""The passes that change a program's structure: their docstrings, their meaning, their limits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dsc.ir.dims import Range
from dsc.ir.graph import Graph
from dsc.ir.interpreter import Interpreter
from dsc.ir.parser import parse_graph
from dsc.ir.printer import print_graph
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.verifier import verify
from dsc.ir.weights import evaluate
from dsc.passes import specialise_entries
from dsc.passes.absorb_mla import AbsorbMla
from dsc.passes.append_cache_in_place import AppendCacheInPlace
from dsc.passes.lower_moe_dispatch import LowerMoeDispatch
from dsc.passes.name_values import named
from dsc.passes.own_outputs import OwnOutputs
from dsc.passes.specialise_entries import SpecialiseEntries, break_even
from dsc.rewrite.base import PassReport
from dsc.rewrite.verify import compare_programs
from dsc.runtime.nodes import draft_nodes
from dsc.runtime.placing import place
from tests.rewrite.harness import doc_block, program_of


def test_no_value_takes_the_name_of_an_input() -> None:
    text = 'graph main(%x: f32[B]) { %y = exp %x\n %z = neg %y\n return %z as "x", %y as "e" }'
    graph = named(parse_graph(text))
    assert [v.name for v in graph.values()] == ["x", "e", "neg"]
    assert graph.output_names == ("x", "e")


def test_specialise_entries_docstring() -> None:
    doc = specialise_entries.__doc__ or ""
    step = parse_graph(doc_block(doc, "Before"))
    program = replace(program_of(doc_block(doc, "Before"), Stage.CANONICAL), entries={"step": step})
    done = SpecialiseEntries().run(program, PassReport())
    assert list(done.entries) == ["decode", "extend", "prefill"]
    wanted = print_graph(parse_graph(doc_block(doc, "After")))
    assert print_graph(done.entries["decode"]) == wanted
    assert [(g.entry, g.step) for g in done.guards] == [
        ("decode", 1), ("extend", None), ("prefill", None),
    ]  # fmt: skip


def test_a_decode_step_of_few_sequences_is_an_entry_of_its_own_where_there_are_more() -> None:
    doc = specialise_entries.__doc__ or ""
    step = parse_graph(doc_block(doc, "Before"))
    program = replace(program_of(doc_block(doc, "Before"), Stage.CANONICAL), entries={"step": step})
    for most, few in ((64, ["decode_few"]), (4, [])):
        many = replace(program, symbols={**program.symbols, "B": Range(1, most)})
        done = SpecialiseEntries(few=4).run(many, PassReport())
        assert list(done.entries) == [*few, "decode", "extend", "prefill"]
        assert [done.choose_entry(*s, 9) for s in ((1, 4), (1, 5), (2, 1))] == [
            *(few or ["decode"]), "decode", "extend",
        ]  # fmt: skip
        assert {name: done.ranges(name)["B"].hi for name in done.entries} == {
            name: 4 if name in few else most for name in done.entries
        }
        for name in few:
            assert replace(done.entries[name], name="decode") == done.entries["decode"]


MLA = """graph step(%qn: bf16[B,S,128,128], %qr: bf16[B,S,128,64], %c: bf16[B,T,512],
  %r: bf16[B,T,64], %n: i64[B], @kv_b: bf16[32768,512]) {
  %o = mla_attention %qn, %qr, %c, %r, @kv_b, %n {scale=0.1} : bf16[B,S,128,128]
  return %o
}"""


def test_break_even_of_v3_is_170_new_tokens() -> None:
    assert break_even(parse_graph(MLA)) == 170  # 512 * 256 / 768 = 170.67, rounded down


@pytest.mark.parametrize(("latent", "most"), [(64, 0), (65, 4160), (128, 128), (63, 0)])
def test_absorption_breaks_even_only_where_expanding_may_cost_less(latent: int, most: int) -> None:
    """Over a latent of width c, with 64 + 64 columns of a head: c * 128 // (2 * c - 128).

    0: absorbing costs less for any number of tokens.
    """
    text = (
        MLA.replace("128,128]", "128,64]").replace("32768", "16384").replace("512]", f"{latent}]")
    )
    assert break_even(parse_graph(text)) == most


def test_absorption_needs_a_weight() -> None:
    text = MLA.replace("@kv_b: bf16[32768,512]", "%kv_b: bf16[32768,512]").replace("@", "%")
    program = program_of(text, Stage.CANONICAL)
    report = PassReport()
    assert AbsorbMla(entries=("main",)).run(program, report) is program
    assert report.missed == [("absorb", "", "kv_b is computed, not a weight")]


def test_absorption_leaves_other_entries_alone() -> None:
    program = program_of(MLA, Stage.CANONICAL)
    assert AbsorbMla().run(program, PassReport()) is program


TWICE = """graph step(%qn: f32[B,S,2,4], %qr: f32[B,S,2,2], %c: f32[B,T,6], %r: f32[B,T,2],
  %n: i64[B], @kv_b: f32[14,6]) {
  %o = mla_attention %qn, %qr, %c, %r, @kv_b, %n {scale=0.5} loc "first"
  %p = mla_attention %qn, %qr, %c, %r, @kv_b, %n {scale=0.25} loc "second"
  return %o, %p
}"""


def test_absorbed_halves_are_each_heads_rows() -> None:
    """Of the 7 rows of a head 4 go to the query and 3 to the values; both attentions share them."""
    program, report = program_of(TWICE, Stage.CANONICAL), PassReport()
    after = AbsorbMla(entries=("main",)).run(program, report)
    verify(after)
    whole = evaluate(program.weights["kv_b"], program.source)
    assert list(after.weights) == ["kv_b.k", "kv_b.v"]
    k, v = (evaluate(e, after.source) for e in after.weights.values())
    assert torch.equal(k, torch.stack([whole[0:4], whole[7:11]]))
    assert torch.equal(v, torch.stack([whole[4:7], whole[11:14]]))
    assert (report.fired, report.places) == ({"absorb": 2}, {"absorb": ["first", "second"]})
    assert compare_programs(program, after, AbsorbMla.tolerance).ok


def test_an_entry_that_keeps_the_expanded_form_is_told_once() -> None:
    program = program_of(TWICE, Stage.CANONICAL)
    graph = program.entries["main"]
    both = replace(program, entries={"decode": graph, "prefill": graph})
    report = PassReport()
    after = AbsorbMla().run(both, report)
    assert after.entries["prefill"] is both.entries["prefill"]
    assert "mla_attention" not in {n.op for n in after.entries["decode"].nodes}
    why = "entry prefill keeps the expanded form: only decode_few, decode, extend are absorbed"
    assert report.missed == [("absorb", "first", why)]
    assert report.near[0].culprits == ("o",)
    plain = program_of("graph main(%x: f32[N]) { %y = neg %x\n return %y }", Stage.CANONICAL)
    AbsorbMla().run(plain, quiet := PassReport())
    assert not quiet.missed


@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_lowered_experts_compute_the_same(act: str) -> None:
    text = """graph main(%x: f32[B,S,8], %i: i64[B,S,3], %w: f32[B,S,3], @g: f32[4,6,8],
      @d: f32[4,8,3]) {
      %y = experts %x, %i, %w, @g, @d {act="silu"} : f32[B,S,8]
      return %y
    }""".replace("silu", act)
    before = program_of(text, Stage.CANONICAL)
    after = LowerMoeDispatch().run(before, PassReport())
    verify(after)
    inputs = {
        "x": torch.randn(2, 5, 8),
        "i": torch.stack([torch.randperm(4)[:3] for _ in range(10)]).view(2, 5, 3),
        "w": torch.rand(2, 5, 3),
    }
    wanted = Interpreter(before).run("main", inputs)["y"]
    found = Interpreter(after).run("main", inputs)["y"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def chain(seed: int, length: int = 40) -> Graph:
    """A random straight-line graph over values of several sizes, with views and late reads."""
    chooser = random.Random(seed)
    lines, live = [], ["x"]
    sizes = {"x": "N,4"}
    for i in range(length):
        source = chooser.choice(live[-6:])
        name = f"v{i}"
        if chooser.random() < 0.2:
            sizes[name] = "2*N,2" if sizes[source] == "N,4" else "N,4"
            shape = sizes[name].replace(" ", "")
            lines.append(f"%{name} = reshape %{source} {{shape=[{shape}]}}")
        elif chooser.random() < 0.3:
            other = chooser.choice([v for v in live if sizes[v] == sizes[source]])
            sizes[name] = sizes[source]
            lines.append(f"%{name} = add %{source}, %{other}")
        else:
            sizes[name] = sizes[source]
            lines.append(f"%{name} = neg %{source}")
        live.append(name)
    body = "\n".join(lines)
    outputs = ", ".join(f"%{v}" for v in {live[-1], live[len(live) // 2]})
    return parse_graph(f"graph main(%x: f32[N,4]) {{\n{body}\nreturn {outputs}\n}}")


def test_outputs_that_share_storage_get_their_own() -> None:
    graph = parse_graph("""graph main(%x: f32[4]) {
      %a = neg %x
      %b = reshape %a {shape=[2,2]}
      return %a, %b, %x, %a as "again"
    }""")
    program = Program("p", {"main": graph}, stage=Stage.CANONICAL)
    after = OwnOutputs().run(program, PassReport())
    verify(after)
    plan = place(draft_nodes(after.entries["main"]), {})
    places = [plan.buffers[port.buffer] for port in plan.outputs]
    assert len({buffer.name for buffer in places}) == 4
    assert all(buffer.region == "output" for buffer in places)
    x = torch.randn(4)
    found = Interpreter(after).run("main", {"x": x})
    assert torch.equal(found["again"], -x)
    assert torch.equal(found["x"], x)


CACHED = """graph main(%q: f32[B,S,2,4], %past: f32[B,P,8], %new: f32[B,S,8], %n: i64[B]) {{
  %c = append %past, %new, %n : f32[B,P+S,8]
  %k = reshape %c {{shape=[B,P+S,2,4]}} : f32[B,P+S,2,4]
  %y = attention %q, %k, %k, %n {{causal=true, scale=0.5}} : f32[B,S,2,4]
  {line}
  return %y, %c as "present" updates %past{out}
}}"""


@pytest.mark.parametrize(
    ("line", "out"),
    [
        ("%m = amax %c {axes=[1]} : f32[B,8]", ", %m"),
        ("%m = silu %c : f32[B,P+S,8]", ", %m"),
        ("%m = mean %past {axes=[1]} : f32[B,8]", ", %m"),
        ("%m = slice %c {axis=1, start=P, end=P+S} : f32[B,S,8]", ", %m"),
        ("%m = arange {start=P, end=P+S, dtype=i64} : i64[S]", ", %m"),
        ("%m = attention %q, %k, %k {causal=true, scale=0.5} : f32[B,S,2,4]", ", %m"),
        ("", ', %past as "old"'),
        ("%o = neg %n\n%m = attention %q, %k, %k, %o {causal=true, scale=0.5}", ", %m"),
    ],
)
def test_a_cache_read_past_its_end_is_not_written_in_place(line: str, out: str) -> None:
    text = CACHED.format(line=line, out=out)
    program = program_of(text, Stage.CANONICAL)
    report = PassReport()
    after = AppendCacheInPlace().run(program, report)
    assert [n.op for n in after.entries["main"].nodes if n.op == "cache_write"] == []
    assert report.missed, "it says why"
    kept = AppendCacheInPlace().run(
        program_of(CACHED.format(line="", out=""), Stage.CANONICAL), report
    )
    assert next(n.op for n in kept.entries["main"].nodes) == "cache_write"
