"""One drawn configuration of each type that `bench.matrix` draws, against the stock class.

Traced, interpreted as sessions would run it, and through all passes for the reference backend. The
whole matrix, through saved folders and on all backends, is a bar.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dsc
from bench import parity
from bench.matrix import LIMITS, TYPES, Whole, draw
from dsc.frontends.self_check import examine, in_memory
from dsc.ir.program import Program

DRAW = 3
STEPS = 2


@pytest.mark.parametrize("model_type", TYPES)
def test_a_drawn_model_equals_stock(model_type: str) -> None:
    stock, signature = in_memory(draw(model_type, DRAW))
    programs: list[Program] = []
    verdict = examine(stock, signature, programs.append)
    assert verdict.passes, verdict.fault

    (program,) = programs
    session = dsc.compile(program, backend="reference", **LIMITS).session()
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(signature.vocab_size, (2, 19 + STEPS), generator=random)
    rows = [session.prefill(ids[:, :19], all_logits=True)]
    rows += [session.decode(ids[:, 19 + step])[:, None] for step in range(STEPS)]
    result = parity.Result(model_type, "reference")
    oracle: Any = Whole(stock)
    parity.note(result, "prefill and decode", oracle, ids, torch.cat(rows, 1), 0)
    assert result.worst <= parity.TOLERANCE
