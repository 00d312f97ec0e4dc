"""What was loaded is what was on disk then: a folder that is replaced changes nothing loaded."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsc
from dsc import backends
from dsc.api import CompiledModel
from dsc.errors import ArtifactError
from dsc.ir.parser import parse_program
from dsc.ir.weights import random_source, sources
from tests.run_module import run_module

BACKENDS = (
    "reference",
    "onnxruntime",
    "tvm",
    pytest.param("triton", marks=pytest.mark.exhaustive),  # ten CPU seconds of its interpreter
)
PLACE = tempfile.TemporaryDirectory(prefix="dsc-replaced-")
TEXT = (Path(__file__).resolve().parent.parent / "data" / "small_lm.dsc").read_text()
OTHER = TEXT.replace("eps=1e-06", "eps=0.5").replace("scale=0.5", "scale=3.0")
"""The same sizes and weights, but other numbers in the kernels."""
PROMPT = torch.tensor([[5, 3, 8, 1]])


@cache
def compiled(text: str, backend: str) -> Path:
    """The artifact of a program, compiled once; each text has weights of its own."""
    keys = {s.key: s.type for e in parse_program(text).weights.values() for s in sources(e)}
    program = parse_program(text, random_source(keys, len(text)))
    options = {"compile": False} if backend == "triton" else None
    model = dsc.compile(
        program, backend=backend, max_context=32, prefill_chunk=8, backend_options=options
    )
    return model.save(Path(PLACE.name) / backend / ("other" if text == OTHER else "text"))


def saved(text: str, backend: str, out: Path) -> None:
    """The artifact of a program in `out`, in the place of what was there."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(compiled(text, backend), out)


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
    saved(OTHER, backend, out)
    second = numbers(dsc.load(out))
    went_on = torch.cat([start, session.decode([2])])
    alone = numbers(dsc.load(twin))
    assert torch.equal(went_on, alone), "the live session took numbers of the new folder"
    saved(OTHER, "reference", tmp_path / "other")
    other = numbers(dsc.load(tmp_path / "other"))
    torch.testing.assert_close(second, other, rtol=0, atol=1e-4)
    assert (other - alone).abs().max() > 1e-2, "the two models must differ"


@pytest.mark.parametrize("backend", ["onnxruntime", "tvm"])
def test_run_py_is_the_code_of_the_folder_that_it_opened(backend: str, tmp_path: Path) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    alone = {text: stepped(model_of(compiled(text, backend))) for text in (TEXT, OTHER)}
    out = tmp_path / "out"
    saved(TEXT, backend, out)
    first = model_of(out)
    assert np.array_equal(stepped(first), alone[TEXT])
    saved(OTHER, backend, out)
    assert np.array_equal(stepped(model_of(out)), alone[OTHER])
    assert np.array_equal(stepped(first), alone[TEXT])
    assert not np.array_equal(alone[TEXT], alone[OTHER]), "the two models must differ"


def model_of(folder: Path) -> Any:
    """The `Model` of a folder's run.py."""
    return run_module(folder).Model(folder)


def stepped(model: Any) -> np.ndarray[Any, Any]:
    """Logits of the prompt's last token, by the model's own `step`."""
    ids = PROMPT.numpy()
    found: np.ndarray[Any, Any] = model.step(
        ids, np.arange(ids.size)[None], np.zeros(1, np.int64), np.array([[ids.size - 1]])
    )
    return found


def test_a_folder_replaced_between_opening_and_running_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    saved(TEXT, "reference", out)
    model = dsc.load(out)
    saved(OTHER, "reference", out)
    with pytest.raises(ArtifactError, match="was replaced after it was opened"):
        model.session(1)


def test_a_folder_replaced_while_its_code_is_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    saved(TEXT, "reference", out)
    model = dsc.load(out)
    kind = type(backends.get("reference"))
    load = kind.load

    def replacing(*args: Any) -> Any:
        found = load(*args)
        saved(OTHER, "reference", out)
        return found

    monkeypatch.setattr(kind, "load", replacing)
    with pytest.raises(ArtifactError, match="was replaced after it was opened"):
        model.session(1)
