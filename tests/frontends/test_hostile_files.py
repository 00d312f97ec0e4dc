"""Mutated files of a stranger import, open and start nothing, and end in one printable error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import hostile_files
from bench.hostile_files import Watch, measure
from bench.hostile_readers import NAMES
from dsc.errors import CheckpointError, ConfigError, DscError, printable
from dsc.frontends import hub
from dsc.frontends.chat_template import find_chat
from dsc.frontends.facts import Facts
from dsc.frontends.generation_config import load_generation, settings_of
from dsc.frontends.huggingface import read_config
from dsc.frontends.rope_scaling import RopeScaling
from dsc.frontends.stock import clean, stock_config
from dsc.frontends.tokenizer import find_tokenizer
from dsc.ir.safetensors import SafetensorsFile
from tests.decoders import PLAIN

LLAMA = PLAIN | {"model_type": "llama"}


def test_hundreds_of_files_of_each_reader() -> None:
    """One process for all of them; `make bars` has the large counts."""
    found = measure(NAMES, files=150, seconds=60)
    assert {name: each["failures"] for name, each in found.items()} == {n: {} for n in NAMES}
    for name, each in found.items():
        assert each["files"] == 150, name
        assert each["read"] > 0, name


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_a_worker_that_says_nothing_hangs(code: str) -> None:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, bufsize=0) as busy:
        assert hostile_files._line(busy, 0.5) == b""
        assert busy.poll() is None
        busy.kill()


def test_a_kept_run_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(names: Any, files: int, seconds: float, seed: int, first: int, kept: Any) -> None:
        asked.append((first, files))
        wrong = {"hangs": [1, f"file {first}"]} if first == 10 else {}
        line = {"reader": names[0], "seed": seed, "end": first + 10, "files": 10, "read": 10}
        kept(line | {"failures": wrong, "seconds": 1.5})

    monkeypatch.setattr(hostile_files, "measure", measured)
    for _ in range(3):
        found = hostile_files.keep(tmp_path / "a" / "kept.jsonl", "config", 20, 60.0, 7)
    assert asked == [(0, 20), (10, 10)]
    hostile_files.keep(tmp_path / "a" / "kept.jsonl", "config", 10, 60.0, 8)
    assert asked[-1] == (0, 10)
    assert found == {"ok": False, "files": 20, "read": 20, "failures": {"hangs": [1, "file 10"]},
                     "seconds": 3.0, "end": 20}  # fmt: skip


@pytest.mark.parametrize(
    "act",
    [
        lambda: open("/etc/hostname"),
        lambda: os.listdir("/etc"),
        lambda: __import__("antigravity_of_a_stranger"),
        lambda: __import__("this"),
        lambda: (Path(np.__file__).parent / "py.typed").read_bytes(),
        lambda: __import__("socket").socket(),
        lambda: os.system("true"),
        lambda: exec("hostile_bait = 1"),
        lambda: __import__("urllib.request").request.urlopen("http://localhost:9/"),
        lambda: Path("/tmp/../etc/hostile").mkdir(),
    ],
)
def test_the_watch_sees_what_no_file_may_cause(act: Callable[[], Any], tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.settle()
    watch.armed = True
    try:
        act()
    except (OSError, ImportError):
        pass
    finally:
        watch.armed = False
    assert watch.seen


@pytest.mark.parametrize("section", [5, [1], "yarn", True])
def test_a_rope_section_that_is_none_cannot_be_scaled(section: object) -> None:
    with pytest.raises(ConfigError, match="rope_scaling must be an object"):
        clean(LLAMA | {"rope_scaling": section}, scaling=RopeScaling("yarn", 4.0))


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rope_type", [{"a": "yarn"}], "rope_parameters.rope_type must be a text"),
        ("rope_type", {"a": "yarn"}, "rope_type must be a text, found a section"),
        ("factor", "4", "rope_parameters.factor must be a number, found '4'"),
        ("rope_theta", {"a": 1e4}, "rope_theta must be a number, found a section"),
        ("beta_fast", True, "beta_fast must be a number, found True"),
    ],
)
def test_a_rope_section_holds_texts_and_numbers(
    model_type: str, key: str, value: object, words: str
) -> None:
    section = {"rope_type": "yarn", "factor": 4.0, key: value}
    with pytest.raises(ConfigError, match=words):
        clean(LLAMA | {"model_type": model_type, "rope_parameters": section})


@pytest.mark.parametrize("original", [10**400, 64])
@pytest.mark.parametrize("factor", [float("inf"), 1e308, True])
def test_positions_beyond_all_numbers(original: int, factor: float) -> None:
    section = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    assert Facts.read("llama", {"rope_scaling": section}).positions is None
    with pytest.raises(ConfigError, match="no positions"):
        clean(LLAMA | {"max_position_embeddings": 10**400}, scaling=RopeScaling("yarn", 4.0))


def test_one_field_under_two_names_has_one_value() -> None:
    raw = LLAMA | {"model_type": "mixtral", "num_experts": 2, "num_local_experts": 4}
    with pytest.raises(ConfigError, match=r"num_experts and num_local_experts are one"):
        stock_config(clean(raw))
    with pytest.raises(ConfigError, match=r"are one, and are None and 4"):
        stock_config(clean(raw | {"num_experts": None}))
    assert stock_config(clean(raw | {"num_experts": 4})).num_local_experts == 4


@pytest.mark.parametrize("key", ["Hidden_Size", "hiddenSize", "hidden_size_"])
def test_a_key_that_looks_like_a_field_is_not_passed_over(key: str) -> None:
    raw = {k: v for k, v in LLAMA.items() if k != "hidden_size"} | {key: 16}
    with pytest.raises(ConfigError, match=f"{key} is no field, and hidden_size is missing"):
        stock_config(clean(raw))


def test_no_code_for_a_terminal_leaves_a_file() -> None:
    assert printable("a\x1b[2J\u202e\ud800\nb") == "a\\x1b[2J\\u202e\\ud800\nb"
    assert str(DscError("\x1b]0;x\x07", "\x9b", "\0")).isascii()
    _, notes = settings_of({f"\x1b[{i}J" + "k" * 99: 7 for i in range(99)}, Facts("llama"))
    assert "\x1b" not in notes[0]
    assert len(notes[0]) < 2000


@pytest.mark.parametrize("target", ["../../secret.json", "/proc/self/environ", "/dev/zero"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, name: str, target: str) -> None:
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "a" / "model"
    folder.mkdir(parents=True)
    (folder / name).symlink_to(target)
    readers: dict[str, Callable[[Path], object]] = {
        "config.json": read_config,
        "generation_config.json": lambda f: load_generation(f, Facts("llama")),
        "tokenizer.json": find_tokenizer,
    }
    with pytest.raises(DscError, match=r"leads out|a pipe or a device"):
        readers[name](folder)
    (folder / "chat_template.json").symlink_to(target)
    assert "leads out" in (told := find_chat(folder)[1]) or "a pipe or a device" in told


@pytest.mark.parametrize("ref", [b"\xff\xfe", b"../..", b"/", b"a" * 9999, b"x\0y", b"\x1b[2J"])
def test_a_reference_of_the_cache_names_a_snapshot_or_nothing(tmp_path: Path, ref: bytes) -> None:
    repository = tmp_path / "models--o--n"
    (repository / "snapshots" / "0123").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_bytes(ref)
    with pytest.raises(DscError, match="holds no snapshot"):
        hub.snapshot_of(repository)
    (repository / "snapshots" / "out").symlink_to(tmp_path)
    with pytest.raises(DscError, match="holds no snapshot"):
        hub.snapshot_of(repository, "out")


@pytest.mark.parametrize("key", ["9" * 5000, "9" * 10])
def test_an_id_of_a_token_of_thousands_of_digits(tmp_path: Path, key: str) -> None:
    settings = {"tokenizer_class": "TikTokenTokenizer"}
    settings |= {"added_tokens_decoder": {key: {"content": "x"}}}  # type: ignore[dict-item]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tiktoken.model").write_bytes(b"")
    with pytest.raises(ConfigError, match="is no token with its id"):
        find_tokenizer(tmp_path)


def test_offsets_without_end_are_told_in_short(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4] * 9999}}
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"0123")
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile.open(file)
    assert len(str(caught.value)) < 500
