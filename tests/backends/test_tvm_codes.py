"""Products of the tvm backend whose weights are codes, against their numbers in fp64.

Rows that are taken as codes are compared with the nearest codes of the same rows, so that one code
that is off by one, or one lost term, is more than the bound allows.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsc import pipeline
from dsc.backends import get
from dsc.backends.base import EmitOptions, No
from dsc.backends.tvm.machine import GENERIC, cpu_of, machine_for
from dsc.ir.formats import Format, pack
from dsc.ir.interpreter import run_graph
from dsc.ir.op import lookup
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_expr
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, evaluate, leaf, random_tensor
from dsc.rewrite.base import PassReport
from dsc.runtime.standalone import lacking
from dsc.targets import parse_target
from tests.backends.coded_products import ROWS, Case, bound, compiled, exact, inputs, program
from tests.backends.tiles import modelled

pytest.importorskip("tvm")
CASES = [
    Case("f8e4m3", 300, 256, 128, high=128, activations="", scales="f32", dtype="bf16"),
    Case("f8e4m3", 140, 200, 128, high=128, activations="f8e4m3:128", scales="f8e8m0"),
    Case("f8e4m3", 40, 96, 0, activations="f8e4m3:128", scales="f32", dtype="bf16"),
    Case("f8e4m3", 20, 50, 32, activations="", scales="f16"),
    Case("f8e4m3", 72, 160, 128, high=16, activations="", scales="f32", dtype="bf16", experts=3),
    Case("f8e4m3", 70, 64, 0, high=0, activations="f8e4m3:128", scales="f32"),
    Case("i8", 64, 64, 32),
    Case("i8", 41, 100, 64, zeros="i8", dtype="bf16"),
    Case("i8", 576, 256, 0, scales="f32"),
    Case("i8", 7, 20, 32, activations="", dtype="bf16"),
    Case("i8", 33, 96, 32, activations="", zeros="i8", scales="bf16"),
    Case("i4", 64, 64, 32, dtype="bf16"),
    Case("i4", 130, 70, 32, zeros="i8"),
    Case("i4", 576, 128, 64, scales="bf16"),
    Case("i4", 20, 200, 128, activations="", zeros="i8"),
    Case("i8", 24, 64, 32, experts=3),
    Case("i4", 40, 96, 32, experts=3, zeros="i8", dtype="bf16"),
]


@dataclass(frozen=True)
class Form:
    """Another CPU whose code this one may run, what multiplies bytes there, and what is tried."""

    cpu: str
    dots: str
    cases: list[Case]
    needs: tuple[str, ...] = ()


FORMS = [
    Form("x86-64", "words", [CASES[7], CASES[12], CASES[3]]),
    Form("x86-64-v3", "signs", [CASES[7], CASES[12], CASES[1]], ("avx2", "fma", "f16c")),
    Form("", "half", [CASES[6]], ("avx512vl", "avx512_vnni")),
    Form("skylake-avx512", "wide signs", [CASES[7]], ("avx512bw", "avx512vl", "avx512dq")),
    Form("cascadelake", "wide", [CASES[3]], ("avx512bw", "avx512vl", "avx512dq", "avx512_vnni")),
]
"""How codes are multiplied elsewhere; vpdpbusd on 32 bytes is encoded as AVX-512 has it here."""


@pytest.fixture(scope="module")
def made() -> Program:
    return program(CASES)


@pytest.fixture(scope="module")
def loaded(made: Program, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compiled(made, "cpu", tmp_path_factory.mktemp("codes"))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_product_of_codes_is_that_of_their_numbers(
    case: Case, rows: int, made: Program, loaded: Any
) -> None:
    given = inputs(case, rows)
    wanted, terms = exact(case, made, given)
    got = loaded.run(f"g_{case.name}", given)["y"]
    assert got.dtype == given["x"].dtype
    assert bool(((got.double() - wanted).abs() <= bound(case, wanted, terms)).all())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.cpu or form.dots)
def test_other_cpus_multiply_codes(
    form: Form, made: Program, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of bytes are whole numbers: with fused products a form has the bits of every other."""
    lacks = lacking(form.needs)
    if lacks:
        pytest.skip(f"this CPU has no {', '.join(lacks)}")
    target = f"cpu:{form.cpu}" if form.cpu else "cpu"
    found = machine_for(parse_target(target))
    if form.cpu:
        assert found.dots == form.dots
    else:
        other = replace(found, lanes=8, vectors=8, dots=form.dots, bf16=False)
        monkeypatch.setattr("dsc.backends.tvm.machine.machine_for", lambda _: other)
    run = compiled(program(form.cases), target, tmp_path)
    for case in form.cases:
        for rows in ROWS:
            given = inputs(case, rows)
            wanted, terms = exact(case, made, given)
            got = run.run(f"g_{case.name}", given)["y"]
            assert bool(((got.double() - wanted).abs() <= bound(case, wanted, terms)).all())
            if found.fma and case.codes != "f8e4m3":
                assert torch.equal(got, loaded.run(f"g_{case.name}", given)["y"])
        for threads in (1, 2):
            run.set_threads(threads, None)
            assert torch.equal(got, run.run(f"g_{case.name}", given)["y"])


def test_tiles_of_bytes_have_the_bits_of_vectors(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model of AMX: 16 rows with and without the last ones, zero points, experts' rows."""
    host, cases = machine_for(parse_target("cpu")), [CASES[7], CASES[16]]
    if host.vectors < 32:
        pytest.skip("this CPU has no AVX-512, which kernels with tiles are made for")
    modelled(monkeypatch, replace(host, byte_tiles=True), tmp_path)
    run = compiled(program(cases), "cpu", tmp_path)
    assert run.meta["tiles"]
    for case in cases:
        for rows in (1, 7, 16, 17, 20):
            given = inputs(case, rows)
            run.set_threads(1 + rows % 2, None)
            got = run.run(f"g_{case.name}", given)["y"]
            assert torch.equal(got, loaded.run(f"g_{case.name}", given)["y"])


@pytest.mark.parametrize(
    ("cpu", "has", "lacks"),
    [("alderlake", "{vex} vpdpbusd", "zmm"), ("sapphirerapids", "tdpbssd", "{vex} vpdpbusd")],
)
def test_code_for_other_cpus_has_their_instructions(
    cpu: str, has: str, lacks: str, tmp_path: Path
) -> None:
    if not shutil.which("objdump"):
        pytest.skip("no objdump")
    target = parse_target(f"cpu:{cpu}")
    found = get("tvm").emit(program([CASES[6]]), EmitOptions((target,))).files["tvm/kernels.so"]
    (tmp_path / "kernels.so").write_bytes(bytes(found))
    line = ["objdump", "-d", str(tmp_path / "kernels.so")]
    text = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert has in text
    assert lacks not in text


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == "f32"], ids=lambda c: c.name)
def test_a_lost_term_is_more_than_the_bound(case: Case, made: Program) -> None:
    given = inputs(case, 5)
    wanted, terms = exact(case, made, given)
    less = {**given, "x": given["x"].clone()}
    less["x"][:, case.depth - 1] = 0
    lost, _ = exact(case, made, less)
    moved = (lost - wanted).abs()[[0, 2, 3, 4]] > bound(case, wanted, terms)[[0, 2, 3, 4]]
    assert float(moved.double().mean()) > 0.8  # the others' codes are 0


EXPERTS = """graph experts(%x: f32[N,72], %i: i64[N,2], %r: f32[N,2]) {
  %y = experts %x, %i, %r, @up, @down {activations="ROWS"} : f32[N,72]
  return %y
}"""


@pytest.mark.parametrize(
    ("codes", "rows"),
    [("i8", "i8:32"), ("i4", "i8:32"), ("i4", ""), ("f8e4m3", "f8e4m3:128"), ("f8e4m3", "")],
)
def test_experts_of_codes_are_those_of_their_numbers(codes: str, rows: str, tmp_path: Path) -> None:
    """Inner rows end inside of a tile of 16.

    A hidden number may have its neighbour's code, off by a 127th of its group's largest.
    """
    up, down = (
        TensorType(DType(codes), shape, Format((1, 32), DType.f16))
        for shape in ((5, 48, 72), (5, 72, 24))
    )
    both = (("up", up), ("down", down))
    stated = "".join(f"  @{name} : {t} = {print_expr(leaf(name, t))}\n" for name, t in both)
    head = 'program "t" {stage=OPTIMIZED}\nsymbols {N=[1,20]}\n'
    made = parse_program(f"{head}weights {{\n{stated}}}\n{EXPERTS.replace('ROWS', rows)}")
    tensors = {
        name + suffix: part
        for name, t in both
        for (suffix, _), part in zip(
            t.parts, pack(random_tensor(t.with_dtype(DType.f32), name), t).parts, strict=True
        )
    }
    made = replace(made, source=DictSource(tensors))
    chosen = pipeline.make("choose_formats", formats=("i8", "i4", "f8e4m3"), tile=16)
    done = pipeline.apply(chosen.run(made, PassReport()), ["own_outputs"])
    run = compiled(done, "cpu", tmp_path)
    for count in (1, 3, 20):
        generator = torch.Generator().manual_seed(count)
        chosen_ones = torch.randint(0, 4, (count, 2), generator=generator)
        given = {
            "x": torch.randn(count, 72, generator=generator), "i": chosen_ones,
            "r": torch.rand(count, 2, generator=generator),
        }  # fmt: skip
        weights = [evaluate(done.weights[name], done.source) for name in ("up", "down")]
        (node,) = done.entries["experts"].nodes[:1]
        wanted = lookup("experts").run([*given.values(), *weights], node.attrs)
        off = (run.run("experts", given)["y"] - wanted).abs() / wanted.abs().max()
        assert float(off.max()) < (2e-3 if rows else 1e-6)
        assert float(off.mean()) < (1e-4 if rows else 1e-7)


def test_threads_and_company_change_no_bit(made: Program, loaded: Any) -> None:
    for case in CASES:
        given = inputs(case, 17)
        loaded.set_threads(1, None)
        one = loaded.run(f"g_{case.name}", given)["y"]
        loaded.set_threads(2, None)
        assert torch.equal(one, loaded.run(f"g_{case.name}", given)["y"])
        if not case.experts:
            alone = [loaded.run(f"g_{case.name}", {"x": row[None]})["y"] for row in given["x"]]
            assert torch.equal(one, torch.cat(alone))


def test_the_columns_of_a_task_change_no_bit(loaded: Any, tmp_path: Path) -> None:
    few = [c for c in CASES if c.columns == 576]
    many = compiled(program(few), "cpu", tmp_path, threads=64)
    for case in few:
        given, name = inputs(case, 5), f"g_{case.name}"
        assert torch.equal(loaded.run(name, given)["y"], many.run(name, given)["y"])


def test_few_threads_read_long_runs() -> None:
    runs = [GENERIC.shared_by(n).run for n in (1, 2, 3, 4, 8, 64)]
    assert runs == [128, 128, 64, 64, 32, 32]


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.activations and not c.experts], ids=lambda c: c.name
)
def test_a_row_with_nan_or_infinity_is_no_number(case: Case, loaded: Any) -> None:
    for value in (float("nan"), float("inf")):
        given = inputs(case, 5)
        given["x"][3, case.depth - 3] = value
        got = loaded.run(f"g_{case.name}", given)["y"]
        assert not got[3].isfinite().any()
        assert got[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize(("target", "case"), [("", 0), ("x86-64-v3", 1), ("x86-64", 3)])
def test_a_code_that_is_no_number_makes_none(target: str, case: int, tmp_path: Path) -> None:
    """By pairs, by fp16, and one by one: of 2 in 3 columns of the result."""
    chosen = parse_target(f"cpu:{target}" if target else "cpu")
    if lacking(cpu_of(chosen.arch).needs):
        pytest.skip(f"this CPU does not run code for {target}")
    made = program([CASES[case]], spoiled=True)
    given = inputs(CASES[case], 7)
    got = compiled(made, str(chosen), tmp_path).run(f"g_{CASES[case].name}", given)["y"]
    columns = torch.arange(got.shape[1])
    assert torch.equal(got.isnan(), (columns % 3 != 2).expand_as(got))


def test_what_follows_codes_is_done_on_their_tiles(tmp_path: Path) -> None:
    """Two halves that begin inside of tiles, and a bias: a region has the bits of its parts."""
    weight = Case("i4", 140, 64, 32).weight
    text = f"""program "t" {{stage=OPTIMIZED}}
      symbols {{N=[1,20]}}
      weights {{ @w : {weight} = {print_expr(leaf("w", weight))} }}
      graph gated(%x: bf16[N,64], %b: bf16[140]) {{
        %y = linear %x, @w, %b {{activations="i8:32"}} : bf16[N,140]
        %g, %u = split %y {{sizes=[70,70], axis=-1}} : bf16[N,70], bf16[N,70]
        %a = swiglu %g, %u : bf16[N,70]
        return %a
      }}"""
    source = pack(random_tensor(weight.with_dtype(DType.f32), "w"), weight).parts
    stored = DictSource({f"w{end}": x for (end, _), x in zip(weight.parts, source, strict=True)})
    chosen = pipeline.make("choose_formats", formats=("i4",), tile=16)
    made = chosen.run(parse_program(text, stored), PassReport())
    runs = []
    for level in (0, 3):
        passes = pipeline.read(f"fuse{{level={level},limits=tvm}},own_outputs", get)
        done = pipeline.apply(made, passes)
        assert len(done.entries["gated"].nodes) == (1 if level else 3)
        runs.append(compiled(done, "cpu", tmp_path / str(level)))
    for rows in (1, 7, 20):
        generator = torch.Generator().manual_seed(rows)
        given = {"x": torch.randn(rows, 64, generator=generator).bfloat16(),
                 "b": torch.randn(140, generator=generator).bfloat16()}  # fmt: skip
        apart, together = (run.run("gated", given)["a"] for run in runs)
        assert torch.equal(apart, together)
        (wanted,) = run_graph(
            made.entries["gated"], list(given.values()),
            lambda name: evaluate(made.weights[name], made.source),
        )  # fmt: skip
        assert float((apart - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())


def test_kernels_are_refused_by_what_they_lack() -> None:
    """A format, an operator or rows that no kernel takes, in words."""

    def answer(line: str, weight: str) -> str:
        text = f"""program "t" {{stage=OPTIMIZED}}
          graph g(%x: f32[2,64], %i: i64[2], @w: {weight}) {{
            %y = {line}
            return %y
          }}"""
        (graph,) = parse_program(text).entries.values()
        told = get("tvm").supports(graph.nodes[0])
        return told.reason if isinstance(told, No) else ""

    linear, tiled = "linear %x, @w", "i8{1x32,f16,tile=16}[64,64]"
    assert answer(linear, tiled) == ""
    assert "weights in i8{1x32,f16}" in answer(linear, "i8{1x32,f16}[64,64]")
    assert "scales in f64" in answer(linear, "i8{1x32,f64,tile=16}[64,64]")
    assert "zero points beside f8e4m3" in answer(linear, "f8e4m3{1x32,f32,i8,tile=16}[64,64]")
    assert "zero points in i16" in answer(linear, "i8{1x32,f16,i16,tile=16}[64,64]")
    assert "activations i8:64" in answer(f'{linear} {{activations="i8:64"}}', tiled)
    assert "for weights in f32" in answer(f'{linear} {{activations="i8:32"}}', "f32[64,64]")
    assert "embedding of a weight" in answer("embedding %i, @w", tiled)
    assert "einsum of a weight" in answer('einsum %x, @w {eq="nk,mk->nm"}', tiled)
