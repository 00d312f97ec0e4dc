"""config.json is input from outside: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsc.errors import ConfigError, UnsupportedArchitecture
from dsc.frontends.family import MEMBERS, load_config, parse_config
from dsc.frontends.folder import MAX_CONFIG_BYTES, read_bounded
from dsc.frontends.stock import clean
from dsc.models.configs import CONFIGS
from dsc.strict_json import parse_object

V3: dict[str, Any] = json.loads(CONFIGS["671b"].read_text())


def changed(**fields: Any) -> dict[str, Any]:
    return V3 | fields


@pytest.mark.parametrize("name", CONFIGS)
def test_every_preset_is_valid(name: str) -> None:
    cfg = load_config(CONFIGS[name])
    assert cfg.model_type == "deepseek_v3"
    assert (cfg.scoring_func, cfg.topk_method) == ("sigmoid", "noaux_tc")


def test_v3_softmax_scale_has_yarn_squared() -> None:
    cfg = parse_config(V3)
    assert cfg.rope_parameters.softmax_scale_factor == pytest.approx(1.8738, abs=1e-4)
    assert cfg.softmax_scale == pytest.approx(0.1352, abs=1e-4)
    assert cfg.rope_parameters.cos_sin_scale == 1.0


@pytest.mark.parametrize("published", MEMBERS)
def test_known_architectures(published: str) -> None:
    router = {"scoring_func": None, "topk_method": None, "norm_topk_prob": None}
    cfg = parse_config(changed(model_type=published, **router))
    assert cfg.model_type == MEMBERS[published]
    assert cfg.norm_topk_prob is (cfg.model_type == "deepseek_v3")


@pytest.mark.parametrize("published", MEMBERS)
def test_experts_are_one_group_where_nothing_is_said(published: str) -> None:
    unsaid = ("scoring_func", "topk_method", "norm_topk_prob", "n_group", "topk_group")
    cfg = parse_config(changed(model_type=published, **dict.fromkeys(unsaid)))
    assert (cfg.n_group, cfg.topk_group) == (1, 1)


@pytest.mark.parametrize("published", ["llama", None, 3, "DeepseekV3ForCausalLM"])
def test_unknown_architecture_names_the_known_ones(published: object) -> None:
    with pytest.raises(UnsupportedArchitecture) as caught:
        parse_config(changed(model_type=published), "folder/config.json")
    told = str(caught.value)
    assert repr(published) in told
    assert "folder/config.json" in told
    assert all(name in told for name in MEMBERS)


def test_both_spellings_of_rope_agree() -> None:
    older = parse_config(V3)
    section = {key: value for key, value in V3["rope_scaling"].items() if key != "type"}
    newer = {**section, "rope_type": "yarn", "rope_theta": 10000}
    spelled = {key: value for key, value in V3.items() if not key.startswith("rope_")}
    assert parse_config(spelled | {"rope_parameters": newer}) == older
    assert older.rope_parameters.factor == 40


def test_betas_may_be_equal_as_in_kimi_k2() -> None:
    section = V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0}
    assert parse_config(changed(rope_scaling=section)).rope_parameters.beta_fast == 1


def test_no_rope_section_is_plain_rope() -> None:
    cfg = parse_config(changed(rope_scaling=None, rope_theta=50000))
    assert cfg.rope_parameters.rope_type == "default"
    assert cfg.rope_parameters.rope_theta == 50000
    assert cfg.softmax_scale == 192**-0.5


def test_dtype_in_both_spellings() -> None:
    assert parse_config(changed(torch_dtype="float16")).dtype == "float16"
    assert parse_config(changed(torch_dtype=None, dtype="float32")).dtype == "float32"


def test_fp8_blocks() -> None:
    published = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [64, 32],
    }
    quantization = clean(changed(quantization_config=published)).facts.quantization_config
    assert quantization is not None
    assert quantization.block == (64, 32)
    del published["weight_block_size"]
    quantization = clean(changed(quantization_config=published)).facts.quantization_config
    assert quantization is not None
    assert quantization.block == (128, 128)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", "7168", "hidden_size must be a whole number, found '7168'"),
        ("hidden_size", 0, "hidden_size must be above 0, found 0"),
        ("rms_norm_eps", float("inf"), "rms_norm_eps must be a finite number, found inf"),
        ("tie_word_embeddings", 1, "tie_word_embeddings must be true or false, found 1"),
        ("hidden_act", "gelu", "hidden_act must be 'silu', found 'gelu'"),
        ("eos_token_id", "x", "eos_token_id must be a whole number or a list, found 'x'"),
        ("rope_theta", "x", "rope_parameters.rope_theta must be a number, found 'x'"),
        ("vocab_size", None, "vocab_size is missing"),
    ],
)
def test_a_wrong_key_says_what_it_must_be(key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(changed(**{key: value}))
    assert caught.value.what == words
    assert caught.value.hint == "correct the file, or get it again"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": ({"hidden_size": "7168"}, "hidden_size"),
    "true for a number": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "a fraction": ({"num_attention_heads": 1.5}, "num_attention_heads"),
    "zero": ({"kv_lora_rank": 0}, "kv_lora_rank"),
    "negative": ({"vocab_size": -1}, "vocab_size"),
    "beyond bounds": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    "too many chosen": ({"num_experts_per_tok": 300}, r"num_experts_per_tok \(300\)"),
    "groups do not divide": ({"n_group": 7}, r"n_group \(7\) does not divide"),
    "too many groups kept": ({"topk_group": 9}, r"topk_group \(9\) exceeds n_group \(8\)"),
    "groups too small": (
        {"n_group": 256, "topk_group": 200},
        r"two experts.*n_group \(256\) leaves 1",
    ),
    "kept too few": ({"n_group": 128, "topk_group": 1}, "the 2 experts"),
    "odd rope": ({"qk_rope_head_dim": 63}, "must be even"),
    "grouped heads": ({"num_key_value_heads": 8}, "must equal num_attention_heads"),
    "softmax v3": ({"scoring_func": "softmax"}, "router scores by"),
    "other activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "sparse every other": ({"moe_layer_freq": 2}, "moe_layer_freq"),
    "other rope": ({"rope_scaling": {"type": "longrope"}}, "rope_type"),
    "rope is a list": ({"rope_scaling": [1]}, "rope section"),
    "rope by layer": ({"rope_scaling": {"full_attention": {"rope_type": "yarn"}}}, "rotate alike"),
    "two ropes": ({"rope_parameters": V3["rope_scaling"] | {"factor": 4}}, "different things"),
    "a scale and no type": ({"rope_scaling": {"factor": 4}}, "has factor and no rope_type"),
    "partly rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "yarn shrinks": (
        {"rope_scaling": V3["rope_scaling"] | {"factor": 0.5}},
        "rope_parameters.factor",
    ),
    "theta": ({"rope_theta": 0.5}, "rope_theta must exceed 1"),
    "betas": ({"rope_scaling": V3["rope_scaling"] | {"beta_fast": 0.5}}, "beta_fast"),
    "int4": ({"quantization_config": {"quant_method": "gptq"}}, "quant_method"),
    "block of one": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        "weight_block_size",
    ),
    "negative block": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, -1]}},
        "weight_block_size",
    ),
    "beyond any float": ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    "missing": ({"hidden_size": None}, "hidden_size"),
    "bias in mlp": ({"mlp_bias": True}, "mlp_bias"),
    "v2 normalises": (
        {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy"},
        "norm_topk_prob",
    ),
}


@pytest.mark.parametrize(("fields", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(fields: dict[str, Any], words: str) -> None:
    parse_config(V3)
    read = clean if "quantization_config" in fields else parse_config
    with pytest.raises(ConfigError, match=words):
        read(changed(**fields))


def test_all_faults_of_type_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(changed(hidden_size=-1, vocab_size="many"))
    assert "hidden_size" in str(caught.value)
    assert "vocab_size" in str(caught.value)


GARBAGE = {
    "empty": (b"", "not valid JSON"),
    "cut off": (b'{"a": ', "not valid JSON"),
    "not text": (b"\xff\xfe\x00", "no UTF-8 text: byte 0 is 0xff"),
    "an array": (b"[1, 2]", "expected a JSON object"),
    "a number": (b"7", "expected a JSON object"),
    "a key twice": (b'{"a": 1, "a": 2}', "'a' appears twice"),
    "a key twice inside": (b'{"b": {"a": 1, "a": 2}}', "'a' appears twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "a huge integer": (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "deep": (b"[" * 200_000, "nested too deeply"),
}


@pytest.mark.parametrize(("text", "words"), GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_told_with_its_file(tmp_path: Path, text: bytes, words: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(tmp_path)
    assert str(file) in str(caught.value)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(MAX_CONFIG_BYTES + 1)
    with pytest.raises(ConfigError, match="larger than the limit"):
        load_config(file)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load_config(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "yarn": {
        "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 0.7, "attention_factor": 1.1, "truncate": True,
    },
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "proportional": {"partial_rotary_factor": 0.5},
    "llama3": {
        "factor": 4.0, "original_max_position_embeddings": 1024, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}  # fmt: skip
"""A full section of every rope type that transformers has."""


def test_every_rope_type_of_transformers_is_held_against_its_own_validation() -> None:
    """Each section whole, and without each of its keys: refused where transformers refuses.

    What both accept has the same frequencies and the same scale of cos and sin; a type that is not
    computed is refused by its name.
    """
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    from dsc.models.v3 import inverse_frequencies

    assert ROPE_INIT_FUNCTIONS.keys() | {"default"} <= TYPES.keys()
    fields = {"max_position_embeddings": 4096, "qk_rope_head_dim": 64, "rope_theta": 10000.0}
    refused, computed = [], 0
    for kind, whole in TYPES.items():
        for lost in (None, *whole, "rope_type"):
            section = {"rope_type": kind, **whole}
            section = {key: value for key, value in section.items() if key != lost}
            raw = V3 | fields | {"rope_scaling": section}
            try:
                theirs = DeepseekV3Config(**fields, rope_scaling=dict(section))
            except Exception as problem:  # transformers raises KeyError, wrapped or not
                with pytest.raises(ConfigError) as caught:
                    parse_config(raw)
                assert lost is not None
                assert lost in str(problem)  # noqa: PT017 - what both say is compared
                assert lost in str(caught.value) or repr(kind) in str(caught.value)
                refused.append((kind, lost))
                continue
            if kind not in ("default", "yarn") or (lost == "rope_type" and whole):
                words = "no rope_type" if lost == "rope_type" else f"rope_type {kind!r}"
                if kind == "proportional" and lost == "rope_type":
                    continue  # of the family's keys it has none left: a plain section
                with pytest.raises(ConfigError, match=words):
                    parse_config(raw)
                continue
            ours = parse_config(raw).rope_parameters
            rotary = DeepseekV3RotaryEmbedding(theirs)
            torch.testing.assert_close(inverse_frequencies(ours, 64), rotary.inv_freq)
            assert ours.cos_sin_scale == pytest.approx(rotary.attention_scaling)
            computed += 1
    assert ("yarn", "factor") in refused
    assert computed >= 9


def test_a_context_before_yarn_is_derived_as_transformers_derives_it() -> None:
    section = {"rope_type": "yarn", "factor": 4}
    inside = section | {"original_max_position_embeddings": 512}
    for changes, expected in (
        ({"rope_scaling": section}, V3["max_position_embeddings"]),
        ({"rope_scaling": inside}, 512),
        ({"rope_scaling": inside, "original_max_position_embeddings": 256}, 256),
    ):
        assert parse_config(
            changed(**changes)
        ).rope_parameters.original_max_position_embeddings == (expected)


@pytest.mark.parametrize(
    "name",
    [
        "num_nextn_predict_layers",
        "tie_word_embeddings",
        "hidden_act",
        "rms_norm_eps",
        "rope_scaling",
    ],
)
def test_null_is_no_value(name: str) -> None:
    """transformers writes null for what it leaves to the class."""
    assert parse_config(changed(**{name: None})) == parse_config(
        {key: value for key, value in V3.items() if key != name}
    )


@given(name=st.sampled_from(sorted(V3)), value=JSON)
def test_any_value_of_any_field_is_accepted_or_refused(name: str, value: object) -> None:
    """Whatever stands in a field, the answer is a config or one of our errors."""
    try:
        parse_config(changed(**{name: value}))
    except (ConfigError, UnsupportedArchitecture) as error:
        assert str(error)  # noqa: PT017 - both outcomes are right


@given(st.binary(max_size=64))
def test_any_bytes_are_an_object_or_refused(text: bytes) -> None:
    try:
        assert isinstance(parse_object(text, "x", ConfigError), dict)
    except ConfigError as error:
        assert error.where == "x"  # noqa: PT017


LIMITS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 1 << 24), "hidden_size": (1, 1 << 20), "num_hidden_layers": (1, 1024),
    "first_k_dense_replace": (0, 1024), "num_nextn_predict_layers": (0, 16),
    "n_shared_experts": (1, 64), "q_lora_rank": (1, 1 << 20), "max_position_embeddings":
    (1, 1 << 26), "num_experts_per_tok": (1, 128), "topk_group": (1, 8),
}  # fmt: skip
"""The least and the most of a field; the last two are what V3's 8 groups of 32 experts leave."""


@pytest.mark.parametrize(("name", "limits"), LIMITS.items())
def test_limits_are_met_and_not_passed(name: str, limits: tuple[int, int]) -> None:
    least, most = limits
    for value in limits:
        assert getattr(parse_config(changed(**{name: value})), name) == value
    for value in (least - 1, most + 1):
        with pytest.raises(ConfigError, match=name):
            parse_config(changed(**{name: value}))


V2 = V3 | {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy"}
V2 |= {"norm_topk_prob": False}


@pytest.mark.parametrize(
    ("base", "fields", "told"),
    [
        (V3, {"n_group": 128, "topk_group": 4}, ""),  # two experts a group, 8 in all
        (V3, {"n_group": 128, "topk_group": 3},
         "num_experts_per_tok (8) exceeds the 6 experts of topk_group (3) groups"),
        (V3, {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 256}, ""),
        (V3, {"n_group": 256, "topk_group": 8},
         "a group needs two experts to be scored, n_group (256) leaves 1"),
        (V3, {"num_key_value_heads": None}, ""),
        (V3, {"rope_interleave": False, "hidden_size": 7169}, ""),
        (V3, {"partial_rotary_factor": 1}, ""),
        (V2, {"n_group": 128, "topk_group": 1}, ""),  # greedy looks at no groups
        (V2, {"n_group": 128, "topk_group": 1, "topk_method": "group_limited_greedy"},
         "num_experts_per_tok (8) exceeds the 2 experts of topk_group (1) groups"),
        (V2, {"n_group": 256, "topk_group": 8, "topk_method": "group_limited_greedy"}, ""),
        (V2, {"rope_interleave": False}, "deepseek_v2 has no rope_interleave: false"),
        (V2, {"hidden_size": 7169}, "a deepseek_v2 needs a hidden_size (7169) that "
         "num_attention_heads (128) divides"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob is not defined for deepseek_v2 routers"),
    ],
)  # fmt: skip
def test_fields_that_contradict_are_told_and_those_that_just_fit_are_not(
    base: dict[str, Any], fields: dict[str, Any], told: str
) -> None:
    if not told:
        parse_config(base | fields)
        return
    with pytest.raises(ConfigError) as caught:
        parse_config(base | fields)
    assert caught.value.what == told


@pytest.mark.parametrize(
    ("fields", "cos_sin", "softmax"),
    [
        ({"factor": 1}, 1.0, 1.0),
        ({}, 0.1 * math.log(2) + 1, 1.0),
        ({"attention_factor": 1.5, "mscale": 2, "mscale_all_dim": 1}, 1.5,
         (0.1 * math.log(2) + 1) ** 2),
        ({"mscale": 2, "mscale_all_dim": 3}, (0.2 * math.log(2) + 1) / (0.3 * math.log(2) + 1),
         (0.3 * math.log(2) + 1) ** 2),
        ({"mscale": 2}, 0.1 * math.log(2) + 1, 1.0),
        ({"mscale": 0, "mscale_all_dim": 3}, 0.1 * math.log(2) + 1,
         (0.3 * math.log(2) + 1) ** 2),
        ({"rope_type": "default", "attention_factor": 1.5, "mscale_all_dim": 3}, 1.0, 1.0),
    ],
)  # fmt: skip
def test_yarn_scales_what_its_keys_say(
    fields: dict[str, Any], cos_sin: float, softmax: float
) -> None:
    section = {"rope_type": "yarn", "factor": 2} | fields
    rope = parse_config(changed(rope_scaling=section)).rope_parameters
    assert rope.cos_sin_scale == pytest.approx(cos_sin, rel=1e-12)
    assert rope.softmax_scale_factor == pytest.approx(softmax, rel=1e-12)
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32, 1, True)


def test_the_base_of_the_frequencies_is_the_sections_own_then_the_models_then_10000() -> None:
    plain = {key: value for key, value in V3.items() if not key.startswith("rope_")}
    for fields, base in (
        ({}, 10000),
        ({"rope_theta": 700}, 700),
        ({"rope_theta": 700, "rope_parameters": {"rope_theta": 50000}}, 50000),
        ({"rope_theta": 700, "rope_scaling": {"type": "default"}}, 700),
    ):
        assert parse_config(plain | fields).rope_parameters.rope_theta == base
    section = V3["rope_scaling"]
    both = {"rope_scaling": section, "rope_parameters": section | {"rope_theta": 800}}
    assert parse_config(changed(**both)).rope_parameters.rope_theta == 800
    with pytest.raises(ConfigError, match="rope_theta must exceed 1, found 1"):
        parse_config(changed(rope_theta=1))


def test_layers_have_experts_from_the_first_that_is_not_dense() -> None:
    cfg = parse_config(V3)
    assert [cfg.is_moe(n) for n in range(5)] == [False, False, False, True, True]
    assert cfg.qk_head_dim == 192


def test_a_file_as_large_as_the_limit_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"12345678")
    assert read_bounded(file, 8) == b"12345678"
    with pytest.raises(ConfigError, match="larger than the limit of 7 bytes"):
        read_bounded(file, 7)
