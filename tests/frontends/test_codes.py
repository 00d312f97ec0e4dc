"""Quantised checkpoints keep their codes: every layout, and what in one is refused.

Folders are written by `bench/quantised_folders.py` from the layouts' definitions, values by hand
stand beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import dsc
from bench.quantised_folders import (
    LAYOUTS,
    Codes,
    Tensors,
    awq,
    compressed_tensors,
    config_of,
    gptq,
    int8,
    stored,
)
from dsc.cli import main
from dsc.errors import CheckpointError, ConfigError
from dsc.frontends.checked import CheckedSource
from dsc.frontends.family import ModelConfig
from dsc.frontends.huggingface import load_checkpoint
from dsc.frontends.names import map_weights
from dsc.ir.arrays import Array, array_of, tensor_of
from dsc.ir.formats import Packed
from dsc.ir.streams import blocks
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, WeightExpr, evaluate
from dsc.ir.weights import parts as parts_of
from dsc.passes._in_format import Dequantised, in_format
from dsc.verification import transformers_logits
from tests.family import facts, small
from tests.frontends.test_huggingface import official

WIDE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
"""Widths that groups of 32 and words of 8 fit."""


def told(layout: str, group: int = 32, **changes: Any) -> dict[str, Any]:
    """The `quantization_config` of a layout."""
    config: dict[str, Any] = config_of({}, LAYOUTS[layout], group)["quantization_config"]
    return config | changes


def numbers_of(
    tensors: Tensors, quantization: dict[str, Any], shape: tuple[int, ...]
) -> tuple[WeightExpr, DictSource]:
    """The expression of a weight called w.weight that is stored in these tensors."""
    source = DictSource({f"w.{name}": tensor_of(part.copy()) for name, part in tensors.items()})
    declared = {"w.weight": TensorType(DType.f32, shape)}
    mapped = map_weights(declared, source, facts(quantization_config=quantization))
    return mapped.weights["w.weight"], source


def drawn(rows: int, columns: int, group: int, bits: int, scales: Any = np.float16) -> Codes:
    """Codes and zero points of every value, and scales of any bits."""
    random = np.random.default_rng(rows)
    shape = rows, columns // group
    return Codes(
        random.integers(0, 1 << bits, (rows, columns)).astype(np.uint8),
        random.integers(0, 1 << bits, shape).astype(np.uint8),
        random.normal(0, 0.1, shape).astype(scales),
        np.arange(columns) // group,
    )


def centred(codes: Codes, bits: int) -> Codes:
    """The same with all zero points in the middle."""
    return Codes(codes.codes, np.full_like(codes.zeros, 1 << bits - 1), codes.scales, codes.index)


BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
KEPT: dict[str, tuple[str, int, bool, Any, Callable[[Codes], Tensors]]] = {
    "compressed-tensors": ("ct-int4", 4, True, BF16, lambda c: compressed_tensors(c, 4, True)),
    "with zero points": (
        "ct-int4-zeros", 4, False, np.float16, lambda c: compressed_tensors(c, 4, False),
    ),
    "in 8 bits": ("ct-int8", 8, False, np.float32, lambda c: compressed_tensors(c, 8, False)),
    "zero points apart": (
        "ct-int4-zeros", 4, False, BF16, lambda c: compressed_tensors(c, 4, True) | {
            "weight_zero_point": c.zeros.astype(np.int8) - 8}),
    "gptq": ("gptq-zeros", 4, False, np.float16, lambda c: gptq(c, 4, 1)),
    "gptq, symmetric": ("gptq", 4, True, np.float16, lambda c: gptq(c, 4, 1)),
    "gptq_v2": ("gptq-v2", 4, False, np.float16, lambda c: gptq(c, 4, 0)),
    "gptq in 8 bits": ("gptq-8", 8, False, np.float16, lambda c: gptq(c, 8, 1)),
    "awq": ("awq", 4, False, np.float16, awq),
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "bits", "symmetric", "scales", "store"), KEPT.values(), ids=KEPT.keys()
)
@pytest.mark.parametrize(("shape", "group"), [((40, 96), 32), ((8, 32), 8)])
def test_codes_scales_and_zero_points_are_those_stored_bit_for_bit(
    layout: str, bits: int, symmetric: bool, scales: Any, store: Callable[[Codes], Tensors],
    shape: tuple[int, int], group: int,
) -> None:  # fmt: skip
    codes = drawn(*shape, group, bits, scales)
    codes = centred(codes, bits) if symmetric else codes
    expr, source = numbers_of(store(codes), told(layout, group), shape)
    packed = evaluate(in_format(expr), source)
    assert isinstance(packed, Packed)
    kind = DType.of(np.dtype(scales))
    zeros = "" if symmetric else ",i8"
    assert str(packed.type) == f"i{bits}{{1x{group},{kind}{zeros}}}[{shape[0]},{shape[1]}]"
    found, kept, *shifted = map(array_of, packed.parts)
    if bits == 4:
        apart = np.stack([found & 15, found >> 4], -1).reshape(shape)
    else:
        apart = (found.astype(np.int16) + 128).astype(np.uint8)
    assert np.array_equal(apart, codes.codes)
    assert np.ascontiguousarray(kept).tobytes() == codes.scales.tobytes()
    middle = 1 << bits - 1
    assert all(np.array_equal(z.astype(int) + middle, codes.zeros) for z in shifted)
    assert np.array_equal(evaluate(expr, source).numpy(), codes.numbers)
    for (_, part), whole in zip(parts_of("w", in_format(expr)), packed.parts, strict=True):
        streamed = b"".join(np.ascontiguousarray(array_of(b)).tobytes()
                            for b in blocks(part, source, 64))  # fmt: skip
        assert streamed == np.ascontiguousarray(array_of(whole)).tobytes()
    rows = [array_of(b).reshape(-1) for b in blocks(expr, source, 512)]
    assert len(rows) > 1
    assert np.array_equal(np.concatenate(rows), codes.numbers.reshape(-1))


def test_layouts_by_hand() -> None:
    """The values that the layouts' documents give."""
    ones = np.ones((1, 8), np.float16)
    packed: Tensors = {
        "weight_packed": np.array([[0x76543210]], np.int32),
        "weight_scale": np.array([[0.5]], np.float16), "weight_shape": np.array([1, 8]),
    }  # fmt: skip
    expr, source = numbers_of(packed, told("ct-int4", 8), (1, 8))
    assert evaluate(expr, source).tolist() == [[(q - 8) * 0.5 for q in range(8)]]
    words = np.array([[0x75316420]] * 8, np.int32)
    zeros = np.array([[0x43215630]], np.uint32).view(np.int32)
    given: Tensors = {"qweight": words, "qzeros": zeros, "scales": ones}
    expr, source = numbers_of(given, told("awq", 8), (8, 8))
    shifted = [0, 1, 3, 2, 6, 3, 5, 4]  # slots 0 3 6 5 1 2 3 4 are columns 0 2 4 6 1 3 5 7
    assert evaluate(expr, source)[:, 0].tolist() == [c - z for c, z in enumerate(shifted)]
    word = np.array([[0x76543210] * 8], np.uint32).view(np.int32)
    for zero, form, meant in ((15, "gptq", 0), (7, "gptq", 8), (8, "gptq_v2", 8)):
        stored_zeros = np.array([[zero * 0x11111111]], np.uint32).view(np.int32)
        given = {"qweight": word, "qzeros": stored_zeros, "scales": ones}
        quantization = told("gptq-zeros", 8, checkpoint_format=form)
        expr, source = numbers_of(given, quantization, (8, 8))
        assert evaluate(expr, source)[3].tolist() == [q - meant for q in range(8)], form


@pytest.mark.parametrize("layout", ["ct-int4", "awq", "gptq"])
def test_a_group_of_minus_one_is_a_row(layout: str) -> None:
    codes = centred(drawn(8, 64, 64, 4), 4)
    made = {"ct-int4": compressed_tensors(codes, 4, True), "awq": awq(codes),
            "gptq": gptq(codes, 4, 1)}[layout]  # fmt: skip
    expr, source = numbers_of(made, told(layout, -1), (8, 64))
    assert "{1x*,f16" in str(in_format(expr).type)
    assert np.array_equal(evaluate(expr, source).numpy(), codes.numbers)


def test_rows_that_fill_no_word_are_cut_where_they_end() -> None:
    """10 columns of 4 bits are 5 bytes of 8; 10 zero points of rows 2 words of 8."""
    codes = drawn(10, 10, 10, 4)
    expr, source = numbers_of(
        compressed_tensors(codes, 4, False), told("ct-int4-zeros", 10), (10, 10)
    )
    assert np.array_equal(evaluate(expr, source).numpy(), codes.numbers)
    assert str(in_format(expr).type) == "i4{1x10,f16,i8}[10,10]"


@pytest.mark.parametrize("block", [None, [4, 16]], ids=["channel", "block"])
def test_int8_is_kept_as_it_is(block: list[int] | None) -> None:
    codes = drawn(8, 64, 64, 8, np.float32)
    plain = int8(centred(codes, 8))
    quantization = told("w8a8")
    if block is not None:
        quantization = {"quant_method": "blockwise_int8", "weight_block_size": block}
        scales = np.random.default_rng(0).random((2, 4), np.float32)
        plain = {"weight": plain["weight"], "weight_scale_inv": scales}
    expr, source = numbers_of(plain, quantization, (8, 64))
    kept, *_ = evaluate(in_format(expr), source).parts
    assert np.array_equal(array_of(kept), plain["weight"])
    scales = plain.get("weight_scale_inv", codes.scales)
    spread = scales.repeat(8 // len(scales), 0).repeat(64 // scales.shape[1], 1)
    assert np.array_equal(evaluate(expr, source).numpy(), plain["weight"] * spread)


@pytest.mark.parametrize("layout", ["gptq-ordered", "ct-int4-zeros"])
def test_columns_that_an_index_puts_out_of_order_are_exact_and_dequantised(layout: str) -> None:
    order = np.random.default_rng(1).permutation(64)
    codes = drawn(16, 64, 16, 4)
    codes = Codes(codes.codes, codes.zeros, codes.scales, codes.index[order])
    if layout == "gptq-ordered":
        made = gptq(codes, 4, 1)
    else:
        made = compressed_tensors(codes, 4, False)
        made["weight_g_idx"] = codes.index.astype(np.int32)
    expr, source = numbers_of(made, told(layout, 16), (16, 64))
    assert np.array_equal(evaluate(expr, source).numpy(), codes.numbers)
    with pytest.raises(Dequantised, match="a scale of its own"):
        in_format(expr)


def test_an_index_in_order_or_of_minus_ones_keeps_the_codes() -> None:
    codes = drawn(16, 64, 16, 4)
    for index in (codes.index, np.full(64, -1)):
        made = compressed_tensors(codes, 4, False) | {"weight_g_idx": index.astype(np.int32)}
        expr, source = numbers_of(made, told("ct-int4-zeros", 16), (16, 64))
        assert str(in_format(expr).type) == "i4{1x16,f16,i8}[16,64]"
        assert np.array_equal(evaluate(expr, source).numpy(), codes.numbers)


PEERS = Path(__file__).parents[1] / "data" / "peer-layouts.safetensors"


def test_packages_of_the_layouts_read_the_same_numbers() -> None:
    """In fp16, which is what those compute in: to the bit."""
    with safe_open(PEERS, "pt") as file:
        layouts = {name: json.loads(config) for name, config in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    assert len(layouts) == 8
    for layout, config in layouts.items():
        parts = {
            key.removeprefix(f"{layout}."): array_of(part) for key, part in tensors.items()
            if key.startswith(f"{layout}.")
        }  # fmt: skip
        wanted = parts.pop("numbers")
        expr, source = numbers_of(parts, config, wanted.shape)
        kept = in_format(expr).type
        assert str(kept).startswith(
            {"int": "i8{1x*", "flo": "f8e4m3{1x*"}.get(layout[:3], "i4{1x32")
        )
        assert np.array_equal(evaluate(expr, source).half().numpy(), wanted), layout


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        ("auto_round:auto_gptq", "gptq-zeros"),
        ("auto_round:gptqmodel", "gptq-v2"),
        ("auto_round", "gptq-v2"),
        ("auto_round:auto_awq", "awq"),
    ],
)
def test_autoround_says_whose_layout_it_writes(form: str, layout: str) -> None:
    weight = np.random.default_rng(3).normal(size=(8, 64)).astype(np.float32)
    made, numbers = LAYOUTS[layout].store(weight, 32)
    config: dict[str, Any] = {
        "quant_method": "auto-round", "packing_format": form, "bits": 4, "group_size": 32,
        "sym": False, "data_type": "int", "extra_config": {"lm_head": {"bits": 16}},
    }  # fmt: skip
    expr, source = numbers_of(made, config, (8, 64))
    assert np.array_equal(evaluate(expr, source).numpy(), numbers)
    for changes, words in (
        ({"packing_format": "auto_round:fp8_static"}, "packing_format 'auto_round:fp8_static'"),
        ({"data_type": "mx_fp"}, "data_type 'mx_fp'"),
        ({"extra_config": {"a.b": {"bits": 8}}}, "extra_config 'a.b', bits 8"),
        ({"bits": 3}, "bits 3, quant_method 'auto-round'"),
    ):
        with pytest.raises(ConfigError, match=words):
            facts(quantization_config=config | changes)


# --- whole checkpoints ---------------------------------------------------------------------------


def tensors_of(config: ModelConfig) -> Tensors:
    return {name: array_of(tensor) for name, tensor in official(config).items()}


def folder(path: Path, raw: dict[str, Any], tensors: Tensors) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    save_file({k: tensor_of(np.ascontiguousarray(t)) for k, t in tensors.items()},
              path / "model.safetensors")  # fmt: skip
    return path


def both(path: Path, layout: str, group: int = 16) -> tuple[Path, Path]:
    """A small model in a layout, and the numbers that it stands for."""
    config = small(**WIDE)
    raw = config.model_dump(exclude_none=True)
    tensors = tensors_of(config)
    tensors["model.layers.3.eh_proj.weight"] = np.zeros((64, 64), np.float32)  # further tokens
    made, numbers = stored(tensors, LAYOUTS[layout], group)
    told_raw = config_of(raw, LAYOUTS[layout], group)
    return folder(path / "stored", told_raw, made), folder(path / "plain", raw, numbers)


@pytest.mark.parametrize("layout", ["kimi", "w8a8", "fp8-channel", "fp8-block", "gptq-ordered"])
def test_a_checkpoint_is_the_model_of_its_numbers(tmp_path: Path, layout: str) -> None:
    """Experts one by one become stacks; what is left out of quantising is read as it is."""
    found, plain = (load_checkpoint(f, DType.f32) for f in both(tmp_path, layout))
    states = [each.load().state_dict() for each in (found, plain)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all("eh_proj" in key for key in found.unused_mtp)
    assert plain.unused_mtp == ("model.layers.3.eh_proj.weight",)
    notes = [note for note in found.notes if "activations in integers" in note]
    assert len(notes) == (layout == "w8a8")


def test_an_artifact_holds_the_codes_and_says_what_transformers_does(tmp_path: Path) -> None:
    stored_in, plain = both(tmp_path, "ct-int4-zeros")
    model = dsc.compile(stored_in, backend="reference", dtype="fp32", max_context=16)
    model.save(tmp_path / "out")
    kept = {name: expr.type for name, expr in model.program.weights.items() if expr.type.format}
    assert str(kept["model.layers.1.mlp.experts.gate_up_proj"]) == "i4{1x16,bf16,i8}[8,64,64]"
    assert {t.dtype for t in kept.values()} == {DType.i4}
    ids = list(range(9))
    expected = transformers_logits(plain, ids)
    session = dsc.load(tmp_path / "out").session(1)
    ours = np.asarray(session.prefill([ids], all_logits=True))[0]
    np.testing.assert_allclose(ours, expected, atol=1e-4 * max(1.0, float(np.abs(expected).max())))


# --- what is refused -----------------------------------------------------------------------------

Damage = Callable[[Tensors, dict[str, Any]], None]


def _set(name: str, value: Array | None) -> Damage:
    def damage(tensors: Tensors, quantization: dict[str, Any]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return damage


def _weights(**changes: Any) -> Damage:
    def damage(tensors: Tensors, quantization: dict[str, Any]) -> None:
        groups = quantization.get("config_groups")
        (groups["group_0"]["weights"] if groups else quantization).update(changes)

    return damage


MISFIT: dict[str, tuple[str, Damage, str]] = {
    **{
        f"groups of {size} in {layout}": (
            layout, _weights(group_size=size), f"{name}: no whole groups of {size} .* 64 columns",
        )
        for size in (0, -2, 48, 10**12)
        for layout, name in (("ct-int4", "w.weight_scale"), ("gptq", "w.scales"))
    },
    "groups of another size": (
        "ct-int4", _weights(group_size=16), r"w\.weight_scale: expected f32\[8,4\]",
    ),
    "no scales": ("ct-int4", _set("weight_scale", None), r"missing.*\s+w\.weight_scale"),
    "no codes": ("ct-int4", _set("weight_packed", None), r"missing.*\s+w\.weight_packed"),
    "no zero points": ("ct-int4-zeros", _set("weight_zero_point", None), "weight_zero_point"),
    "no zero points of gptq": ("gptq", _set("qzeros", None), r"missing.*\s+w\.qzeros"),
    "no words": ("awq", _set("qweight", None), r"missing.*\s+w\.qweight"),
    "no index": ("gptq-ordered", _set("g_idx", None), r"missing.*\s+w\.g_idx"),
    "no scales of int8": ("w8a8", _set("weight_scale", None), r"missing.*\s+w\.weight_scale"),
    "scales of none": ("ct-int4", _set("weight_scale", np.zeros((8, 0), np.float16)),
                       r"weight_scale: expected f32\[8,2\].*found f16\[8,0\]"),
    "scales in integers": ("gptq", _set("scales", np.zeros((2, 8), np.int32)),
                           r"w\.scales: expected f16\[2,8\]"),
    "words of another width": ("ct-int4", _set("weight_packed", np.zeros((8, 7), np.int32)),
                               r"weight_packed: expected i32\[8,8\]"),
    "words that are turned": ("awq", _set("qweight", np.zeros((8, 8), np.int32)),
                              r"qweight: expected i32\[64,1\]"),
    "bytes for words": ("ct-int4", _set("weight_packed", np.zeros((8, 32), np.uint8)),
                        r"weight_packed: expected i32\[8,8\]"),
    "zero points of no shape": ("ct-int4-zeros", _set("weight_zero_point", np.zeros((8, 2), "i4")),
                                r"weight_zero_point: expected i32\[1,2\]"),
    "an index of no group": ("gptq", _set("g_idx", np.arange(64, dtype=np.int32)),
                             r"g_idx: groups 0 to 63, 0 to 1 are there"),
    "an index of no columns": ("gptq", _set("g_idx", np.zeros(8, np.int32)), r"g_idx: expected"),
    "a shape of no matrix": ("ct-int4", _set("weight_shape", np.zeros(3, np.int64)),
                             r"weight_shape: expected i32\[2\]"),
    "plain beside packed": ("ct-int4", _set("weight", np.zeros((8, 64), np.float16)),
                            r"unexpected tensors.*\s+w\.weight "),
    "unannounced int8": ("fp8-channel", _set("weight", np.zeros((8, 64), np.int8)),
                         r"w\.weight: i8\[8,64\] is not FP8"),
    "what no layout has": ("gptq", _set("perm", np.zeros(64, np.int32)), r"unexpected.*\s+w\.perm"),
}  # fmt: skip


def of_one_weight(layout: str) -> tuple[Tensors, dict[str, Any]]:
    weight = np.random.default_rng(2).normal(size=(8, 64)).astype(np.float32)
    made, _ = LAYOUTS[layout].store(weight, 32)
    return made, json.loads(json.dumps(told(layout)))


@pytest.mark.parametrize(("layout", "damage", "words"), MISFIT.values(), ids=MISFIT.keys())
def test_what_does_not_fit_is_named(layout: str, damage: Damage, words: str) -> None:
    tensors, quantization = of_one_weight(layout)
    numbers_of(tensors, quantization, (8, 64))
    damage(tensors, quantization)
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        numbers_of(tensors, quantization, (8, 64))


def test_codes_that_fill_no_words_are_refused() -> None:
    for layout, shape in (("gptq", (12, 64)), ("awq", (12, 64)), ("ct-int4", (8, 63))):
        size = 64 if layout != "ct-int4" else 63
        tensors, _ = of_one_weight(layout)
        with pytest.raises(CheckpointError, match=r"fill no words|two share a byte"):
            numbers_of(tensors, told(layout, size), shape)


WRONG: dict[str, tuple[str, Damage, str, str]] = {
    "NaN": ("gptq", _set("scales", np.full((2, 8), np.nan, np.float16)), "w.scales", "NaN"),
    "infinity": ("ct-int4", _set("weight_scale", np.full((8, 2), np.inf, BF16)),
                 "w.weight_scale", "infinite"),
    "NaN of FP8": ("fp8-block", _set("weight_scale_inv", np.full((1, 1), np.nan, "f4")),
                   "w.weight_scale_inv", "NaN"),
    "a code of FP8": ("fp8-channel", _set("weight", np.full((8, 64), 0xFF, "u1").view(F8)),
                      "w.weight", "a weight is NaN"),
    "another shape": ("ct-int4", _set("weight_shape", np.array([8, 63])), "w.weight_shape",
                      "8, 64, the shape"),
    "the other form": ("gptq", _set("qzeros", np.full((2, 1), -2004318072, np.int32)), "w.qzeros",
                       "not stored as 7.*checkpoint_format"),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "damage", "key", "words"), WRONG.values(), ids=WRONG.keys())
def test_values_that_make_another_model_are_named_when_they_are_read(
    layout: str, damage: Damage, key: str, words: str,
) -> None:  # fmt: skip
    tensors, quantization = of_one_weight(layout)
    source = DictSource({f"w.{name}": tensor_of(part.copy()) for name, part in tensors.items()})
    declared = {"w.weight": TensorType(DType.f32, (8, 64))}
    config = facts(quantization_config=quantization)
    mapped = map_weights(declared, source, config)
    expr = mapped.weights["w.weight"]
    evaluate(expr, CheckedSource(source, mapped.checks))
    damage(tensors, quantization)
    source = DictSource({f"w.{name}": tensor_of(part.copy()) for name, part in tensors.items()})
    for read in (evaluate, lambda *given: list(blocks(*given))):
        with pytest.raises(CheckpointError, match=words) as caught:
            read(expr, CheckedSource(source, mapped.checks))
        assert caught.value.where == key


def test_a_scale_that_is_no_number_ends_a_compile_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(**WIDE)
    raw = config.model_dump(exclude_none=True)
    made, _ = stored(tensors_of(config), LAYOUTS["ct-int4-zeros"], 16)
    key = "model.layers.2.mlp.experts.5.up_proj.weight_scale"
    made[key] = np.full_like(made[key], np.nan)
    model = folder(tmp_path / "model", config_of(raw, LAYOUTS["ct-int4-zeros"], 16), made)
    line = ["compile", str(model), "--backend", "reference", "-o", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["dsc", *line])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert key in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


CONFIGS: dict[str, tuple[str, Damage, str]] = {
    "3 bits": ("gptq", _weights(bits=3), "GPTQ weights of such codes are not read .*bits 3"),
    "2 bits packed": ("ct-int4", _weights(num_bits=2), "2-bit int weights are not read"),
    "marlin": ("gptq", _weights(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    "gemv": ("awq", _weights(version="gemv"), "version 'gemv'"),
    "8 bits of awq": ("awq", _weights(bits=8), "AWQ weights of such codes"),
    "rules": ("gptq", _weights(dynamic={"+:.*mlp.*": {"bits": 8}}), r"dynamic '\+:"),
    "no size": ("gptq", _weights(group_size=None), "group_size is missing"),
    "a size in words": ("ct-int4", _weights(group_size="32"), "group_size must be a whole number"),
    "a strategy of tokens": ("ct-int4", _weights(strategy="token"), "4-bit int weights"),
    "sparse": ("ct-int4", lambda t, q: q.update(format="marlin-24"), "format 'marlin-24'"),
}


@pytest.mark.parametrize(("layout", "damage", "words"), CONFIGS.values(), ids=CONFIGS.keys())
def test_schemes_that_are_not_read_are_named(layout: str, damage: Damage, words: str) -> None:
    tensors, quantization = of_one_weight(layout)
    damage(tensors, quantization)
    with pytest.raises(ConfigError, match=words):
        facts(quantization_config=quantization)


def test_modules_left_out_by_a_rule_are_no_fault() -> None:
    tensors, quantization = of_one_weight("gptq")
    numbers_of(tensors, quantization | {"dynamic": {"-:.*self_attn.*": {}}}, (8, 64))
    plain = {"weight": np.zeros((8, 64), np.float32)}
    for layout in ("gptq", "awq", "ct-int4", "w8a8"):
        expr, source = numbers_of(plain, told(layout), (8, 64))
        assert np.array_equal(evaluate(expr, source).numpy(), plain["weight"]), layout
