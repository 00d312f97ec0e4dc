"""What codes may cost tiny-v3 in perplexity, on every backend, and in stock ONNX Runtime.

The text is one that the model was not trained on, in windows of 256 tokens, beside transformers in
fp32. The checkpoint is taken as it is, and as FP8 in blocks of 128 x 128, which int8 and int4 are
made of on the way. For ONNX Runtime a folder is exported in each dialect and run by its files alone
(`bench.onnx_stock`). For triton, whose kernels are interpreted here, the text is 2,048 tokens.

    python -m bench.coded_perplexity [ENGINE ...] [--windows N]

What was measured at this commit is read back from bench/out/coded_perplexity.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dsc
from bench import language
from bench.onnx_stock import StockSession, opened
from bench.results import OUT, measured, tell
from bench.tiny import TEXT, TINY
from dsc.frontends.convert import convert

RESULTS = OUT / "coded_perplexity.jsonl"
ONNX = {"ONNX Runtime": "ort", "ONNX Runtime, standard": "standard"}
ENGINES = (*ONNX, "tvm", "reference")
INTERPRETED = 8
"""Windows that kernels are interpreted for."""
COSTS = {"none": 0.0001, "fp8": 0.002, "int8": 0.001, "int4": 0.007}
"""By how much of itself perplexity may grow: fp32 in another order, and codes by their format."""
CASES = (
    ("plain", "none"), ("plain", "int8"), ("plain", "int4"), ("plain", "fp8"),
    ("fp8", "none"), ("fp8", "int8"), ("fp8", "int4"),
)  # fmt: skip
"""What the checkpoint stores, and what weights are quantised to."""


def allowed(stored: str, quant: str) -> float:
    """The share by which perplexity may grow: what is stored costs, and what is made of it.

    >>> allowed("plain", "int8"), round(allowed("fp8", "int4"), 4)
    (0.001, 0.009)
    """
    return COSTS[quant] + (COSTS["fp8"] if stored == "fp8" else 0.0)


def logits_of(folder: Path, engine: str, quant: str, out: Path) -> language.Logits:
    """Windows of ids to logits, of a checkpoint compiled for an engine."""
    options: dict[str, Any] = {"dtype": "fp32", "quant": quant, "max_context": language.WINDOW}
    if engine == "triton":
        options["backend_options"] = {"compile": False}
    if engine not in ONNX:
        return language.our_logits(dsc.compile(folder, backend=engine, **options))
    dsc.export(folder, out, onnx_ops=ONNX[engine], **options)
    sessions = opened(out)

    def run(part: torch.Tensor) -> torch.Tensor:
        rows = StockSession(out, len(part), sessions).prefill(part.tolist())
        return torch.as_tensor(np.stack(rows))

    return run


def run(engines: Sequence[str] = ENGINES, windows: int | None = None) -> list[dict[str, Any]]:
    """Perplexities of all cases on these engines."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(TEXT.read_text()).ids
    ways = [(engine, windows) for engine in engines]
    with tempfile.TemporaryDirectory() as place:
        folders = {"plain": TINY, "fp8": Path(place) / "fp8"}
        convert(TINY, folders["fp8"], "fp8")

        @cache
        def exact() -> float:
            return language.perplexity(language.stock_logits(TINY, torch.float32), ids, windows)

        def measure(
            stored: str, quant: str, left: Sequence[tuple[str, int | None]]
        ) -> Iterator[dict[str, Any]]:
            for engine, _ in left:
                out = Path(place) / f"{engine} {stored} {quant}"
                logits = logits_of(folders[stored], engine, quant, out)
                found = language.perplexity(logits, ids, windows)
                cost, most = found / exact() - 1, allowed(stored, quant)
                yield {
                    "stored": stored, "quant": quant, "engine": engine, "windows": windows,
                    "ok": cost <= most, "perplexity": round(found, 4),
                    "transformers": round(exact(), 4), "cost": float(f"{cost:.3g}"),
                    "allowed": most,
                }  # fmt: skip

        return measured(RESULTS, ("stored", "quant", "engine", "windows"), CASES, ways, measure)


def bar() -> dict[str, Any]:
    """FP8 costs 0.2% at most, int8 0.1%, int4 0.7%: ONNX Runtime, tvm, triton, the interpreter."""
    if not TEXT.is_file():
        return {"ok": None, "skipped": "the validation text is not beside this checkout"}
    found = [*run(), *run(["triton"], INTERPRETED)]
    told = {
        f"{each['engine']}: {each['stored']}, {each['quant']}": [
            each["perplexity"], each["cost"], each["allowed"],
        ]
        for each in found
    }  # fmt: skip
    return {"ok": all(each["ok"] for each in found), **told}


def main() -> None:
    """Measure, and print what does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engines", nargs="*", default=ENGINES)
    parser.add_argument("--windows", type=int)
    asked = parser.parse_args()
    found = run(asked.engines, asked.windows)
    for each in found:
        print(*(each[key] for key in ("engine", "stored", "quant", "perplexity", "cost")))
    tell(found)


if __name__ == "__main__":
    main()
