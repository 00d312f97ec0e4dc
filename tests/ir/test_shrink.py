"""Shrinking: any model of the family at its real widths becomes a small program that runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from bench.parity import BASE
from bench.quantised_folders import LAYOUTS, config_of
from dsc.errors import VerificationError
from dsc.frontends.codes import CodesReader
from dsc.frontends.stock import clean
from dsc.ir.dims import Dim
from dsc.ir.extents import Check, Extent, System, Unsolvable
from dsc.ir.interpreter import Interpreter
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.samples import sample_inputs
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import MetaSource, Source, WeightExpr, apply, sources
from tests.ir.strategies import SIZES, programs

FAMILY: dict[str, dict[str, Any]] = {
    "671b": {"vocab": 129280, "hidden": 7168, "heads": 128, "q": 1536, "c": 512, "n": 128, "r": 64,
             "v": 128, "e": 256, "i": 2048, "k": 8, "groups": 8, "keep": 4, "score": "sigmoid"},
    "236b": {"vocab": 102400, "hidden": 5120, "heads": 128, "q": 1536, "c": 512, "n": 128, "r": 64,
             "v": 128, "e": 160, "i": 1536, "k": 6, "groups": 8, "keep": 3, "score": "softmax"},
    "16b": {"vocab": 102400, "hidden": 2048, "heads": 16, "q": 768, "c": 512, "n": 128, "r": 64,
            "v": 128, "e": 64, "i": 1408, "k": 6, "groups": 1, "keep": 1, "score": "softmax"},
    "kimi-k2": {"vocab": 163840, "hidden": 7168, "heads": 64, "q": 1536, "c": 512, "n": 128,
                "r": 64, "v": 128, "e": 384, "i": 2048, "k": 8, "groups": 1, "keep": 1,
                "score": "sigmoid"},
    "glm": {"vocab": 154880, "hidden": 2048, "heads": 20, "q": 768, "c": 512, "n": 192, "r": 64,
            "v": 256, "e": 64, "i": 1536, "k": 4, "groups": 1, "keep": 1, "score": "sigmoid"},
}  # fmt: skip

LAYER = """\
program "{name}" {{stage=CANONICAL}}
meta {{"config": {{"hidden_size": {hidden}, "num_hidden_layers": 61, "vocab_size": {vocab}}}}}
symbols {{B=[1,64], L=[1,512], P=[0,4096], S=[1,512]}}
weights {{
{weights}
}}
graph step(%input_ids: i64[B,S], %positions: i64[B,S], %lengths: i64[B], %logits_at: i64[B,L],
    %past.3.latent: bf16[B,P,{c}], %past.3.rope: bf16[B,P,{r}]) {{
  %x = embedding %input_ids, @embed
  %h = rms_norm %x, @input_layernorm {{eps=1e-06}}
  %qa = linear %h, @q_a
  %qn = rms_norm %qa, @q_a_norm {{eps=1e-06}}
  %q = linear %qn, @q_b
  %qh = reshape %q {{shape=[B,S,{heads},{qk}]}}
  %q_nope, %qr = split %qh {{sizes=[{n},{r}]}}
  %kva = linear %h, @kv_a
  %c0, %kr = split %kva {{sizes=[{c},{r}]}}
  %c1 = rms_norm %c0, @kv_a_norm {{eps=1e-06}}
  %q_rope = rope %qr, %positions, @inv_freq {{layout="interleaved"}}
  %k_rope = rope %kr, %positions, @inv_freq {{layout="interleaved"}}
  %c = append %past.3.latent, %c1, %lengths
  %r = append %past.3.rope, %k_rope, %lengths
  %o = mla_attention %q_nope, %q_rope, %c, %r, @kv_b, %lengths {{scale=0.1352}}
  %of = reshape %o {{shape=[B,S,{ov}]}}
  %a = linear %of, @o
  %x1 = add %x, %a
  %h1 = rms_norm %x1, @post_layernorm {{eps=1e-06}}
  %idx, %w = route %h1, @gate, @bias {{score="{score}", groups={groups}, keep={keep},
    top_k={k}, normalise=true, scale=2.5}}
  %e = experts %h1, %idx, %w, @gate_up, @down
  %both = linear %h1, @shared_gate_up
  %g, %u = split %both {{sizes=[{i},{i}]}}
  %act = swiglu %g, %u
  %s = linear %act, @shared_down
  %es = add %e, %s
  %y = add %es, %x1
  %z = select_rows %y, %logits_at
  %logits = linear %z, @head
  return %logits as "logits", %c as "present.3.latent" updates %past.3.latent,
    %r as "present.3.rope" updates %past.3.rope
}}
"""


def weight_shapes(m: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, heads, i, e = m["hidden"], m["heads"], m["i"], m["e"]
    return {
        "embed": (m["vocab"], d), "input_layernorm": (d,), "q_a": (m["q"], d),
        "q_a_norm": (m["q"],), "q_b": (heads * (m["n"] + m["r"]), m["q"]),
        "kv_a": (m["c"] + m["r"], d), "kv_a_norm": (m["c"],), "inv_freq": (m["r"] // 2,),
        "kv_b": (heads * (m["n"] + m["v"]), m["c"]), "o": (d, heads * m["v"]),
        "post_layernorm": (d,), "gate": (e, d), "bias": (e,), "gate_up": (e, 2 * i, d),
        "down": (e, d, i), "shared_gate_up": (2 * i, d), "shared_down": (d, i),
        "head": (m["vocab"], d),
    }  # fmt: skip


def layer(name: str) -> Program:
    """One decoder layer with embedding and head, at the widths of a model, without values."""
    m = FAMILY[name]
    lines = []
    for weight, shape in weight_shapes(m).items():
        dtype = "f32" if weight in ("inv_freq", "bias") else "bf16"
        t = f"{dtype}[{','.join(map(str, shape))}]"
        lines.append(f'  @{weight} : {t} = source "model.layers.3.{weight}" : {t}')
    text = LAYER.format(
        name=name, weights="\n".join(lines), qk=m["n"] + m["r"], ov=m["heads"] * m["v"], **m
    )
    program = parse_program(text)
    verify(program)
    return program


def in_fp8(key: str, n: int, k: int) -> WeightExpr:
    """A matrix in FP8 with block scales."""
    scale = TensorType(DType.f32, (-(-n // 128), -(-k // 128)))
    stored = apply(
        "scaled", Source(f"{key}.weight", TensorType(DType.f8e4m3, (n, k))),
        Source(f"{key}.weight_scale_inv", scale), block=(128, 128),
    )  # fmt: skip
    return apply("dequantize", stored, dtype=DType.bf16)


def in_words(layout: str, g: int = 64) -> Callable[[str, int, int], WeightExpr]:
    """Matrices in 4-bit codes with zero points, as a layout packs them."""
    quantization = clean(BASE | config_of({}, LAYOUTS[layout], g)).facts.quantization_config

    def matrix(key: str, n: int, k: int) -> WeightExpr:
        parts: dict[str, tuple[DType, tuple[int, ...]]]
        if layout.startswith("ct"):
            parts = {
                "weight_packed": (DType.i32, (n, k // 8)),
                "weight_scale": (DType.bf16, (n, k // g)),
                "weight_zero_point": (DType.i32, (-(-n // 8), k // g)),
            }
        else:
            words = (k, n // 8) if layout == "awq" else (k // 8, n)
            parts = {
                "qweight": (DType.i32, words),
                "qzeros": (DType.i32, (k // g, n // 8)),
                "scales": (DType.f16, (k // g, n)),
            }
        types = {f"{key}.{end}": TensorType(*part) for end, part in parts.items()}
        reader = CodesReader(MetaSource(types), quantization)
        return reader.weight(f"{key}.weight", TensorType(DType.bf16, (n, k)))

    return matrix


def in_codes(program: Program, blocks: Callable[[str, int, int], WeightExpr]) -> Program:
    """Projections as codes, one source an expert, as checkpoints have them."""

    def expr(name: str, old: WeightExpr) -> WeightExpr:
        shape = tuple(int(str(d)) for d in old.type.shape)
        if name in ("q_a", "q_b", "kv_a", "kv_b", "o", "shared_down"):
            return blocks(name, *shape)
        if name == "down":
            return apply("stack", *(blocks(f"experts.{e}.down", *shape[1:]) for e in
                                    range(shape[0])))  # fmt: skip
        if name == "gate_up":
            e, i2, d = shape
            halves = ([blocks(f"experts.{x}.{part}", i2 // 2, d) for part in ("gate", "up")]
                      for x in range(e))  # fmt: skip
            return apply("stack", *(apply("concat", *pair, axis=0) for pair in halves))
        return old

    return replace(program, weights={k: expr(k, e) for k, e in program.weights.items()})


def check_small(before: Program, after: Program, largest: int) -> None:
    """The shrunk program verifies, runs, reads back, and is of the same form."""
    verify(after)
    assert parse_program(print_program(after), after.source) == after
    for name, graph in before.entries.items():
        small = after.entries[name]
        assert [n.op for n in small.nodes] == [n.op for n in graph.nodes]
        assert [v.name for v in small.values()] == [v.name for v in graph.values()]
        assert [v.type.dtype for v in small.values()] == [v.type.dtype for v in graph.values()]
        assert [n.loc for n in small.nodes] == [n.loc for n in graph.nodes]
        assert small.aliases == graph.aliases
        dims = {d for v in small.values() for d in v.type.shape if isinstance(d, int)}
        assert max(dims, default=0) <= largest


def sizes_by_number(before: Program, after: Program) -> dict[Dim, set[Dim]]:
    """For every number among the dims of weights and values, what it became."""
    pairs = [(e.type, after.weights[k].type) for k, e in before.weights.items()]
    for name, graph in before.entries.items():
        values = zip(graph.values(), after.entries[name].values(), strict=True)
        pairs += [(a.type, b.type) for a, b in values]
    found: dict[Dim, set[Dim]] = {}
    for a, b in pairs:
        for x, y in zip(a.shape, b.shape, strict=True):
            found.setdefault(x, set()).add(y)
    return found


@pytest.mark.parametrize("name", FAMILY)
def test_a_layer_of_every_model_of_the_family(name: str) -> None:
    before = layer(name)
    start = time.process_time()
    after = before.shrunk()
    sizes = {"B": 2, "S": 3, "P": 4, "L": 2}
    outputs = Interpreter(after).run("step", sample_inputs(after.entries["step"], sizes))
    assert time.process_time() - start < 20
    check_small(before, after, 1000)
    assert outputs["logits"].isfinite().all()
    became = sizes_by_number(before, after)
    assert all(len(small) == 1 for small in became.values()), "equal dims stay equal"
    small = {number: min(found, key=str) for number, found in became.items()}
    m = FAMILY[name]
    assert all(small[n] == n for n in small if isinstance(n, int) and n <= 8)
    assert small[m["n"] + m["r"]] == small[m["n"]] + small[m["r"]]
    assert small[m["heads"] * m["v"]] == small[m["heads"]] * small[m["v"]]
    assert int(str(small[m["e"]])) % m["groups"] == 0
    assert int(str(small[m["r"]])) % 2 == 0
    assert all(n % 2 == 1 or s % 2 == 0 for n, s in small.items()
               if isinstance(n, int) and isinstance(s, int))  # fmt: skip
    config = after.meta["config"]
    assert config == {"hidden_size": small[m["hidden"]], "num_hidden_layers": 61,
                      "vocab_size": small[m["vocab"]]}  # fmt: skip


@pytest.mark.parametrize("name", ["671b", "glm"])
def test_block_scaled_weights_keep_whole_blocks(name: str) -> None:
    before = in_codes(layer(name), in_fp8)
    after = before.shrunk()
    check_small(before, after, 6000)
    kv_a = after.weights["kv_a"].type.shape
    rows, columns = (int(str(d)) for d in kv_a)
    assert rows % 128 != 0, "576 rows are 4.5 blocks"
    assert columns % 128 == 0
    scales = after.source.types["kv_a.weight_scale_inv"].shape
    assert scales == (-(-rows // 128), columns // 128)
    experts = after.weights["gate_up"].type.shape[0]
    assert isinstance(experts, int)
    kept = [k for k in after.source.types if k.endswith("down.weight") and "experts" in k]
    assert len(kept) == experts < FAMILY[name]["e"], "experts beyond the first are dropped"
    for name_, expr in after.weights.items():
        assert Interpreter(after).weight(name_).shape == expr.type.shape


@pytest.mark.parametrize("layout", ["ct-int4-zeros", "gptq-v2", "awq"])
def test_packed_weights_keep_whole_words_and_groups(layout: str) -> None:
    before = in_codes(layer("16b"), in_words(layout))
    after = before.shrunk()
    check_small(before, after, 2000)
    for name, expr in after.weights.items():
        if name in ("q_b", "kv_a", "o", "gate_up", "down"):
            assert int(str(expr.type.shape[-1])) % 64 == 0, name
        assert Interpreter(after).weight(name).shape == expr.type.shape


def test_entries_share_weights_and_shrink_alike() -> None:
    before = layer("671b")
    step = before.entries["step"]
    entries = {"decode": step.substitute({"S": 1, "L": 1}), "prefill": step}
    before = replace(before, entries=entries)
    after = before.shrunk()
    check_small(before, after, 1000)
    decode, prefill = after.entries["decode"], after.entries["prefill"]
    assert decode == replace(prefill.substitute({"S": 1, "L": 1}), name="decode")


@given(programs())
def test_any_program_shrinks_to_one_that_runs(before: Program) -> None:
    after = before.shrunk()
    check_small(before, after, 300)
    for name, graph in after.entries.items():
        Interpreter(after).run(name, sample_inputs(graph, SIZES))


OPERATORS = {
    "products and sums": """(%x: f32[B,S,600,40], @w: f32[24000,50]) {
        %f = reshape %x {shape=[B,S,24000]}
        %y = matmul %f, @w
        %a, %b = split %y {sizes=[20,30], axis=-1}
        %c = concat %b, %a, %b {axis=2}
        return %c }""",
    "slices and halves": """(%x: f32[B,64,1024]) {
        %even = slice %x {axis=2, start=0, end=1024, step=2}
        %tail = slice %x {axis=2, start=512, end=1024}
        %y = add %even, %tail
        %head = slice %x {axis=1, start=0, end=16}
        return %y, %head }""",
    "rotary pairs": """(%x: f32[B,S,128,64], %cos: f32[B,S,1,32]) {
        %a = slice %x {axis=3, start=0, end=63, step=2}
        %b = slice %x {axis=3, start=1, end=64, step=2}
        %y = mul %a, %cos
        %z = mul %b, %cos
        %r = concat %y, %z {axis=3}
        %s = add %r, %x
        return %s }""",
    "masks and aranges": """(%x: f32[B,3000]) {
        %i = arange {start=0, end=3000, dtype=i64}
        %j = reshape %i {shape=[3000,1]}
        %m = le %i, %j
        %z = full {shape=[3000,3000], value=0.0, dtype=f32}
        %e = expand %x {shape=[1,B,3000]}
        %n = full {shape=[], value=1.0, dtype=f32}
        %w = where %m, %z, %n
        return %w, %e }""",
    "one-hot experts": """(%i: i64[B,S,8], %x: f32[B,S,512]) {
        %f = reshape %i {shape=[B*S,8]}
        %y = reshape %x {shape=[B*S,512]}
        %rows, %o, %p = dispatch %y, %f {experts=256}
        %g = grouped_linear %rows, @w, %o
        %c = histc %f {bins=256}
        return %g, %c }""".replace("%x: f32[B,S,512]", "%x: f32[B,S,512], @w: f32[256,96,512]"),
    "grouped heads": """(%q: f32[B,S,32,100], %k: f32[B,P,4,100], %v: f32[B,P,4,60]) {
        %o = attention %q, %k, %v {scale=0.1, causal=false}
        %f = reshape %o {shape=[B,S,1920]}
        %t = permute %f {dims=[0,2,1]}
        %s = sum %t {axes=[1]}
        %k2, %i = topk %t {k=1}
        return %s, %k2 }""",
    "bodies": """(%x: f32[B,700]) {
        %y = fused %x {body=graph b(%z: f32[B,700]) {
          %r = reshape %z {shape=[B,70,10]}
          %s = softmax %r
          return %s }}
        return %y }""",
    "gathers": """(%x: f32[B,900], %i: i64[B,40], %s: f32[B,40]) {
        %a = gather %x, %i {axis=1}
        %b = scatter %x, %i, %s {axis=1}
        %c = slice_scatter %x, %s {axis=1, start=100, end=140}
        %v, %w = sort %c {axis=1}
        return %a, %b, %v }""",
    "einsum": """(%q: f32[B,S,128,96], @k: f32[128,96,512]) {
        %y = einsum %q, @k {eq="bshn,hnc->bshc"}
        return %y }""",
    "grouped sdpa": """(%q: f32[B,32,S,96], %k: f32[B,8,P,96], %m: f32[B,1,S,P]) {
        %y = sdpa %q, %k, %k, %m {scale=0.1, grouped=true}
        return %y }""",
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_that_signatures_say_little_of(name: str) -> None:
    header, _, body = OPERATORS[name].partition(") {")
    weights = re.findall(r",? *@(\w+): (f32\[[\d,]+\])", header)
    lines = "\n".join(f'@{w} : {t} = source "{w}" : {t}' for w, t in weights)
    header = re.sub(r",? *@\w+: f32\[[\d,]+\]", "", header)
    before = parse_program(
        f'program "p" {{stage=TRACED}} symbols {{B=[1,4], S=[1,9], P=[1,9]}}\n'
        f"weights {{ {lines} }} graph main{header}) {{{body}"
    )
    verify(before)
    after = before.shrunk()
    check_small(before, after, 400)
    graph = after.entries["main"]
    if name != "gathers":  # a slice may start past what the index covers, not past its operand
        Interpreter(after).run("main", sample_inputs(graph, SIZES))
    assert max(int(str(d)) for e in (*after.weights.values(), *graph.inputs)
               for d in e.type.shape if isinstance(d, int)) < 100  # fmt: skip


def test_a_table_that_is_only_looked_up_shrinks() -> None:
    program = parse_program("""program "p" {stage=TRACED} symbols {B=[1,4]}
    weights { @w : f32[4000,7] = source "w" : f32[4000,7] }
    graph main(%i: i64[B]) { %y = take @w, %i {axis=0} return %y }""")
    rows, columns = program.shrunk().weights["w"].type.shape
    assert isinstance(rows, int)
    assert rows < 100
    assert columns == 7


def test_what_cannot_shrink_is_an_error_that_says_why() -> None:
    system = System()
    a, b = system.extent(30), system.extent(90)
    system.equate(b, Extent.number(3) * a)
    system.divisible(a, 10)
    system.divisible(b, 90)
    assert {system.original[u]: v for u, v in system.solve().items()} == {30: 30, 90: 90}
    system.checks.clear()
    system.checks.append(Check((0,), lambda values: False, "impossible"))
    with pytest.raises(Unsolvable, match="impossible"):
        system.solve()


def test_a_failed_search_names_the_program_and_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: System) -> dict[int, int]:
        raise Unsolvable("576 = 512 + 65")

    monkeypatch.setattr(System, "solve", fail)
    with pytest.raises(VerificationError, match="no small sizes fit the program 671b") as caught:
        layer("671b").shrunk()
    assert "equal numbers kept equal: 576 = 512 + 65" in caught.value.what
    assert caught.value.hint is not None


def test_a_shrunk_program_reads_random_weights_of_its_sources() -> None:
    before = layer("16b")
    assert isinstance(before.source, MetaSource)
    after = before.shrunk()
    keys = {s.key for e in after.weights.values() for s in sources(e)}
    assert set(after.source.types) == keys
    assert after.source.load("model.layers.3.bias").isfinite().all()


def test_parts_of_a_stack_that_differ_in_more_than_their_sources_keep_their_own_sizes() -> None:
    before = parse_program("""program "p" {stage=CANONICAL}
    meta {"config": {"hidden_size": 30, "num_hidden_layers": 30, "head_dim": 90, "tie_size": true,
      "other_size": 77, "name_size": "x"}, "more": 30}
    weights {
      @w : f32[2,30] = stack(slice(source "x" : f32[90]) {axis=0, start=0, end=30},
        slice(source "y" : f32[90]) {axis=0, start=12, end=42})
    }
    graph main(%x: f32[30]) { %y = mul @w, %x return %y }""")
    after = before.shrunk()
    check_small(before, after, 40)
    Interpreter(after).run("main", sample_inputs(after.entries["main"], {}))
    small, whole = (after.weights["w"].type.shape[1], after.source.types["y"].shape[0])
    assert isinstance(small, int)
    assert small < 30
    assert after.meta == {
        "config": {"hidden_size": small, "num_hidden_layers": 30, "head_dim": whole,
                   "tie_size": True, "other_size": 77, "name_size": "x"}, "more": 30,
    }  # fmt: skip
