"""Quantised checkpoints of other decoders keep their codes, fused and stacked ones among them.

Folders are those of `bench/quantised_folders.py`; what the layouts are is held in `test_codes.py`.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dsc
from bench import coded_folders, onnx_folders
from bench.coded_folders import folder, kept_as
from bench.names import mapped, small_model
from bench.quantised_folders import Tensors
from dsc.backends.onnxruntime.contrib import DIALECTS
from dsc.frontends.convert import convert
from dsc.frontends.huggingface import load_checkpoint
from dsc.ir.arrays import array_of
from dsc.ir.safetensors import open_safetensors
from dsc.ir.types import DType
from dsc.ir.weights import evaluate
from dsc.passes._in_format import Dequantised, in_format
from tests.frontends.test_huggingface import FP8_CONFIG, quantised

FIELDS: dict[str, Any] = {"tie_word_embeddings": False}
TYPES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {"intermediate_size": 96}, "phi3": {}, "mixtral": {},
    "qwen3_moe": {"moe_intermediate_size": 32},
}  # fmt: skip
"""Whose projections are apart, fused as they are stored, and stacked, whole words in each."""
PAIRS = {
    "llama": ("gptq", "awq", "ct-int4", "fp8-block", "w8a8"), "qwen3": ("gptq-zeros",),
    "phi3": ("awq", "fp8-channel"), "mixtral": ("ct-int4",),
    "qwen3_moe": ("gptq", "awq", "ct-int4", "fp8-block", "fp8-channel"),
}  # fmt: skip
GROUP = 16


@cache
def model_of(model_type: str) -> Any:
    return small_model(model_type, **FIELDS, **TYPES[model_type])


@cache
def plain_of(model_type: str) -> tuple[dict[str, Any], Tensors]:
    """`config.json` and the tensors of a small model, as transformers publishes it."""
    return coded_folders.plain_of(model_of(model_type))


def both(path: Path, model_type: str, layout: str) -> tuple[Path, Path]:
    """A small model in a layout, and the numbers that it stands for."""
    return coded_folders.both(path, plain_of(model_type), layout, GROUP)


@pytest.mark.parametrize(
    ("model_type", "layout"), [(kind, layout) for kind in PAIRS for layout in PAIRS[kind]]
)
def test_codes_of_each_type_are_kept_and_stand_for_their_numbers(
    model_type: str, layout: str, tmp_path: Path
) -> None:
    stored_in, plain = both(tmp_path, model_type, layout)
    found, source = load_checkpoint(stored_in, DType.f32), open_safetensors(plain)
    numbers = mapped(model_of(model_type), source).weights
    state = found.load().state_dict()
    assert state.keys() == numbers.keys()
    assert all(torch.equal(state[name], evaluate(expr, source)) for name, expr in numbers.items())
    linears = {n for n, e in found.weights.items() if ".layers." in n and e.type.rank > 1}
    routers = {n for n in linears if n.endswith((".gate.weight", "_gate.weight"))}
    cut = {n for n in linears if n.endswith("experts.gate_up_proj") and layout == "fp8-block"}
    for name in linears - routers - cut:
        assert re.match(kept_as(layout, GROUP), str(in_format(found.weights[name]).type)), name
    for name in cut:
        with pytest.raises(Dequantised, match="cuts a block of 128"):
            in_format(found.weights[name])


@pytest.mark.parametrize(("model_type", "layout"), [("qwen3", "gptq-zeros"), ("qwen3_moe", "awq")])
def test_an_artifact_of_another_type_holds_the_codes(
    model_type: str, layout: str, tmp_path: Path
) -> None:
    quantised_folder, plain = both(tmp_path, model_type, layout)
    found, numbers = (
        dsc.compile(each, backend="reference", dtype="fp32", max_context=16)
        for each in (quantised_folder, plain)
    )
    coded = {n: str(e.type) for n, e in found.program.weights.items() if e.type.format}
    assert sum(".layers." in name for name in coded) >= 4 * 2
    assert all(re.match(kept_as(layout, GROUP), t) for t in coded.values())
    ids = [[3, 1, 4, 1, 5, 9]]
    one, other = (each.session().prefill(ids) for each in (found, numbers))
    np.testing.assert_allclose(array_of(one), array_of(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "layout", "backend", "coded_a_layer"),
    [
        ("llama", "fp8-block", "tvm", 7),
        ("llama", "fp8-block", "onnxruntime", 0),
    ],
)
def test_other_backends_hold_the_codes_or_the_numbers_of_a_folder(
    model_type: str, layout: str, backend: str, coded_a_layer: int
) -> None:
    """Widths that cut blocks: projections of the Llama are not merged, so that codes stay."""
    (found,) = coded_folders.check(model_type, layout, "ends", [backend])
    assert found["wrong"] == []
    assert found["kept"] == 2 * coded_a_layer
    assert (found["dequantised"] > 0) == (coded_a_layer == 0)


def test_onnx_files_hold_the_codes_that_a_folder_stores() -> None:
    """Read by onnx alone; experts are a stack in one dialect, and one by one in the other."""
    for found in onnx_folders.check("qwen3_moe", "awq", "ends", DIALECTS):
        assert found["wrong"] == []
        assert found["weights"] == 2 * (4 + 3 * 8)


def test_a_code_that_is_another_is_told() -> None:
    rows = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    due = onnx_folders.rounded(rows, 4)
    packed = due.codes[:, ::2] | due.codes[:, 1::2] << 4
    scales = due.scales.astype(np.float32)
    found = {"w": ((2, 16), packed.tobytes()), "w.scale": ((2, 1), scales.tobytes())}
    assert onnx_folders.in_files(found, "w", 4, due) == ""
    packed[1, 3] ^= 16
    found["w"] = ((2, 16), packed.tobytes())
    assert onnx_folders.in_files(found, "w", 4, due) == "w has other codes"
    found["w.zero"] = ((2, 1), bytes([7, 8]))
    assert onnx_folders.in_files(found, "w", 4, due) == "w has other codes and zero points"


def test_experts_stacked_in_fp8_with_their_scales_are_read(tmp_path: Path) -> None:
    """As transformers saves what it has quantised: `[E, n, k]` and scales `[E, n/b, k/b]`."""
    raw, _ = plain_of("qwen3_moe")
    model = model_of("qwen3_moe")
    block = (8, 16)
    made = quantised(dict(model.state_dict()), block)
    told = raw | {"quantization_config": FP8_CONFIG | {"weight_block_size": list(block)}}
    tensors = {name: array_of(tensor) for name, tensor in made.items()}
    found = load_checkpoint(folder(tmp_path / "fp8", told, tensors), DType.f32)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert str(in_format(found.weights[name]).type).startswith("f8e4m3{8x16,f32}[8,")
    state: dict[str, Tensor] = found.load().state_dict()
    scales = made[name + "_scale_inv"].repeat_interleave(8, 1).repeat_interleave(16, 2)
    assert torch.equal(state[name], made[name].float() * scales)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_type_is_converted_to_fp8_and_back(model_type: str, tmp_path: Path) -> None:
    """Its linears but the head and the routers, which are named; the second trip is the first."""
    first, back, again = (tmp_path / name for name in ("first", "back", "again"))
    raw, tensors = plain_of(model_type)
    convert(folder(tmp_path / "plain", raw, tensors), first, "fp8")
    narrow = {k for k, t in open_safetensors(first).types.items() if t.dtype is DType.f8e4m3}
    routers = [f"model.layers.{layer}.mlp.gate" for layer in (0, 1)]
    left = ["lm_head", *(routers if model_type == "qwen3_moe" else [])]
    assert narrow == {
        k for k, t in tensors.items()
        if ".layers." in k and t.ndim == 2 and k.removesuffix(".weight") not in left
    }  # fmt: skip
    told = json.loads((first / "config.json").read_text())["quantization_config"]
    assert told["modules_to_not_convert"] == left
    found = load_checkpoint(first, DType.f32)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert str(in_format(found.weights[name]).type).startswith("f8e4m3{128x128,f32}")
    convert(first, back, "bf16")
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    convert(back, again, "fp8")
    one, other = open_safetensors(first), open_safetensors(again)
    assert one.types.keys() == other.types.keys()
    for key in narrow:
        assert np.array_equal(one.array(key).view(np.uint8), other.array(key).view(np.uint8)), key
