"""What torch does on the same card: products by cuBLAS, attention, and a compiled block.

Each figure has its bytes and flops, so that it can be held against the same kernels' in a step of
`bench.gpu`. What this torch or this machine lacks is left out with its reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional

Figures = dict[str, Any]
REPEATS, WARMUP = 20, 3
COPY_BYTES, SQUARE = 1 << 31, 8192
HEADS, NOPE, ROPE, VALUE, LATENT, Q_LATENT, HIDDEN = 128, 128, 64, 128, 512, 1536, 7168
CONTEXT = 4096
PRODUCTS = {
    "q_a and kv_a": (2112, 7168), "q_b": (24576, 1536), "o": (7168, 16384),
    "gate and up": (36864, 7168), "down": (7168, 18432), "head": (129280, 7168),
}  # fmt: skip
"""Rows and columns of the weights of V3's dense products."""
ROWS = (1, 64, 4096)


def measure() -> Figures:
    """All figures. Raises `RuntimeError` where torch has no CUDA."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch has no CUDA here")
    found: Figures = {"torch": torch.__version__, "card": torch.cuda.get_device_name()}
    parts: dict[str, Callable[[], Any]] = {
        "speeds": _speeds, "products": _products, "attention": _attention, "block": _block,
    }  # fmt: skip
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as problem:
            found[name] = {"error": f"{type(problem).__name__}: {problem}"}
        torch.cuda.empty_cache()
    return found


def seconds(step: Callable[[], object]) -> float:
    """The median of a step by events."""
    times: list[float] = []
    for _ in range(WARMUP + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[WARMUP:])


def _figures(taken: float, nbytes: int = 0, flops: int = 0) -> Figures:
    rates = {"TB/s": round(nbytes / taken / 1e12, 3), "TFLOP/s": round(flops / taken / 1e12, 1)}
    return {"us": round(taken * 1e6, 1), "bytes": nbytes, "flops": flops, **rates}


def _random(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)


def _speeds() -> Figures:
    """A copy, read and written, and the largest product of cuBLAS, also in FP8."""
    x = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
    y, a, b = torch.empty_like(x), _random(SQUARE, SQUARE), _random(SQUARE, SQUARE)
    copied = seconds(lambda: y.copy_(x))
    found = {
        "copy": _figures(copied, 2 * COPY_BYTES),
        "bf16": _figures(seconds(lambda: a @ b), 0, 2 * SQUARE**3),
    }
    one = torch.ones((), device="cuda")
    codes = [x.to(torch.float8_e4m3fn) for x in (a, b.T.contiguous())]

    def coded() -> object:
        return torch._scaled_mm(codes[0], codes[1].T, one, one, out_dtype=torch.bfloat16)

    try:
        found["fp8"] = _figures(seconds(coded), 0, 2 * SQUARE**3)
    except (RuntimeError, TypeError) as problem:
        found["fp8"] = {"error": str(problem)}
    return found


def _products() -> Figures:
    """V3's dense products by cuBLAS, of one row, of a batch and of a prompt's chunk."""
    found = {}
    for name, (n, k) in PRODUCTS.items():
        weight = _random(n, k)
        for rows in ROWS:
            x = _random(rows, k)
            taken = seconds(partial(functional.linear, x, weight))
            moved = 2 * (n * k + rows * (n + k))
            found[f"{name}, {rows} rows"] = _figures(taken, moved, 2 * rows * n * k)
    return found


def _attention() -> Figures:
    """A causal prompt of `CONTEXT` tokens at V3's widths: keys of 192, values of 128."""
    q, k = (_random(1, HEADS, CONTEXT, NOPE + ROPE) for _ in range(2))
    v = _random(1, HEADS, CONTEXT, VALUE)
    padded = functional.pad(v, (0, NOPE + ROPE - VALUE))
    pairs = CONTEXT * (CONTEXT + 1) // 2
    flops = 2 * pairs * HEADS * (NOPE + ROPE + VALUE)
    moved = 2 * HEADS * CONTEXT * (2 * (NOPE + ROPE) + 2 * VALUE)
    peers: dict[str, Callable[[], object]] = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        for values, kind in ((v, ""), (padded, ", values padded")):
            peers[f"sdpa {name.lower()}{kind}"] = _by_sdpa(name, q, k, values)
    peers["flex"] = _by_flex(q, k, v)
    found: Figures = {}
    for name, step in peers.items():
        try:
            found[name] = _figures(seconds(step), moved, flops)
        except Exception as problem:
            found[name] = {"error": f"{type(problem).__name__}: {str(problem)[:200]}"}
    return found


def _by_sdpa(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Callable[[], object]:
    def step() -> object:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return step


def _by_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    made: list[Any] = []

    def step() -> object:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not made:
            mask = create_block_mask(
                lambda b, h, i, j: i >= j, None, None, CONTEXT, CONTEXT, device="cuda"
            )
            made.extend((torch.compile(flex_attention), mask))
        return made[0](q, k, v, block_mask=made[1])

    return step


def _block() -> Figures:
    """transformers' attention block of V3 by torch.compile: a prompt of `CONTEXT` tokens."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock

    config = DeepseekV3Config(num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        block = stock.DeepseekV3Attention(config, 0).to(torch.bfloat16).eval()
        rotary = stock.DeepseekV3RotaryEmbedding(config)
    compiled: Any = torch.compile(block)
    x, places = _random(1, CONTEXT, HIDDEN), torch.arange(CONTEXT, device="cuda")[None]

    def step() -> object:
        with torch.no_grad():
            return compiled(x, rotary(x, places), None)

    return {f"prompt of {CONTEXT}": _figures(seconds(step))}
