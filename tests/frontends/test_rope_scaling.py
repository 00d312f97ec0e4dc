"""A context is extended by the model's own scaling, or by one that is chosen, and no further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dsc
from dsc.errors import ConfigError, UsageError
from dsc.frontends.load import load_program
from dsc.frontends.rope_scaling import RopeScaling, own_scaling, reach
from dsc.frontends.stock import clean, stock_model
from tests.decoders import CONFIGS, cleaned, decoder, ids

LLAMA: dict[str, Any] = {"model_type": "llama", **CONFIGS["llama"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved llama of 64 positions."""
    place = tmp_path_factory.mktemp("llama")
    saved: Any = decoder("llama")
    saved.save_pretrained(place)
    return place


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3"])
def test_a_chosen_scaling_is_the_section_that_one_would_write(kind: str) -> None:
    chosen = clean(LLAMA | {"rope_theta": 5000.0}, scaling=RopeScaling(kind, 4.0))
    section: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 5000.0}
    section["original_max_position_embeddings"] = 64
    if kind == "llama3":
        section |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    written = LLAMA | {"rope_parameters": section, "max_position_embeddings": 256}
    assert chosen.facts.positions == 256
    tables = []
    for config in (chosen, clean(written), clean(LLAMA)):
        model: Any = stock_model(config, device="cpu")
        tables.append(model.model.rotary_emb.inv_freq)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_what_a_model_scales_itself_is_its_own() -> None:
    named = LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0}}
    with pytest.raises(ConfigError, match=r"scales its positions itself \(yarn\)"):
        clean(named, scaling=RopeScaling("yarn", 4.0))
    layers = {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}
    with pytest.raises(ConfigError, match="one for each of full_attention, sliding_attention"):
        clean(LLAMA | {"rope_parameters": layers}, scaling=RopeScaling("yarn", 4.0))
    assert own_scaling({"rope_parameters": {"rope_theta": 1e4}}) == ""


def test_a_model_without_rotary_embedding_cannot_be_scaled() -> None:
    config = clean({"model_type": "gpt2", **CONFIGS["gpt2"]}, scaling=RopeScaling("yarn", 2.0))
    with pytest.raises(ConfigError, match="no rotary embedding"):
        stock_model(config)


@pytest.mark.parametrize("text", ["yarn", "yarn:1", "yarn:nan", "longrope:2", "dynamic:2", "4"])
def test_what_is_no_scaling_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"no rope scaling that|scales by no factor"):
        RopeScaling.parse(text)


@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        ({"rope_parameters": YARN}, 256),
        ({"rope_scaling": {"type": "yarn", "factor": 2.5}, "rope_theta": 1.0}, 0),
        ({"rope_scaling": YARN | {"rope_type": "longrope"}}, 0),
        ({"rope_parameters": YARN | {"factor": True, "rope_type": "x"}}, 0),
        ({"rope_parameters": {"full": YARN, "sliding": {"rope_type": "default"}}}, 256),
        ({}, 0),
    ],
)
def test_own_scalings_reach_so_far(values: dict[str, Any], tokens: int) -> None:
    assert reach(values) == tokens


def test_positions_are_what_is_trained_for_or_reached() -> None:
    assert cleaned("llama", rope_parameters=YARN).facts.positions == 256
    assert (
        cleaned("llama", rope_parameters=YARN, max_position_embeddings=999).facts.positions == 999
    )


def test_a_context_beyond_the_models_needs_a_scaling(folder: Path) -> None:
    with pytest.raises(UsageError, match="beyond the model's 64 positions") as refused:
        load_program(folder, max_context=65)
    assert "--rope-scaling yarn:N" in str(refused.value)
    with pytest.raises(UsageError, match="beyond the model's 128 positions"):
        load_program(folder, max_context=129, rope_scaling="yarn:2")
    with pytest.raises(UsageError, match="this is none"):
        load_program("tiny", rope_scaling="yarn:2")


def test_an_extended_model_is_the_stock_one_with_that_section(folder: Path) -> None:
    """Logits of 100 tokens, 36 beyond what the folder says."""
    compiled = dsc.compile(folder, backend="reference", rope_scaling="yarn:2", max_context=100)
    assert compiled.program.meta["rope_scaling"] == "yarn:2"
    assert any("scaled by yarn:2, to 128" in note for note in compiled.report["notes"])
    tokens = ids(1, 100)
    session = compiled.session(max_batch=1)
    found = torch.as_tensor(session.prefill(tokens, all_logits=True))
    section = YARN | {"factor": 2.0, "rope_theta": 10000.0}
    model: Any = decoder("llama", rope_parameters=section, max_position_embeddings=128)
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 64
