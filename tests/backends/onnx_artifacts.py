"""Artifacts of the onnxruntime backend: written, opened, and called as their users call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch

from dsc import pipeline
from dsc.backends.base import EmitOptions
from dsc.backends.onnxruntime import OnnxRuntimeBackend
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.runtime import artifact
from dsc.runtime.executable import Executable
from dsc.runtime.session import Session
from dsc.targets import Target
from tests.backends.canonical_lm import Sizes, canonical_lm

BACKEND = OnnxRuntimeBackend()
PROMPT_LENGTHS = [9, 4, 6]


def prepared(dtype: DType, cache: str = "contiguous", tied: bool = False, **asked: Any) -> Program:
    """Return a small language model, as the pipeline leaves it for this backend."""
    options = pipeline.PipelineOptions(cache=cache, **asked)
    model = canonical_lm(Sizes(dtype=dtype, tied=tied))
    done, _ = pipeline.run(model, BACKEND, Target("cpu"), options)
    return done


def executable(program: Program, folder: Path, **options: Any) -> Executable:
    """Write a program's artifact, and load it."""
    emission = BACKEND.emit(program, EmitOptions(threads=1, extra=options))
    artifact.write(folder, program, emission, backend="onnxruntime", targets=("cpu",), report={})
    return loaded(folder)


def loaded(folder: Path) -> Executable:
    """Load an artifact."""
    opened = artifact.read(folder)
    return BACKEND.load(folder, opened.manifest, opened.program)


def drawn_ids(*shape: int) -> torch.Tensor:
    """Return seeded tokens."""
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(sum(shape)))


def conversation(runs: Executable, program: Program) -> list[torch.Tensor]:
    """Return the logits of a ragged prompt, two decode steps, and a second prompt."""
    session = Session(runs, program, max_batch=4, max_context=60)
    steps = [session.prefill(drawn_ids(3, 9), PROMPT_LENGTHS)]
    steps += [session.decode(drawn_ids(3)), session.decode(drawn_ids(3) + 1)]
    steps.append(session.prefill(drawn_ids(3, 30), [30, 1, 12]))
    return [step.float() for step in steps]


def stock_session(path: Path, options: Any = None) -> Any:
    """Return a session of an ONNX model as ONNX Runtime alone opens it, on the CPU."""
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
