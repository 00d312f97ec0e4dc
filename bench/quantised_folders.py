"""Write a checkpoint's weights as quantised checkpoints store them, layout by layout.

    python -m bench.quantised_folders models/tiny-v3 OUT --layout gptq

Codes are the nearest ones, which is no way to quantise a model well; the layouts are those of
compressed-tensors, GPTQ, AWQ and FP8, bit by bit from their definitions and with NumPy alone, so
that reading can be held against them. All linears of the layers are quantised but the router's,
and nothing else; `kimi` leaves all but routed experts.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsc.ir.arrays import Array, tensor_of
from dsc.ir.safetensors import open_safetensors

Tensors = dict[str, Array]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of a word that its bits 4i to 4i + 3 hold."""


@dataclass(frozen=True)
class Codes:
    """`W[n,k] = (codes[n,k] - zeros[n,g(k)]) * scales[n,g(k)]`, codes and zeros from 0 up.

    `index` is g(k).
    """

    codes: Array
    zeros: Array
    scales: Array
    index: Array

    @property
    def numbers(self) -> Array:
        """W in fp32."""
        codes = self.codes.astype(np.float32) - self.zeros[:, self.index].astype(np.float32)
        return codes * self.scales[:, self.index].astype(np.float32)


def quantised(
    weight: Array, bits: int, group: int, symmetric: bool, scales: Any, index: Array | None = None
) -> Codes:
    """The nearest codes, where `group` columns have a scale, those of one group by `index`."""
    rows, columns = weight.shape
    if index is None:
        index = np.arange(columns) // group
    wide = weight.astype(np.float32)[:, np.argsort(index, kind="stable")].reshape(rows, -1, group)
    most, middle = (1 << bits) - 1, 1 << bits - 1
    if symmetric:
        step = np.abs(wide).max(-1) / (middle - 1)
        zeros = np.full(step.shape, middle)
    else:
        low, high = np.minimum(wide.min(-1), 0), np.maximum(wide.max(-1), 0)
        step = (high - low) / most
        zeros = np.clip(np.round(-low / np.where(step == 0, 1, step)), 0, most)
    kept = np.where(step == 0, 1, step).astype(scales)
    zero, scale = zeros[:, index], kept.astype(np.float32)[:, index]
    codes = np.clip(np.round(weight.astype(np.float32) / scale) + zero, 0, most)
    return Codes(codes.astype(np.uint8), zeros.astype(np.uint8), kept, index)


def words(fields: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Rows of numbers as 32-bit words: place i of a word holds its element order[i]."""
    a_word = 32 // bits
    padded = np.pad(fields, [(0, 0), (0, -fields.shape[1] % a_word)]).astype(np.uint32)
    made = np.zeros((len(fields), padded.shape[1] // a_word), np.uint32)
    for place, element in enumerate(order or range(a_word)):
        made |= padded[:, element::a_word] << np.uint32(bits * place)
    return made.view(np.int32)


# --- layouts: the tensors of a weight called X.weight, X left out ---------------------------------


def compressed_tensors(found: Codes, bits: int, symmetric: bool) -> Tensors:
    """pack-quantized: codes along K, zero points along N."""
    made = {
        "weight_packed": words(found.codes, bits),
        "weight_scale": found.scales,
        "weight_shape": np.array(found.codes.shape, np.int64),
    }
    if not symmetric:
        made["weight_zero_point"] = words(found.zeros.T, bits).T
    return made


def gptq(found: Codes, bits: int, stored_zero: int) -> Tensors:
    """Both forms: zero points less `stored_zero`, modulo their range."""
    zeros = (found.zeros.astype(np.int32) - stored_zero) % (1 << bits)
    return {
        "qweight": words(found.codes, bits).T,
        "qzeros": words(zeros.T, bits),
        "scales": found.scales.T,
        "g_idx": found.index.astype(np.int32),
    }


def awq(found: Codes) -> Tensors:
    """gemm."""
    return {
        "qweight": words(found.codes.T, 4, AWQ_COLUMNS),
        "qzeros": words(found.zeros.T, 4, AWQ_COLUMNS),
        "scales": found.scales.T,
    }


def int8(found: Codes) -> Tensors:
    """int-quantized: int8 with a scale a row."""
    return {
        "weight": (found.codes.astype(np.int16) - 128).astype(np.int8),
        "weight_scale": found.scales,
    }


def fp8(weight: Array, block: tuple[int, int], scales: Any) -> tuple[Array, Array]:
    """e4m3 codes, and the scales of blocks; 0 is the whole axis."""
    rows, columns = (size or extent for size, extent in zip(block, weight.shape, strict=True))
    high, wide = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    found = np.ones((high, wide), np.float32)
    for i, j in np.ndindex(high, wide):
        part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        found[i, j] = np.abs(part.astype(np.float32)).max() / 448 or 1
    kept = found.astype(scales)
    spread = kept.astype(np.float32).repeat(rows, 0).repeat(columns, 1)
    codes = weight.astype(np.float32) / spread[: weight.shape[0], : weight.shape[1]]
    return np.clip(codes, -448, 448).astype(ml_dtypes.float8_e4m3fn), kept


@dataclass(frozen=True)
class Layout:
    """What `quantization_config` says, and the tensors and numbers of a weight."""

    config: Mapping[str, Any]
    store: Callable[[Array, int], tuple[Tensors, Array]]
    """Of a weight and the size of groups."""
    only_experts: bool = False


@dataclass(frozen=True)
class Integers:
    """A layout of integers: the codes of a weight, and the tensors that hold them.

    Columns of a group follow each other, or lie anywhere where it is `ordered`; a `whole` row may
    be one.
    """

    make: Callable[[Codes], Tensors]
    bits: int
    symmetric: bool
    scales: Any
    ordered: bool = False
    whole: bool = False

    def codes(self, weight: Array, group: int) -> Codes:
        """The codes of a weight that are stored."""
        columns = weight.shape[1]
        index = None
        if self.ordered:
            index = np.random.default_rng(columns).permutation(columns) // group
        size = columns if self.whole else group
        return quantised(weight, self.bits, size, self.symmetric, self.scales, index)

    def __call__(self, weight: Array, group: int) -> tuple[Tensors, Array]:
        """The tensors of a weight, and the numbers that they stand for."""
        found = self.codes(weight, group)
        return self.make(found), found.numbers


def _fp8(
    block: tuple[int, int], suffix: str, scales: Any
) -> Callable[[Array, int], tuple[Tensors, Array]]:
    def store(weight: Array, group: int) -> tuple[Tensors, Array]:
        codes, kept = fp8(weight, block, scales)
        rows, columns = (size or extent for size, extent in zip(block, weight.shape, strict=True))
        spread = kept.astype(np.float32).repeat(rows, 0).repeat(columns, 1)
        numbers = codes.astype(np.float32) * spread[: weight.shape[0], : weight.shape[1]]
        return {"weight": codes, "weight" + suffix: kept}, numbers

    return store


def _compressed(form: str, ignore: list[str], **weights: Any) -> dict[str, Any]:
    activations = weights.pop("input_activations", None)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


NOT_ROUTED = [
    "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
    "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
]  # fmt: skip
GROUP = {"num_bits": 4, "type": "int", "strategy": "group"}
A8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False}
REST = ["lm_head", "re:.*mlp.gate$"]
F16, BF16 = np.float16, ml_dtypes.bfloat16
LAYOUTS = {
    "kimi": Layout(
        _compressed("pack-quantized", NOT_ROUTED, **GROUP, symmetric=True),
        Integers(lambda c: compressed_tensors(c, 4, True), 4, True, BF16), only_experts=True,
    ),
    "ct-int4": Layout(
        _compressed("pack-quantized", REST, **GROUP, symmetric=True),
        Integers(lambda c: compressed_tensors(c, 4, True), 4, True, BF16),
    ),
    "ct-int4-zeros": Layout(
        _compressed("pack-quantized", REST, **GROUP, symmetric=False),
        Integers(lambda c: compressed_tensors(c, 4, False), 4, False, BF16),
    ),
    "ct-int8": Layout(
        _compressed("pack-quantized", REST, **GROUP | {"num_bits": 8}, symmetric=False),
        Integers(lambda c: compressed_tensors(c, 8, False), 8, False, F16),
    ),
    "w8a8": Layout(
        _compressed("int-quantized", REST, num_bits=8, type="int", strategy="channel",
                    symmetric=True, input_activations=A8),
        Integers(int8, 8, True, BF16, whole=True),
    ),
    "fp8-channel": Layout(
        _compressed("float-quantized", REST, num_bits=8, type="float", strategy="channel"),
        _fp8((1, 0), "_scale", BF16),
    ),
    "fp8-tensor": Layout(
        _compressed("float-quantized", REST, num_bits=8, type="float", strategy="tensor"),
        _fp8((0, 0), "_scale", np.float32),
    ),
    "fp8-block": Layout(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
         "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        _fp8((128, 128), "_scale_inv", np.float32),
    ),
    "gptq": Layout(
        GPTQ | {"sym": True},
        Integers(lambda c: gptq(c, 4, 1), 4, True, F16),
    ),
    "gptq-zeros": Layout(
        GPTQ | {"checkpoint_format": "gptq"},
        Integers(lambda c: gptq(c, 4, 1), 4, False, F16),
    ),
    "gptq-v2": Layout(
        GPTQ | {"checkpoint_format": "gptq_v2"},
        Integers(lambda c: gptq(c, 4, 0), 4, False, F16),
    ),
    "gptq-8": Layout(
        GPTQ | {"bits": 8},
        Integers(lambda c: gptq(c, 8, 1), 8, False, F16),
    ),
    "gptq-ordered": Layout(
        GPTQ | {"desc_act": True},
        Integers(lambda c: gptq(c, 4, 1), 4, False, F16, ordered=True),
    ),
    "awq": Layout(
        {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm",
         "modules_to_not_convert": ["mlp.gate"]},
        Integers(awq, 4, False, F16),
    ),
}  # fmt: skip


ROUTERS = (".mlp.gate.weight", ".block_sparse_moe.gate.weight", ".shared_expert_gate.weight")
"""Linears that no tool quantises."""


def stored(tensors: Mapping[str, Array], layout: Layout, group: int) -> tuple[Tensors, Tensors]:
    """All tensors in a layout, and the numbers they stand for under their own names."""
    made: Tensors = {}
    numbers: Tensors = {}
    for name, tensor in tensors.items():
        numbers[name] = made[name] = tensor
        linear = tensor.ndim == 2 and ".layers." in name and name.endswith(".weight")
        if (
            not linear
            or name.endswith(ROUTERS)
            or (layout.only_experts and ".experts." not in name)
        ):
            continue
        del made[name]
        parts, numbers[name] = layout.store(tensor, group)
        stem = name.removesuffix("weight")
        made |= {stem + end: np.ascontiguousarray(part) for end, part in parts.items()}
    return made, numbers


def config_of(raw: Mapping[str, Any], layout: Layout, group: int) -> dict[str, Any]:
    """`config.json` with what the layout says of itself, and the size of groups."""
    told = json.loads(json.dumps(layout.config))
    for each in told.get("config_groups", {}).values():
        if each["weights"]["strategy"] == "group":
            each["weights"]["group_size"] = group
    if told["quant_method"] in ("gptq", "awq"):
        told["group_size"] = group
    return {**raw, "quantization_config": told}


def write(folder: Path, out: Path, layout: str, group: int) -> None:
    """The folder in a layout, without layers that predict further tokens."""
    from safetensors.torch import save_file

    raw = json.loads((folder / "config.json").read_text())
    source = open_safetensors(folder)
    behind = f"model.layers.{raw['num_hidden_layers']}."
    tensors = {key: source.array(key) for key in source.types if not key.startswith(behind)}
    made, _ = stored(tensors, LAYOUTS[layout], group)
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name in ("tokenizer.json", "generation_config.json"):
            shutil.copy(file, out)
    (out / "config.json").write_text(json.dumps(config_of(raw, LAYOUTS[layout], group), indent=1))
    save_file({name: tensor_of(part) for name, part in made.items()}, out / "model.safetensors")


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--group", type=int, default=32)
    asked = parser.parse_args()
    write(asked.folder, asked.out, asked.layout, asked.group)


if __name__ == "__main__":
    main()
