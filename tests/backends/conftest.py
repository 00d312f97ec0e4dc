"""Artifacts that tests of several files read, made once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dsc.ir.program import Program


@pytest.fixture(scope="session")
def lm() -> Program:
    """Return a small language model in fp32, as the pipeline leaves it for onnxruntime."""
    from dsc.ir.types import DType
    from tests.backends.onnx_artifacts import prepared

    return prepared(DType.f32)


@pytest.fixture(scope="session")
def exported(lm: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return its artifact, which nobody changes."""
    from tests.backends.onnx_artifacts import executable

    out = tmp_path_factory.mktemp("lm") / "artifact"
    executable(lm, out)
    return out
