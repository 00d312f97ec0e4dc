"""ONNX models for servers: called as GenAI, optimum and Triton call them, and their files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import dsc
from bench import onnx_servers
from dsc import pipeline
from dsc.backends.base import EmitOptions
from dsc.backends.onnxruntime import serving, triton_server
from dsc.backends.reference import ReferenceExecutable
from dsc.errors import UsageError
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.ir.weights import random_source
from dsc.runtime import artifact
from dsc.runtime.session import Session
from dsc.targets import Target
from tests.backends.onnx_artifacts import BACKEND, executable, prepared, stock_session

Array = np.ndarray[Any, Any]
Step = Callable[[list[list[int]], str], Array]
ROWS = [[5, 6, 7, 8, 3, 2, 9], [9, 4], [7]]
HEADS, WIDTH, VOCABULARY = 2, 4, 11
_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
_GROUPED = """program "grouped" {stage=CANONICAL}
symbols {B=[1,64], S=[1,64], P=[0,64], L=[1,64]}
weights {
  @embed : f32[11,10] = source "embed" : f32[11,10]
  @norm : f32[10] = source "norm" : f32[10]
  @q : f32[16,10] = source "q" : f32[16,10]
  @k : f32[8,10] = source "k" : f32[8,10]
  @v : f32[8,10] = source "v" : f32[8,10]
  @o : f32[10,16] = source "o" : f32[10,16]
  @freq : f32[2] = source "freq" : f32[2]
}
graph main(%input_ids: i64[B,S], %positions: i64[B,S], %lengths: i64[B], %logits_at: i64[B,L],
           %past.0.key: f32[B,P,8], %past.0.value: f32[B,P,8]) {
  %x = embedding %input_ids, @embed
  %h = rms_norm %x, @norm {eps=1e-06}
  %q = linear %h, @q
  %qh = reshape %q {shape=[B,S,4,4]}
  %qr = rope %qh, %positions, @freq {layout="half"}
  %k = linear %h, @k
  %kh = reshape %k {shape=[B,S,2,4]}
  %kr = rope %kh, %positions, @freq {layout="half"}
  %kf = reshape %kr {shape=[B,S,8]}
  %v = linear %h, @v
  %pk = append %past.0.key, %kf, %lengths
  %pv = append %past.0.value, %v, %lengths
  %ka = reshape %pk {shape=[B,P+S,2,4]}
  %va = reshape %pv {shape=[B,P+S,2,4]}
  %a = attention %qr, %ka, %va, %lengths {scale=0.5, causal=true}
  %f = reshape %a {shape=[B,S,16]}
  %y = linear %f, @o
  %z = add %x, %y
  %s = select_rows %z, %logits_at
  %logits = linear %s, @embed
  return %logits, %pk as "present.0.key" updates %past.0.key,
         %pv as "present.0.value" updates %past.0.value
}
"""


@cache
def program(kind: str) -> Program:
    """Return a causal LM with latent caches, or with keys and values of two heads."""
    if kind == "latent":
        return prepared(DType.f32)
    found = parse_program(_GROUPED)
    types = {k: e.type for k, e in found.weights.items()}
    meta = {"config": {"num_key_value_heads": HEADS, "model_type": "llama"}}
    found = replace(found, source=random_source(types), meta=meta)
    done, _ = pipeline.run(found, BACKEND, Target("cpu"), pipeline.PipelineOptions())
    return done


def conversation(kind: str, rows: list[list[int]]) -> list[list[Array]]:
    """Return each sequence's logits, alone and in the interpreter: a prompt, three tokens."""
    every = []
    for row in rows:
        session = Session(ReferenceExecutable(program(kind)), program(kind), 1, 32)
        logits = [session.prefill(torch.tensor([row]))]
        logits += [session.decode([token]) for token in (1, 2, 3)]
        every.append([x[0].numpy() for x in logits])
    return every


def stock_steps(session: Any, rows: list[list[int]], side: str) -> Iterator[Array]:
    """Yield logits of a padded prompt and of three tokens, as exports of transformers are run."""
    most = max(map(len, rows))

    def padded(row: list[int], pad: int) -> list[int]:
        padding = [pad] * (most - len(row))
        return [*padding, *row] if side == "left" else [*row, *padding]

    ids = np.array([padded(row, 1) for row in rows])
    mask = np.array([padded([1] * len(row), 0) for row in rows])
    caches = [x for x in session.get_inputs() if x.name.startswith("past")]
    past = {x.name: np.zeros((len(rows), x.shape[1], 0, x.shape[3]), np.float32) for x in caches}
    names = [x.name for x in session.get_outputs()]
    for token in (1, 2, 3, 0):
        feeds = {"input_ids": ids, "attention_mask": mask, **past}
        found = dict(zip(names, session.run(None, feeds), strict=True))
        yield found["logits"]
        past = {n: found[n.replace("past_key_values", "present")] for n in past}
        ids = np.full((len(rows), 1), token)
        mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["latent", "grouped"])
def test_a_model_for_genai_masks_padding_wherever_it_is(
    kind: str, side: str, tmp_path: Path
) -> None:
    executable(program(kind), tmp_path / "a", server="genai")
    told = json.loads((tmp_path / "a" / "genai_config.json").read_text())["model"]["decoder"]
    readme = (tmp_path / "a" / "README.md").read_text()
    assert f"| `{told['filename']}` | the steps of ONNX Runtime GenAI" in readme
    path = tmp_path / "a" / told["filename"]
    onnx.checker.check_model(str(path), full_check=True)
    session = stock_session(path)
    for x in session.get_inputs():
        if x.name.startswith("past"):
            assert x.shape[1::2] == [told["num_key_value_heads"], told["head_size"]]
    wanted = conversation(kind, ROWS)
    for at, logits in enumerate(stock_steps(session, ROWS, side)):
        assert logits.shape[1] == 1
        for row, every in enumerate(wanted):
            np.testing.assert_allclose(logits[row, 0], every[at], atol=1e-5)


def test_what_genai_is_told_names_the_models_ports(tmp_path: Path) -> None:
    said = {"eos_token_id": [1, 7], "temperature": 0.5, "min_p": 0.1}
    known = program("latent")
    known = replace(known, meta={**known.meta, "generation": said})
    executable(known, tmp_path / "a", server="genai")
    found = json.loads((tmp_path / "a" / "genai_config.json").read_text())
    model = onnx.load(str(tmp_path / "a" / "onnx" / "genai.onnx"), load_external_data=False)
    told = found["model"]["decoder"]
    for side, ports in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        layers = range(told["num_hidden_layers"])
        named = {n % i if "%" in n else n for n in told[side].values() for i in layers}
        assert named == {port.name for port in ports}
    assert found["model"]["eos_token_id"] == [1, 7]
    assert found["search"]["temperature"] == 0.5
    assert "min_p" not in found["search"]


def test_servers_take_no_caches_in_place(tmp_path: Path) -> None:
    done = prepared(DType.f32, "in-place")
    with pytest.raises(UsageError, match="hands grown caches"):
        executable(done, tmp_path / "a", server="genai")


def test_a_model_for_optimum_has_heads_and_all_logits(tmp_path: Path) -> None:
    executable(program("grouped"), tmp_path / "a", server="optimum")
    session = stock_session(tmp_path / "a" / "onnx" / "model.onnx")
    assert session.get_inputs()[2].shape == ["B", HEADS, "P", WIDTH]
    wanted = conversation("grouped", ROWS)
    for at, logits in enumerate(stock_steps(session, ROWS, "left")):
        assert logits.shape == (3, 1 if at else 7, VOCABULARY)
        for row, every in enumerate(wanted):
            np.testing.assert_allclose(logits[row, -1], every[at], atol=1e-5)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["model_type"] == "llama"


FIELDS = {
    "": {"name", "backend", "default_model_filename", "max_batch_size", "input", "output"}
    | {"sequence_batching", "dynamic_batching"},
    "input": {"name", "data_type", "dims", "reshape"},
    "output": {"name", "data_type", "dims", "reshape"},
    "reshape": {"shape"},
    "dynamic_batching": set(),
    "sequence_batching": {"max_sequence_idle_microseconds", "oldest", "state"},
    "oldest": {"max_candidate_sequences"},
    "state": {"input_name", "output_name", "data_type", "dims", "initial_state"},
    "initial_state": {"name", "data_type", "dims", "zero_data"},
}
"""What of Triton's model_config.proto is written, by message."""
_TOKEN = re.compile(r'#[^\n]*|"(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s\[\]{}:,]+')


def parsed(text: str) -> dict[str, list[Any]]:
    """Return a message of the protobuf text format: its values by field, each a list."""
    tokens = [t for t in _TOKEN.findall(text) if not t.startswith("#")]

    def message(kind: str) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        while tokens and tokens[0] != "}":
            field = tokens.pop(0)
            assert field in FIELDS[kind], f"{field} in {kind}"
            if tokens[0] == ":":
                tokens.pop(0)
            found.setdefault(field, []).extend(values(field))
        return found

    def values(field: str) -> list[Any]:
        if tokens[0] != "[":
            return [value(field)]
        tokens.pop(0)
        found = []
        while tokens[0] != "]":
            found.append(value(field))
            if tokens[0] == ",":
                tokens.pop(0)
        tokens.pop(0)
        return found

    def value(field: str) -> Any:
        token = tokens.pop(0)
        if token != "{":
            return json.loads(token) if re.match(r'["\d-]|true|false', token) else token
        found = message(field)
        assert tokens.pop(0) == "}"
        return found

    found = message("")
    assert not tokens
    return found


def one_of(message: Mapping[str, list[Any]], field: str) -> Any:
    """Return the value of a field that is there once."""
    (found,) = message[field]
    return found


@pytest.mark.parametrize("kind", ["latent", "grouped"])
def test_triton_keeps_the_states_of_a_sequence(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "a"
    executable(program(kind), out, server="triton-server")
    name = triton_server.repository_name(program(kind))
    config = parsed((out / name / "config.pbtxt").read_text())
    assert one_of(config, "name") == name
    assert {p.name for p in (out / name).iterdir()} == {"1", "config.pbtxt"}
    path = out / name / "1" / one_of(config, "default_model_filename")
    onnx.checker.check_model(str(path), full_check=True)
    session = stock_session(path)
    ports = {x.name: x for x in (*session.get_inputs(), *session.get_outputs())}
    kinds = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}
    states = one_of(config, "sequence_batching")["state"]
    for port in (*config["input"], *config["output"]):
        assert kinds[one_of(port, "data_type")] == _TYPES[ports[one_of(port, "name")].type]
    sent = {one_of(port, "name") for port in (*config["input"], *config["output"])}
    kept = {one_of(s, key) for s in states for key in ("input_name", "output_name")}
    assert sent == {"input_ids", "logits"}
    assert sent | kept == set(ports)
    for row, wanted in zip(ROWS, conversation(kind, ROWS), strict=True):
        # A sequence's first states are of the sizes that the file gives, with 1 for -1.
        held = {
            one_of(s, "input_name"): np.full(
                [max(d, 1) for d in s["dims"]],
                0 if one_of(s, "input_name") == "past.length" else np.nan,
                kinds[one_of(s, "data_type")],
            )
            for s in states
        }
        for s in states:
            assert one_of(s, "initial_state")["dims"] == [max(d, 1) for d in s["dims"]]
        names = [x.name for x in session.get_outputs()]
        for ids, logits in zip([row, [1], [2], [3]], wanted, strict=True):
            feeds = {"input_ids": np.array([ids]), **held}
            found = dict(zip(names, session.run(None, feeds), strict=True))
            np.testing.assert_allclose(found["logits"][0, 0], logits, atol=1e-5)
            held = {one_of(s, "input_name"): found[one_of(s, "output_name")] for s in states}


@pytest.mark.parametrize(
    ("text", "batched"),
    [
        ("graph main(%x: f32[B,3]) { %y = neg %x return %y }", ""),
        ("graph main(%x: f32[B]) { %y = neg %x return %y }", ""),
        ("graph main(%x: f32[B,3]) { %y = sum %x {axes=[0], keepdims=true} return %y }", "share"),
        ("graph main(%x: f32[B,3]) { %y = softmax %x {axis=0} return %y }", "rows of B see"),
        ("graph main(%x: f32[4,3]) { %y = neg %x return %y }", "share"),
    ],
)
def test_other_models_are_batched_where_rows_are_apart(
    text: str, batched: str, tmp_path: Path
) -> None:
    known = Program("f", {"main": parse_graph(text)}, symbols=parse_program(_GROUPED).symbols)
    executable(known, tmp_path / "a", server="triton-server")
    written = (tmp_path / "a" / "f" / "config.pbtxt").read_text()
    config = parsed(written)
    assert (tmp_path / "a" / "f" / "1" / one_of(config, "default_model_filename")).is_file()
    if batched:
        assert batched in written
        assert one_of(config, "max_batch_size") == 0
        assert "dynamic_batching" not in config
    else:
        assert one_of(config, "max_batch_size") == 64
        assert config["dynamic_batching"] == [{}]
        assert -1 not in one_of(config, "input")["dims"]


@pytest.mark.parametrize(
    ("kind", "server", "problem"),
    [("latent", "optimum", "no keys and values in heads"), ("latent", "vllm", "server 'vllm'")],
)
def test_what_a_server_cannot_hold_is_refused(kind: str, server: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        BACKEND.emit(program(kind), EmitOptions(extra={"server": server}))


def test_no_entrys_model_is_overwritten() -> None:
    (graph,) = program("grouped").entries.values()
    named = replace(program("grouped"), entries={"model": replace(graph, name="model")})
    for server in ("optimum", "triton-server"):
        with pytest.raises(UsageError, match=r"model\.onnx is the model of entry model"):
            BACKEND.emit(named, EmitOptions(extra={"server": server}))


def test_servers_of_language_models_refuse_others() -> None:
    graph = parse_graph("graph main(%x: f32[3]) { %y = neg %x return %y }")
    for server in set(serving.SERVERS) - {"triton-server"}:
        with pytest.raises(UsageError, match="this is none"):
            BACKEND.emit(Program("f", {"main": graph}), EmitOptions(extra={"server": server}))


def test_an_artifact_for_a_server_is_one_for_dsc(tmp_path: Path) -> None:
    runs = executable(program("latent"), tmp_path / "a", server="triton-server")
    session = Session(runs, program("latent"), 1, 32)
    (wanted, *_) = conversation("latent", [ROWS[0]])[0]
    np.testing.assert_allclose(session.prefill(torch.tensor([ROWS[0]]))[0], wanted, atol=1e-5)
    assert artifact.check_hashes(tmp_path / "a")


def test_the_example_writes_transformers_greedy_text_in_both_dialects(tmp_path: Path) -> None:
    wanted = onnx_servers.transformers_text()
    for ops in ("ort", "standard"):
        out = dsc.export(onnx_servers.TINY, tmp_path / ops, dtype="fp32", onnx_ops=ops)
        text = onnx_servers.written(sys.executable, out, "example.py", onnx_servers.PROMPT)
        assert text == wanted
        beside = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
        assert beside <= {path.name for path in out.iterdir()}
