"""`dsc export --check`: what it asks, and that each question can be answered with no."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import onnx
import pytest

import dsc
from bench.onnx_servers import TINY
from dsc.backends.onnxruntime import check as checks
from dsc.backends.onnxruntime.check import Checked, check
from dsc.backends.onnxruntime.graph import SCOPES
from dsc.cli import main
from dsc.ir.dims import Range
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.program import Program
from dsc.ir.safetensors import open_safetensors
from dsc.ir.types import DType
from dsc.runtime import artifact
from tests.backends.onnx_artifacts import executable, prepared

SYMBOLS = {"B": Range(1, 8)}
QUESTIONS = {"external data", "onnx.checker", "shapes", "operators", "ONNX Runtime", "reference"}


def answers(found: Checked) -> dict[str, set[bool | None]]:
    """Return all answers to each question."""
    return {q: {x.passed for x in found.findings if x.question == q} for q in QUESTIONS}


@pytest.mark.parametrize("dtype", [DType.f32, DType.bf16, DType.f16], ids=str)
def test_an_export_is_what_it_should_be(dtype: DType, tmp_path: Path) -> None:
    executable(prepared(dtype), tmp_path / "a", server="genai")
    found = check(tmp_path / "a")
    assert answers(found) == {q: {True} for q in QUESTIONS}, found.failure
    held = [x.model for x in found.findings if x.question == "ONNX Runtime"]
    assert held.count("onnx/genai.onnx") == 1
    assert found.failure == ""
    assert found.sizes["cache_values_per_token_per_layer"] == 20 + 8
    assert {"layer 0", "layer 1", "logits"} <= set(found.layers["onnx/prefill.onnx"])
    kinds = found.operators["onnx/prefill.onnx"]["CPUExecutionProvider"]
    assert kinds["RMSNormalization"] > 1


def test_a_weight_that_differs_from_some_layer_on_is_found_there(tmp_path: Path) -> None:
    """The two norms of layer 1 have each other's weights."""
    executable(prepared(DType.f32), tmp_path / "a")
    path = tmp_path / "a" / "onnx" / "prefill.onnx"
    model = onnx.load(str(path), load_external_data=False)
    tensors = {t.name: t for t in model.graph.initializer}
    first = tensors["model.layers.1.input_layernorm.weight"]
    second = tensors["model.layers.1.post_attention_layernorm.weight"]
    for one, two in zip(first.external_data, second.external_data, strict=True):
        one.value, two.value = two.value, one.value
    path.write_bytes(model.SerializeToString())
    found = checks._Check(_opened(tmp_path / "a")).run()
    off = found.layers["onnx/prefill.onnx"]
    assert off["layer 0"] < 1e-5 < 1e-3 < off["layer 1"]
    failures = [x for x in found.findings if x.passed is False]
    assert {x.question for x in failures} == {"ONNX Runtime"}
    assert failures[0].told in found.failure


def test_a_byte_of_the_weights_that_changed_is_found(tmp_path: Path) -> None:
    """Our interpreter and ONNX Runtime read the same wrong number."""
    executable(prepared(DType.f32), tmp_path / "a")
    with (tmp_path / "a" / "onnx" / "model.safetensors").open("r+b") as file:
        file.seek(-200, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-200, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    failure = check(tmp_path / "a").failure
    assert re.match("weights of onnx/model.safetensors: the hash of .* is not that of", failure)


def _opened(folder: Path) -> artifact.Artifact:
    """Open an artifact, one of whose files is not what its manifest says."""
    manifest = json.loads((folder / "dsc.json").read_text())
    weights = manifest["weights"]
    source = open_safetensors(folder / weights) if weights else None
    text = parse_program((folder / "program.dsc").read_text())
    return artifact.Artifact(folder, manifest, artifact.packed(text, source))


def test_a_model_that_onnx_refuses_is_found(tmp_path: Path) -> None:
    graph = parse_graph("graph main(%x: f32[B,3]) { %y = neg %x return %y }")
    executable(Program("f", {"main": graph}, symbols=SYMBOLS), tmp_path / "a")
    assert check(tmp_path / "a").failure == ""
    path = tmp_path / "a" / "onnx" / "main.onnx"
    model = onnx.load(str(path))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    path.write_bytes(model.SerializeToString())
    found = checks._Check(_opened(tmp_path / "a")).run()
    assert answers(found)["onnx.checker"] == answers(found)["shapes"] == {False}
    assert "onnx.checker of onnx/main.onnx" in found.failure


def test_a_program_without_states_is_checked_on_random_inputs(tmp_path: Path) -> None:
    text = "graph main(%x: f32[B,3], %y: f32[B,1]) { %z = add %x, %y return %z }"
    executable(Program("f", {"main": parse_graph(text)}, symbols=SYMBOLS), tmp_path / "a")
    assert answers(check(tmp_path / "a")) == {q: {True} for q in QUESTIONS}


def test_the_verb_ends_with_1_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "a.dsc", "--check", "-o", str(tmp_path / "a")])
    assert ended.value.code == 2
    assert "check reads the weights too" in capsys.readouterr().err
    line = ["export", "tiny", "--dtype", "fp32", "--json", "-o", str(tmp_path / "b"), "--check"]
    monkeypatch.setattr(checks, "_shapes", lambda path: (False, "they do not follow"))
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    found = json.loads(out)["check"]
    assert {x["passed"] for x in found["findings"] if x["question"] == "ONNX Runtime"} == {True}
    assert "shapes of onnx/prefill.onnx: they do not follow" in err


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the trained checkpoint's artifact, its weights in codes."""
    out = tmp_path_factory.mktemp("coded") / "a"
    return dsc.export(TINY, out, dtype="fp32", quant="int8", max_context=64)


def test_rows_in_codes_are_held_to_what_rounding_explains(coded: Path) -> None:
    found = check(coded)
    assert found.failure == ""
    assert answers(found)["reference"] == {None}
    told = [x.told for x in found.findings if x.question == "ONNX Runtime"]
    steps = [re.match(r"against our interpreter, a step of (\d+) tokens: off by", x) for x in told]
    assert len({step[1] for step in steps if step}) == 2, "one for each form of attention"
    assert any(float(re.findall(r"[\d.e-]+$", each)[0]) > 1e-3 for each in told), told


def test_nodes_are_named_by_the_module_that_they_are_of(coded: Path) -> None:
    """So that what shows a model shows its modules; the innermost scope is the node's own."""
    model = onnx.load(str(next(coded.glob("onnx/*.onnx"))), load_external_data=False)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    inside = [n for n in model.graph.node if n.name.startswith("model.layers.1.self_attn/")]
    assert inside
    for node in inside:
        scopes = ast.literal_eval({x.key: x.value for x in node.metadata_props}[SCOPES])
        assert scopes[:-1] == ["", "model", "model.layers.1", "model.layers.1.self_attn"]
        assert node.doc_string == scopes[-2]
        assert scopes[-1] in node.name
    assert any(x.name == "model.layers.1.input_layernorm.weight" for x in model.graph.initializer)


def test_a_servers_model_that_says_other_logits_is_found(tmp_path: Path) -> None:
    executable(prepared(DType.f32), tmp_path / "a", server="triton-server")
    (path,) = tmp_path.rglob("model.onnx")
    model = onnx.load(str(path), load_external_data=False)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "first"
    model.graph.node.append(onnx.helper.make_node("Softsign", ["first"], ["logits"]))
    path.write_bytes(model.SerializeToString())
    found = checks._Check(_opened(tmp_path / "a")).run()
    (failure,) = (x for x in found.findings if x.passed is False)
    assert failure.model.endswith("/1/model.onnx")
    assert "of the largest logit" in found.failure
