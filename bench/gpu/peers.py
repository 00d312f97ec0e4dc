"""What torch does on the same card: products by cuBLAS, attention, and a compiled block.

Each figure has its bytes and flops, so that it can be held against the same kernels' in a step of
`steps`. What this torch or this machine lacks is left out with its reason, and the others stay.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dsc.ir.lazy import torch

Figures = dict[str, Any]
Tell = Callable[[str, Any], None]
DEVICE = "cuda"
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
MODES = ("default", "reduce-overhead")
"""Of torch.compile: launches from the host, and as a CUDA graph."""


def told(tell: Tell, steps: Mapping[str, Callable[[], Figures]]) -> None:
    """Tell of each step what it found, or why it found nothing. Raises `RuntimeError`."""
    if not is_card():
        raise RuntimeError("torch has no CUDA here")
    tell("torch", torch.__version__)
    for name, step in steps.items():
        try:
            tell(name, step())
        except Exception as problem:
            tell(name, {"error": f"{type(problem).__name__}: {str(problem)[:300]}"})
        torch.cuda.empty_cache()


def is_card() -> bool:
    """Whether torch has a card."""
    return torch.cuda.is_available()


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


def figures(taken: float, nbytes: int = 0, flops: int = 0) -> Figures:
    """A step's microseconds, and what it moved and computed a second."""
    rates = {"TB/s": round(nbytes / taken / 1e12, 3), "TFLOP/s": round(flops / taken / 1e12, 1)}
    return {"us": round(taken * 1e6, 1), "bytes": nbytes, "flops": flops, **rates}


def random(*shape: int) -> torch.Tensor:
    """Numbers like those of weights, in bf16 on the card."""
    return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02)


# --- speeds ---------------------------------------------------------------------------------------


def speeds(folder: Path, found: Mapping[str, Any], tell: Tell) -> None:
    """A copy, read and written, and the largest product of cuBLAS, also in FP8."""
    told(tell, {"copy": _copy, "bf16": _bf16, "fp8": _fp8})


def _copy() -> Figures:
    x = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device=DEVICE).normal_()
    y = torch.empty_like(x)
    taken = seconds(lambda: y.copy_(x))
    return {"a second": 2 * COPY_BYTES / taken, **figures(taken, 2 * COPY_BYTES)}


def _bf16() -> Figures:
    a, b = random(SQUARE, SQUARE), random(SQUARE, SQUARE)
    return _square(lambda: a @ b)


def _fp8() -> Figures:
    one = torch.ones((), device=DEVICE)
    a, b = (random(SQUARE, SQUARE).to(torch.float8_e4m3fn) for _ in range(2))
    return _square(lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16))


def _square(product: Callable[[], object]) -> Figures:
    taken, flops = seconds(product), 2 * SQUARE**3
    return {"a second": flops / taken, **figures(taken, 0, flops)}


# --- products and attention -----------------------------------------------------------------------


def products(folder: Path, found: Mapping[str, Any], tell: Tell) -> None:
    """V3's dense products by cuBLAS, of one row, of a batch and of a prompt's chunk."""
    steps = {
        f"{name}, {rows} rows": partial(_product, rows, n, k)
        for name, (n, k) in PRODUCTS.items()
        for rows in ROWS
    }
    told(tell, steps)


def _product(rows: int, n: int, k: int) -> Figures:
    weight, x = random(n, k), random(rows, k)
    taken = seconds(partial(torch.nn.functional.linear, x, weight))
    return figures(taken, 2 * (n * k + rows * (n + k)), 2 * rows * n * k)


def attention(folder: Path, found: Mapping[str, Any], tell: Tell) -> None:
    """A causal prompt of `CONTEXT` tokens at V3's widths by SDPA: keys of 192, values of 128."""
    steps = {
        f"{name.lower()}{', values padded' if padded else ''}": partial(_by_sdpa, name, padded)
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
        for padded in (False, True)
    }
    told(tell, steps)


def _operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = (random(1, HEADS, CONTEXT, NOPE + ROPE) for _ in range(2))
    return q, k, random(1, HEADS, CONTEXT, VALUE)


def _attended(step: Callable[[], object]) -> Figures:
    pairs = CONTEXT * (CONTEXT + 1) // 2
    moved = 2 * HEADS * CONTEXT * (2 * (NOPE + ROPE) + 2 * VALUE)
    return figures(seconds(step), moved, 2 * pairs * HEADS * (NOPE + ROPE + VALUE))


def _by_sdpa(backend: str, padded: bool) -> Figures:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = _operands()
    if padded:
        v = torch.nn.functional.pad(v, (0, NOPE + ROPE - VALUE))
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return _attended(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        )


def flex(folder: Path, found: Mapping[str, Any], tell: Tell) -> None:
    """The same by FlexAttention, compiled."""
    told(tell, {"flex": _by_flex})


def _by_flex() -> Figures:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i >= j

    mask = create_block_mask(causal, None, None, CONTEXT, CONTEXT, device=DEVICE)
    compiled: Any = torch.compile(flex_attention)
    q, k, v = _operands()
    return _attended(lambda: compiled(q, k, v, block_mask=mask))


# --- transformers' block --------------------------------------------------------------------------


class Past:
    """A cache that holds `CONTEXT` tokens, and gives them with new ones behind, as a grown one."""

    def __init__(self) -> None:
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, *new: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept with the two new parts behind; the first that come are kept."""
        if self.kept is None:
            self.kept = new[0], new[1]
            return self.kept
        return torch.cat((self.kept[0], new[0]), 2), torch.cat((self.kept[1], new[1]), 2)


def block(folder: Path, found: Mapping[str, Any], tell: Tell) -> None:
    """transformers' attention block of V3 by torch.compile, one token and a prompt."""
    steps = {
        f"{what}, {mode}": partial(_by_block, new, mode)
        for what, new in (("decode at 4096", 1), ("prefill of 4096", CONTEXT))
        for mode in MODES[: 2 if new == 1 else 1]
    }
    told(tell, steps)


def _by_block(new: int, mode: str) -> Figures:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock

    config = DeepseekV3Config(
        num_hidden_layers=1, hidden_size=HIDDEN, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, q_lora_rank=Q_LATENT, kv_lora_rank=LATENT,
        qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    with torch.device(DEVICE):
        attend: Any = stock.DeepseekV3Attention(config, 0).to(torch.bfloat16).eval()
        rotary: Any = stock.DeepseekV3RotaryEmbedding(config)
    past = Past() if new == 1 else None
    before = CONTEXT if past else 0
    torch._dynamo.reset()  # what another shape taught it makes code for any shape
    compiled: Any = torch.compile(attend, mode=mode, dynamic=False)
    with torch.no_grad():
        if past is not None:
            x = random(1, CONTEXT, HIDDEN)
            attend(x, rotary(x, _places(0, CONTEXT)), None, past_key_values=past)
        x = random(1, new, HIDDEN)
        turns = rotary(x, _places(before, new))
        taken = seconds(lambda: compiled(x, turns, None, past_key_values=past))
    weights = sum(p.numel() for p in attend.parameters())
    return figures(taken, 2 * (weights + before * (LATENT + ROPE)))


def _places(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count, device=DEVICE)[None]
