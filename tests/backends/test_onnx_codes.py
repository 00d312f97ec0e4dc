"""Weights in codes in ONNX models: every format and dialect against the interpreter's numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from dsc import pipeline
from dsc.backends.onnxruntime import contrib
from dsc.backends.reference import ReferenceExecutable
from dsc.ir.arrays import array_of
from dsc.ir.dims import Range
from dsc.ir.formats import Format
from dsc.ir.graph import Weight
from dsc.ir.parser import parse_graph
from dsc.ir.program import Program
from dsc.ir.streams import blocks
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import Apply, DictSource, WeightExpr, apply, evaluate, leaf, random_tensor
from dsc.passes._in_format import Dequantised
from dsc.passes._unsigned import as_unsigned
from dsc.runtime import artifact
from dsc.targets import Target
from tests.backends.onnx_artifacts import BACKEND, conversation, executable, prepared, stock_session

NUMBERS = ("a", "b", "c", "r")
SHAPE = (2, 2)  # replaced by a weight's own
KINDS = {
    "i4": TensorType(DType.i4, SHAPE, Format((1, 32), DType.f16)),
    "i4 with zero points": TensorType(DType.i4, SHAPE, Format((1, 16), DType.f32, DType.i8)),
    "i8": TensorType(DType.i8, SHAPE, Format((1, 32), DType.f16)),
    "i8 with zero points": TensorType(DType.i8, SHAPE, Format((1, 64), DType.bf16, DType.i8)),
    "i8 of whole rows": TensorType(DType.i8, SHAPE, Format((1, 0), DType.f32)),
}
LINEAR = """graph main(%x: f32[B,S,{k}], @w: f32[{n},{k}], @b: f32[{n}]) {{
  %y = linear %x, @w, @b
  return %y
}}"""
EXPERTS = """graph main(%x: f32[N,{k}], %i: i64[N,2], %s: f32[N,2], @w: f32[5,64,{k}],
  @v: f32[5,{k},32], @a: f32[5,64], @c: f32[5,{k}]) {{
  %y = experts %x, %i, %s, @w, @v, @a, @c {{limit=2.0, alpha=1.5, shift=1.0}}
  return %y
}}"""

ROUTE = '%i, %s = route %x, @r {{score="sigmoid", top_k=2, normalise=true, scale=2.5}}'
ROUTED = EXPERTS.replace("%i: i64[N,2], %s: f32[N,2], ", "@r: f32[5,{k}], ")
ROUTED = ROUTED.replace("  %y", f"  {ROUTE}\n  %y", 1)


def drawn(t: TensorType, seed: int) -> dict[str, torch.Tensor]:
    """Codes and scales of a weight, over all that codes can be."""
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for suffix, part in t.parts:
        shape = tuple(int(str(d)) for d in part.shape)
        if part.dtype.is_float:
            made[suffix] = (torch.rand(shape, generator=rng) * 0.02 + 0.01).to(part.dtype.torch)
            continue
        low, high = (0, 256) if part.dtype is DType.u8 else (-128, 128)
        low, high = (-8, 8) if suffix == ".zero" and t.dtype is DType.i4 else (low, high)
        found = torch.randint(low, high, shape, generator=rng)
        made[suffix] = found.to(part.dtype.torch)
    return made


def program_of(
    text: str, kind: TensorType, quant: str = "none", activation_bits: int = 8
) -> Program:
    """The text with its matrices in a format, through the passes for the backend."""
    graph = parse_graph(text)
    read = {x.name: x for node in graph.nodes for x in node.operands if isinstance(x, Weight)}
    weights: dict[str, WeightExpr] = {}
    tensors: dict[str, torch.Tensor] = {}
    for seed, (name, w) in enumerate(read.items()):
        if name in NUMBERS:
            tensors[name] = random_tensor(w.type, name)
            weights[name] = leaf(name, w.type)
            continue
        t = replace(kind, shape=w.type.shape)
        tensors |= {name + suffix: x for suffix, x in drawn(t, seed).items()}
        weights[name] = apply("dequantize", leaf(name, t), dtype=w.type.dtype)
    ranges = dict.fromkeys("BSN", Range(1, 8))
    program = Program("coded", {"main": graph}, weights, ranges, DictSource(tensors))
    options = pipeline.PipelineOptions(quant=quant, activation_bits=activation_bits)
    return pipeline.prepare(program, BACKEND, Target("cpu"), options).program


def inputs_of(program: Program, rows: int) -> dict[str, torch.Tensor]:
    """Rows, of which one is zeros, and for experts whom they choose."""
    graph, rng = program.entries["main"], torch.Generator().manual_seed(rows)
    sizes = {"B": rows, "S": 2, "N": rows}
    made = {}
    for value in graph.inputs:
        shape = tuple(d if isinstance(d, int) else sizes[str(d)] for d in value.type.shape)
        if value.type.dtype is DType.i64:
            made[value.name] = torch.stack(
                [torch.randperm(5, generator=rng)[:2] for _ in range(rows)]
            )
        else:
            made[value.name] = torch.randn(shape, generator=rng)
    made["x"][0] = 0 if "i" in made else 1  # a router would have ties
    return made


def differ(got: torch.Tensor, wanted: torch.Tensor, flip: float) -> None:
    """Raise unless numbers agree but for the codes of a few that lie between two.

    ONNX Runtime multiplies by the inverse of a scale where the interpreter divides, so a number in
    the middle between two codes may become the other: no more than a share of `flip` then.
    """
    off = (got - wanted).abs()
    assert (off <= flip).all(), off.max()
    near = 1e-5 * max(1.0, float(wanted.abs().max()))
    assert (off > near).float().mean() <= 0.02, off.max()


TEXTS = {
    "linear": LINEAR.format(k=96, n=7),
    "linear of part of a block": LINEAR.format(k=70, n=12),
    "experts": EXPERTS.format(k=96),
    "experts of part of a block": EXPERTS.format(k=80),
    "experts behind a router": ROUTED.format(k=96),
}


@pytest.mark.parametrize("ops", contrib.DIALECTS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_products_of_codes_are_the_interpreters(
    text: str, kind: TensorType, ops: str, tmp_path: Path
) -> None:
    program = program_of(text, kind)
    kept = {w.type.format for n in program.entries["main"].nodes for w in n.operands} - {None}
    assert kept, "codes did not reach the backend"
    runs = executable(program, tmp_path / "a", onnx_ops=ops)
    reference = ReferenceExecutable(program)
    if "route" in text:
        model = onnx.load(str(tmp_path / "a/onnx/main.onnx"), load_external_data=False)
        whole = kind.format is not None and kind.format.block[1] in (16, 32) and ops == "ort"
        assert ("QMoE" in {node.op_type for node in model.graph.node}) == whole
    for rows in (1, 6):
        given = inputs_of(program, rows)
        got, wanted = runs.run("main", given)["y"], reference.run("main", given)["y"]
        differ(torch.as_tensor(got), torch.as_tensor(wanted), 0.1)


@pytest.mark.parametrize("name", ["i4 with zero points", "i8"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_standard_models_say_the_same_where_nothing_is_fused(
    text: str, name: str, tmp_path: Path
) -> None:
    """Rows are rounded by operators of the model, not by what a runtime makes of it."""
    import onnxruntime

    program = program_of(text, KINDS[name])
    executable(program, tmp_path / "a", onnx_ops="standard")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = tmp_path / "a/onnx/main.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    session = stock_session(path, options)
    given = inputs_of(program, 6)
    (got,) = session.run(["y"], {key: array_of(x) for key, x in given.items()})
    wanted = ReferenceExecutable(program).run("main", given)["y"]
    differ(torch.as_tensor(got), torch.as_tensor(wanted), 0.1)


@pytest.mark.parametrize("ops", contrib.DIALECTS)
@pytest.mark.parametrize("name", ["i4 with zero points", "i8"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_rows_that_stay_numbers_are_not_rounded(
    text: str, name: str, ops: str, tmp_path: Path
) -> None:
    """ONNX Runtime would round them, where it makes MatMulNBits of what a standard model says."""
    program = program_of(text, KINDS[name], activation_bits=16)
    given = inputs_of(program, 6)
    got = executable(program, tmp_path / "a", onnx_ops=ops).run("main", given)["y"]
    wanted = torch.as_tensor(ReferenceExecutable(program).run("main", given)["y"])
    assert (torch.as_tensor(got) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("ops", contrib.DIALECTS)
@pytest.mark.parametrize("name", ["i4 with zero points", "i4", "i8 of whole rows"])
def test_a_loop_over_experts_reads_the_codes_of_those_that_were_chosen(
    name: str, ops: str, tmp_path: Path
) -> None:
    program = program_of(TEXTS["experts of part of a block"], KINDS[name])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dsc.backends.onnxruntime.model.MAX_BRANCHES", 0)
        runs = executable(program, tmp_path / "a", onnx_ops=ops)
    given = inputs_of(program, 6)
    model = onnx.load(str(tmp_path / "a/onnx/main.onnx"), load_external_data=False)
    assert "Loop" in {node.op_type for node in model.graph.node}
    wanted = ReferenceExecutable(program).run("main", given)["y"]
    differ(torch.as_tensor(runs.run("main", given)["y"]), torch.as_tensor(wanted), 0.1)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_fp8_becomes_what_was_asked_for_and_integers_stay_as_they_are(
    quant: str, tmp_path: Path
) -> None:
    blocks = Format((64, 64), DType.f32)
    for kind, codes in ((TensorType(DType.f8e4m3, SHAPE, blocks), quant[:1] + quant[3:]),
                        (KINDS["i8 with zero points"], "i8")):  # fmt: skip
        text = TEXTS["experts"].replace("return %y", "%z = neg %y\n  return %z")  # no head
        program = program_of(text, kind, quant)
        node = program.entries["main"].nodes[0]
        stored = {x.type.dtype for x in node.operands if x.type.format is not None}
        assert stored == {codes}, "converted on the way, or kept"
        given = inputs_of(program, 6)
        got = executable(program, tmp_path / str(kind.dtype)).run("main", given)["z"]
        wanted = ReferenceExecutable(program).run("main", given)["z"]
        differ(torch.as_tensor(got), torch.as_tensor(wanted), 0.1)


READ_TWICE = TEXTS["experts"].replace("%x: f32", "%q: f32[5,64], %x: f32")
READ_TWICE = READ_TWICE.replace("  return %y", "  %z = mul %q, @a\n  return %y, %z")


@pytest.mark.parametrize(
    ("text", "paired"),
    [
        (TEXTS["experts"], {"w", "a"}),
        (TEXTS["experts"].replace("{limit", '{act="gelu", limit'), set()),
        (READ_TWICE, set()),
    ],
    ids=["silu", "gelu", "the bias is read elsewhere"],
)
def test_gates_in_pairs_say_the_same(text: str, paired: set[str]) -> None:
    program = program_of(text, KINDS["i4"])
    (node,) = (n for n in program.entries["main"].nodes if n.op == "experts")
    assert node.attrs["pairs"] == bool(paired)
    unpaired = replace(BACKEND.capabilities(Target("cpu")), pairs=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BACKEND, "capabilities", lambda _: unpaired, raising=False)
        apart = program_of(text, KINDS["i4"])
    changed = {name for name, expr in program.weights.items() if apart.weights[name] != expr}
    assert changed == paired
    given = inputs_of(program, 6)
    each = (ReferenceExecutable(one).run("main", given)["y"] for one in (program, apart))
    assert torch.equal(*map(torch.as_tensor, each))


@pytest.mark.parametrize("kind", [KINDS["i4"], KINDS["i8 with zero points"]], ids=str)
def test_16_bit_rows_and_biases_are_widened(kind: TensorType, tmp_path: Path) -> None:
    text = ROUTED.format(k=96).replace("f32[", "bf16[").replace("@r: bf16[", "@r: f32[")
    program = program_of(text, kind)
    given = inputs_of(program, 6)
    given["x"] = given["x"].bfloat16()
    got = executable(program, tmp_path / "a").run("main", given)["y"]
    wanted = torch.as_tensor(ReferenceExecutable(program).run("main", given)["y"]).float()
    off = (torch.as_tensor(got).float() - wanted).abs().max()
    assert off <= 0.05 * wanted.abs().max()


def test_a_branch_turns_all_that_it_reads_itself(tmp_path: Path) -> None:
    """ONNX Runtime leaves zero points out of what it fuses where they come from outside."""
    text = EXPERTS.format(k=96).replace("@c: f32[5,96])", "@c: f32[5,96], @d: f32[64,96])")
    text = text.replace("  %y", "  %z = linear %x, @d\n  %y", 1).replace("return", "return %z,")
    program = program_of(text, KINDS["i8"])
    given = inputs_of(program, 6)
    wanted = ReferenceExecutable(program).run("main", given)
    got = executable(program, tmp_path / "a", onnx_ops="standard").run("main", given)
    for name, numbers in wanted.items():
        differ(torch.as_tensor(got[name]), torch.as_tensor(numbers), 0.1)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_how_wide_a_block_of_unsigned_codes_may_be_the_backend_says(kind: TensorType) -> None:
    given = leaf("w", kind)
    assert isinstance(given, Apply)
    assert kind.format is not None
    columns = kind.format.block[1]
    if columns > 16:
        with pytest.raises(Dequantised, match="a power of two from 16 to 16 is due"):
            as_unsigned(given, 16)
    else:
        made = as_unsigned(given, 16).type.format
        assert made is not None
        assert made.block == (1, 16), "as it is, or a whole row cut"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", [(6, 96), (3, 4, 70)], ids=str)
def test_unsigned_codes_stand_for_the_same_numbers(
    kind: TensorType, shape: tuple[int, ...]
) -> None:
    t = replace(kind, shape=shape)
    source = DictSource({"w" + suffix: x for suffix, x in drawn(t, 0).items()})
    given = leaf("w", t)
    assert isinstance(given, Apply)
    made = as_unsigned(given, 256)
    wanted, found = evaluate(given, source), evaluate(made, source)
    assert torch.equal(found.unpack(torch.float32), wanted.unpack(torch.float32))
    for part, whole in zip(made.args, found.parts, strict=True):
        streamed = torch.cat([torch.as_tensor(x).flatten() for x in blocks(part, source, 64)])
        assert torch.equal(streamed, whole.flatten())


def test_a_model_needs_the_runtime_that_its_operators_were_tried_with(tmp_path: Path) -> None:
    program = program_of(TEXTS["experts behind a router"], KINDS["i4"])
    for ops, needed in (("ort", "1.31"), ("standard", "1.25")):
        folder = tmp_path / ops
        executable(program, folder, onnx_ops=ops)
        needs = artifact.read(folder).manifest["needs"]
        assert needs == {"onnxruntime": f"onnxruntime>={needed}"}


@pytest.mark.parametrize("ops", contrib.DIALECTS)
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_model_in_codes_speaks_as_the_interpreter(quant: str, ops: str, tmp_path: Path) -> None:
    """All but the few logits behind a number that fell to the other of two codes, to a last bit."""
    program = prepared(DType.f32, quant=quant)
    runs = executable(program, tmp_path / "a", onnx_ops=ops)
    for path in sorted(tmp_path.rglob("*.onnx")):
        onnx.checker.check_model(str(path), full_check=True)
    got, wanted = (
        torch.cat(conversation(x, program)) for x in (runs, ReferenceExecutable(program))
    )
    off, most = (got - wanted).abs().amax(-1), wanted.abs().max()
    assert off.median() <= 1e-4 * most, off
    assert off.max() <= 0.1 * most, off
