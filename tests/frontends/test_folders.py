"""Folders as transformers saves them compile by their `model_type`, and compute what stock does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dsc
from dsc.errors import UnsupportedArchitecture, UsageError
from dsc.ir.safetensors import SafetensorsSource
from tests.decoders import PLAIN, decoder, ids

TOLERANCE = 1e-4
LIMITS: dict[str, Any] = {"max_batch": 2, "max_context": 48, "prefill_chunk": 8}


def saved(name: str, folder: Path, **changes: Any) -> Any:
    """Save a small decoder with random weights; the stock model."""
    model: Any = decoder(name, **changes)
    model.save_pretrained(folder)
    return model


def assert_equals_stock(compiled: dsc.CompiledModel, model: Any) -> None:
    """A prefill in chunks of two sequences of different lengths, and two steps after it."""
    tokens = ids(2, 14)
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False).logits
    session = compiled.session()
    first = torch.as_tensor(session.prefill(tokens[:, :11], lengths=[11, 6]))
    found = [first, torch.as_tensor(session.decode(torch.stack([tokens[0, 11], tokens[1, 6]])))]
    for step, logits in enumerate(found):
        for row, length in enumerate((11, 6)):
            expected = wanted[row, length - 1 + step]
            bound = TOLERANCE * max(1.0, float(expected.abs().max()))
            assert float((logits[row].flatten() - expected).abs().max()) <= bound, (step, row)


@pytest.mark.parametrize("name", ["mixtral", "gemma2", "deepseek_v3", "gpt2"])
def test_a_saved_decoder_compiles(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    compiled = dsc.compile(tmp_path, backend="reference", dtype="fp32", **LIMITS)
    assert_equals_stock(compiled, model)
    assert compiled.manifest["config"]["vocab_size"] == 97
    ends = getattr(model.config, "eos_token_id", None)
    assert compiled.manifest["generation"]["eos_token_id"] == ([] if ends is None else [ends])


def test_the_text_tower_of_a_larger_model_compiles(tmp_path: Path) -> None:
    """Its configuration is a section, its tensors lie under a prefix, and others beside them."""
    from safetensors.torch import load_file, save_file

    model = saved("qwen3", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {f"language_model.{name}": t for name, t in load_file(file).items()}
    save_file(tensors | {"vision_tower.weight": torch.zeros(2, 2)}, file)
    tower = json.loads((tmp_path / "config.json").read_text())
    wrapper = {"model_type": "llava", "text_config": tower, "vision_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    compiled = dsc.compile(tmp_path, backend="reference", dtype="fp32", **LIMITS)
    assert_equals_stock(compiled, model)
    assert any("vision_tower" in note for note in compiled.report["notes"])


READER = """
import sys
from dsc.frontends.load import load_program
loaded = load_program(sys.argv[1], max_context=48)
known = {'torch', 'transformers', 'dsc.frontends.causal_lm'} & {*sys.modules}
print(len(loaded.program.weights), loaded.program.meta["config"]["vocab_size"], known)
"""


def test_a_kept_trace_of_any_type_needs_neither_torch_nor_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    saved("mixtral", tmp_path / "model")
    told = [
        subprocess.run(
            [sys.executable, "-c", READER, str(tmp_path / "model")],
            stdout=subprocess.PIPE, check=True, text=True,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert "torch" in told[0]
    assert told[1] == told[0].partition("{")[0] + "set()\n"


REFUSED: dict[str, tuple[dict[str, Any], type[dsc.DscError], str]] = {
    "an encoder": ({"model_type": "bert"}, UnsupportedArchitecture, "it is an encoder"),
    "fewer positions": (
        {"model_type": "gpt2", "n_positions": 16, "max_position_embeddings": None}, UsageError,
        "16 positions .n_positions in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused_before_weights_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, error, why = REFUSED[name]
    saved("llama", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | changes))
    monkeypatch.setattr(SafetensorsSource, "array", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(error, match=why):
        dsc.compile(tmp_path, backend="reference", **LIMITS)
