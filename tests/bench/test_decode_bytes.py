"""Heads that share keys read them once: a profile's bytes beside the configuration's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import dsc
from bench import decode_bytes, limit
from dsc.runtime.limit import working_set

SMALL = {"num_hidden_layers": 2, "vocab_size": 512}
CONTEXT = 600


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "mistral"])
def test_a_decode_step_reads_weights_and_keys_once(model_type: str, tmp_path: Path) -> None:
    """mistral's layers have a window of 256, one of the two of gemma2, and none of qwen2."""
    config = decode_bytes.configuration(model_type, **SMALL)
    decode_bytes.save(config, tmp_path)
    session = dsc.compile(tmp_path, backend="null", max_context=1024).session(max_batch=2)
    session.prefill(np.full((2, CONTEXT), 5))
    with dsc.Profiler() as prof:
        session.decode([5, 5])
    told = sum(event.bytes for event in prof.events if event.category == "entry")
    assert 1 <= decode_bytes.ratio(config, 2, CONTEXT, told) <= decode_bytes.MOST


@pytest.mark.parametrize(
    ("sorts", "window", "rows"),
    [((), None, 2 * 101), ((), 10, 2 * 10), (("full", "sliding"), 10, 101 + 10)],
)
def test_a_window_bounds_the_rows_that_a_configuration_says(
    sorts: Sequence[str], window: int | None, rows: int
) -> None:
    config = {
        "model_type": "qwen2", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 3,
        "num_key_value_heads": 1, "intermediate_size": 5, "num_hidden_layers": 2,
        "layer_types": [f"{sort}_attention" for sort in sorts], "sliding_window": window,
    }  # fmt: skip
    before, after = (working_set(limit.step_work(config, 1, 1, n)) for n in (0, 100))
    assert after - before == (rows - 2) * (4 + 4) * 2
