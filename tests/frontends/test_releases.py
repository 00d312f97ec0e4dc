"""Releases compile as they stand: their own keys, names, formats and leftovers, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dsc
from dsc.frontends.huggingface import load_checkpoint
from dsc.ir.formats import SCALE_FMT
from dsc.ir.types import DType
from tests.released import RELEASES, VOCABULARY, release

STEPS = 2
LENGTH = 19
ALIKE = ("DeepSeek-V3", "DeepSeek-V3.1", "GLM-4.7-Flash", "Youtu", "R1-Distill-Llama")
"""Releases of which others, or they themselves on tvm, show the same: run when asked for."""


@pytest.mark.parametrize(
    ("name", "backend"),
    [pytest.param(n, "reference", marks=[pytest.mark.exhaustive] if n in ALIKE else [])
     for n in RELEASES] + [("DeepSeek-V3.1", "tvm"), ("GLM-4.7-Flash", "tvm")],
)  # fmt: skip
def test_a_release_compiles_as_it_stands(name: str, backend: str, tmp_path: Path) -> None:
    small = release(name)
    (tmp_path / "model").mkdir()
    folder = small.write(tmp_path / "model")
    compiled = dsc.compile(
        folder, backend=backend, dtype="fp32", max_batch=2, max_context=32, prefill_chunk=8
    )
    session = compiled.session()
    ids = torch.randint(VOCABULARY, (2, LENGTH + STEPS), generator=torch.manual_seed(0))
    rows = [session.prefill(ids[:, :LENGTH], all_logits=True)]
    rows += [session.decode(ids[:, LENGTH + i])[:, None] for i in range(STEPS)]
    with torch.no_grad():
        expected = small.stock(input_ids=ids, use_cache=False).logits
    scale = max(1.0, float(expected.abs().max()))
    assert float((torch.cat(rows, 1) - expected).abs().max()) / scale < 1e-4
    trained = small.config.get("quantization_config", {}).get("scale_fmt")
    assert compiled.program.meta.get(SCALE_FMT) == trained
    assert compiled.manifest["generation"]["eos_token_id"] == small.ends
    notes = " ".join(compiled.report["notes"])
    assert ("(MTP)" in notes) == bool(small.further)
    assert ("never imported" in notes) == ("auto_map" in small.config)
    if "tokenizer_config" in RELEASES[name]:
        assert "tokenizer.json was made from tiktoken.model" in notes


def test_the_language_model_of_a_larger_release_is_read(tmp_path: Path) -> None:
    """Kimi-K2.5 and its like: the family in a section, its tensors under a prefix."""
    small = release("Kimi-K2")
    wrapper = {
        "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25",
        "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
        "text_config": small.config, "vision_config": {"model_type": "moonvit"},
        "quantization_config": None, "tie_word_embeddings": False,
    }  # fmt: skip
    tensors = {f"language_model.{name}": tensor for name, tensor in small.tensors.items()}
    tensors |= {f"vision_tower.blocks.{i}.wqkv.weight": torch.ones(3, 3) for i in range(2)}
    small.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    save_file(tensors, tmp_path / "model.safetensors")
    found = load_checkpoint(tmp_path, DType.f32)
    assert any("kimi_k25 the language model alone" in note for note in found.notes)
    state = found.load().state_dict()
    expected = small.stock.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
