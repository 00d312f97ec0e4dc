"""generation_config.json: checked as a stranger's, kept in the artifact, nothing passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsc.errors import ConfigError
from dsc.frontends.facts import Facts
from dsc.frontends.generation_config import load_generation, settings_of
from dsc.frontends.huggingface import read_config


@pytest.fixture(scope="module")
def config(root: Path) -> Facts:
    """Return tiny-v3's configuration: bos 0, eos 1, 2048 tokens."""
    return read_config(root / "models" / "tiny-v3")[1].facts


def test_stop_ids_and_defaults_are_read(config: Facts) -> None:
    raw = {"eos_token_id": [1, 13], "do_sample": True, "temperature": 1, "top_k": None}
    kept, notes = settings_of(raw | {"stop_strings": "###", "pad_token_id": 2}, config)
    assert kept == {
        "eos_token_id": [1, 13],
        "bos_token_id": 0,
        "pad_token_id": 2,
        "do_sample": True,
        "temperature": 1.0,
        "stop_strings": ["###"],
    }
    assert notes == []


def test_config_json_speaks_where_the_file_does_not(config: Facts, tmp_path: Path) -> None:
    assert load_generation(tmp_path, config) == ({"eos_token_id": [1], "bos_token_id": 0}, [])
    assert settings_of({"eos_token_id": 7}, config)[0]["eos_token_id"] == [7]


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"eos_token_id": "1"}, "eos_token_id"),
        ({"eos_token_id": [1, True]}, "eos_token_id"),
        ({"eos_token_id": [[1]]}, "eos_token_id"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"do_sample": 1}, "do_sample"),
        ({"stop_strings": [1]}, "stop_strings"),
    ],
)
def test_what_means_nothing_is_refused_by_name(
    raw: dict[str, Any], key: str, config: Facts
) -> None:
    with pytest.raises(ConfigError, match=key):
        settings_of(raw, config)


def test_of_many_faults_the_first_are_told(config: Facts) -> None:
    with pytest.raises(ConfigError) as refused:
        settings_of({"eos_token_id": ["</s>"] * 5000}, config)
    assert len(str(refused.value)) < 2500
    assert "eos_token_id.0 must be" in str(refused.value)
    assert "more" in str(refused.value)


@pytest.mark.parametrize("text", ['{"top_p": NaN}', "[1]", '{"top_k": 1, "top_k": 2}', "{"])
def test_a_damaged_file_is_refused(text: str, config: Facts, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_generation(tmp_path, config)
    assert "generation_config.json" in str(refused.value)


def test_what_is_not_used_is_noted(config: Facts) -> None:
    raw = {"num_beams": 4, "no_repeat_ngram_size": 3, "renormalize_logits": True}
    off = {"num_beam_groups": 1, "typical_p": 1.0, "bad_words_ids": None, "max_length": 4096}
    kept, (note,) = settings_of(raw | off, config)
    assert note.endswith("not used: no_repeat_ngram_size, num_beams, renormalize_logits")
    kept, (note,) = settings_of({"eos_token_id": [1, 2048], "pad_token_id": -1}, config)
    assert kept["eos_token_id"] == [1]
    assert "pad_token_id" not in kept
    assert note.endswith("left out: eos_token_id 2048, pad_token_id -1")


def test_ids_end_where_the_vocabulary_does(config: Facts) -> None:
    kept, notes = settings_of({"eos_token_id": [0, 2047], "pad_token_id": 2047}, config)
    assert (kept["eos_token_id"], kept["pad_token_id"], notes) == ([0, 2047], 2047, [])
    kept, notes = settings_of({"eos_token_id": 2048, "bos_token_id": -1, "top_h": 2}, config, "f")
    assert kept == {"eos_token_id": []}
    assert notes == [
        "f: outside of the vocabulary, left out: bos_token_id -1, eos_token_id 2048",
        "f: not used: top_h",
    ]


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("temperature", [0, 1e4], [10001]),
        ("top_k", [0, (1 << 31) - 1], [1 << 31]),
        ("top_p", [0, 1], [-0.01, 1.01]),
        ("min_p", [0, 1], [1.01]),
        ("repetition_penalty", [0.01, 1e4], [10001]),
        ("eos_token_id", [-(1 << 31), (1 << 31) - 1], [-(1 << 31) - 1, 1 << 31]),
        ("eos_token_id", [[0] * 4096], [[0] * 4097]),
        ("stop_strings", [["a"] * 4096], [["a"] * 4097]),
    ],
)
def test_limits_are_met_and_not_passed(
    name: str, inside: list[Any], outside: list[Any], config: Facts
) -> None:
    for value in inside:
        settings_of({name: value}, config)
    for value in outside:
        with pytest.raises(ConfigError, match=name):
            settings_of({name: value}, config)
