"""The first call of a function of attention in a new process that has imported torch.

    python -m bench.first_call [ROUNDS]

In turns: Inductor with an empty cache, dsc with an empty cache, dsc with what that left. Seconds
from the import of dsc, or the decoration, to the result; and processor seconds of the process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

_COMPILED = "import dsc.frontends.calls, dsc.api, dsc.backends.tvm.executable"
"""What has Python keep its own code of ours, as it does for packages."""
KINDS = ("inductor", "dsc", "dsc kept")


def measure(rounds: int) -> dict[str, Any]:
    """The medians of each kind, and the ratio to Inductor's within a round."""
    seconds: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    own = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", _COMPILED], env=own, check=True)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as fresh:
            places = {"XDG_CACHE_HOME": fresh, "TORCHINDUCTOR_CACHE_DIR": f"{fresh}/inductor"}
            for kind in KINDS:
                done = subprocess.run(
                    [sys.executable, "-m", "bench.first_call", "--", kind.partition(" ")[0]],
                    env={**own, **places}, capture_output=True, text=True, check=True,
                )  # fmt: skip
                seconds[kind].append(json.loads(done.stdout))
    wall = {kind: [each[0] for each in found] for kind, found in seconds.items()}
    ratios = [mine / theirs for mine, theirs in zip(wall["dsc"], wall["inductor"], strict=True)]
    return {
        "wall": {kind: round(statistics.median(found), 3) for kind, found in wall.items()},
        "processor": {
            kind: round(statistics.median(each[1] for each in found), 3)
            for kind, found in seconds.items()
        },
        "ratio": round(statistics.median(ratios), 3),
    }


def first_call(kind: str) -> list[float]:
    """Seconds and processor seconds of the first call in this process."""
    import torch

    q, k, v = torch.randn(3, 2, 8, 64, 64)
    start, spent = time.perf_counter(), time.process_time()
    if kind == "dsc":
        import dsc

        @dsc.optimize(memory_reuse=True, fusion_level=3)
        def attention_layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            scores = dsc.matmul(q, k.transpose(-2, -1)) / (q.shape[-1] ** 0.5)
            return dsc.softmax(scores, dim=-1) @ v
    else:

        @torch.compile
        def attention_layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            scores = torch.matmul(q, k.transpose(-2, -1)) / (q.shape[-1] ** 0.5)
            return torch.softmax(scores, dim=-1) @ v

    attention_layer(q, k, v)
    return [time.perf_counter() - start, time.process_time() - spent]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--"]:
        print(json.dumps(first_call(sys.argv[2])))
    else:
        print(json.dumps(measure(int(sys.argv[1]) if sys.argv[1:] else 5)))
