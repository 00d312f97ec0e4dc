"""The two dialects of ONNX models: which operators each may write, and who gets them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from dsc.backends.base import EmitOptions
from dsc.backends.onnxruntime import contrib
from dsc.backends.onnxruntime.graph import GraphWriter, Pool
from dsc.backends.onnxruntime.options import Form
from dsc.errors import UsageError
from dsc.ir.dims import Sym
from dsc.ir.types import DType
from tests.backends.onnx_artifacts import BACKEND, executable, prepared


def _writer(ops: str, provider: str = "cpu") -> GraphWriter:
    return GraphWriter(Pool(Form(ops=ops, provider=provider)))


def test_operators_of_the_runtime_are_for_its_own_dialect_and_who_computes_them_right() -> None:
    assert all(_writer("ort").has(op_type) for op_type in contrib.CONTRIB)
    assert not any(_writer("standard").has(op_type) for op_type in contrib.CONTRIB)
    cuda = _writer("ort", "cuda")
    assert cuda.has("MatMulNBits")
    assert not cuda.has("QMoE"), "it ignores router_weights"
    with pytest.raises(AssertionError, match="QMoE is not offered"):
        cuda.contrib("QMoE", "x")


def test_what_was_written_is_counted_and_told_with_what_stands_in_its_place() -> None:
    g = _writer("ort")
    g.contrib("MatMulNBits", "x", "codes", "scales", K=32, N=8, bits=8, block_size=32)
    g.branch().contrib("MatMulNBits", "y", "codes", "scales", K=32, N=8, bits=8, block_size=32)
    assert [node.domain for node in g.nodes] == [contrib.DOMAIN]
    assert g.pool.contrib == {"MatMulNBits": 2}
    (told,) = contrib.notes([g.pool.contrib, {"MatMulNBits": 1}], (), "cpu")
    assert "MatMulNBits: 2 in a model; in standard operators DequantizeLinear" in told
    assert not g.pool.withheld
    cuda, standard = _writer("ort", "cuda"), _writer("standard", "cuda")
    assert not any(each.has("QMoE") for each in (cuda, standard))
    (wrong,) = contrib.notes([], cuda.pool.withheld, "cuda")
    assert wrong == "QMoE is not used on cuda: it ignores router_weights"
    assert not standard.pool.withheld


def test_standard_models_import_nothing_else_and_say_the_same(tmp_path: Path) -> None:
    program = prepared(DType.f32)
    made = {ops: executable(program, tmp_path / ops, onnx_ops=ops) for ops in contrib.DIALECTS}
    for path in sorted((tmp_path / "standard").rglob("*.onnx")):
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        assert [(x.domain, x.version) for x in model.opset_import] == [("", 24)]
    graph = program.entries["prefill"]
    sizes = {"B": 2, "S": 3, "P": 0, "L": 1}
    rng = np.random.default_rng(0)
    given = {}
    for value in graph.inputs:
        shape = [sizes[str(dim)] if isinstance(dim, Sym) else dim for dim in value.type.shape]
        low = value.type.dtype.is_float
        given[value.name] = np.zeros(shape, np.float32) if low else rng.integers(0, 2, shape)
    given["lengths"][:] = 0
    ort, standard = (one.run("prefill", dict(given))["logits"] for one in made.values())
    assert np.abs(ort - standard).max() <= 1e-4 * max(1, np.abs(ort).max())


@pytest.mark.parametrize("given", [{"onnx_ops": "native"}, {"provider": "tpu"}], ids=str)
def test_a_dialect_or_a_provider_that_there_is_not_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"(is|are) called"):
        BACKEND.emit(prepared(DType.f32), EmitOptions(extra=given))
