"""What one rank does in the tests of several: run as `python -m tests.runtime.ranks TASK`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

import dsc
from dsc.errors import DscError
from dsc.ir.ranks import current

PROMPT = list(range(20, 43))
NEXT = [7, 300, 1999, 42]


def steps(model: dsc.CompiledModel) -> torch.Tensor:
    """Logits [23 + 4, vocab] of a prompt and four forced decode steps."""
    session = model.session(max_batch=1, max_context=64)
    rows = [session.prefill(torch.tensor([PROMPT]), all_logits=True)[0]]
    rows += [session.decode(torch.tensor([token])) for token in NEXT]
    return torch.cat(rows)


def logits(artifact: str, out: str) -> None:
    """Save this rank's logits to `out`/RANK.npy."""
    found = steps(dsc.load(artifact, trust=True))
    np.save(Path(out) / f"{current().rank}.npy", found.numpy())


def forever(artifact: str) -> None:
    """Decode until stopped, saying so after the first steps."""
    session = dsc.load(artifact, trust=True).session(max_batch=1, max_context=500)
    session.prefill(torch.tensor([PROMPT]))
    for step in range(400):
        session.decode(torch.tensor([step]))
        if step == 2:
            print("decoding", flush=True)
        time.sleep(0.05)


if __name__ == "__main__":
    try:
        if sys.argv[1] == "logits":
            logits(*sys.argv[2:])
        else:
            forever(*sys.argv[2:])
    except DscError as problem:
        sys.exit(f"dsc: {problem}")
