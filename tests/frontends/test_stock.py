"""A configuration from a stranger does nothing but describe a stock model."""

from __future__ import annotations

import builtins
import json
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

from dsc.errors import ConfigError, DscError, UnsupportedArchitecture
from dsc.frontends import stock
from dsc.frontends.facts import Facts
from dsc.frontends.stock import MAX_DEPTH, StockConfig, clean, completed, stock_config, stock_model
from tests.decoders import CONFIGS, PLAIN, cleaned

LLAMA = PLAIN | {"model_type": "llama"}
HOSTILE: dict[str, Any] = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "Auto_Map": {"AutoConfig": "evil.Config"},
    "autoMap": {"AutoConfig": "evil.Config"},
    "\uff41uto_map": {"AutoConfig": "evil.Config"},
    "_attn_implementation": "evil/kernel",
    "attn_implementation": {"": "evil/kernel"},
    "attn-implementation": "evil/kernel",
    "_attn_implementation_internal": "evil/kernel",
    "experts_implementation": "deepgemm",
    "_experts_implementation_internal": "sonicmoe",
    "custom_generate": "evil/generate",
    "kernel_config": {"RMSNorm": "evil/kernel:RMSNorm"},
    "use_kernels": True,
    "quantization_config": None,
    "quantizer": "evil",
    "chat_template": "{{ evil }}",
    "_name_or_path": "evil/model",
    "name_or_path": "evil/model",
    "trust_remote_code": True,
    "_commit_hash": "0",
    "to_dict": "shadows a method",
    "get_text_config": "shadows a method",
    "from_pretrained": "shadows a method",
    "per_layer_config": {"0": {"hidden_size": 1}},
    "attribute_map": {"hidden_size": "vocab_size"},
    "sub_configs_defaults": {},
    "base_model_tp_plan": {},
    "is_heterogeneous": True,
    "num_labels": 1 << 30,
    "id2label": {"0": "a"},
    "text_config": {"to_dict": 1},
    "vision_config": {"model_type": "siglip_vision_model"},
    "backbone_config": {"model_type": "resnet"},
    "__class__": "object",
    "torchscript": True,
    "a b": 1,
    "": 1,
}


SHADOWS = (
    "to_dict", "get_text_config", "from_pretrained", "attribute_map", "sub_configs_defaults",
    "base_model_tp_plan", "is_heterogeneous", "text_config", "vision_config",
)  # fmt: skip
"""What the class alone tells to be no field of it."""


def plain(config: StockConfig) -> dict[str, Any]:
    found: dict[str, Any] = stock_config(config).to_dict()
    return found


@pytest.mark.parametrize("key", HOSTILE)
def test_a_key_that_could_do_something_is_dropped(key: str) -> None:
    """At the top, in a section, and in the text tower of a wrapper."""
    raw = LLAMA | {key: HOSTILE[key]}
    assert plain(clean(raw)) == plain(clean(LLAMA))
    nested = {"rope_type": "default", "rope_theta": 1e4, key: HOSTILE[key]}
    kept = clean(LLAMA | {"rope_parameters": nested}).values["rope_parameters"]
    assert key not in kept or key in SHADOWS
    assert clean({"model_type": "llava", "text_config": raw}).values == clean(raw).values


def test_all_of_them_at_once_build_the_stock_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("somebody was asked")

    stock_model(clean(LLAMA))  # imports what it needs
    monkeypatch.setattr(socket, "socket", never)
    monkeypatch.setattr(builtins, "input", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    model: Any = stock_model(clean(HOSTILE | LLAMA))
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert model.config._attn_implementation == "sdpa"
    assert "evil" not in json.dumps(model.config.to_dict(), default=str)


def test_cleaning_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from dsc.frontends.stock import clean; clean("
        + repr(LLAMA)
        + "); print({'torch', 'transformers'} & {*sys.modules})"
    )
    told = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    assert told.stdout.decode() == "set()\n"


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "deep": ({"rope_parameters": nested(MAX_DEPTH + 2)}, "nests deeper"),
    "deep lists": ({"a": [[[[[[[[1]]]]]]]]}, "nests deeper"),
    "a long list": ({"layer_types": ["full_attention"] * 20000}, "has 20000 entries"),
    "a long text": ({"hidden_act": "s" * 5000}, "is a text of 5000"),
    "a huge number": ({"hidden_size": 1 << 62}, "is beyond"),
    "no finite number": ({"rms_norm_eps": float("inf")}, "must be a finite number"),
    "too many layers": ({"num_hidden_layers": 1 << 20}, "beyond 1024"),
    "another dtype": ({"dtype": "load"}, "dtype must be 'float32'"),
    "a dtype that is none": ({"torch_dtype": ["float32"]}, "dtype must be"),
    "dynamic rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    "no type": ({"model_type": None}, "no name of a model"),
    "a type that is no text": ({"model_type": ["llama"]}, "no name of a model"),
    "an unknown quantisation": ({"quantization_config": {"quant_method": "evil"}}, "evil"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_out_of_bounds_is_refused_without_transformers(name: str) -> None:
    changes, why = BAD[name]
    with pytest.raises(DscError, match=why):
        clean(LLAMA | changes)


REFUSED: dict[str, tuple[dict[str, Any], type[DscError], str]] = {
    "an unknown type": ({"model_type": "llama9"}, UnsupportedArchitecture, "'llama9' is not one"),
    "no decoder": ({"model_type": "vit"}, UnsupportedArchitecture, "no causal language model"),
    "a text for a width": ({"hidden_size": "wide"}, ConfigError, "transformers refuses"),
    "a negative width": ({"intermediate_size": -4}, ConfigError, "transformers refuses"),
    "heads of another number": ({"head_dim": "x"}, ConfigError, "transformers refuses"),
    "an unknown activation": ({"hidden_act": "evil"}, ConfigError, "is no activation"),
    "layers of another number": (
        {"model_type": "gemma2", "layer_types": ["full_attention"]}, ConfigError, "layer_types"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_cannot_build_is_one_sentence(name: str) -> None:
    changes, error, why = REFUSED[name]
    with pytest.raises(error, match=why) as caught:
        stock_model(clean(LLAMA | changes))
    assert len(caught.value.what.splitlines()) == 1
    assert caught.value.where == "config.json"


@pytest.mark.parametrize("limit", ["MAX_PARTS", "MAX_TABLES"])
def test_a_model_without_bounds_is_refused(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, limit, 10)
    with pytest.raises(ConfigError, match="more than 10"):
        stock_model(clean(LLAMA))


def test_a_kernel_of_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM
    from transformers.integrations import hub_kernels

    def asks(*_: Any, **__: Any) -> None:
        hub_kernels.get_kernel("evil/kernel")

    before = hub_kernels.get_kernel
    monkeypatch.setattr(LlamaForCausalLM, "post_init", asks)
    with pytest.raises(ConfigError, match="kernel of the hub"):
        stock_model(clean(LLAMA))
    assert hub_kernels.get_kernel is before


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_on_meta_are_those_of_a_built_model(name: str) -> None:
    """All that a class computes is real on meta, and nothing that a checkpoint stores."""
    config = cleaned(name)
    made, built = (stock_model(config, device=device) for device in ("meta", "cpu"))
    wanted, stored = dict(built.named_buffers()), built.state_dict()
    for key, found in made.named_buffers():
        assert found.is_meta == (key in stored), key
        assert found.is_meta or torch.equal(found, wanted[key]), key


def test_ties_are_ties() -> None:
    model: Any = stock_model(cleaned("llama", tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_facts_have_one_name_each() -> None:
    config = cleaned("gpt2")
    facts = completed(config, stock_config(config))
    assert (facts.positions, facts.position_name) == (64, "n_positions")
    assert (facts.num_hidden_layers, facts.num_attention_heads) == (3, 4)
    assert facts.tie_word_embeddings is True  # the class's default
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_a_wrapper_gives_its_text_tower() -> None:
    tower = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"}
    raw = {
        "model_type": "llava", "text_config": tower, "vision_config": {"hidden_size": 8},
        "dtype": "bfloat16", "tie_word_embeddings": True,
    }  # fmt: skip
    config = clean(raw)
    assert (config.model_type, config.wrapper, config.dtype) == ("llama", "llava", "bfloat16")
    assert config.facts.tie_word_embeddings is True
    assert "vision_config" not in config.values
    assert not hasattr(stock_config(clean(LLAMA | {"vision_config": {}})), "vision_config")


def test_infinity_is_read_as_transformers_writes_it() -> None:
    found = clean(LLAMA | {"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert found.values["time_step_limit"] == [0.0, float("inf")]


def test_another_rope_of_the_family_is_left_to_the_stock_class() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    raw = CONFIGS["deepseek_v3"] | {"model_type": "kimi_k2", "rope_parameters": rope}
    config = clean(raw)
    assert config.model_type == "deepseek_v3"
    assert stock_config(config).rope_parameters["rope_type"] == "linear"
    with pytest.raises(ConfigError, match="q_lora_rank"):
        clean(raw | {"rope_parameters": None, "q_lora_rank": -1})
    with pytest.raises(UnsupportedArchitecture, match="dynamic"):
        clean(raw | {"rope_parameters": {**rope, "rope_type": "dynamic"}})


def test_kimi_k2_is_a_deepseek_v3() -> None:
    raw = CONFIGS["deepseek_v3"] | {"model_type": "kimi_k2"}
    config = clean(raw)
    assert (config.model_type, config.published) == ("deepseek_v3", "kimi_k2")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("vocab_size", -5, "vocab_size must be above 0, found -5"),
        ("num_key_value_heads", 0, "num_key_value_heads must be above 0, found 0"),
        ("hidden_act", "swoosh", "hidden_act 'swoosh' is no activation"),
    ],
)
def test_what_a_class_refuses_without_a_name_is_named(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        stock_config(clean(LLAMA | {field: value}))
