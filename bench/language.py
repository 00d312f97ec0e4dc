"""Perplexity on a text and greedy continuations, ours and those of stock transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import dsc

WINDOW = 256
PROMPT = "In the beginning"
Logits = Callable[[Tensor], Tensor]
"""Windows of ids [B, W] to logits [B, W, vocab]."""


def perplexity(logits: Logits, ids: list[int], windows: int | None = None, batch: int = 4) -> float:
    """Perplexity over windows of 256 tokens, each on its own; the last partial one is dropped."""
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)[:windows]
    total = 0.0
    for part in rows.split(batch):
        scores = logits(part)[:, :-1].float().log_softmax(-1)
        total -= float(scores.gather(-1, part[:, 1:, None]).sum())
    return math.exp(total / (len(rows) * (WINDOW - 1)))


def our_logits(compiled: dsc.CompiledModel) -> Logits:
    """Logits of a compiled model, a fresh session for each batch of windows."""

    def run(part: Tensor) -> Tensor:
        result: Tensor = compiled.session(max_batch=len(part)).prefill(part, all_logits=True)
        return result

    return run


def stock_logits(folder: Path, dtype: torch.dtype) -> Logits:
    """Logits of stock transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def run(part: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = model(input_ids=part, use_cache=False).logits
        return result

    return run


def stock_greedy(folder: Path, dtype: torch.dtype, ids: list[int], count: int) -> list[int]:
    """Greedy continuation by transformers' `generate`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return [int(i) for i in out[0, len(ids) :]]


def our_greedy(compiled: dsc.CompiledModel, ids: list[int], count: int) -> list[int]:
    """Greedy continuation by a compiled model."""
    from dsc.generation import generate

    stop = compiled.manifest["generation"]["eos_token_id"]
    session = compiled.session(max_batch=1, max_context=len(ids) + count)
    return list(generate(session, ids, count, stop=stop))
