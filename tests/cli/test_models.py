"""`dsc models`: what it finds, what it keeps, and the page that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsc.cli import build_app
from dsc.errors import UsageError
from dsc.frontends import catalogue, trace_cache
from dsc.frontends.catalogue import Catalogue, Row, classes, example


def printed(*arguments: str) -> str:
    """What the verb prints; what it raises."""
    done = CliRunner().invoke(build_app(), ["models", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_the_page_is_what_the_command_prints(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = printed("llama", "openai-gpt", "--all", "--markdown").splitlines()
    page = (root / "docs" / "models.md").read_text().splitlines()
    own = [line for line in found if "1 of 2 types" not in line]
    assert len(own) == len(found) - 1
    assert [line for line in own if line not in page] == []
    assert "| llama | LlamaForCausalLM |  |" in own


def test_the_page_has_a_row_for_every_type_and_95_that_compile(root: Path) -> None:
    lines = (root / "docs" / "models.md").read_text().splitlines()
    types = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")]
    assert sorted(t for t in types if t != "type") == sorted(classes())
    why = lines.index("| type | class | why |")
    compiled = [line for line in lines[:why] if line.startswith("| ")]
    assert len(compiled) - 1 >= 95


def test_a_name_that_is_none_is_told() -> None:
    with pytest.raises(UsageError, match="called lama"):
        printed("lama")


def test_what_was_not_checked_is_not_said_to_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(catalogue, "row_of", lambda name, _: Row(name, "Class", "a reason"))
    found = json.loads(printed("llam*", "gpt2", "--json"))["models"]
    told = {each["model_type"]: each["compiles"] for each in found}
    assert told["llama"] is None, "a pattern may stand for many"
    assert told["gpt2"] is False, "a type that is named is checked"
    assert "are not checked yet: --all checks them" in printed("llam*").splitlines()[-1]


def test_rows_are_kept_and_not_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trace_cache, "key_of_installed", lambda *_, **facts: facts)
    asked: list[str] = []

    def row(name: str, compiled: Any) -> Row:
        asked.append(name)
        return Row(name, "Class", "a reason")

    monkeypatch.setattr(catalogue, "row_of", row)
    for names in (["llama"], ["llama", "gpt2"]):
        Catalogue().check(names, lambda *_: None, lambda _: None)
    assert asked == ["llama", "gpt2"]


@pytest.mark.parametrize("model_type", ["deepseek_v2", "hunyuan_v1_dense", "gemma3", "bamba"])
def test_defaults_that_leave_something_open_are_an_example(model_type: str) -> None:
    found = example(model_type)
    assert found.values["num_hidden_layers"] > 0
