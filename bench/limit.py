"""What a step of a model must do at least, from its configuration alone: the same for all engines.

Each operator reads its weights once, and attention the cached latents of every sequence; flops are
two for a multiply and add. MLA in decode is counted in its absorbed form, which reads and computes
least; a prompt longer than the break-even expands its latents instead, whichever computes less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from dsc.ir.expert_forms import expected_experts
from dsc.ir.formats import Format
from dsc.ir.types import TensorType
from dsc.passes.quantize_weights import Kept, Quantising
from dsc.pipeline import GROUPED, QUANT, make, quantising
from dsc.runtime.limit import Work

BYTES = 2.0
"""Of a weight and of a cached value: bf16."""
SIDE = 4096
"""Rows and columns of the matrix whose bytes tell those of a weight."""


@cache
def width_of(quant: str, is_head: bool = False) -> float:
    """Bytes of a weight with its share of scales, where weights are quantised as a compile does.

    >>> width_of("int4"), width_of("int4", is_head=True)
    (0.5625, 1.0625)
    """
    if quant == "none":
        return BYTES
    made = make(quantising(quant), **({"codes": QUANT[quant]} if quant in GROUPED else {}))
    assert isinstance(made, Quantising)
    try:
        kind = made.kind((), is_head)
    except Kept:
        return BYTES
    matrix = TensorType(kind.codes, (SIDE, SIDE), Format(kind.block, kind.scales))
    size = matrix.nbytes
    assert isinstance(size, int)
    return size / SIDE**2


def step_work(
    config: Mapping[str, Any], batch: int, new: int, context: int, quant: str = "none"
) -> list[Work]:
    """The operators of a step over `new` tokens of each of `batch` sequences after `context`.

    Logits are made for one token each. The router and the latent's expansion, which attention
    absorbs, stay in bf16 whatever weights are in.
    """
    width, head = width_of(quant), width_of(quant, is_head=True)
    found = [_product(batch, config["vocab_size"], config["hidden_size"], head)]
    for index in range(config["num_hidden_layers"]):
        found += _attention(config, batch, new, context, width)
        if index < config["first_k_dense_replace"]:
            found += _mlp(config["hidden_size"], config["intermediate_size"], batch * new, width)
        else:
            found += _experts(config, batch * new, width)
    return found


def prefill_work(
    config: Mapping[str, Any], batch: int, tokens: int, chunk: int, quant: str = "none"
) -> list[Work]:
    """The operators of a prompt, by chunks."""
    found: list[Work] = []
    for at in range(0, tokens, chunk):
        found += step_work(config, batch, min(chunk, tokens - at), at, quant)
    return found


def _product(rows: float, columns: int, depth: int, width: float, read: float = 1.0) -> Work:
    """Rows times a matrix of which the share `read` is read."""
    return Work(columns * depth * width * read, 2 * rows * columns * depth)


def _attention(
    config: Mapping[str, Any], batch: int, new: int, context: int, width: float
) -> Iterator[Work]:
    hidden, heads, rank = (
        config[k] for k in ("hidden_size", "num_attention_heads", "kv_lora_rank")
    )
    nope, rope, value = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    rows, seen = batch * new, context + new
    low = config.get("q_lora_rank")
    if low:
        yield _product(rows, low, hidden, width)
    yield _product(rows, heads * (nope + rope), low or hidden, width)
    yield _product(rows, rank + rope, hidden, width)
    pairs = batch * new * (context + (new + 1) / 2)  # a token sees itself and what came before
    absorbed = 2 * rows * heads * rank * (nope + value) + 2 * pairs * heads * (2 * rank + rope)
    expanded = 2 * batch * seen * heads * rank * (nope + value)
    expanded += 2 * pairs * heads * (nope + rope + value)
    stored = heads * rank * (nope + value) * BYTES + batch * seen * (rank + rope) * BYTES
    yield Work(stored, min(absorbed, expanded))
    yield _product(rows, hidden, heads * value, width)


def _mlp(hidden: int, inner: int, rows: float, width: float) -> Iterator[Work]:
    yield _product(rows, 2 * inner, hidden, width)
    yield _product(rows, hidden, inner, width)


def _experts(config: Mapping[str, Any], rows: int, width: float) -> Iterator[Work]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    count, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    read = expected_experts(count, chosen, rows)
    yield _product(rows, count, hidden, BYTES)
    for columns, depth in ((2 * inner, hidden), (hidden, inner)):
        yield Work(columns * depth * width * read, 2 * rows * chosen * columns * depth)
    shared = config.get("n_shared_experts") or 0
    if shared:
        yield from _mlp(hidden, inner * shared, rows, width)
