"""What the compiler costs at 671 B parameters, and what absorption buys at that size."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dsc

SETTLE = 0.3
"""Seconds after which torch's threads no longer spin."""
STEPS = 5
"""Decode steps of ours in a turn; one of stock's takes longer than all of them."""
V3_ATTENTION: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 7168,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
"""A model that is one attention block of V3 and next to nothing around it."""


def measure_compile(source: str, layers: int | None = None) -> dict[str, Any]:
    """Compile a model of 671B widths for the null backend in a process of its own, cold.

    `source` is `v3` (models/v3.py, always at full depth) or `stock` (transformers' class on meta).
    Returns CPU seconds of tracing and of all passes, the peak memory in GB, and what the report
    says of decode.
    """
    line = [sys.executable, "-m", "bench.scale", source, *([str(layers)] if layers else [])]
    environment = {**os.environ, "DSC_CACHE": "off", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _compile_here(source: str, layers: int | None) -> dict[str, Any]:
    from dsc import backends, pipeline
    from dsc.frontends.huggingface import stock_causal_lm
    from dsc.frontends.load import load_program
    from dsc.ir.types import DType
    from dsc.models import configs, v3
    from dsc.targets import Target

    config = configs.config("671b")
    if layers is not None:
        config = config.model_copy(update={"num_hidden_layers": layers})
    start = time.process_time()
    if source == "stock":
        loaded = load_program(stock_causal_lm(config, DType.bf16))
    else:
        loaded = load_program(v3.__file__, config="671b", weights="none")
    traced = time.process_time()
    program, records = pipeline.run(
        loaded.program, backends.get("null"), Target("cpu"), pipeline.PipelineOptions()
    )
    done = time.process_time()
    from dsc.report import cache_bytes, entry_report

    return {
        "layers": config.num_hidden_layers,
        "trace_s": round(traced - start, 2),
        "passes_s": round(done - traced, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "decode_parameters": entry_report(program, "decode")["parameters"],
        "cache_bytes_per_token": cache_bytes(program),
        "passes": len(records),
    }


def attention_block(
    dtype: str = "bf16", context: int = 4096, pairs: int = 5, backend: str = "tvm"
) -> dict[str, Any]:
    """Decode one token through V3's attention block: stock and ours in turn, both in `dtype`."""
    from transformers import DynamicCache

    from dsc.frontends.family import parse_config
    from dsc.frontends.huggingface import stock_causal_lm
    from dsc.ir.types import DType
    from dsc.runtime.protocol import ratios

    torch.manual_seed(0)
    element = DType(dtype)
    stock: Any = stock_causal_lm(parse_config(V3_ATTENTION), element, device="cpu")
    with torch.no_grad():
        for tensor in stock.parameters():
            tensor.copy_(torch.randn(tensor.shape) * 0.02)
    compiled = dsc.compile(stock, backend=backend, max_batch=1, max_context=context + 64)
    session, past = compiled.session(), DynamicCache()
    prompt = torch.randint(0, 8, (1, context))
    session.prefill(prompt)
    with torch.no_grad():
        for chunk in prompt.split(512, dim=1):
            stock(chunk, past_key_values=past, logits_to_keep=1)
    token = torch.tensor([[3]])

    def ours() -> Tensor:
        logits: Tensor = session.decode(token)
        return logits[0]

    def theirs() -> Tensor:
        with torch.no_grad():
            logits: Tensor = stock(token, past_key_values=past).logits
        return logits[0, 0]

    def turn(step: Callable[[], Tensor], steps: int) -> float:
        """Median seconds of a few steps, when the other's threads have stopped spinning."""
        time.sleep(SETTLE)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    first, second = ours().float(), theirs().float()
    error = float((first - second).abs().max() / second.abs().max().clamp(min=1.0))
    times: dict[str, list[float]] = {"ours": [], "stock": []}
    for _ in range(pairs):
        times["ours"].append(turn(ours, STEPS))
        times["stock"].append(turn(theirs, 1))
    return {
        "ratio": round(statistics.median(ratios(times["ours"], times["stock"])), 1),
        "ours_ms": round(statistics.median(times["ours"]) * 1e3, 1),
        "stock_ms": round(statistics.median(times["stock"]) * 1e3, 1),
        "max_difference": error,
    }


if __name__ == "__main__":
    depth = int(sys.argv[2]) if len(sys.argv) > 2 else None
    print(json.dumps(_compile_here(sys.argv[1], depth)))
