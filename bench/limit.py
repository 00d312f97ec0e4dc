"""What a step of a model must do at least, from its configuration alone: the same for all engines.

Each operator reads its weights once, and attention the cached latents of every sequence, or its
keys and values; flops are two for a multiply and add. MLA in decode is counted in its absorbed
form, which reads and computes least; a prompt longer than the break-even expands its latents
instead, whichever computes less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from dsc.asked import GROUPED, QUANT
from dsc.ir.expert_forms import expected_experts
from dsc.ir.formats import Format
from dsc.ir.types import TensorType
from dsc.passes.quantize_weights import Kept, Quantising
from dsc.pipeline import make, quantising
from dsc.runtime.limit import Work

SIDE = 4096
"""Rows and columns of the matrix whose bytes tell those of a weight."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of a weight with its share of scales, and whether it is integers, as rows may be."""

    bytes: float
    coded: bool = False


BF16 = Stored(2.0)
"""Of cached values too."""


@cache
def stored(quant: str, is_head: bool = False) -> Stored:
    """What a weight is where weights are quantised as a compile does.

    >>> stored("int4"), stored("int4", is_head=True).bytes
    (Stored(bytes=0.5625, coded=True), 1.0625)
    """
    if quant == "none":
        return BF16
    made = make(quantising(quant), **({"codes": QUANT[quant]} if quant in GROUPED else {}))
    assert isinstance(made, Quantising)
    try:
        kind = made.kind((), is_head)
    except Kept:
        return BF16
    size = TensorType(kind.codes, (SIDE, SIDE), Format(kind.block, kind.scales)).nbytes
    assert isinstance(size, int)
    return Stored(size / SIDE**2, kind.codes.is_int)


def step_work(
    config: Mapping[str, Any], batch: int, new: int, context: int, quant: str = "none"
) -> list[Work]:
    """The operators of a step over `new` tokens of each of `batch` sequences after `context`.

    Logits are made for one token each. The router and the latent's expansion, which attention
    absorbs, stay in bf16 whatever weights are in.
    """
    kind, head = stored(quant), stored(quant, is_head=True)
    found = [_product(batch, config["vocab_size"], config["hidden_size"], head)]
    for index in range(config["num_hidden_layers"]):
        found += _attention(config, index, batch, new, context, kind)
        if index < config.get("first_k_dense_replace", index + 1):
            found += _mlp(config["hidden_size"], config["intermediate_size"], batch * new, kind)
        else:
            found += _experts(config, batch * new, kind)
    return found


def prefill_work(
    config: Mapping[str, Any], batch: int, tokens: int, chunk: int, quant: str = "none"
) -> list[Work]:
    """The operators of a prompt, by chunks."""
    found: list[Work] = []
    for at in range(0, tokens, chunk):
        found += step_work(config, batch, min(chunk, tokens - at), at, quant)
    return found


def _product(rows: float, columns: int, depth: int, kind: Stored) -> Work:
    """Rows times a matrix."""
    return Work(columns * depth * kind.bytes, 2 * rows * columns * depth, kind.coded)


def _plain_attention(
    config: Mapping[str, Any], index: int, batch: int, new: int, context: int, kind: Stored
) -> Iterator[Work]:
    """Attention over keys and values: a row of a cache is read once for the heads that share it.

    A layer with a window reads the rows that its queries see.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width, groups = config.get("head_dim") or hidden // heads, config["num_key_value_heads"]
    sorts, window = config.get("layer_types"), config.get("sliding_window") or context + new
    whole = sorts and sorts[index] != "sliding_attention"
    if whole or not config.get("use_sliding_window", True):
        window = context + new
    rows, pairs = batch * new, batch * new * min(context + (new + 1) / 2, window)
    yield _product(rows, (heads + 2 * groups) * width, hidden, kind)
    seen = batch * (min(context, window - 1) + new)
    cached = seen * 2 * groups * width * BF16.bytes
    yield Work(cached, 4 * pairs * heads * width)
    yield _product(rows, hidden, heads * width, kind)


def _attention(
    config: Mapping[str, Any], index: int, batch: int, new: int, context: int, kind: Stored
) -> Iterator[Work]:
    if "kv_lora_rank" not in config:
        yield from _plain_attention(config, index, batch, new, context, kind)
        return
    hidden, heads, rank = (
        config[k] for k in ("hidden_size", "num_attention_heads", "kv_lora_rank")
    )
    nope, rope, value = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    rows, seen = batch * new, context + new
    low = config.get("q_lora_rank")
    if low:
        yield _product(rows, low, hidden, kind)
    yield _product(rows, heads * (nope + rope), low or hidden, kind)
    yield _product(rows, rank + rope, hidden, kind)
    pairs = batch * new * (context + (new + 1) / 2)  # a token sees itself and what came before
    absorbed = 2 * rows * heads * rank * (nope + value) + 2 * pairs * heads * (2 * rank + rope)
    expanded = 2 * batch * seen * heads * rank * (nope + value)
    expanded += 2 * pairs * heads * (nope + rope + value)
    stored = heads * rank * (nope + value) * BF16.bytes + batch * seen * (rank + rope) * BF16.bytes
    yield Work(stored, min(absorbed, expanded))
    yield _product(rows, hidden, heads * value, kind)


def _mlp(hidden: int, inner: int, rows: float, kind: Stored) -> Iterator[Work]:
    yield _product(rows, 2 * inner, hidden, kind)
    yield _product(rows, hidden, inner, kind)


def _experts(config: Mapping[str, Any], rows: int, kind: Stored) -> Iterator[Work]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    count, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    read = expected_experts(count, chosen, rows)
    yield _product(rows, count, hidden, BF16)
    for columns, depth in ((2 * inner, hidden), (hidden, inner)):
        flops = 2 * rows * chosen * columns * depth
        yield Work(columns * depth * kind.bytes * read, flops, kind.coded)
    shared = config.get("n_shared_experts") or 0
    if shared:
        yield from _mlp(hidden, inner * shared, rows, kind)
