"""The ONNX artifact as a product: card and example, what inputs are, opsets, runtimes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from dsc.backends.base import EmitOptions
from dsc.backends.onnxruntime.check import check
from dsc.backends.onnxruntime.options import LEAST_RUNTIME
from dsc.backends.onnxruntime.session import OnnxExecutable
from dsc.errors import BackendUnavailable, UsageError
from dsc.ir.dims import Range
from dsc.ir.parser import parse_graph
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.runtime import artifact
from dsc.runtime.session import Session
from tests.backends.onnx_artifacts import BACKEND, executable, prepared


@pytest.mark.parametrize(
    ("dtype", "options", "caches"),
    [
        (DType.bf16, {}, "float32"),
        (DType.bf16, {"caches": "bf16"}, "bfloat16"),
        (DType.f16, {"opset": 24}, "float16"),
        (DType.f32, {"cache": "in-place"}, "float32"),
    ],
    ids=str,
)
def test_the_cards_example_runs_and_continues_as_a_session(
    dtype: DType, options: dict[str, Any], caches: str, tmp_path: Path
) -> None:
    rest = {name: value for name, value in options.items() if name != "cache"}
    program = prepared(dtype, options.get("cache", "contiguous"))
    ends = [1, 7]
    generation = {"bos_token_id": 3, "eos_token_id": ends}
    program = replace(program, meta={**program.meta, "generation": generation})
    folder = tmp_path / "a"
    session = Session(executable(program, folder, **rest), program, 1, 60)
    text = (folder / "README.md").read_text()
    words = " ".join(text.split())
    most = program.limits
    assert f"B up to {most.max_batch} sequences, S up to {most.prefill_chunk} new" in words
    assert f"lengths + S up to {most.max_context} tokens in a sequence" in words
    assert "A text ends at one of the ids 1, 7." in words
    assert "| `onnx/prefill.onnx` | any S |" in text
    for name in (*(v.name for v in program.entries["prefill"].inputs), "logits", "present.0.rope"):
        assert f"`{re.sub('[.][0-9]+[.]', '.N.', name)}`" in text
    rows = "C" if "cache" in options else "P"
    assert f"| {caches} | [B, {rows}, 20] |" in text
    assert "| `logits` | float32 |" in text
    code = (folder / "example.py").read_text()
    assert code == text.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 40
    numbers = {DType.f32: "float32", DType.bf16: "bfloat16", DType.f16: "float16"}[dtype]
    assert f"Its numbers are {numbers}. The weights are in `onnx/model.safetensors`" in words
    line = [sys.executable, str(folder / "example.py")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *made = json.loads(done.stdout)
    assert first == 3
    assert len(made) == 63 or made[-1] in ends
    logits = session.prefill(torch.tensor([[3]]))
    for token in made:
        assert token == int(logits[0].argmax())
        logits = session.decode([token])
    assert (folder / "run.py").exists() == (caches != "bfloat16" and "cache" not in options)


def test_an_example_takes_a_text_of_no_token_and_tells_of_one_of_too_many(
    exported: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "a"))
    tokenizer = Tokenizer(WordLevel({"a": 5, "?": 6}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    line = [sys.executable, str(folder / "example.py")]
    empty, long = (
        subprocess.run([*line, text], capture_output=True, text=True, check=False)
        for text in (" ", "a " * 64)
    )
    assert empty.returncode == 0, empty.stderr
    assert "64 tokens, and a text has 64 at most" in long.stderr


def test_every_input_and_output_says_what_it_is(exported: Path) -> None:
    model = onnx.load(str(exported / "onnx/prefill.onnx"), load_external_data=False)
    said = {x.name: x.doc_string for x in (*model.graph.input, *model.graph.output)}
    assert all(said.values())
    assert "exactly the largest of lengths" in said["past.1.latent"]
    assert "ONNX Runtime 1.23" in model.doc_string
    facts = {p.key: p.value for p in model.metadata_props}
    assert json.loads(facts["max_context"]) == 64
    assert list(facts) == sorted(facts), "a program read from its text gives another file"


@pytest.mark.parametrize("opset", [23, 24])
def test_an_opset_is_written_by_its_own_operators(opset: int, tmp_path: Path) -> None:
    program = prepared(DType.f32)
    executable(program, tmp_path / "a", opset=opset)
    for path in sorted(tmp_path.rglob("*.onnx")):
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        assert model.opset_import[0].version == opset
        kinds = {n.op_type for n in model.graph.node}
        assert "TensorScatter" not in kinds, "ONNX Runtime warns of each copy that it makes"
    needs = artifact.read(tmp_path / "a").manifest["needs"]
    assert needs == {"onnxruntime": f"onnxruntime>={LEAST_RUNTIME[opset]}"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"opset": 21}, "opset 21"), ({"caches": "fp16"}, "fp16"), ({"caches": "int8"}, "int8")],
)
def test_what_is_not_written_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        BACKEND.emit(prepared(DType.bf16), EmitOptions(extra=options))


def test_an_older_runtime_is_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    opened = artifact.read(exported)
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.1")
    with pytest.raises(BackendUnavailable, match=r"needs ONNX Runtime 1\.23, 1\.22\.1 is") as told:
        BACKEND.load(exported, opened.manifest, opened.program)
    assert told.value.hint == "pip install 'onnxruntime>=1.23'", "no other opset would help"
    code = "import onnxruntime, sys; onnxruntime.__version__ = '1.22.1'; import run"
    line = [sys.executable, "-c", code + "; run.Model('.')"]
    done = subprocess.run(line, cwd=exported, capture_output=True, text=True, check=False)
    assert "onnxruntime>=1.23" in done.stderr


def test_what_is_no_language_model_has_a_card_and_one_call_as_its_example(tmp_path: Path) -> None:
    text = 'graph main(%x: f32[B,3], %i: i64[B]) { %y = neg %x return %y as "y", %i as "j" }'
    graph, folder = parse_graph(text), tmp_path / "a"
    symbols = {"B": Range(1, 8)}
    executable(Program("neg", {"main": graph}, symbols=symbols), folder, provider="cuda")
    assert not (folder / "run.py").exists()
    card = (folder / "README.md").read_text()
    assert "with its CUDA provider (`pip install onnxruntime-gpu`)" in " ".join(card.split())
    assert "| `x` | float32 | [B, 3] |\n| `i` | int64 | [B] |\n" in card
    assert "Sizes: B from 1 to 8." in card
    assert "weights" not in card
    done = subprocess.run(
        [sys.executable, str(folder / "example.py")], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["y float32 (2, 3)", "j int64 (2,)"], done.stderr


def test_the_example_tells_what_it_does(exported: Path) -> None:
    line = [sys.executable, str(exported / "example.py"), "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert (
        done.stdout == 'Continues a text by the likeliest tokens: python example.py "In the'
        ' beginning".\n'
    )


def test_the_card_names_codes(tmp_path: Path) -> None:
    executable(prepared(DType.f32, quant="int4"), tmp_path / "a")
    words = " ".join((tmp_path / "a" / "README.md").read_text().split())
    assert re.search(r"Of \d+ weights \d+ are int4 codes with a scale for 32 columns, 1 are", words)


def test_a_reduced_build_is_told_all_operators(exported: Path) -> None:
    from onnxruntime.tools.reduced_build_config_parser import parse_config

    (required, _) = parse_config(str(exported / "required_operators.config"))[:2]
    wanted: dict[str, dict[int, set[str]]] = {}
    for path in exported.rglob("*.onnx"):
        model = onnx.load(str(path), load_external_data=False)
        versions = {x.domain or "ai.onnx": x.version for x in model.opset_import}
        for domain, kind in re.findall(
            r"= ((?:\w+\.)*)([A-Z]\w+) [<(]", onnx.printer.to_text(model)
        ):
            own = domain.rstrip(".") or "ai.onnx"
            wanted.setdefault(own, {}).setdefault(versions[own], set()).add(kind)
    assert required == wanted
    assert {"If", "Gather", "MatMul"} <= wanted["ai.onnx"][23]


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_model_for_a_provider_that_is_not_here_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a"
    runs = executable(prepared(DType.f32), out, provider="cuda")
    assert isinstance(runs, OnnxExecutable)
    with pytest.raises(BackendUnavailable, match="made for CUDAExecutionProvider") as refused:
        runs.open("prefill")
    assert "onnxruntime-gpu" in str(refused.value)
    here = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    with monkeypatch.context() as installed:
        installed.setattr("onnxruntime.get_available_providers", lambda: here)
        with pytest.raises(BackendUnavailable, match="did not start here"):
            runs.open("prefill")
    found = check(out)
    assert found.failure == ""
    told = [x.told for x in found.findings if x.question == "operators"]
    assert all("made for CUDAExecutionProvider, and" in text for text in told)
    assert all("nodes on CPUExecutionProvider" in text for text in told)
    line = 'providers=["CUDAExecutionProvider", "CPUExecutionProvider"]'
    assert line in (out / "example.py").read_text().replace("'", '"')
