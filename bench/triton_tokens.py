"""Tokens of tiny-v3 in codes, wholly through triton's kernels, which are interpreted here.

A prompt in two steps and 32 steps of one token, as the checkpoint is and as FP8 in blocks of
128 x 128, by what weights are quantised to and what caches are kept in. At each step the logits are
held against the reference backend's over the same tokens, which are the reference's greedy ones:
where its margin between the two best is ten times what the typical step's is off by, the token must
be the same. What is left out is counted, and half of them at most. In bf16 a router at a tie may
choose another expert, so the largest error of any logit is told and fails nothing.

    python -m bench.triton_tokens [--steps N]

What was measured at this commit is read back from bench/out/triton_tokens.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import dsc
from bench.results import OUT, measured, tell
from bench.tiny import TINY
from dsc.frontends.convert import convert

RESULTS = OUT / "triton_tokens.jsonl"
STEPS, PROMPT = 32, 20
MARGIN = 10
"""Of the typical step's error of it, what the two best tokens must be apart by."""
CASES = (
    ("plain", "none", "bf16", "bf16"), ("fp8", "none", "bf16", "bf16"),
    ("plain", "fp8", "bf16", "fp8"), ("fp8", "fp8", "fp32", "fp8"),
    ("plain", "int8", "bf16", "int8"), ("plain", "int4", "bf16", "fp8"),
    ("plain", "int4", "fp32", "bf16"),
)  # fmt: skip
"""What the checkpoint stores, what weights are quantised to, the compute type, and the caches."""


def tokens(folder: Path, quant: str, dtype: str, kept: str, steps: int) -> dict[str, Any]:
    """How often the greedy token is the same, and how far logits are apart."""
    asked: dict[str, Any] = {"quant": quant, "dtype": dtype, "cache_format": kept}
    asked |= {"max_context": 64, "max_batch": 1, "prefill_chunk": 16}
    without = {"compile": False}
    ours = dsc.compile(folder, backend="triton", backend_options=without, **asked).session(1)
    reference = dsc.compile(folder, backend="reference", **asked).session(1)
    ids = torch.randint(2048, (1, PROMPT), generator=torch.Generator().manual_seed(3))
    found, wanted = ours.prefill(ids).float(), reference.prefill(ids).float()
    errors, off, pairs = [], 0.0, []
    for _ in range(steps):
        best = wanted[0].topk(2)
        first, second = best.indices.tolist()
        margin = float(wanted[0, first] - wanted[0, second])
        errors.append(abs(float(found[0, first] - found[0, second]) - margin))
        off = max(off, float((found - wanted).abs().max()))
        pairs.append((int(found[0].argmax()), first, margin))
        following = best.indices[:1]
        found = ours.decode(following).float()
        wanted = reference.decode(following).float()
    same = [a == b for a, b, _ in pairs]
    typical = median(errors)
    told = [a == b for a, b, margin in pairs if margin > MARGIN * typical]
    ok = all(told) and 2 * len(told) >= steps
    error = {"error": float(f"{typical:.3g}"), "largest": float(f"{off:.3g}")}
    return {"ok": ok, "same": sum(same), "compared": len(told)} | error


def run(steps: int = STEPS) -> list[dict[str, Any]]:
    """All cases."""
    with tempfile.TemporaryDirectory() as place:
        folders = {"plain": TINY, "fp8": Path(place) / "fp8"}
        convert(TINY, folders["fp8"], "fp8")

        def measure(
            stored: str, quant: str, dtype: str, kept: str, left: Sequence[int]
        ) -> Iterator[dict[str, Any]]:
            for count in left:
                case = {"stored": stored, "quant": quant, "dtype": dtype, "cache": kept}
                found = tokens(folders[stored], quant, dtype, kept, count)
                yield case | {"steps": count} | found

        names = ("stored", "quant", "dtype", "cache", "steps")
        return measured(RESULTS, names, CASES, [steps], measure)


def bar() -> dict[str, Any]:
    """Greedy tokens through triton's kernels are the reference's where they are no near-ties."""
    found = run()
    told = {
        " ".join(str(each[name]) for name in ("stored", "quant", "dtype", "cache")): each["same"]
        for each in found
    }
    return {"ok": all(each["ok"] for each in found), **told}


def main() -> None:
    """Measure, and print what does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=STEPS)
    found = run(parser.parse_args().steps)
    for each in found:
        print(*each.values())
    tell(found)


if __name__ == "__main__":
    main()
