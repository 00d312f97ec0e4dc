"""Tables whose rows are looked up in codes: every format and dialect, tied to a head or not."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from dsc.asked import QUANT
from dsc.backends.onnxruntime import contrib
from dsc.backends.reference import ReferenceExecutable
from dsc.ir.arrays import array_of
from dsc.ir.program import Program
from dsc.ir.types import DType
from tests.backends.onnx_artifacts import conversation, executable, prepared, stock_session
from tests.backends.test_onnx_codes import KINDS, differ, program_of

ALONE = """graph main(%i: i64[N,3], @w: f32[9,70]) {
  %y = embedding %i, @w
  return %y
}"""
TIED = """graph main(%i: i64[N,3], @w: f32[9,96]) {
  %h = embedding %i, @w
  %s = silu %h
  %y = linear %s, @w
  return %y
}"""
IDS = {"i": torch.tensor([[0, 8, 3], [5, 5, 1]])}


def wanted(program: Program) -> torch.Tensor:
    """What the interpreter gives."""
    return torch.as_tensor(ReferenceExecutable(program).run("main", IDS)["y"])


@pytest.mark.parametrize("ops", contrib.DIALECTS)
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_the_interpreters_to_every_bit(name: str, ops: str, tmp_path: Path) -> None:
    """In fp32, and rounded to 16 bits behind the lookup."""
    for text in (ALONE, ALONE.replace("f32", "bf16")):
        program = program_of(text, KINDS[name])
        (table,) = program.weight_types().values()
        assert table.format is not None
        folder = tmp_path / str(len(text))
        got = executable(program, folder, onnx_ops=ops).run("main", IDS)["y"]
        assert torch.equal(torch.as_tensor(got), wanted(program))
        model = onnx.load(str(folder / "onnx/main.onnx"), load_external_data=False)
        used = {node.op_type for node in model.graph.node}
        has_zeros = table.format.zeros is not None
        assert ("GatherBlockQuantized" in used) is (ops == "ort" and not has_zeros)


@pytest.mark.parametrize("ops", contrib.DIALECTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_tied_head_reads_the_same_bytes(name: str, ops: str, tmp_path: Path) -> None:
    """Once in the file, and with nothing fused too."""
    import onnxruntime

    program = program_of(TIED, KINDS[name])
    got = executable(program, tmp_path / "a", onnx_ops=ops).run("main", IDS)["y"]
    differ(torch.as_tensor(got), wanted(program), 0.1)
    path = tmp_path / "a/onnx/main.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    stored = [x.name for x in model.graph.initializer if x.external_data]
    parts = [n + end for n, t in program.weight_types().items() for end, _ in t.parts]
    assert sorted(stored) == sorted(parts)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = stock_session(path, options)
    (plain,) = session.run(["y"], {"i": array_of(IDS["i"])})
    differ(torch.as_tensor(plain), wanted(program), 0.1)


@pytest.mark.parametrize("ops", contrib.DIALECTS)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_model_whose_embedding_is_in_codes_says_what_the_interpreter_says(
    quant: str, tied: bool, ops: str, tmp_path: Path
) -> None:
    """To a last bit; of the rows that a tied head takes as codes a few fall to the other of two."""
    program = prepared(DType.f32, tied=tied, quant_embedding=quant)
    coded = {n: str(t.dtype) for n, t in program.weight_types().items() if t.format is not None}
    assert coded == {"model.embed_tokens.weight": QUANT[quant]}
    assert ("lm_head.weight" in program.weights) is not tied
    runs = executable(program, tmp_path / "a", onnx_ops=ops)
    got, due = (torch.cat(conversation(x, program)) for x in (runs, ReferenceExecutable(program)))
    off, most = (got - due).abs().amax(-1), due.abs().max()
    assert off.median() <= 1e-5 * most, off
    assert off.max() <= (0.02 if tied else 1e-5) * most, off
