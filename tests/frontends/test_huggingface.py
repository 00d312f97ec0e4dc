"""A checkpoint folder: which weights reach which parameters, and what the module computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.parity import PLAIN, randomise
from dsc.errors import CheckpointError, ConfigError
from dsc.frontends.causal_lm import (
    CausalLMStep,
    parameter_types,
)
from dsc.frontends.conversions import Conversions, conversions_of
from dsc.frontends.family import ModelConfig, load_config, states_of
from dsc.frontends.huggingface import (
    CheckpointModel,
    load_checkpoint,
    stock_causal_lm,
)
from dsc.frontends.names import map_weights
from dsc.frontends.signature import Extents
from dsc.frontends.states import discover
from dsc.frontends.stock import cast_parameters
from dsc.ir.safetensors import SafetensorsFile, open_safetensors
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, evaluate, sources
from dsc.models import v3
from dsc.models.configs import TINY_CHECKPOINT
from tests.family import advance, empty_caches, facts, small, small_v2, stock

FP8 = Path(__file__).parents[1] / "data" / "tiny-v3-fp8"
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
Tensors = dict[str, Tensor]


def save(folder: Path, config: ModelConfig, tensors: Tensors, **extra: Any) -> Path:
    """Write a checkpoint folder that holds `tensors`."""
    raw = config.model_dump(exclude_none=True) | extra
    (folder / "config.json").write_text(json.dumps(raw))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors")
    return folder


def official(config: ModelConfig, seed: int = 0) -> Tensors:
    """Random weights under the official names: each expert's projections on their own."""
    split: Tensors = {}
    for name, tensor in stock(config, seed).state_dict().items():
        prefix, _, last = name.rpartition(".")
        if not prefix.endswith("mlp.experts"):
            split[name] = tensor.clone()
            continue
        for expert, matrix in enumerate(tensor):
            if last == "down_proj":
                split[f"{prefix}.{expert}.down_proj.weight"] = matrix.clone()
                continue
            for half, part in zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True):
                split[f"{prefix}.{expert}.{half}.weight"] = part.clone()
    return split


def greedy(model: CheckpointModel, text: str, count: int) -> str:
    """Greedy continuation, one token a step, through the step's own caches."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    step, past = model.load(), empty_caches(load_config(model.folder))
    ids = tokenizer.encode(text).ids
    written: list[int] = []
    for _ in range(count):
        logits, past = advance(step, torch.tensor([ids]), past)
        ids = [int(logits[0, -1].argmax())]
        written += ids
    return str(tokenizer.decode(written))


# --- whole checkpoints ---------------------------------------------------------------------------


def test_official_names_load_as_transformers_loads_them() -> None:
    from transformers import AutoModelForCausalLM

    model = load_checkpoint(TINY_CHECKPOINT)
    assert model.dtype is DType.bf16
    expected = AutoModelForCausalLM.from_pretrained(TINY_CHECKPOINT, dtype=torch.bfloat16)
    found = model.load().state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_the_tiny_model_writes_its_sentence() -> None:
    model = load_checkpoint(TINY_CHECKPOINT, DType.f32)
    expected = " of the LORD, and the LORD commanded Moses.\nAnd Moses said unto the LORD, Behold,"
    assert greedy(model, "In the beginning", 22).startswith(expected)


def test_nothing_is_read_before_it_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(SafetensorsFile, "array", read)
    step = load_checkpoint(TINY_CHECKPOINT).build()
    assert all(parameter.is_meta for parameter in step.parameters())


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "per expert"])
def test_reads_what_transformers_saves(tmp_path: Path, stacked: bool) -> None:
    config = small()
    reference = randomise(stock_causal_lm(config, device="cpu"))
    save_pretrained: Any = reference.save_pretrained
    save_pretrained(tmp_path, save_original_format=not stacked)
    model = load_checkpoint(tmp_path, DType.f32)
    stored = "model.layers.1.mlp.experts.gate_up_proj" in model.source.types
    assert stored is stacked
    assert load_config(tmp_path).rope_parameters == config.rope_parameters
    found = model.load().state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_the_same_weights_serve_models_v3(tmp_path: Path) -> None:
    config = small()
    checkpoint = load_checkpoint(save(tmp_path, config, official(config)), DType.f32)
    ours = v3.build(config)
    table = conversions_of(checkpoint.build().stock())
    own = checkpoint.mapped(parameter_types(ours), conversions=table)
    assert own.weights == checkpoint.weights
    state = {name: evaluate(expr, own.source) for name, expr in own.weights.items()}
    ours.load_state_dict(state, strict=True)
    ids = torch.arange(12)[None]
    expected, _ = advance(checkpoint.load(), ids, empty_caches(config))
    found, _ = advance(ours, ids, empty_caches(config))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_weights_are_cast_to_the_asked_dtype_and_biases_stay_fp32(tmp_path: Path) -> None:
    config = small()
    model = load_checkpoint(save(tmp_path, config, official(config)), DType.bf16)
    state = model.load().state_dict()
    assert state["lm_head.weight"].dtype == torch.bfloat16
    assert state["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert load_checkpoint(tmp_path).dtype is DType.f32  # the stored one, config.json names none


def test_loaded_weights_are_writable_and_the_file_stays() -> None:
    model = load_checkpoint(TINY_CHECKPOINT)
    model.load().get_parameter("model.norm.weight").zero_()
    assert model.source.load("model.norm.weight").abs().min() > 0


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    config = small(tie_word_embeddings=True)
    tensors = official(config)
    del tensors["lm_head.weight"]
    head = tensors["model.embed_tokens.weight"].clone()
    model = load_checkpoint(save(tmp_path, config, tensors))
    assert model.weights["lm_head.weight"] == model.weights["model.embed_tokens.weight"]
    with_head = load_checkpoint(save(tmp_path, config, tensors | {"lm_head.weight": head}))
    assert "lm_head.weight" in with_head.notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_head_that_is_tied_may_not_differ(dtype: torch.dtype) -> None:
    """transformers takes a head that differs, although the configuration ties it."""
    embedding = torch.arange(24.0).view(8, 3)
    declared = dict.fromkeys(("embed", "head"), TensorType(DType.f32, (8, 3)))
    table = Conversions(tied={"head": "embed"})

    def ignored(head: Tensor) -> tuple[str, ...]:
        source = DictSource({"embed": embedding, "head": head})
        return map_weights(declared, source, facts(), conversions=table).ignored

    assert ignored(embedding.to(dtype)) == ("head",)
    other = embedding.to(dtype, copy=True)
    other[7, 2] = -1.0
    with pytest.raises(CheckpointError, match=r"head is tied to embed .* differ from row 7 on"):
        ignored(other)


def test_code_in_the_folder_is_never_imported(tmp_path: Path) -> None:
    config = small()
    (tmp_path / "modeling_deepseek.py").write_text("raise SystemExit('imported')")
    auto_map = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    model = load_checkpoint(save(tmp_path, config, official(config), auto_map=auto_map))
    model.build()
    assert model.notes == ("code of the checkpoint is never imported: modeling_deepseek.py",)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing"):
        load_checkpoint(tmp_path)


# --- tensors that do not fit ---------------------------------------------------------------------

EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
NORM = "model.layers.1.self_attn.kv_a_layernorm.weight"


def lose_expert(tensors: Tensors) -> None:
    del tensors[EXPERT]


def lose_norm(tensors: Tensors) -> None:
    del tensors[NORM]


def misshape(tensors: Tensors) -> None:
    tensors[NORM] = torch.ones(17)


def transpose_expert(tensors: Tensors) -> None:
    tensors[EXPERT] = tensors[EXPERT].t()


def add(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.indexer.wk.weight"] = torch.ones(2, 2)


def one_expert_too_many(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.experts.8.up_proj.weight"] = tensors[EXPERT].clone()


def integers(tensors: Tensors) -> None:
    tensors[NORM] = torch.ones(16, dtype=torch.int32)


def stray_scale(tensors: Tensors) -> None:
    tensors["lm_head.weight_scale_inv"] = torch.ones(1, 1)


def fp8_unannounced(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_expert, [f"missing tensors (1):\n  {EXPERT} : f32[16,32]"]),
        (lose_norm, [f"missing tensors (1):\n  {NORM} : f32[16]"]),
        (misshape, [f"{NORM}: expected f32[16], found f32[17]"]),
        (transpose_expert, [f"{EXPERT}: expected f32[16,32], found f32[32,16]"]),
        (add, ["unexpected tensors (1):\n  model.layers.1.self_attn.indexer.wk.weight : f32[2,2]"]),
        (one_expert_too_many, ["unexpected tensors (1):\n  model.layers.2.mlp.experts.8.up_proj"]),
        (integers, [f"{NORM}: expected f32[16], found i32[16]"]),
        (
            stray_scale,
            ["lm_head.weight: f32[97,32] is not FP8 (e4m3), yet has lm_head.weight_scale"],
        ),
        (fp8_unannounced, ["lm_head.weight: f8e4m3[97,32]", "no quantization_config"]),
    ],
)
def test_names_every_tensor_that_does_not_fit(
    tmp_path: Path, damage: Callable[[Tensors], None], words: list[str]
) -> None:
    config = small()
    tensors = official(config)
    damage(tensors)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(save(tmp_path, config, tensors))
    for part in words:
        assert part in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_all_faults_are_told_together(tmp_path: Path) -> None:
    config = small()
    tensors = official(config)
    for damage in (lose_expert, misshape, add):
        damage(tensors)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(save(tmp_path, config, tensors))
    told = str(caught.value)
    assert all(kind in told for kind in ("missing tensors", "do not fit", "unexpected tensors"))


def test_one_faulty_expert_is_one_fault(tmp_path: Path) -> None:
    """Whatever an expert lacks, its neighbours are in order and are not told."""
    for lost in (".up_proj.weight", ".up_proj.weight_scale_inv", ".down_proj.weight_scale_inv"):
        config = small()
        tensors = quantised(official(config), (128, 128))
        del tensors[f"model.layers.1.mlp.experts.3{lost}"]
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(save(tmp_path, config, tensors, quantization_config=FP8_CONFIG))
        told = caught.value.what.splitlines()
        assert told[0] == "missing tensors (1):"
        assert f"model.layers.1.mlp.experts.3{lost}" in told[1]
        assert len(told) == 2


def test_one_cause_in_every_expert_is_one_line(tmp_path: Path) -> None:
    config = small()
    tensors = official(config)
    for name in [name for name in tensors if ".mlp.experts." in name]:
        if name.endswith("down_proj.weight"):
            tensors[name] = tensors[name].t()
        elif name.endswith("up_proj.weight"):
            tensors[name.replace("up_proj", "w3")] = tensors.pop(name)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(save(tmp_path, config, tensors))
    heads = ["tensors that do not fit (16):", "missing tensors (16):", "unexpected tensors (16):"]
    told = caught.value.what.splitlines()
    assert told[0::2] == heads
    assert all("(and 15 of other layers or experts)" in line for line in told[1::2])


def test_a_prefix_of_all_names_is_one_sentence(tmp_path: Path) -> None:
    config = small()
    tensors = {f"language_model.{name}": t for name, t in official(config).items()}
    with pytest.raises(CheckpointError, match=r"lie under 'language_model\.'") as caught:
        load_checkpoint(save(tmp_path, config, tensors))
    assert len(str(caught.value).splitlines()) == 3


# --- FP8 -----------------------------------------------------------------------------------------


def quantised(tensors: Tensors, block: tuple[int, int], suffix: str = "_scale_inv") -> Tensors:
    """The matrices of all layers in FP8 beside scales by block; routers and the rest as they are.

    Stacked matrices `[E, n, k]` get stacked scales.
    """
    made: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or ".layers." not in name or name.endswith("mlp.gate.weight"):
            made[name] = tensor
            continue
        *_, rows, columns = tensor.shape
        table = (-(-rows // block[0]), -(-columns // block[1]))
        random = torch.Generator().manual_seed(len(made))
        scale = torch.rand(*tensor.shape[:-2], *table, generator=random) * 0.1 + 0.01
        made[name] = (tensor * 4).to(torch.float8_e4m3fn)
        made[name + suffix] = scale
    return made


def dequantised(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """W = weight * scale by the definition, element by element."""
    rows, columns = torch.arange(weight.shape[0]), torch.arange(weight.shape[1])
    return weight.float() * scale[rows // block[0]][:, columns // block[1]]


@pytest.mark.parametrize(
    ("shape", "block"),
    [((576, 256), (128, 128)), ((100, 130), (128, 128)), ((7, 5), (2, 4)), ((4, 8), (2, 4))],
)
def test_09_partial_fp8_blocks(shape: tuple[int, int], block: tuple[int, int]) -> None:
    """kv_a of V3 has N = 576 = 4.5 blocks: the last block of rows is half as high."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random).to(torch.float8_e4m3fn)
    blocks = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scale = torch.rand(blocks, generator=random) + 0.5
    quantization = FP8_CONFIG | {"weight_block_size": list(block)}
    config = facts(quantization_config=quantization, tie_word_embeddings=False)
    source = DictSource({"w.weight": weight, "w.weight_scale_inv": scale})
    declared = {"w.weight": TensorType(DType.f32, shape)}
    mapped = map_weights(declared, source, config)
    found = evaluate(mapped.weights["w.weight"], source)
    assert torch.equal(found, dequantised(weight, scale, block))

    wrong = DictSource({"w.weight": weight, "w.weight_scale_inv": scale[:-1]})
    with pytest.raises(CheckpointError, match=r"w.weight_scale_inv: expected f32"):
        map_weights(declared, wrong, config)
    with pytest.raises(CheckpointError, match=r"missing tensors \(1\):\s+w.weight_scale_inv"):
        map_weights(declared, DictSource({"w.weight": weight}), config)


def test_16_scale_and_weight_in_different_shards() -> None:
    model = load_checkpoint(FP8)
    files = open_safetensors(FP8).files
    split = []
    for name, expr in model.weights.items():
        keys = [leaf.key for leaf in sources(expr)]
        scales = [key for key in keys if key.endswith("_scale_inv")]
        for scale in scales:
            weight = scale.removesuffix("_scale_inv")
            if files[scale].path != files[weight].path:
                split.append(name)
                expected = dequantised(
                    model.source.load(weight), model.source.load(scale), (128, 128)
                )
                found = evaluate(expr, model.source)
                assert torch.equal(found, expected.bfloat16())
    assert split == [f"model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in (0, 1, 2)]


def test_fp8_weights_approach_those_they_were_made_of() -> None:
    """Every quantised weight is within e4m3's error of the bf16 checkpoint; the rest is equal."""
    exact, quantised = load_checkpoint(TINY_CHECKPOINT), load_checkpoint(FP8)
    assert exact.weights.keys() == quantised.weights.keys()
    for name, expr in exact.weights.items():
        expected = evaluate(expr, exact.source).float()
        found = evaluate(quantised.weights[name], quantised.source).float()
        error = (found - expected).norm() / expected.norm()
        assert error < (0.035 if expected.ndim > 1 else 1e-6), name


# --- multi-token prediction ----------------------------------------------------------------------


def test_15_mtp_layer_is_ignored_and_told() -> None:
    model = load_checkpoint(TINY_CHECKPOINT)
    mine = {leaf.key for expr in model.weights.values() for leaf in sources(expr)}
    assert not any(key.startswith("model.layers.4.") for key in mine)
    assert mine | set(model.unused_mtp) == set(model.source.types)
    assert len(model.unused_mtp) == 68
    assert "layer 4 predicts further tokens (MTP); its 68 tensors" in model.notes[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 5}, "layer 4 predicts further tokens (MTP: it has model.layers.4."),
        ({"num_hidden_layers": 3}, "unexpected tensors (62):\n  model.layers.3."),
    ],
    ids=["used as a decoder layer", "a decoder layer used as MTP"],
)
def test_15_mtp_layer_is_never_misloaded(
    tmp_path: Path, fields: dict[str, int], words: str
) -> None:
    """A config that counts layers otherwise than the weights is refused."""
    raw = json.loads((TINY_CHECKPOINT / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | fields))
    shutil.copy(TINY_CHECKPOINT / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize("announced", [0, None, 1])
def test_15_mtp_layer_is_left_out_whether_or_not_it_is_announced(
    tmp_path: Path, announced: int | None
) -> None:
    raw = json.loads((TINY_CHECKPOINT / "config.json").read_text())
    raw["num_nextn_predict_layers"] = announced
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shutil.copy(TINY_CHECKPOINT / "model.safetensors", tmp_path)
    model, whole = load_checkpoint(tmp_path), load_checkpoint(TINY_CHECKPOINT)
    assert model.weights == whole.weights
    assert len(model.unused_mtp) == 68
    told = "num_nextn_predict_layers does not announce" in model.notes[0]
    assert told is (not announced)


def test_15_a_plain_layer_in_the_place_of_mtp_is_unexpected(tmp_path: Path) -> None:
    """The announced MTP layer must have what joins hidden state and embedding."""
    config = small(num_nextn_predict_layers=1)
    tensors = official(config)
    tensors["model.layers.3.input_layernorm.weight"] = torch.ones(32)
    with pytest.raises(CheckpointError, match=r"unexpected tensors \(1\):\s+model.layers.3"):
        load_checkpoint(save(tmp_path, config, tensors))
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(32, 64)
    assert len(load_checkpoint(save(tmp_path, config, tensors)).unused_mtp) == 2


def test_layers_that_are_not_there_are_one_sentence(tmp_path: Path) -> None:
    config = small(num_hidden_layers=2)
    save(tmp_path, config, official(config))
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 9}))
    with pytest.raises(CheckpointError, match="is 9, and the weights end with layer 1") as caught:
        load_checkpoint(tmp_path)
    assert caught.value.where == str(tmp_path / "config.json")
    assert "set num_hidden_layers to 2" in str(caught.value.hint)


# --- the module that is traced -------------------------------------------------------------------

FAMILY = {
    "v3": small(num_hidden_layers=2),
    "v2_lite": small_v2(
        num_hidden_layers=2, q_lora_rank=None, n_group=1, topk_group=1, rope_parameters=PLAIN
    ),
    "v2": small_v2(num_hidden_layers=2, topk_method="group_limited_greedy", v_head_dim=20),
}


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY.keys())
def test_one_export_of_stock_serves_all_extents(config: ModelConfig) -> None:
    """One non-strict trace, four axes symbolic: bit-equal to eager where dims are 0 or 1."""
    step, signature = stock(config), states_of(config)
    shapes = signature.dynamic_shapes()
    program = torch.export.export(
        step, signature.example_inputs(), dynamic_shapes=shapes, strict=False
    )
    traced = program.module()
    for batch, new, past in ((1, 1, 9), (2, 1, 3), (1, 8, 0), (1, 1, 0)):
        inputs = signature.example_inputs(Extents(batch, new, past, 1), seed=batch + new + past)
        with torch.no_grad():
            expected, found = step(*inputs), traced(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(program.graph_signature.user_inputs) == len(signature.input_names())
    assert len(program.graph_signature.user_outputs) == len(signature.output_names())


def test_ragged_export_equals_its_eager_self() -> None:
    config = small(num_hidden_layers=2)
    step, signature = stock(config), states_of(config)
    shapes = signature.dynamic_shapes()
    traced = torch.export.export(
        step, signature.example_inputs(), dynamic_shapes=shapes, strict=False
    ).module()
    inputs = list(signature.example_inputs(Extents(3, 2, 4, 1)))
    inputs[2] = torch.tensor([4, 0, 2])
    with torch.no_grad():
        expected, found = step(*inputs), traced(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_step_equals_the_stock_forward() -> None:
    """Through the step, in chunks, the stock model gives what it gives alone and at once."""
    config = small()
    step = stock(config)
    alone: Any = randomise(stock_causal_lm(config, device="cpu"))
    ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = alone(input_ids=ids).logits
    past, parts = empty_caches(config, 2), []
    for chunk in torch.split(ids, [11, 12, 1], dim=1):
        logits, past = advance(step, chunk, past)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)


def test_export_on_meta_records_real_frequencies() -> None:
    config = small(num_hidden_layers=2)
    step = CausalLMStep(stock_causal_lm(config, DType.bf16))
    inputs = step.signature.example_inputs(device="meta")
    shapes = step.signature.dynamic_shapes()
    program = torch.export.export(step, inputs, dynamic_shapes=shapes, strict=False)
    constants = program.constants
    expected = v3.inverse_frequencies(config.rope_parameters, config.qk_rope_head_dim)
    assert torch.equal(constants["model.rotary_emb.inv_freq"], expected)
    assert program.state_dict["model.layers.1.mlp.gate.e_score_correction_bias"].is_meta


def test_names_of_inputs_and_outputs() -> None:
    signature = states_of(small())
    assert signature.input_names()[:6] == (
        "input_ids",
        "positions",
        "lengths",
        "logits_at",
        "past.0.latent",
        "past.0.rope",
    )
    assert signature.output_names()[-1] == "present.2.rope"
    assert signature.cache_names()[1] == ("present.0.rope", "past.0.rope")
    assert len(signature.example_inputs()) == len(signature.input_names())
    assert discover(stock(small()).stock()) == signature.states


def test_casting_leaves_buffers_alone() -> None:
    model = cast_parameters(v3.build(small()), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_what_to_compute_in_is_asked_where_nothing_says_it(tmp_path: Path) -> None:
    config = small()
    tensors = official(config)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].double()
    save(tmp_path, config, tensors)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"names no dtype.* is stored in f64\n.*\n.*--dtype"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, DType.bf16).dtype is DType.bf16
