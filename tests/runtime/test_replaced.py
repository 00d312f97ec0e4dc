"""What was loaded is what was on disk then: a folder that is replaced changes nothing loaded."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import dsc
from dsc.api import CompiledModel
from dsc.errors import ArtifactError
from dsc.ir.parser import parse_program
from dsc.ir.weights import random_source, sources

BACKENDS = ("reference", "onnxruntime", "tvm", "triton")
TEXT = (Path(__file__).resolve().parent.parent / "data" / "small_lm.dsc").read_text()
OTHER = TEXT.replace("eps=1e-06", "eps=0.5").replace("scale=0.5", "scale=3.0")
"""The same sizes and weights, but other numbers in the kernels."""
PROMPT = torch.tensor([[5, 3, 8, 1]])


def saved(text: str, backend: str, out: Path, seed: int = 0, force: bool = False) -> None:
    """Compile a program with weights of a seed to a folder."""
    keys = {s.key: s.type for e in parse_program(text).weights.values() for s in sources(e)}
    program = parse_program(text, random_source(keys, seed))
    options = {"compile": False} if backend == "triton" else None
    dsc.compile(
        program, backend=backend, max_context=32, prefill_chunk=8, backend_options=options
    ).save(out, force)


def numbers(model: CompiledModel) -> torch.Tensor:
    """Logits of a prompt and of the token after it."""
    session = model.session(1)
    return torch.cat([session.prefill(PROMPT), session.decode([2])])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replaced_folder_is_new_code_and_a_live_session_keeps_its_own(
    backend: str, tmp_path: Path
) -> None:
    if find_spec({"reference": "torch"}.get(backend, backend)) is None:
        pytest.skip(f"{backend} is not installed")
    out, twin = tmp_path / "out", tmp_path / "twin"
    saved(TEXT, backend, out)
    shutil.copytree(out, twin)
    first = dsc.load(out)
    session = first.session(1)
    start = session.prefill(PROMPT)
    saved(OTHER, backend, out, seed=1, force=True)
    second = numbers(dsc.load(out))
    went_on = torch.cat([start, session.decode([2])])
    alone = numbers(dsc.load(twin))
    assert torch.equal(went_on, alone), "the live session took numbers of the new folder"
    saved(OTHER, "reference", tmp_path / "other", seed=1)
    other = numbers(dsc.load(tmp_path / "other"))
    torch.testing.assert_close(second, other, rtol=0, atol=1e-4)
    assert (other - alone).abs().max() > 1e-2, "the two models must differ"


def test_a_folder_replaced_between_opening_and_running_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    saved(TEXT, "reference", out)
    model = dsc.load(out)
    saved(OTHER, "reference", out, force=True)
    with pytest.raises(ArtifactError, match="was replaced after it was opened"):
        model.session(1)
