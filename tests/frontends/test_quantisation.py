"""Quantised checkpoints: FP8 of every maker is read, any other form is refused by what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import dsc
from dsc.cli import build_app
from dsc.cli.verify import check_oracle
from dsc.errors import CheckpointError, ConfigError, UsageError
from dsc.frontends.huggingface import load_checkpoint
from dsc.frontends.names import map_weights
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, evaluate
from dsc.models import v3
from dsc.passes._in_format import in_format
from dsc.verification import transformers_logits
from tests.family import facts, small, stock
from tests.frontends.test_huggingface import FP8_CONFIG, dequantised, official, quantised, save

E4M3 = torch.float8_e4m3fn
FLOAT = {"num_bits": 8, "type": "float"}


def compressed(**weights: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors with one group."""
    groups = {"group_0": {"targets": ["Linear"], "weights": FLOAT | weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


READ: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    "deepseek blocks": (FP8_CONFIG | {"weight_block_size": [4, 3]}, "_scale_inv", (2, 4)),
    "fp8 per tensor": (FP8_CONFIG | {"weight_block_size": None}, "_scale_inv", ()),
    "fp8 static": (FP8_CONFIG | {"activation_scheme": "static"}, "_scale_inv", (1,)),
    "compressed-tensors by row": (compressed(strategy="channel"), "_scale", (7, 1)),
    "compressed-tensors per tensor": (compressed(strategy="tensor"), "_scale", (1,)),
    "compressed-tensors by block": (
        compressed(strategy="block", block_structure=[4, 3]),
        "_scale",
        (2, 4),
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "_scale", (7, 1)),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "_scale", ()),
    "modelopt without method": ({"quant_algo": "FP8"}, "_scale", ()),
    "modelopt by row": ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "_scale", (7,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("config", "suffix", "shape"), READ.values(), ids=READ.keys())
def test_fp8_of_every_maker_is_weight_times_scale(
    config: dict[str, Any], suffix: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """One scale a block, a row or a tensor; what scales activations is left out."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 10, generator=random).to(E4M3)
    scale = (torch.rand(shape, generator=random) + 0.5).to(dtype)
    tensors = {"w.weight": weight, "w.weight" + suffix: scale, "w.input_scale": torch.ones(())}
    source = DictSource(tensors | {"self_attn.k_scale": torch.ones(1)})
    declared = {"w.weight": TensorType(DType.f32, (7, 10))}
    mapped = map_weights(declared, source, facts(quantization_config=config))
    wide = scale.float()
    if shape == (2, 4):
        expected = dequantised(weight, wide, (4, 3))
    else:
        expected = weight.float() * (wide[:, None] if shape == (7,) else wide)
    assert torch.equal(evaluate(mapped.weights["w.weight"], source), expected)
    kind = {(2, 4): "4x3", (7,): "1x*", (7, 1): "1x*"}.get(shape, "*x*")
    if config.get("weight_block_size") == [128, 128]:  # all of a small matrix
        kind = "128x128"
    assert f"{{{kind},f32}}" in str(in_format(mapped.weights["w.weight"]).type)
    assert sorted(mapped.ignored) == ["self_attn.k_scale", "w.input_scale"]


@pytest.mark.parametrize("shape", [(3,), (7, 2), (2, 4), (4, 2), (1, 7), (7, 1, 2), (7, 1)])
def test_scales_of_no_known_form_are_refused(shape: tuple[int, ...]) -> None:
    kind = torch.int32 if shape == (7, 1) else torch.float32
    scale = torch.ones(shape, dtype=kind)
    source = DictSource({"w.weight": torch.zeros(7, 10).to(E4M3), "w.weight_scale": scale})
    declared = {"w.weight": TensorType(DType.f32, (7, 10))}
    config = facts(quantization_config=compressed(strategy="channel"))
    with pytest.raises(CheckpointError, match=r"w.weight_scale: expected f32\[7,1\]"):
        map_weights(declared, source, config)


@pytest.mark.parametrize("kind", ["block", "row", "tensor"])
def test_stacked_fp8_experts_are_read(kind: str) -> None:
    """`[E, n, k]` in FP8 with `[E, p, q]` scales, by block, row and tensor: expert by expert."""
    block = (4, 3)
    random = torch.Generator().manual_seed(1)
    key, shape = "model.layers.1.mlp.experts.down_proj", (5, 7, 10)
    weight = torch.randn(shape, generator=random).to(E4M3)
    table = {"block": (5, 2, 4), "row": (5, 7, 1), "tensor": (5,)}[kind]
    scale = torch.rand(table, generator=random) + 0.5
    source = DictSource({key: weight, key + "_scale_inv": scale})
    config = facts(quantization_config=FP8_CONFIG | {"weight_block_size": list(block)})
    mapped = map_weights({key: TensorType(DType.f32, shape)}, source, config)
    if kind == "block":
        expected = torch.stack(
            [dequantised(w, s, block) for w, s in zip(weight, scale, strict=True)]
        )
    else:
        expected = weight.float() * scale.reshape(5, -1, 1)
    assert torch.equal(evaluate(mapped.weights[key], source), expected)
    wrong = DictSource({key: weight, key + "_scale_inv": torch.ones(5, 3, 4)})
    with pytest.raises(CheckpointError, match=r"expected f32\[5,2,4\]"):
        map_weights({key: TensorType(DType.f32, shape)}, wrong, config)


def test_a_checkpoint_of_stacked_fp8_experts_is_that_of_apart_ones(tmp_path: Path) -> None:
    """The same experts, saved one by one and stacked, are the same model."""
    config, told = small(), FP8_CONFIG | {"weight_block_size": [8, 16]}
    apart = quantised(official(config), (8, 16))
    stacked = {n: t for n, t in apart.items() if ".mlp.experts." not in n}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for suffix in ("", "_scale_inv"):

            def each(part: str, suffix: str = suffix, prefix: str = prefix) -> list[Tensor]:
                return [apart[f"{prefix}.{e}.{part}.weight{suffix}"] for e in range(8)]

            halves = zip(each("gate_proj"), each("up_proj"), strict=True)
            stacked[f"{prefix}.gate_up_proj{suffix}"] = torch.stack(
                [torch.cat([g.view(torch.uint8), u.view(torch.uint8)]).view(g.dtype)
                 for g, u in halves]
                if not suffix else [torch.cat(both) for both in halves]
            )  # fmt: skip
            stacked[f"{prefix}.down_proj{suffix}"] = torch.stack(each("down_proj"))
    folders = tmp_path / "apart", tmp_path / "stacked"
    states = []
    for folder, tensors in zip(folders, (apart, stacked), strict=True):
        folder.mkdir()
        save(folder, config, tensors, quantization_config=told)
        states.append(load_checkpoint(folder, DType.f32).load().state_dict())
    assert states[0].keys() == states[1].keys() == stock(config).state_dict().keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "int3": (compressed(**INT4 | {"num_bits": 3}), "3-bit int weights"),
    "nvfp4": (compressed(num_bits=4, strategy="tensor_group"), "4-bit float weights"),
    "fp8 in groups": (compressed(strategy="group"), "strategy 'group'"),
    "sparse": (
        compressed(strategy="channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse weights",
    ),
    "rotated": (
        compressed(strategy="channel") | {"transform_config": {"config_groups": {"R1": {}}}},
        "rotated weights",
    ),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
    "awq": ({"quant_method": "awq", "bits": 3, "group_size": 128}, "AWQ"),
    "gptq": ({"quant_method": "gptq", "bits": 3}, "GPTQ"),
    "autoround": ({"quant_method": "auto-round", "bits": 4}, "AutoRound"),
    "mxfp4": ({"quant_method": "mxfp4"}, "MXFP4"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "torchao": ({"quant_method": "torchao"}, "torchao"),
    "unheard of": ({"quant_method": "squeeze"}, "quant_method 'squeeze'"),
    "no method": ({"bits": 4}, "quant_method None"),
    "a method that is no text": ({"quant_method": ["fp8"]}, "quant_method"),
}


@pytest.mark.parametrize(("config", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_any_other_form_is_one_sentence_and_what_to_do(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        facts(quantization_config=config)
    told = str(caught.value)
    assert "quantization_config: " in told
    assert "are not read" in told
    assert "dequantise it and save it in bf16" in told


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"a": 3}},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": None}}},
        compressed(strategy="block", block_structure="128x128"),
        FP8_CONFIG | {"weight_block_size": [128, 0]},
        FP8_CONFIG | {"fmt": "e5m2"},
        ["fp8"],
    ],
)
def test_a_malformed_section_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="quantization_config"):
        facts(quantization_config=config)


def test_packed_weights_that_no_key_announces_are_one_sentence(tmp_path: Path) -> None:
    config = small()
    tensors = official(config)
    name = "model.layers.1.self_attn.o_proj."
    del tensors[name + "weight"]
    tensors[name + "qweight"] = torch.ones(4, 4, dtype=torch.int32)
    with pytest.raises(
        CheckpointError, match=r"o_proj\.qweight holds a weight in a quantised form"
    ):
        load_checkpoint(save(tmp_path, config, tensors))


def test_modelopt_says_its_algorithm_in_a_file_of_its_own(tmp_path: Path) -> None:
    config = small()
    tensors = quantised(official(config), (128, 128), "_scale")
    save(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match="no quantization_config"):
        load_checkpoint(tmp_path)
    file = tmp_path / "hf_quant_config.json"
    file.write_text(
        json.dumps({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}})
    )
    assert load_checkpoint(tmp_path, DType.f32).config.facts.quantization_config is not None
    file.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(ConfigError, match="NVFP4"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2"])
def test_transformers_is_an_oracle_of_fp8_and_of_remote_code(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock class over our dequantised weights: no loader of transformers, no code that runs.

    The last blocks are partial, which transformers' own loader reads wrongly.
    """
    import transformers

    def loader(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers loaded the folder itself")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loader)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", loader)
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('imported')")
    config, told = small(), FP8_CONFIG | {"weight_block_size": [20, 12]}
    apart = quantised(official(config), (20, 12))
    auto_map = {"AutoModelForCausalLM": "modeling_own.Model", "AutoConfig": "modeling_own.Config"}
    more = {"auto_map": auto_map, "model_type": model_type, "quantization_config": told}
    save(tmp_path, config, apart, **more)
    plain = {
        name: dequantised(t, apart[name + "_scale_inv"], (20, 12)) if t.dtype is E4M3 else t
        for name, t in apart.items()
        if not name.endswith("_scale_inv")
    }
    (tmp_path / "plain").mkdir()
    save(tmp_path / "plain", small(), plain)
    check_oracle("hf", str(tmp_path))
    ids = list(range(9))
    found = transformers_logits(tmp_path, ids)
    expected = transformers_logits(tmp_path / "plain", ids)
    assert found.shape == (9, config.vocab_size)
    assert np.array_equal(found, expected)
    session = dsc.compile(tmp_path, backend="reference", dtype="fp32", max_context=16).session(1)
    ours = np.asarray(session.prefill([ids], all_logits=True))[0]
    np.testing.assert_allclose(ours, found, atol=1e-4 * max(1.0, float(np.abs(found).max())))


def test_what_transformers_cannot_be_asked_is_refused_before_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*_: Any, **__: Any) -> None:
        raise AssertionError("it was compiled first")

    def verified(model: object) -> None:
        line = ["verify", str(model), "--against", "hf"]
        CliRunner().invoke(build_app(), line, catch_exceptions=False)

    monkeypatch.setattr("dsc.api.compile", compiled)
    config = small()
    tensors = official(config)
    del tensors["model.norm.weight"]
    save(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        verified(tmp_path)
    with pytest.raises(UsageError, match="checkpoint folders only"):
        verified(v3.__file__)
