"""A compiler that compiles nothing, so that the verbs are tested apart from what they call."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

import dsc
from dsc.cli import build_app
from dsc.ir.parser import parse_program
from dsc.runtime import probes

VOCAB = 16
SMALL_LM = Path(__file__).resolve().parent.parent / "data" / "small_lm.dsc"
GENERATION = {"eos_token_id": [7], "do_sample": True, "top_p": 0.9, "stop_strings": ["###"]}
"""What the fake artifact's manifest says of texts; the fake model's own is greedy."""
Invoke = Callable[..., Result]


class CountingSession:
    """After token t the likeliest token is t + 1 (modulo the vocabulary)."""

    def __init__(self, max_batch: int = 1, max_context: int = 64) -> None:
        self.max_batch, self.max_context = max_batch, max_context
        self.last: dict[int, int] = {}

    def prepare(self, prompts: Sequence[int]) -> None:
        """Nothing is opened late."""

    def add(self, ids: NDArray[np.int64]) -> int:
        """Start a sequence with a prompt [S]; its id."""
        assert len(self.last) < self.max_batch
        sequence = max(self.last, default=0) + 1
        self.last[sequence] = int(ids[-1])
        return sequence

    def remove(self, sequence: int) -> None:
        """End a sequence."""
        del self.last[sequence]

    def logits(self, sequence: int) -> NDArray[np.float32]:
        """Return logits [vocab]."""
        row: NDArray[np.float32] = np.eye(VOCAB, dtype=np.float32)[
            (self.last[sequence] + 1) % VOCAB
        ]
        return row

    def prefill(self, ids: NDArray[np.int64], all_logits: bool = False) -> NDArray[np.float32]:
        """Return logits [B, S, vocab], or of the last position [B, vocab]."""
        logits = np.eye(VOCAB, dtype=np.float32)[(ids + 1) % VOCAB]
        return logits if all_logits else logits[:, -1]

    def decode(self, next_ids: Any) -> Any:
        """Return logits [B, vocab], or [vocab] by sequence."""
        if not isinstance(next_ids, dict):
            return self.prefill(next_ids[:, None])
        self.last |= next_ids
        return {sequence: self.logits(sequence) for sequence in next_ids}


class LetterTokenizer:
    """Token i is the i-th letter of the alphabet."""

    def encode(self, text: str) -> SimpleNamespace:
        """Number the letters."""
        return SimpleNamespace(ids=[(ord(c) - ord("a")) % VOCAB for c in text])

    def decode(self, ids: Sequence[int]) -> str:
        """Spell the numbers."""
        return "".join(chr(ord("a") + i) for i in ids)

    def token_to_id(self, token: str) -> int | None:
        """The number of a letter."""
        return ord(token) - ord("a") if len(token) == 1 else None


class CountingModel:
    """What the fake `compile` and `load` return."""

    targets: tuple[str, ...] = ("cpu",)
    limits = (2, 64)

    def __init__(self, backend: str = "reference") -> None:
        self.backend = backend
        self.source = "somewhere"
        self._files: dict[str, bytes] = {}
        self.report: dict[str, Any] = {"passes": []}
        self.tokenizer = LetterTokenizer()
        self.sessions: list[tuple[int, int]] = []
        self.max_batch, self.max_context = self.limits
        self.manifest: dict[str, Any] = {
            "config": {"vocab_size": VOCAB},
            "generation": {"eos_token_id": [7]},
        }
        self.executable: object = None
        self.program = parse_program(SMALL_LM.read_text())

    def session(self, max_batch: int, max_context: int) -> CountingSession:
        """Open a session and note its bounds."""
        self.sessions.append((max_batch, max_context))
        return CountingSession(max_batch, max_context)

    def save(self, path: Path, force: bool = False, progress: object = None) -> None:
        """Write the least that the verbs read."""
        path.mkdir(parents=True, exist_ok=force)
        manifest = {"config": {"vocab_size": VOCAB}, "generation": GENERATION, "files": {}}
        (path / "dsc.json").write_text(json.dumps(manifest | {"limits": {"max_context": 64}}))
        (path / "program.dsc").write_text("the program")
        (path / "report.json").write_text("{}")
        (path / "null").mkdir(exist_ok=True)
        (path / "null" / "kernel.txt").write_text("nothing")


class FakeApi:
    """Stands in for `dsc.api` and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.loaded: list[dict[str, Any]] = []
        self.model = CountingModel()

    def compile(self, model: str, **options: Any) -> CountingModel:
        """Remember the options; write one dump where they ask for it."""
        self.asked.append({"model": model, **options})
        if "dump_dir" in options:
            for number, name in enumerate(("raise_mla", "absorb_mla")):
                (options["dump_dir"] / f"{number:02}-{name}.dsc").write_text(f"after {name}\n")
        return CountingModel(options.get("backend") or "reference")

    def best_backend(self) -> SimpleNamespace:
        """What is taken where no backend is named."""
        return SimpleNamespace(name="reference")

    def load(self, path: Path, trust: bool = False, **options: Any) -> CountingModel:
        """Remember the path and the options."""
        self.loaded.append({"path": path, "trust": trust, **options})
        return self.model


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """Put the fake in the place of `dsc.api`; the machine's speed is read in no time."""
    fake = FakeApi()
    monkeypatch.setattr(probes, "MATRIX", (32, 64, 64))
    monkeypatch.setattr(probes, "READ_BYTES", 1 << 22)
    monkeypatch.setattr(dsc, "api", fake, raising=False)
    return fake


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Return a folder that the verbs take for an artifact."""
    CountingModel().save(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def invoke() -> Invoke:
    """Run a verb in this process; an exception that escapes it escapes here."""

    def run(*arguments: str, typed: bytes | None = None) -> Result:
        return CliRunner().invoke(build_app(), list(arguments), typed, catch_exceptions=False)

    return run
