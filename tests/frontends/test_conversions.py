"""transformers' tables as data: what is saved of any type comes back bit for bit, read once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.names import declared, mapped, quiet, small_model, table_of
from dsc.errors import CheckpointError
from dsc.frontends.conversion_steps import (
    Alternate,
    Cut,
    Join,
    Making,
    Other,
    RopeRows,
    Stack,
    Step,
    Transpose,
    made_by,
    step_of,
    wanted_by,
)
from dsc.frontends.conversions import Conversions, Converter, Renaming, natural
from dsc.frontends.facts import Facts
from dsc.frontends.huggingface import load_checkpoint
from dsc.frontends.names import map_weights
from dsc.ir.arrays import Array, array_of
from dsc.ir.op import type_of
from dsc.ir.safetensors import open_safetensors
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, Source, WeightSource, evaluate

TYPES = (
    "llama",  # names are equal
    "gpt2",  # the base model is saved under a name of its own; tied
    "gemma3_text",  # tied
    "qwen3_moe",  # experts one by one
    "mixtral",  # w1, w2, w3
    "gpt_oss",  # experts stacked, with biases
    "granitemoe",  # renamed parts
    "hrm_text",  # one stored tensor becomes several
    "kimi_linear",  # convolutions joined
    "inkling2_text",  # places of a fused tensor, numbers that are shifted
    "dots3_note_text",  # a table of a part of the model
)
Tensors = dict[str, Tensor]


class Counted(WeightSource):
    """A source that counts how often each tensor is read."""

    def __init__(self, tensors: Tensors) -> None:
        self.below = DictSource(tensors)
        self.types = self.below.types
        self.reads: Counter[str] = Counter()

    def load(self, key: str) -> Tensor:
        self.reads[key] += 1
        return self.below.load(key)

    def array(self, key: str, rows: slice = slice(None)) -> Array:
        return array_of(self.load(key))[rows]


@cache
def model_of(model_type: str) -> Any:
    return small_model(model_type)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `save_pretrained` writes of a type, by name."""

    @cache
    def tensors(model_type: str) -> Tensors:
        folder = tmp_path_factory.mktemp(model_type)
        with quiet():
            model_of(model_type).save_pretrained(folder)
        found: Tensors = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                found |= {key: opened.get_tensor(key) for key in opened.keys()}
        return found

    return lambda model_type: dict(tensors(model_type))


@pytest.mark.parametrize("model_type", TYPES)
def test_what_transformers_saves_comes_back_and_is_read_when_it_is_asked_for(
    model_type: str, saved: Any
) -> None:
    model, source = model_of(model_type), Counted(saved(model_type))
    found = mapped(model, source)
    assert not source.reads
    assert found.mtp == found.ignored == found.left_out == found.others == ()
    for name, tensor in model.state_dict().items():
        assert torch.equal(evaluate(found.weights[name], source), tensor), name
    assert source.reads.keys() == source.types.keys()


def test_names_differ_where_they_are_said_to(saved: Any) -> None:
    """The tables are at work: without them the same tensors are no model."""
    for model_type in TYPES[3:]:
        if model_type == "gpt_oss":
            continue
        model, source = model_of(model_type), DictSource(saved(model_type))
        with pytest.raises(CheckpointError, match=r"missing|all tensors lie under"):
            map_weights(declared(model), source, Facts(""), conversions=Conversions(base="model"))


def test_the_layout_of_transformers_itself_is_read_too() -> None:
    for model_type in ("qwen3_moe", "mixtral", "hrm_text"):
        model = model_of(model_type)
        state = model.state_dict()
        found = mapped(model, DictSource(state))
        assert found.weights == {name: Source(name, type_of(t)) for name, t in state.items()}


def test_a_base_model_without_its_head_and_its_prefix_is_read() -> None:
    model = model_of("gpt2")
    bare = {n.removeprefix("transformer."): t for n, t in model.state_dict().items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    found = mapped(model, DictSource(bare))
    assert found.left_out == ("h.0.attn.bias",)
    assert found.ignored == ("lm_head.weight",)
    del bare["lm_head.weight"]
    weights = mapped(model, DictSource(bare)).weights
    assert weights["lm_head.weight"] == weights["transformer.wte.weight"]
    bare["lm_head.weight"] = bare.pop("wte.weight")
    weights = mapped(model, DictSource(bare)).weights
    assert weights["transformer.wte.weight"] == weights["lm_head.weight"]


def test_a_table_comes_back_from_json_and_needs_neither_torch_nor_transformers() -> None:
    for model_type in TYPES:
        table = table_of(model_of(model_type))
        assert Conversions.from_json(json.loads(json.dumps(table.to_json()))) == table
    kept = json.dumps(table_of(model_of("qwen3_moe")).to_json())
    code = (
        "import json, sys\n"
        "from dsc.frontends.conversions import Conversions\n"
        "from dsc.frontends.names import map_weights\n"
        "from dsc.frontends.facts import Facts\n"
        "from dsc.ir.types import DType, TensorType as T\n"
        "from dsc.ir.weights import MetaSource\n"
        f"table = Conversions.from_json(json.loads({kept!r}))\n"
        "name = 'model.layers.0.mlp.experts.'\n"
        "each = {f'{name}{e}.down_proj.weight': T(DType.f32, (4, 6)) for e in range(3)}\n"
        "stacked = {name + 'down_proj': T(DType.f32, (3, 4, 6))}\n"
        "found = map_weights(stacked, MetaSource(each), Facts('qwen3_moe'), conversions=table)\n"
        "assert len(found.weights[name + 'down_proj'].args) == 3\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- faults: the one cause first -----------------------------------------------------------------

EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


def told(model_type: str, tensors: Tensors) -> list[str]:
    """The lines of the error for a damaged checkpoint."""
    with pytest.raises(CheckpointError) as caught:
        mapped(model_of(model_type), DictSource(tensors))
    return caught.value.what.splitlines()


def test_a_missing_expert_is_named_and_shortens_nothing(saved: Any) -> None:
    tensors = saved("qwen3_moe")
    kind = type_of(tensors.pop(EXPERT))
    assert told("qwen3_moe", tensors) == ["missing tensors (1):", f"  {EXPERT} : {kind}"]
    tensors = saved("qwen3_moe")
    last = max((n for n in tensors if ".0.mlp.experts." in n and "down" in n), key=natural)
    del tensors[last]
    assert told("qwen3_moe", tensors)[1].startswith(f"  {last} : ")


def test_an_expert_of_another_type_is_named_as_it_is_stored(saved: Any) -> None:
    tensors = saved("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    kind = type_of(tensors.pop(name))
    assert told("mixtral", tensors) == ["missing tensors (1):", f"  {name} : {kind}"]


def test_a_renamed_tensor_is_one_sentence(saved: Any) -> None:
    tensors = saved("qwen3_moe")
    tensors["model.layers.0.mlp.experts.3.w3.weight"] = tensors.pop(EXPERT)
    (line,) = told("qwen3_moe", tensors)
    assert line.startswith(f"{EXPERT} : ")
    assert line.endswith("is missing, and model.layers.0.mlp.experts.3.w3.weight is there in "
                         "its place")  # fmt: skip
    tensors = {n.replace(".layers.", ".blocks."): t for n, t in saved("llama").items()}
    (line,) = told("llama", tensors)
    assert "model.layers." in line
    assert "model.blocks." in line
    assert f"(as are {sum('.blocks.' in n for n in tensors) - 1} more)" in line


def test_a_wrong_shape_is_one_line_whatever_comes_of_it(saved: Any) -> None:
    tensors = saved("qwen3_moe")
    found = tensors[EXPERT] = tensors[EXPERT][:-1]
    lines = told("qwen3_moe", tensors)
    assert lines[0] == "tensors that do not fit (1):"
    assert lines[1].startswith(f"  {EXPERT}: expected f32[")
    assert lines[1].endswith(f"found {type_of(found)}")
    assert len(lines) == 2
    tensors = saved("llama")
    tensors = {n: t[1:] if n.endswith("mlp.up_proj.weight") else t for n, t in tensors.items()}
    assert len(told("llama", tensors)) == 2


def test_an_extra_tensor_is_one_line(saved: Any) -> None:
    tensors = saved("qwen3_moe")
    extra = max((n for n in tensors if n.endswith("up_proj.weight")), key=natural)
    count = len({n.split(".")[5] for n in tensors if ".0.mlp.experts." in n})
    other = f"model.layers.0.mlp.experts.{count}.up_proj.weight"
    tensors[other] = tensors[extra]
    kind = type_of(tensors[extra])
    assert told("qwen3_moe", tensors) == ["unexpected tensors (1):", f"  {other} : {kind}"]


def test_a_damaged_prefix_is_one_sentence(saved: Any) -> None:
    tensors = {n.replace("model.", "modell.", 1): t for n, t in saved("llama").items()}
    (line,) = told("llama", tensors)
    assert line.startswith(f"{len(tensors) - 1} of {len(tensors)} tensors lie under 'modell.'")


def test_all_of_one_part_missing_is_one_line_a_kind(saved: Any) -> None:
    tensors = {n: t for n, t in saved("qwen3_moe").items() if not n.endswith(".up_proj.weight")}
    head, line = told("qwen3_moe", tensors)
    gates = sum("gate_proj" in n for n in tensors)
    assert head == f"missing tensors ({gates}):"
    assert line.startswith("  model.layers.0.mlp.experts.0.up_proj.weight : ")
    assert line.endswith(f"(and {gates - 1} of other layers or experts)")


def test_what_a_class_leaves_out_is_told_but_no_layer_is(saved: Any) -> None:
    """The class of GLM-4.5 leaves out layer 46 by its number, whatever it is."""
    tensors = saved("llama") | {"model.layers.46.mlp.up_proj.weight": torch.ones(2, 2)}
    tensors["mtp.norm.weight"] = torch.ones(2)
    model = model_of("llama")
    table = replace(table_of(model), left_out=(r"model\.layers\.46.*", "^mtp"))
    two = Facts("", num_hidden_layers=2)
    with pytest.raises(CheckpointError) as caught:
        map_weights(declared(model), DictSource(tensors), two, conversions=table)
    told = caught.value.what.splitlines()
    assert told == ["unexpected tensors (1):", "  model.layers.46.mlp.up_proj.weight : f32[2,2]"]
    tensors["model.layers.46.eh_proj.weight"] = torch.ones(2, 4)
    found = map_weights(declared(model), DictSource(tensors), two, conversions=table)
    assert (len(found.mtp), found.left_out) == (2, ("mtp.norm.weight",))


# --- larger models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "base"),
    [("language_model.", "language_model.model."), ("", "model.language_model."), ("", "model.")],
    ids=["all under a prefix", "a prefix inside", "beside"],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_larger_model_gives_its_language_model(
    model_type: str, head: str, base: str, saved: Any
) -> None:
    model = model_of(model_type)
    inside = {
        base + n.removeprefix("model.") if n.startswith("model.") else head + n: t
        for n, t in saved(model_type).items()
    }
    beside = {
        "vision_tower.layers.0.self_attn.q_proj.weight": torch.ones(3, 3),
        "multi_modal_projector.linear_1.weight": torch.ones(2, 2),
    }
    source = DictSource(inside | beside)
    found = map_weights(
        declared(model), source, Facts(""), conversions=table_of(model), wrapper="llava"
    )
    assert sorted(found.others) == sorted(beside)
    for name, tensor in model.state_dict().items():
        assert torch.equal(evaluate(found.weights[name], source), tensor), name
    lost = next(name for name in inside if name.endswith("input_layernorm.weight"))
    del inside[lost]
    with pytest.raises(CheckpointError, match=r"missing tensors \(1\)"):
        map_weights(declared(model), DictSource(inside | beside), Facts(""),
                    conversions=table_of(model), wrapper="llava")  # fmt: skip


def folder_of(path: Path, raw: dict[str, Any], tensors: Tensors) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    return path


def test_a_folder_of_a_larger_model_tells_what_it_leaves_out(tmp_path: Path, saved: Any) -> None:
    model = model_of("qwen3_moe")
    raw = {"model_type": "kimi_k25", "text_config": model.config.to_dict(),
           "vision_config": {"model_type": "moonvit"}}  # fmt: skip
    tensors = {f"language_model.{n}": t for n, t in saved("qwen3_moe").items()}
    tensors["vision_tower.encoder.blocks.0.wqkv.weight"] = torch.ones(3, 3)
    tensors["mm_projector.proj.0.weight"] = torch.ones(2, 2)
    found = load_checkpoint(folder_of(tmp_path, raw, tensors), DType.f32)
    assert found.notes == (
        "of the kimi_k25 the language model alone is compiled; left out are 2 tensors of "
        "mm_projector.proj, vision_tower.encoder",
    )
    state = found.load().state_dict()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"^all tensors lie under 'language_model\.'"):
        load_checkpoint(folder_of(tmp_path, model.config.to_dict(), {
            n: t for n, t in tensors.items() if n.startswith("language_model.")
        }))  # fmt: skip


# --- the steps, each against transformers' own ---------------------------------------------------


def operations() -> dict[str, tuple[Any, list[str], list[str], dict[str, list[Tensor]]]]:
    from transformers import core_model_loading as core

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    return {
        "join": (core.Concatenate(1), ["a", "b"], ["t"], {"b": [drawn(3, 2)], "a": [drawn(3, 4)]}),
        "stack": (core.MergeModulelist(1), ["a"], ["t"], {"a": [drawn(3, 2), drawn(3, 2)]}),
        "chunk": (core.Chunk(0), ["a"], ["t", "u"], {"a": [drawn(5, 2)]}),
        "interleave": (core.Interleave(1), ["a"], ["t"], {"a": [drawn(2, 6)]}),
        "back": (core.Interleave(1, True), ["a"], ["t"], {"a": [drawn(2, 6)]}),
        "transpose": (core.Transpose(0, 1), ["a"], ["t"], {"a": [drawn(2, 6)]}),
        "rope": (core.PermuteForRope(), ["a"], ["t"], {"a": [drawn(8, 3)]}),
        "rope back": (core.PermuteForRope(inverse=True), ["a"], ["t"], {"a": [drawn(8)]}),
    }


@pytest.mark.parametrize("name", operations())
def test_each_step_makes_what_transformers_makes(name: str) -> None:
    operation, sources, targets, given = operations()[name]

    class Config:
        num_attention_heads = 2

    expected = operation.convert(
        {key: list(tensors) for key, tensors in given.items()}, source_patterns=sources,
        target_patterns=targets, config=Config(), full_layer_name="t", model=None,
    )  # fmt: skip
    step = step_of(operation, Config())
    tensors = {f"{key}{i}": t for key, each in given.items() for i, t in enumerate(each)}
    source = DictSource(tensors)
    leaves = {
        key: [Source(f"{key}{i}", source.types[f"{key}{i}"]) for i in range(len(each))]
        for key, each in given.items()
    }
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    making = Making(tuple(sources), tuple(targets), shapes)
    made = made_by([step], leaves, making)
    assert made.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(evaluate(made[key][0], source), tensor), key
    if name != "join":  # parts that differ in size cannot be told
        wanted = wanted_by([step], making, len(tensors))
        assert {key: each.shape for key, each in wanted.items()} == {
            key: tuple(each[0].shape) for key, each in given.items()
        }


def test_a_split_is_as_large_as_its_targets() -> None:
    making = Making(("qkv",), ("q", "k"), {"q": (4, 3), "k": (2, 3)})
    whole = Source("x", TensorType(DType.f32, (6, 3)))
    made = made_by([Cut(0, True)], {"qkv": [whole]}, making)
    assert [made[t][0].type.shape for t in making.targets] == [(4, 3), (2, 3)]
    assert wanted_by([Cut(0, True)], making, 1)["qkv"].shape == (6, 3)


@pytest.mark.parametrize("step", [Join(1), Stack(), Cut(0, True), Alternate(1), Transpose(0, 2),
                                  RopeRows(0, 4, True, ("q",)), Other(0, "X")])  # fmt: skip
def test_a_step_comes_back_from_json(step: Step) -> None:
    table = Conversions(converters=(Converter("(?P<g0>a)", ("b",), sources=("a",), steps=(step,)),))
    assert Conversions.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_a_step_that_is_not_known_is_told_with_its_tensor() -> None:
    table = Conversions(
        converters=(
            Converter("(?P<g0>^a$)", ("b",), sources=("a",), steps=(Other(0, "FoldNorm"),)),
        )
    )
    source = DictSource({"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match="makes b of it by FoldNorm") as caught:
        map_weights({"b": TensorType(DType.f32, (2,))}, source, Facts(""), conversions=table)
    assert caught.value.where == "a"


def test_a_pair_of_renamings_waits_for_its_first() -> None:
    """`norm0` to `norm1` and `norm1` to `norm2`: what is converted already is left alone."""
    pair = Renaming(r"(?P<g0>norm0)|(?P<g1>norm1)", ("norm1", "norm2"), paired=True)
    table = Conversions((pair,))
    apart = table.renamed(["a.norm0", "a.norm1"], {})
    assert [each.name for each in apart.values()] == ["a.norm1", "a.norm2"]
    assert [each.name for each in table.renamed(["a.norm1", "a.norm2"], {}).values()] == [
        "a.norm1", "a.norm2",
    ]  # fmt: skip


def test_numbers_in_names_are_ordered_as_numbers_however_long() -> None:
    names = ["a.10.b", "a.9.b", "a.b2", "a.b10", "a.b", "a." + "9" * 9999]
    assert sorted(names, key=natural) == [
        "a.9.b", "a.10.b", "a." + "9" * 9999, "a.b", "a.b2", "a.b10",
    ]  # fmt: skip


def test_open_files_are_mapped(tmp_path: Path) -> None:
    with quiet():
        model_of("qwen3_moe").save_pretrained(tmp_path)
    found = mapped(model_of("qwen3_moe"), open_safetensors(tmp_path))
    assert found.weights.keys() == model_of("qwen3_moe").state_dict().keys()
