"""An exported folder run as its README.md says, by ONNX Runtime and NumPy alone.

Nothing here imports dsc, so what is compared with transformers is what other people's code computes
with an export: a session of each model with ONNX Runtime's defaults, chosen by the number of new
tokens, and caches that go from step to step as they come.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class StockSession:
    """A batch of sequences over an export's models, of which it has one session each."""

    def __init__(self, folder: Path, batch: int = 1, sessions: dict[int, Any] | None = None):
        self.sessions = opened(folder) if sessions is None else sessions
        general = self.sessions[max(self.sessions)]
        self._names = [x.name for x in general.get_outputs()]
        self.caches = {
            x.name: np.zeros((batch, 0, *x.shape[2:]), TYPES[x.type])
            for x in general.get_inputs() if x.name.startswith("past.")
        }  # fmt: skip
        self.lengths = np.zeros(batch, np.int64)

    def prefill(self, rows: Sequence[Sequence[int]], chunk: int | None = None) -> list[Logits]:
        """Logits [S, vocab] of each sequence's prompt, so many tokens a step at most."""
        chunk = chunk or max(self.sessions)
        parts: list[list[Logits]] = [[] for _ in rows]
        for start in range(0, max(map(len, rows)), chunk):
            step = [row[start : start + chunk] for row in rows]
            for found, new, logits in zip(parts, step, self.step(step), strict=True):
                found.append(logits[: len(new)])
        return [np.concatenate(found) for found in parts]

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Logits [B, vocab] after one more token of each sequence."""
        return self.step([[int(token)] for token in tokens])[:, 0]

    def step(self, rows: Sequence[Sequence[int]]) -> Logits:
        """Logits [B, S, vocab] of all new tokens; shorter rows, none even, are padded."""
        new = np.array([len(row) for row in rows])
        most = int(new.max())
        ids = np.array([[*row, *[0] * (most - len(row))] for row in rows], np.int64)
        feeds = {
            "input_ids": ids, "positions": self.lengths[:, None] + np.arange(most),
            "lengths": self.lengths, "logits_at": np.tile(np.arange(most), (len(rows), 1)),
        }  # fmt: skip
        session = next(self.sessions[size] for size in sorted(self.sessions) if most <= size)
        found = dict(zip(self._names, session.run(self._names, feeds | self.caches), strict=True))
        self.lengths = self.lengths + new
        held = int(self.lengths.max())
        self.caches = {
            name: np.ascontiguousarray(found[name.replace("past", "present")][:, :held])
            for name in self.caches
        }
        logits: Logits = found["logits"].astype(np.float32)
        return logits


def opened(folder: Path) -> dict[int, Any]:
    """A session of each model, by the most new tokens of a step, as example.py has them."""
    import onnxruntime

    found = re.search(r"^MODELS = (\{.*\})", (folder / "example.py").read_text(), re.MULTILINE)
    assert found is not None, "example.py names no models"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return {
        most: onnxruntime.InferenceSession(
            str(folder / path), options, providers=["CPUExecutionProvider"]
        )
        for most, path in ast.literal_eval(found[1]).items()
    }  # fmt: skip


def greedy(session: StockSession, ids: Sequence[int], count: int) -> tuple[list[int], Logits]:
    """`count` likeliest tokens after a prompt, and the logits [count, vocab] that chose them."""
    (prompt,) = session.prefill([ids])
    rows, made = [prompt[-1]], [int(prompt[-1].argmax())]
    while len(made) < count:
        rows.append(session.decode(made[-1:])[0])
        made.append(int(rows[-1].argmax()))
    return made, np.stack(rows)
