"""The check of an architecture finds what is wrong with a step, and nobody gets around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsc.errors import UnsupportedArchitecture
from dsc.frontends import causal_lm, registries, self_check, trace_cache
from dsc.frontends.load import load_program
from dsc.frontends.self_check import Verdict, disturb, examine, in_memory, twin
from dsc.frontends.stock import clean, stock_model

BASE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOWED = BASE | {"model_type": "mistral", "sliding_window": 4096, "head_dim": 4}
QWEN = BASE | {"model_type": "qwen2"}


def verdict(values: dict[str, Any]) -> Verdict:
    return examine(*in_memory(twin(clean(values))))


@pytest.mark.parametrize("values", [WINDOWED, QWEN])
def test_a_sound_step_passes(values: dict[str, Any]) -> None:
    found = verdict(values)
    assert found.passes, found.fault
    assert 0 < found.error < 1e-5


def test_a_mask_without_its_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = registries._Masks.shown

    def causal(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        def mask(b: Tensor, h: Tensor, own: Tensor, row: Tensor) -> Tensor:
            return row <= own

        return shown(self, *args, **{**kwargs, "mask_function": mask})

    monkeypatch.setattr(registries._Masks, "shown", causal)
    assert "differs from MistralForCausalLM" in verdict(WINDOWED).fault


def test_rows_counted_from_the_end_of_the_cache_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def behind(past: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
        return torch.cat([past, new], dim=1)

    monkeypatch.setattr(causal_lm, "append", behind)
    assert "sequences of different lengths" in verdict(QWEN).fault


def test_a_bias_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(stock: Any, signature: Any) -> Any:
        program = traced(stock, signature)
        projection = stock.model.layers[1].self_attn.q_proj
        projection.bias = torch.nn.Parameter(torch.zeros_like(projection.bias))
        return program

    traced = self_check.traced
    monkeypatch.setattr(self_check, "traced", without)
    assert "over a prompt" in verdict(QWEN).fault


def test_positions_that_are_not_looked_at_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(module: Any, positions: Tensor) -> dict[str, Tensor]:
        return {"position_ids": positions - positions[:, :1]}

    monkeypatch.setattr(causal_lm, "positions_for", counted)
    assert "over a chunk after a prompt" in verdict(QWEN).fault


def test_no_weight_is_left_where_its_class_begins() -> None:
    stock = stock_model(clean(QWEN), device="cpu")
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    disturb(stock)
    same = [name for name, tensor in stock.state_dict().items() if (tensor == before[name]).any()]
    assert not same


def test_what_tracing_runs_into_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise AttributeError("'NoneType' object has no\nattribute 'terms'")

    monkeypatch.setattr(causal_lm, "trace_step", broken)
    assert verdict(QWEN).fault == (
        "Qwen2ForCausalLM cannot be traced: AttributeError: 'NoneType' object has no attribute"
        " 'terms'"
    )


def test_widths_that_are_not_known_are_refused_before_they_take_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(self_check, "shrunk", dict)
    wide = QWEN | {"hidden_size": 8192, "intermediate_size": 8192}
    with pytest.raises(UnsupportedArchitecture, match=r"has 806,\d+,\d+ parameters"):
        verdict(wide)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> str:
    """Every architecture fails, with this sentence."""
    told = "its step differs from Qwen2ForCausalLM by 0.3 of the largest, over a prompt"
    monkeypatch.setattr(self_check, "examine", lambda *_: Verdict(told))
    monkeypatch.setenv("DSC_CACHE", "off")
    return told


def test_a_folder_of_a_type_that_fails_is_refused(faulty: str, tmp_path: Path) -> None:
    saved: Any = stock_model(clean(QWEN), device="cpu")
    saved.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match="qwen2 is not compiled: its step differs"):
        load_program(tmp_path)


def test_a_module_of_a_type_that_fails_is_refused(faulty: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=faulty):
        load_program(stock_model(clean(QWEN), device="cpu"))


def test_a_module_of_another_class_is_checked_as_that_class(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import Qwen2ForCausalLM

    class Louder(Qwen2ForCausalLM):  # type: ignore[misc]
        pass

    seen: list[Any] = []
    monkeypatch.setenv("DSC_CACHE", "off")

    def stopped(stock: Any, _: Any) -> Verdict:
        seen.append(type(stock))
        return Verdict("stop")

    monkeypatch.setattr(self_check, "examine", stopped)
    with pytest.raises(UnsupportedArchitecture, match="stop"):
        load_program(Louder(stock_model(clean(QWEN)).config))
    assert seen == [Louder]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """A cache of one's own, and a process that says it has not imported transformers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def versions(version: str) -> None:
        def key(code: str, **facts: Any) -> dict[str, Any]:
            return {**facts, "transformers": version}

        monkeypatch.setattr(trace_cache, "key_of_installed", key)

    versions("5")
    return versions


def test_a_kept_verdict_builds_nothing(
    apart: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "in_memory", lambda *_: (None, None))
    monkeypatch.setattr(trace_cache, "key_of", lambda *_, **__: None)
    monkeypatch.setattr(self_check, "examine", lambda *_: Verdict("", 1e-6, "a remark"))
    first = self_check.self_check(clean(QWEN))
    monkeypatch.setattr(self_check, "examine", lambda *_: Verdict("looked again"))
    assert self_check.self_check(clean(QWEN)) == first == Verdict("", 1e-6, "a remark")
    other = self_check.self_check(clean(QWEN | {"rms_norm_eps": 1e-3}))
    assert other.fault == "looked again", "a fact that changes what is computed"
    apart("6")
    assert self_check.self_check(clean(QWEN)).fault == "looked again", "another transformers"


def test_models_of_one_twin_share_a_verdict(
    apart: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def look(*_: Any) -> Verdict:
        looked.append(1)
        return Verdict()

    monkeypatch.setattr(self_check, "examine", look)
    for layers in (32, 48):
        wide = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": layers}
        self_check.self_check(clean(QWEN | wide | {"num_attention_heads": 32}))
    assert looked == [1]


def test_the_check_is_told_and_comes_before_tracing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved: Any = stock_model(clean(QWEN), device="cpu")
    saved.save_pretrained(tmp_path)
    told: list[str] = []
    monkeypatch.setenv("DSC_CACHE", "off")
    monkeypatch.setattr(self_check, "examine", lambda *_: Verdict())
    load_program(tmp_path, progress=lambda what, *_: told.append(what))
    assert told == [
        "finding the model",
        "reading the model",
        "checking the architecture",
        "tracing",
    ]
