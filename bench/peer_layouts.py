"""Quantised weights as other projects' packages write them: what reading is held against.

    python -m bench.peer_layouts samples tests/data/peer-layouts.safetensors
    python -m bench.peer_layouts folder models/tiny-v3 OUT --format auto_gptq

Needs auto-round 0.16.1 and compressed-tensors 0.20.0 of PyPI, for this script alone. `samples` has
each package pack one matrix and say which numbers that stands for; `folder` has AutoRound quantise
a checkpoint to the nearest codes, in groups of 32. What is made is committed, or measured, not made
by tests.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch

ROWS, COLUMNS, GROUP = 64, 64, 32
FORMATS = ("auto_gptq", "auto_awq", "llm_compressor", "auto_round")


def _grid(symmetric: bool) -> tuple[Any, Any, Any]:
    """A linear in fp16, scales and zero points [N, K/g]; no number is cut to what codes say."""
    random = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float16)
    linear.weight.data = torch.randn(ROWS, COLUMNS, generator=random).half() * 0.1
    grouped = linear.weight.data.float().unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = (grouped.abs().amax(-1) / 7 if symmetric else (high - low) / 15).half()
    zeros = torch.full_like(low, 8) if symmetric else (-low / scales.float()).round().clamp(1, 15)
    return linear, scales, zeros.int()


def _auto_round(module: str, symmetric: bool) -> dict[str, Any]:
    linear, scales, zeros = _grid(symmetric)
    kind = importlib.import_module(f"auto_round_extension.torch.{module}").QuantLinear
    made = kind(4, GROUP, COLUMNS, ROWS, bias=False)
    made.device = "cpu"
    made.pack(linear, scales.float(), 8 if symmetric else zeros.float(), device="cpu")
    numbers = made(torch.eye(COLUMNS, dtype=torch.float16)).T
    parts = {name: getattr(made, name) for name in ("qweight", "qzeros", "scales")}
    return {**parts, "numbers": numbers}


def _awq() -> dict[str, Any]:
    linear, scales, zeros = _grid(symmetric=False)
    awq = importlib.import_module("auto_round.export.export_to_awq.utils")
    made = awq.WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scales.float().T, zeros=zeros.T.contiguous(), device="cpu"
    )
    parts = {name: getattr(made, name) for name in ("qweight", "qzeros", "scales")}
    return {**parts, "numbers": awq.dequantize_gemm(**parts, bits=4, group_size=GROUP).T}


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    """One of compressed-tensors' compressors, there and back."""
    linear, scales, zeros = _grid(weights.get("symmetric", True))
    schemes = importlib.import_module("compressed_tensors.quantization")
    compressors = importlib.import_module("compressed_tensors.compressors")
    args = schemes.QuantizationArgs(**weights)
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    if weights["strategy"] == "channel":
        most = 448 if weights["type"] == "float" else 127
        scales = (linear.weight.data.float().abs().amax(1, keepdim=True) / most).half()
    state = {"weight": linear.weight.data, "weight_scale": scales}
    if not weights["symmetric"]:
        state["weight_zero_point"] = (zeros - 8).to(torch.int8)
    stored = compressor.compress(state, scheme)
    return {**stored, "numbers": compressor.decompress(stored, scheme)["weight"]}


def samples(path: Path) -> None:
    """Write one matrix in each layout, with what its package reads there."""
    from safetensors.torch import save_file

    in_groups = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    by_row = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
    awq = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}

    def compressed(form: str, weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        config = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
        return config, _compressed(form, **weights)

    made = {
        "gptq": (gptq | {"sym": True}, _auto_round("qlinear_torch_zp", True)),
        "gptq-zeros": (gptq | {"sym": False}, _auto_round("qlinear_torch_zp", False)),
        "gptq-v2": (
            gptq | {"sym": False, "checkpoint_format": "gptq_v2"},
            _auto_round("qlinear_torch", False),
        ),
        "awq": (awq, _awq()),
        "pack-quantized": compressed("pack-quantized", in_groups | {"symmetric": True}),
        "pack-quantized-zeros": compressed("pack-quantized", in_groups | {"symmetric": False}),
        "int-quantized": compressed("int-quantized", by_row | {"type": "int"}),
        "float-quantized": compressed("float-quantized", by_row | {"type": "float"}),
    }
    tensors = {
        f"{layout}.{name}": part.detach().contiguous()
        for layout, (_, parts) in made.items()
        for name, part in parts.items()
        if part is not None
    }
    save_file(tensors, path, {name: json.dumps(config) for name, (config, _) in made.items()})


def folder(source: Path, out: Path, form: str, symmetric: bool) -> None:
    """A checkpoint as AutoRound writes it: 4 bits in groups of 32, rounded to the nearest."""
    rounding = importlib.import_module("auto_round").AutoRound(
        str(source), scheme="W4A16", bits=4, group_size=GROUP, sym=symmetric, iters=0,
        device_map="cpu", disable_opt_rtn=True,
    )  # fmt: skip
    rounding.quantize_and_save(output_dir=str(out), format=form)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("samples", "folder"))
    parser.add_argument("path", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path("out"))
    parser.add_argument("--format", choices=FORMATS, default="auto_gptq")
    parser.add_argument("--symmetric", action="store_true")
    asked = parser.parse_args()
    if asked.what == "samples":
        samples(asked.path)
    else:
        folder(asked.path, asked.out, asked.format, asked.symmetric)


if __name__ == "__main__":
    main()
