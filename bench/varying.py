"""The README's attention function at sizes that vary, in one process: what each call takes.

    python -m bench.varying [--backend NAME]

Batch and queries of one come back after larger ones, and either the features vary as well (self) or
queries and keys do (crossed). The first call compiles for its sizes, the second for all; none after
it should wait for a compiler.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor

import dsc

SIZES = [(1, 4, 16, 16), (2, 4, 33, 70), (3, 4, 7, 129), (1, 4, 1, 500), (2, 4, 64, 64)]
WIDTH = 32


def attention_layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in the README."""
    scores = dsc.matmul(q, k.transpose(-2, -1)) / (q.shape[-1] ** 0.5)
    return dsc.softmax(scores, dim=-1) @ v


def measured(crossed: bool, backend: str | None = None) -> dict[str, object]:
    """Seconds of each call, the largest error against eager, and the recompiles."""
    function = dsc.optimize(memory_reuse=True, fusion_level=3, backend=backend)(attention_layer)
    seconds, errors = [], []
    for batch, heads, new, last in SIZES:
        total, width = (last, WIDTH) if crossed else (new, last)
        q = torch.randn(batch, heads, new, width)
        k, v = (torch.randn(batch, heads, total, width) for _ in range(2))
        start = time.perf_counter()
        found = function(q, k, v)
        seconds.append(time.perf_counter() - start)
        errors.append(float((found - attention_layer(q, k, v)).abs().max()))
    recompiles = len(dsc.explain(function).recompiles)
    return {"seconds": seconds, "error": max(errors), "recompiles": recompiles}


def main() -> None:
    """Both readings of the sizes, as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend")
    backend = parser.parse_args().backend
    torch.set_grad_enabled(False)
    found = {}
    for name, crossed in (("self", False), ("crossed", True)):
        torch._dynamo.reset()
        found[name] = measured(crossed, backend)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
