"""Random configurations exported in both dialects, run by stock ONNX Runtime: no dsc runs.

The draws are those of `bench.matrix`, each saved as a folder and exported in fp32; the numbers come
from `bench.onnx_stock`, which knows an export from its files alone. Every logit of a prompt, of two
in chunks of different sizes, of a batch of different lengths and of 8 decode steps of that batch is
held against one forward of the stock class.

    python -m bench.onnx_configs [TYPE ...] [--ops NAME] [--draws FIRST LAST]

Results go to bench/out/onnx_configs.jsonl; what was measured at this commit is not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsc
from bench import parity
from bench.matrix import LIMITS, RAGGED, Whole, draw
from bench.names import quiet
from bench.onnx_stock import StockSession, opened
from bench.results import OUT, failed, measured, tell
from dsc.backends.onnxruntime.contrib import DIALECTS
from dsc.frontends.self_check import disturb, in_memory

TYPES = (
    "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "llama", "qwen3", "gemma2", "gpt_oss",
)  # fmt: skip
RESULTS = OUT / "onnx_configs.jsonl"
CASES = tuple((model_type, index) for index in range(8) for model_type in TYPES)[:50]
"""A type and a draw of it; some types have one more than others."""
STEPS = 8
CHUNKS = (16, 5)
"""The largest step of `LIMITS`, and one that models for few tokens take."""


def check(model_type: str, index: int, dialects: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Compare a draw in each dialect with the stock class, through a saved folder."""
    case = {"type": model_type, "draw": index}
    stock, _ = in_memory(draw(model_type, index))
    disturb(stock, index)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        with quiet():
            stock.save_pretrained(folder)
        for ops in dialects:
            yield case | {"ops": ops} | _tried(folder, ops, stock, index)


def _tried(folder: Path, ops: str, stock: Any, seed: int) -> dict[str, Any]:
    try:
        out = dsc.export(folder, folder.with_name(ops), dtype="fp32", onnx_ops=ops, **LIMITS)
        result = compared(out, stock, seed)
    except Exception as problem:
        return {"ok": False, "error": failed(problem)}
    shown = {name: float(f"{error:.3g}") for name, error in result.errors.items()}
    held = result.worst <= parity.TOLERANCE
    return {"ok": held, "worst": result.worst, "errors": shown, "positions": result.positions}


def compared(out: Path, stock: Any, seed: int = 0) -> parity.Result:
    """An export's logits beside those of the stock model: each scenario's largest error."""
    oracle: Any = Whole(stock)
    result = parity.Result(out.name, "onnxruntime")
    sessions = opened(out)
    random = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(stock.config.vocab_size, shape, generator=random)

    def note(what: str, row: Tensor, logits: Any) -> None:
        parity.note(result, what, oracle, row[None], torch.as_tensor(logits)[None], 0)

    ids = tokens(3, 13)
    for row, logits in zip(ids, StockSession(out, 3, sessions).prefill(ids.tolist()), strict=True):
        note("prefill", row, logits)
    (ids,) = tokens(1, 37)
    for chunk in CHUNKS:
        (logits,) = StockSession(out, 1, sessions).prefill([ids.tolist()], chunk)
        note(f"chunks of {chunk}", ids, logits)
    session = StockSession(out, len(RAGGED), sessions)
    ids = tokens(len(RAGGED), max(RAGGED) + STEPS)
    prompts = [row[:n].tolist() for row, n in zip(ids, RAGGED, strict=True)]
    rows = [[each] for each in session.prefill(prompts)]
    for step in range(STEPS):
        found = session.decode([int(ids[row, n + step]) for row, n in enumerate(RAGGED)])
        for every, logits in zip(rows, found, strict=True):
            every.append(logits[None])
    for row, n, every in zip(ids, RAGGED, rows, strict=True):
        whole = torch.cat([torch.as_tensor(each) for each in every])
        note("different lengths and decode", row[: n + STEPS], whole)
    return result


def run(
    cases: Sequence[tuple[str, int]] = CASES, dialects: Sequence[str] = DIALECTS
) -> list[dict[str, Any]]:
    """Results of these draws, one a dialect."""
    return measured(RESULTS, ("type", "draw", "ops"), cases, dialects, check)


def bar() -> dict[str, Any]:
    """50 random configurations of seven types in both dialects, in stock ONNX Runtime."""
    found = run()
    bad = [each for each in found if not each["ok"]]
    worst = {
        ops: max(each.get("worst", 0.0) for each in found if each["ops"] == ops)
        for ops in DIALECTS
    }  # fmt: skip
    positions = sum(each.get("positions", 0) for each in found)
    return {
        "ok": not bad, "results": len(found), "positions": positions, "worst": worst,
        "bad": bad[:20],
    }  # fmt: skip


def main() -> None:
    """Measure, and print what does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--ops", action="append")
    parser.add_argument("--draws", type=int, nargs=2, default=(0, 8))
    asked = parser.parse_args()
    first, last = asked.draws
    cases = [case for case in CASES if case[0] in asked.types and first <= case[1] < last]
    tell(run(cases, asked.ops or DIALECTS))


if __name__ == "__main__":
    main()
