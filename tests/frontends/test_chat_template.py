"""What of a folder's chat templates goes into an artifact, and what is told instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsc.chat_template import parse_chat
from dsc.errors import ArtifactError
from dsc.frontends.chat_template import find_chat


def kept(folder: Path) -> tuple[str, object]:
    """The template that a chat takes, and its tokens."""
    found, note = find_chat(folder)
    assert found is not None
    assert note == ""
    chat = parse_chat(found)
    return chat.text, chat.tokens


def test_a_template_is_found_wherever_transformers_has_put_it(tmp_path: Path) -> None:
    assert find_chat(tmp_path) == (None, "")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "oldest"}')
    assert kept(tmp_path) == ("oldest", {})
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "listed"}]
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": named, "bos_token": None} | tokens))
    assert kept(tmp_path) == ("listed", {"bos_token": "<s>", "eos_token": "</s>"})
    settings.write_text(json.dumps({"chat_template": "text"}))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "B", "pad_token": 3}')
    assert kept(tmp_path) == ("text", {"bos_token": "B"})
    (tmp_path / "chat_template.jinja").write_text("file")
    assert kept(tmp_path) == ("file", {"bos_token": "B"})


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("chat_template.jinja", "a" * (1 << 20) + "a", "larger than the limit"),
        ("tokenizer_config.json", '{"chat_template": 3}', "must be a text, or a list"),
        ("tokenizer_config.json", '{"chat_template": [{"name": 3}]}', "must be a text, or a list"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", json.dumps({"chat_template": "a" * (1 << 21)}), "larger than"),
    ],
)
def test_what_is_no_template_is_told_and_the_model_compiles(
    tmp_path: Path, file: str, text: str, words: str
) -> None:
    (tmp_path / file).write_text(text)
    found, note = find_chat(tmp_path)
    assert found is None
    assert words in note
    assert file in note


@pytest.mark.parametrize("text", ["{", "{}", '{"templates": {}, "tokens": {}}', '{"templates": 3}'])
def test_a_damaged_template_of_an_artifact_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError):
        parse_chat(text.encode())
