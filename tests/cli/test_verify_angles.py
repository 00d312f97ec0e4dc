"""`dsc verify` compares with a source whose positions turn by the angles that were compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

import dsc
from bench.parity import randomise
from dsc.frontends.stock import clean, stock_model
from tests.cli.conftest import Invoke
from tests.decoders import CONFIGS
from tests.frontends.test_longrope import FIRST, config

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a chosen scaling": ("llama", {"rope_scaling": "yarn:2", "max_context": 100}),
    "angles for short texts": ("phi3", {"max_context": FIRST}),
    "angles for long texts": ("phi3", {"max_context": FIRST + 1}),
}


@pytest.mark.parametrize(
    ("case", "against"),
    [
        ("a chosen scaling", "reference"),
        ("a chosen scaling", "hf"),
        ("angles for short texts", "reference"),
        ("angles for long texts", "hf"),
        pytest.param("angles for short texts", "hf", marks=pytest.mark.exhaustive),
        pytest.param("angles for long texts", "reference", marks=pytest.mark.exhaustive),
    ],
)
def test_the_source_has_the_angles_of_the_artifact(
    case: str, against: str, invoke: Invoke, tmp_path: Path
) -> None:
    name, options = CASES[case]
    raw = {"model_type": name} | CONFIGS[name] if name in CONFIGS else config(name)
    model: Any = randomise(stock_model(clean(raw), device="cpu"))
    model.generation_config = GenerationConfig()
    model.save_pretrained(tmp_path / "model")
    made = dsc.compile(tmp_path / "model", backend="reference", **options)
    made.save(tmp_path / "out")
    done = invoke("verify", str(tmp_path / "out"), "--against", against, "--tokens", "12")
    assert done.exit_code == 0, done.output
