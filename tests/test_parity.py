"""Whole models against stock transformers: a sample of `bench.parity` and `bench.language`.

`python -m bench.parity` runs every configuration on every backend.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dsc
from bench import language, onnx_configs, parity
from bench.matrix import LIMITS
from dsc.backends.onnxruntime.contrib import DIALECTS
from dsc.ir.graph import Graph
from dsc.models.configs import TINY_CHECKPOINT

SAMPLE = [
    ("v3", ("reference", "onnxruntime", "tvm")),
    ("v3-odd", ("tvm",)),
]
BACKENDS = ("onnxruntime", "tvm")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "backends"), SAMPLE)
def test_logits_equal_transformers(case: str, backends: tuple[str, ...], tmp_path: Path) -> None:
    """Prefill, chunked prefill, ragged batches, 32 decode steps past the original YaRN length."""
    parity.make_checkpoint(case, tmp_path / "model")
    for backend in backends:
        result = parity.check(case, backend, tmp_path / "model")
        assert result.ok, result.as_dict()


@pytest.mark.slow
@pytest.mark.parametrize("ops", DIALECTS)
def test_an_export_in_stock_onnxruntime_equals_transformers(ops: str, tmp_path: Path) -> None:
    """By its files alone: chunks of two sizes, a batch of different lengths, 8 decode steps."""
    stock = parity.make_checkpoint("v2", tmp_path / "model")
    out = dsc.export(tmp_path / "model", tmp_path / "out", dtype="fp32", onnx_ops=ops, **LIMITS)
    found = onnx_configs.compared(out, stock)
    assert found.ok, found.as_dict()
    with torch.no_grad():
        next(stock.parameters())[:, 0] += 0.01
    assert not onnx_configs.compared(out, stock).ok


def test_an_oracle_that_is_off_is_noticed(tmp_path: Path) -> None:
    """The comparison itself can fail: one weight moved a little is seen."""
    parity.make_checkpoint("v3-all-dense", tmp_path / "model")
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        stock.model.layers[1].self_attn.kv_b_proj.weight[0, 0] += 0.05
    compiled = dsc.compile(
        tmp_path / "model", backend="reference", dtype="fp32", max_context=96, prefill_chunk=16
    )
    result = parity.Result("v3-all-dense", "reference")
    assert not parity.compare(compiled, parity.Oracle(stock), result, steps=2).ok


def test_04_mscale_squared_beyond_the_original_context(tmp_path: Path) -> None:
    """YaRN multiplies scores by m^2: unseen at position 0, plain after it and past 16 tokens."""
    stock = parity.make_checkpoint("v3-all-dense", tmp_path / "model")
    right = dsc.compile(
        tmp_path / "model", backend="reference", dtype="fp32", max_context=96, prefill_chunk=16
    )
    m = 0.1 * 0.7 * math.log(4) + 1
    program = right.program.map_entries(lambda g: rescaled(g, 1 / m))
    wrong = replace(right, program=program)
    ids = torch.arange(40)[None] % 97
    oracle, _ = parity.Oracle(stock).logits(ids[0])
    for compiled, alike in ((right, True), (wrong, False)):
        logits = compiled.session(max_batch=1).prefill(ids, all_logits=True)[0]
        error = (logits - oracle).abs().amax(-1)
        assert error[0] < 1e-5
        assert bool(error[1:16].max() < 1e-4) is alike
        assert bool(error[16:].max() < 1e-4) is alike


def rescaled(graph: Graph, factor: float) -> Graph:
    """The graph with the score scale of every attention multiplied."""
    nodes = [
        replace(n, attrs=n.attrs.updated(scale=n.attrs["scale"] * factor))
        if n.op in ("mla_attention", "latent_attention")
        else n
        for n in graph.nodes
    ]
    return graph.with_nodes(nodes)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tiny_model_writes_what_transformers_writes(backend: str) -> None:
    compiled = dsc.compile(TINY_CHECKPOINT, backend=backend)
    ids = compiled.tokenizer.encode(language.PROMPT).ids
    stock = language.stock_greedy(TINY_CHECKPOINT, torch.bfloat16, ids, 64)
    assert language.our_greedy(compiled, ids, 64) == stock


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_perplexity_on_real_text(backend: str, shared: Path) -> None:
    """Eight windows of the validation text, within 0.5% of transformers in bf16."""
    compiled = dsc.compile(TINY_CHECKPOINT, backend=backend)
    text = (shared / "text" / "valid.txt").read_text()
    ids = compiled.tokenizer.encode(text).ids
    ours = language.perplexity(language.our_logits(compiled), ids, windows=8)
    logits = language.stock_logits(TINY_CHECKPOINT, torch.bfloat16)
    assert ours == pytest.approx(language.perplexity(logits, ids, windows=8), rel=0.005)
