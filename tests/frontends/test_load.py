"""Whatever can be named as a model; traces that are kept between runs."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsc.errors import ConfigError, DscError, UsageError
from dsc.frontends import trace_cache
from dsc.frontends.causal_lm import CausalLMStep
from dsc.frontends.config import load_config
from dsc.frontends.huggingface import stock_causal_lm
from dsc.frontends.load import Asked, load_program
from dsc.ir.limits import Limits
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.weights import DictSource, evaluate
from dsc.models.configs import TINY_CHECKPOINT
from tests.family import small
from tests.runtime.test_session import small_lm

KEY = {"config": {"a": 1}, "versions": {"torch": "2"}}


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An entry in a cache of one's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DSC_TRACE_CACHE", raising=False)
    trace_cache.store(KEY, small_lm(), {"inv": torch.tensor([1.0, 0.5])})
    (entry,) = (tmp_path / "dsc" / "traces").glob("*.json")
    return entry


def test_a_kept_trace_comes_back(cached: Path) -> None:
    found = trace_cache.load(KEY)
    assert found is not None
    assert print_program(found) == print_program(small_lm())
    assert evaluate(found.weights["inv"], found.source).tolist() == [1.0, 0.5]
    with pytest.raises(DscError):
        evaluate(found.weights["head"], found.source)


def test_another_key_misses(cached: Path) -> None:
    assert trace_cache.load({**KEY, "config": {"a": 2}}) is None


def test_a_file_with_another_key_misses(cached: Path) -> None:
    entry = json.loads(cached.read_text())
    entry["key"]["config"] = {"a": 3}
    cached.write_text(json.dumps(entry))
    assert trace_cache.load(KEY) is None


@pytest.mark.parametrize("garbage", [b"", b"{}", b"[" * 4000, b'{"key": 1, "program": "x"}'])
def test_a_damaged_entry_misses(cached: Path, garbage: bytes) -> None:
    cached.write_bytes(garbage)
    assert trace_cache.load(KEY) is None


def test_damaged_constants_miss(cached: Path) -> None:
    cached.with_suffix(".safetensors").write_bytes(b"1234")
    assert trace_cache.load(KEY) is None


def test_the_cache_can_be_off(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSC_TRACE_CACHE", "off")
    assert trace_cache.load(KEY) is None


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    trace_cache.store(KEY, small_lm(), {})
    assert trace_cache.load(KEY) is None


def test_the_key_names_every_source() -> None:
    key = trace_cache.key_of(nn.Sequential(nn.Linear(2, 2)), dtype="f32")
    assert key is not None
    assert any(f.endswith("linear.py") for f in key["module"]["sources"])
    assert any(f.endswith("torch_export.py") for f in key["ours"])
    assert any(f.endswith("traced.py") for f in key["ours"])


CHANGES: dict[str, Callable[[Any], None]] = {
    "an attribute": lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 0.5),
    "a nested value": lambda m: m.model.config.rope_parameters.update(factor=9.0),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "a method": lambda m: setattr(m.model.norm, "forward", lambda x: x),
    "a class": lambda m: setattr(m.model, "norm", nn.Identity()),
    "a parameter's type": lambda m: m.lm_head.to(torch.float16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_module_that_was_changed_has_another_key(change: Callable[[Any], None]) -> None:
    """The configuration that a trace is asked for stays the same all along."""
    first, same, changed = (CausalLMStep(stock_causal_lm(small())) for _ in range(3))
    change(changed)
    key = trace_cache.key_of(first, config="c")
    assert key is not None
    assert trace_cache.key_of(same, config="c") == key
    assert trace_cache.key_of(changed, config="c") != key


def test_sources_that_a_model_imports_are_in_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "far_away.py").write_text("def twice(x):\n    return 2 * x\n")
    (tmp_path / "nearer.py").write_text("from far_away import twice\n")
    (tmp_path / "top.py").write_text(
        "import torch, nearer\nclass Net(torch.nn.Module):\n"
        "    def forward(self, x):\n        return nearer.twice(x)\n"
    )
    key = trace_cache.key_of(importlib.import_module("top").Net())
    assert key is not None
    assert {Path(f).name for f in key["module"]["sources"]} == {
        "far_away.py", "nearer.py", "top.py",
    }  # fmt: skip


def test_what_cannot_be_told_is_not_kept() -> None:
    module = nn.Identity()
    module.lock = threading.Lock()  # type: ignore[assignment]
    assert trace_cache.key_of(module) is None


def test_a_program_loads_as_it_is() -> None:
    program = small_lm()
    loaded = load_program(program).program
    assert loaded.limits == program.limits.within(Limits())
    assert loaded.declaring(limits=None) == program


def test_a_text_loads_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "lm.dsc"
    path.write_text(print_program(small_lm()))
    program: Program = load_program(path).program
    assert not program.has_weights
    assert not isinstance(program.source, DictSource)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no build"), ("1 / 0", "ZeroDivisionError"), ("build = 3", "no build")],
)
def test_a_file_that_builds_nothing(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "model.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        load_program(path)


def test_options_that_contradict_the_model() -> None:
    with pytest.raises(UsageError, match=r"its own config\.json"):
        load_program(TINY_CHECKPOINT, config="tiny")
    with pytest.raises(UsageError, match="its own weights"):
        load_program(TINY_CHECKPOINT, weights="elsewhere")
    with pytest.raises(UsageError, match="comes without weights"):
        load_program("v3", config="16b")
    with pytest.raises(ConfigError, match="another configuration"):
        load_program("v3", config="16b", weights=TINY_CHECKPOINT)
    with pytest.raises(UsageError, match="cannot compile a Linear"):
        load_program(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="no model at"):
        load_program("nowhere")


def test_a_context_beyond_the_models_positions_is_refused() -> None:
    """In the words of the option and of the key, before anything is traced; up to it is right."""
    config = load_config(TINY_CHECKPOINT)
    positions = config.max_position_embeddings
    with pytest.raises(UsageError, match=f"max_context {positions + 1} is beyond the model's"):
        load_program(TINY_CHECKPOINT, max_context=positions + 1)
    for asked in (None, positions):
        assert Asked(1, asked, 8).limits(config).max_context == positions
