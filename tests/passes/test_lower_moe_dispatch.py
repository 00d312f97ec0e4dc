"""The two forms of a layer of experts: which is chosen where, what they compute, how large."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsc import backends
from dsc.api import compile_program
from dsc.backends.base import No, Yes
from dsc.backends.triton.backend import EXPERTS as TRITON
from dsc.backends.tvm.backend import EXPERTS as TVM
from dsc.ir.dims import Range, bounds
from dsc.ir.expert_forms import ExpertKernels, ExpertLayer, direct_pays, regrets
from dsc.ir.interface import Guard
from dsc.ir.interpreter import Interpreter
from dsc.ir.ops.moe import plain_experts
from dsc.ir.stages import Stage
from dsc.passes.lower_moe_dispatch import LowerMoeDispatch, ranges_of
from dsc.passes.own_outputs import OwnOutputs
from dsc.passes.specialise_entries import SpecialiseEntries
from dsc.rewrite.base import PassReport
from dsc.rewrite.manager import Manager
from dsc.runtime.nodes import plan_nodes
from dsc.targets import Target
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.rewrite.harness import program_of

V3 = ExpertLayer(256, 8, width=7168, inner=2048, itemsize=2, weights=6 * 7168 * 2048)
LITE = ExpertLayer(64, 6, width=2048, inner=1408, itemsize=2, weights=6 * 2048 * 1408)
WIDE = Sizes(hidden=512, experts=8, expert_inner=256, groups=2, top_k=2)
LAYER = """graph main(%x: f32[{n},24], %idx: i64[{n},2], %w: f32[{n},2], @gate_up: f32[5,32,24],
  @down: f32[5,24,16]) {{
  %y = experts %x, %idx, %w, @gate_up, @down {{act="{act}"}}
  return %y
}}"""


@pytest.mark.parametrize("layer", [V3, LITE], ids=["v3", "v2-lite"])
@pytest.mark.parametrize("kernels", [TRITON, TVM], ids=["triton", "tvm"])
def test_small_decode_is_direct_and_prefill_grouped(
    layer: ExpertLayer, kernels: ExpertKernels
) -> None:
    assert direct_pays(layer, kernels, 1, 4)[0]
    assert not direct_pays(layer, kernels, 172, 2048)[0]


def test_costs_are_what_the_sizes_say() -> None:
    """One token: the weights of its experts, either way; all tokens: those of all experts."""
    free = ExpertKernels(rereads=True, tile=1, balance=1e9, launch=0)
    hidden = 8 * 2048 * 2
    assert V3.direct(1, free) == pytest.approx(8 * V3.weights + 2 * hidden)
    assert V3.grouped(1, free) == pytest.approx(8 * V3.weights + 6 * hidden + 8 * 4 * 7168 * 2)
    assert V3.used(4096) == pytest.approx(256)
    assert V3.direct(64, free) / V3.direct(1, free) == pytest.approx(64)
    padded = replace(free, balance=1.0, tile=128)
    assert V3.grouped(1, padded) == pytest.approx(8 * 128 * 6 * 7168 * 2048)
    direct, grouped = regrets(V3, replace(TRITON, balance=250.0, launch=10_000_000), 1, 1)
    assert direct == 1.0
    assert grouped == pytest.approx(1.057, abs=0.002)


def test_the_guard_cuts_the_range_of_new_tokens() -> None:
    program = Manager().run(canonical_lm(Sizes()), [SpecialiseEntries()])
    guards = (Guard("decode", 1), Guard("extend", 9), Guard("prefill"))
    guarded = program.declaring(guards=guards)
    assert ranges_of(guarded, "extend")["S"] == Range(2, 9)
    assert ranges_of(guarded, "prefill")["S"] == Range(10, 32)
    assert ranges_of(program_of(LAYER.format(n="N", act="silu")), "main")["N"].lo == 0


def test_the_guard_cuts_the_range_of_sequences() -> None:
    """Those of a step that an entry before takes are not this one's, if it takes all its steps."""
    program = Manager().run(canonical_lm(Sizes(), 64), [SpecialiseEntries(few=4)])
    found = {name: ranges_of(program, name)["B"] for name in program.entries}
    assert found == {
        "decode_few": Range(1, 4), "decode": Range(5, 64), "extend": Range(1, 64),
        "prefill": Range(1, 64),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "entry", "new", "found"),
    [
        ((1, 9, None), "a", (1, 32), (1, 1)),
        ((1, 9, None), "b", (1, 32), (2, 9)),
        ((1, 9, None), "c", (1, 32), (10, 32)),
        ((1, 9, None), "c", (12, 32), (12, 32)),
        ((1, 9, None), "b", (1, 8), (2, 8)),
        ((1, 64, None), "c", (1, 32), (32, 32)),
        ((8, 8, None), "b", (1, 32), (1, 8)),
        ((8, 9, None), "b", (1, 32), (9, 9)),
        ((None, None, None), "b", (2, 32), (2, 32)),
        ((1, 9, None), "d", (1, 32), (1, 32)),
    ],
)
def test_an_entry_has_the_steps_that_no_narrower_one_takes(
    steps: tuple[int | None, ...], entry: str, new: tuple[int, int], found: tuple[int, int]
) -> None:
    guards = tuple(Guard(name, step) for name, step in zip("abc", steps, strict=True))
    program = program_of(LAYER.format(n="S", act="silu"), Stage.CANONICAL).declaring(guards=guards)
    ranged = replace(program, symbols={"S": Range(*new), "B": Range(1, 4)})
    assert ranges_of(ranged, entry) == {"S": Range(*found), "B": Range(1, 4)}
    fixed = replace(program, symbols={"B": Range(1, 4)})
    assert ranges_of(fixed, entry) == fixed.symbols


@pytest.mark.parametrize(("rows", "last"), [("N", "combine"), ("B,N", "reshape")])
def test_the_grouped_form_without_costs_is_always_taken(rows: str, last: str) -> None:
    report = PassReport()
    program = program_of(LAYER.format(n=rows, act="relu"), Stage.CANONICAL)
    done = LowerMoeDispatch().run(program, report)
    made = done.entries["main"].nodes
    assert [n.op for n in made if n.op != "reshape"] == [
        "dispatch", "grouped_linear", "split", "relu", "mul", "grouped_linear", "combine"
    ]  # fmt: skip
    assert (made[-1].op, made[-1].output.name) == (last, "y")
    assert report.fired == {"lower": 1}
    assert not report.facts


def test_the_report_gives_each_entrys_form_and_why() -> None:
    program = Manager().run(canonical_lm(WIDE), [SpecialiseEntries()])
    report = PassReport()
    kernels = ExpertKernels(rereads=True, tile=16, balance=100.0, launch=2_000_000)
    done = LowerMoeDispatch(kernels).run(program, report)
    assert {name: report.facts[name]["experts"] for name in done.entries} == {
        "decode": "direct", "extend": "grouped", "prefill": "grouped",
    }  # fmt: skip
    assert report.facts["decode"]["tokens"] == [1, 4]
    assert min(report.facts["decode"]["worst_cost_over_best"].values()) >= 1
    ops = {name: {n.op for n in g.nodes} for name, g in done.entries.items()}
    assert "experts" in ops["decode"]
    assert "grouped_linear" in ops["prefill"] - ops["decode"]


def test_grouped_buffers_are_bounded_by_the_chunk() -> None:
    """Twice the chunk, twice the bytes; and no more than its pairs of rows at once."""
    arenas = {}
    for chunk in (16, 32):
        program = canonical_lm(WIDE, max_batch=2)
        program = replace(program, symbols={**program.symbols, "S": Range(1, chunk)})
        passes = [SpecialiseEntries(), LowerMoeDispatch(), OwnOutputs()]
        done = Manager().run(program, passes)
        plan = plan_nodes(done, {}).entries["prefill"]
        pairs = 2 * chunk * WIDE.top_k
        made = [v for n in done.entries["prefill"].nodes for v in n.outputs]
        rows = [v for v in made if bounds(v.type.shape[0], done.symbols).hi == pairs]
        assert len(rows) >= 5
        widest = pairs * 4 * (2 * WIDE.expert_inner + WIDE.hidden)
        assert plan.lower_bound <= 2 * widest
        arenas[chunk] = plan.arena_bytes
    assert 1.9 < arenas[32] / arenas[16] < 2.1


CHOICES = {
    "some experts have no token": [[0, 3], [3, 0], [0, 3], [3, 4], [4, 0], [0, 3], [3, 4]],
    "all on one expert": [[2, 2]] * 7,
    "one token": [[4, 1]],
}


def test_experts_in_a_format_cost_what_is_stored_of_them() -> None:
    text = LAYER.format(n="N", act="silu")
    for name in ("@gate_up: ", "@down: "):
        text = text.replace(f"{name}f32", f"{name}f8e4m3{{8x8,f32}}")
    program = replace(program_of(text, Stage.CANONICAL), symbols={"N": Range(1, 64)})
    report = PassReport()
    LowerMoeDispatch(TVM).run(program, report)
    stored = 32 * 24 + 4 * (4 * 3) + 24 * 16 + 4 * (3 * 2)
    layer = ExpertLayer(5, 2, width=24, inner=16, itemsize=4, weights=stored)
    _, (direct, grouped) = direct_pays(layer, TVM, 1, 64)
    found = report.facts["main"]["worst_cost_over_best"]
    assert found == {"direct": round(direct, 3), "grouped": round(grouped, 3)}
    wide = replace(layer, weights=12 * 24 * 16)
    assert direct_pays(wide, TVM, 1, 64)[1] != (direct, grouped)


ALWAYS = {
    "direct": ExpertKernels(rereads=False, tile=64, balance=1.0, launch=1 << 30),
    "grouped": ExpertKernels(rereads=True, tile=1, balance=1.0, launch=0, kernels=-9),
}
"""Costs that make each form the cheaper one for these small sizes."""


@pytest.mark.parametrize("form", ALWAYS)
@pytest.mark.parametrize(
    ("backend", "act"),
    [("reference", "gelu"), ("tvm", "silu"), ("tvm", "relu"), ("triton", "silu")],
)
def test_uneven_choices(backend: str, act: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts without a token, and one with all, in each form on each backend that runs here."""
    if backend != "reference":
        pytest.importorskip(backend)
    own = type(backends.get(backend))
    given = own.capabilities
    asked = replace(given(own(), Target("cpu")), experts=_forcing(form))
    monkeypatch.setattr(own, "capabilities", lambda self, target: asked)
    monkeypatch.setenv("DSC_CACHE", "off")  # no key tells of such capabilities
    program = program_of(LAYER.format(n="N", act=act), Stage.CANONICAL)
    program = replace(program, symbols={"N": Range(1, 8)})
    model = compile_program(program, backend=backend)
    ops = {n.op for n in model.program.entries["main"].walk()}
    assert ("experts" in ops) == (form == "direct")
    for choices in CHOICES.values():
        torch.manual_seed(0)
        idx = torch.tensor(choices)
        inputs = {"x": torch.randn(len(choices), 24), "idx": idx, "w": torch.rand(idx.shape)}
        (found,) = model.run(inputs).values()
        (wanted,) = Interpreter(program).run("main", inputs).values()
        torch.testing.assert_close(found, wanted)


def _forcing(form: str) -> ExpertKernels:
    found = ALWAYS[form]
    layer = ExpertLayer(5, 2, width=24, inner=16, itemsize=4, weights=12 * 24 * 16)
    assert direct_pays(layer, found, 1, 8)[0] is (form == "direct")
    return found


BIASED = """graph main(%x: f32[N,24], %idx: i64[N,2], %w: f32[N,2], @gate_up: f32[5,32,24],
  @down: f32[5,24,16], @b: f32[5,32], @c: f32[5,24]) {{
  %y = experts %x, %idx, %w, @gate_up, @down{more}
  return %y
}}"""


@pytest.mark.parametrize(
    "more",
    [
        ", @b, @c {limit=0.5, alpha=1.702, shift=1.0}",
        ", _, @c",
        ', @b {act="gelu_tanh"}',
        " {limit=0.5}",
    ],
)
@pytest.mark.parametrize("backend", ["reference", "tvm", "onnxruntime"])
def test_biases_and_limits_are_spelled_out(more: str, backend: str) -> None:
    """Each row has its own expert's biases, for one token as for many, whatever the form costs."""
    if backend != "reference":
        pytest.importorskip(backend)
    program = program_of(BIASED.format(more=more), Stage.CANONICAL)
    program = replace(program, symbols={"N": Range(1, 8)})
    report = PassReport()
    LowerMoeDispatch(kernels=replace(TVM, launch=1 << 40)).run(program, report)
    assert report.fired == {"lower": 1}
    model = compile_program(program, backend=backend)
    for tokens in (1, 7):
        random = torch.Generator().manual_seed(tokens)
        given = {
            "x": torch.randn(tokens, 24, generator=random),
            "idx": torch.rand(tokens, 5, generator=random).argsort(-1)[:, :2].contiguous(),
            "w": torch.rand(tokens, 2, generator=random),
        }
        wanted = Interpreter(program).run("main", given)
        torch.testing.assert_close(model.run(given)["y"], wanted["y"], rtol=1e-4, atol=1e-4)


def test_experts_with_biases_may_be_kept_in_codes() -> None:
    """What kernels are asked is whether they take the products: the rest is spelled out."""
    program = program_of(BIASED.format(more=", @b, @c {limit=0.5}"), Stage.CANONICAL)
    plain = program_of(LAYER.format(n="N", act="silu"), Stage.CANONICAL)
    for each in (program, plain):
        (node,) = each.entries["main"].nodes
        asked = plain_experts(node)
        assert len(asked.operands) == 5
        assert asked.attrs["limit"] == float("inf")
        assert isinstance(backends.get("tvm").supports(asked), Yes)
    assert isinstance(backends.get("tvm").supports(program.entries["main"].nodes[0]), No)
