"""Tokenizers that come as byte pairs: converted without the checkpoint's code, or said."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
from tokenizers import Tokenizer

from dsc.errors import CheckpointError, ConfigError, DscError
from dsc.frontends.tokenizer import PATTERNS, find_tokenizer, read_ranks
from dsc.models.configs import TINY_CHECKPOINT

DATA = Path(__file__).resolve().parent.parent / "data"
CLASS = "TikTokenTokenizer"
MERGES = ["in", "th", "the", " the", "er", "12", "123", "ing", "Th", "'s", " s"]
SPECIAL = {268: "[BOS]", 270: "<|im_end|>"}
TEXTS = [
    "The singer's 12345 things", "in the", "  the\n\n  x", "\u4e2d\u6587the\u4e2d", "'S THING's",
    "a\u0301b \U0001f600!", "\r\nthe\r\n", "",
]  # fmt: skip


def ranks() -> dict[bytes, int]:
    """All bytes, then pairs whose halves have ranks already, as tiktoken orders them."""
    tokens = [bytes([byte]) for byte in range(256)] + [merge.encode() for merge in MERGES]
    return {token: rank for rank, token in enumerate(tokens)}


def write(folder: Path, **changes: Any) -> Path:
    """A folder with ranks and special tokens, as Moonlight and Kimi-K2 have them."""
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks().items())
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    decoder = {str(i): {"content": content, "special": True} for i, content in SPECIAL.items()}
    settings = {"tokenizer_class": CLASS, "added_tokens_decoder": decoder} | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def merged(piece: bytes) -> list[int]:
    """Byte pairs by definition: of all neighbours that are a token, the lowest rank first."""
    table, parts = ranks(), [bytes([byte]) for byte in piece]
    while True:
        pairs = [(table[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in table]
        if piece in table:
            return [table[piece]]
        if not pairs:
            return [table[part] for part in parts]
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_ranks_become_the_tokenizer_that_they_describe(tmp_path: Path) -> None:
    """Every text is split by the class's pattern and merged by rank; special tokens keep ids."""
    (tmp_path / "tokenization_kimi.py").write_text("raise SystemExit('imported')")
    made, note = find_tokenizer(write(tmp_path))
    assert isinstance(made, bytes)
    assert note == "tokenizer.json was made from tiktoken.model"
    tokenizer = Tokenizer.from_str(made.decode())
    pattern = regex.compile(PATTERNS[CLASS], regex.V1)
    for text in TEXTS:
        pieces = [match[0] for match in pattern.finditer(text)]
        assert "".join(pieces) == text
        expected = [i for piece in pieces for i in merged(piece.encode())]
        assert tokenizer.encode(text).ids == expected, text
        assert tokenizer.decode(expected) == text
    assert tokenizer.encode("[BOS]the<|im_end|>").ids == [268, ranks()[b"the"], 270]
    assert tokenizer.token_to_id("<|reserved_token_267|>") == 267


def test_a_folder_with_a_tokenizer_keeps_it() -> None:
    assert find_tokenizer(TINY_CHECKPOINT) == (TINY_CHECKPOINT / "tokenizer.json", "")


def test_no_tokenizer_is_nothing_to_tell(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) == (None, "")


@pytest.mark.parametrize("name", ["tokenizer.json", "tiktoken.model"])
def test_a_file_that_is_not_whole_is_told_and_not_passed_over(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "blob")
    with pytest.raises(DscError, match=r"No such file|leads nowhere"):
        find_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["QWenTokenizer", None, 3])
def test_a_class_whose_split_is_not_known_is_said_and_not_guessed(
    tmp_path: Path, name: object
) -> None:
    made, note = find_tokenizer(write(tmp_path, tokenizer_class=name))
    assert made is None
    assert repr(name) in note
    assert "once a tokenizer.json lies beside it" in note


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("AA== 0\nAQ== 2\n", "rank 2 where 1 follows"),
        ("AA== 0\nAA== 1\n", "rank 1 where 1 follows"),
        ("AA== 0\n\u00e9 1\n", "base64 and a rank"),
        ("AA== x\n", "base64 and a rank"),
        ("AA==\n", "base64 and a rank"),
        ("AA== 0\n", "255 single bytes have no rank"),
    ],
)
def test_damaged_ranks_are_refused_with_their_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "tiktoken.model"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read_ranks(file)


@pytest.mark.parametrize(
    "decoder",
    [
        {"268": {"content": "a"}, "269": {"content": "a"}},
        {"3": {"content": "[BOS]"}},
        {"99999999": {"content": "[BOS]"}},
        {"x": {"content": "[BOS]"}},
        {"268": "[BOS]"},
        ["[BOS]"],
    ],
)
def test_special_tokens_that_contradict_are_refused(tmp_path: Path, decoder: object) -> None:
    with pytest.raises(ConfigError, match="added_tokens_decoder"):
        find_tokenizer(write(tmp_path, added_tokens_decoder=decoder))


def test_lines_of_ranks_are_counted_from_one_and_empty_ones_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "tiktoken.model"
    file.write_text("\n" + file.read_text().replace("\n", "\n\n", 3))
    assert read_ranks(file) == ranks()
    file.write_text("AA== 0\n\nAQ== 7\n")
    with pytest.raises(CheckpointError) as caught:
        read_ranks(file)
    assert (caught.value.what, caught.value.where) == ("rank 7 where 1 follows", f"{file}, line 3")


@pytest.mark.parametrize("beyond", [-1, (1 << 16) + 1])
def test_special_tokens_follow_the_byte_pairs(tmp_path: Path, beyond: int) -> None:
    decoder = {str(len(ranks()) + beyond): {"content": "[BOS]"}}
    with pytest.raises(ConfigError, match="has ids outside 267, … which follow"):
        find_tokenizer(write(tmp_path, added_tokens_decoder=decoder))
    decoder = {str(len(ranks())): {"content": "[BOS]"}}
    made, _ = find_tokenizer(write(tmp_path, added_tokens_decoder=decoder))
    assert isinstance(made, bytes)
    assert Tokenizer.from_str(made.decode()).token_to_id("[BOS]") == 267


@pytest.mark.parametrize(
    "listed", [{"268": {"content": ""}}, {"-1": {"content": "a"}}, {"268": {}}]
)
def test_a_special_token_has_a_text_and_an_id(tmp_path: Path, listed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        find_tokenizer(write(tmp_path, added_tokens_decoder=listed))
    assert caught.value.what == f"added_tokens_decoder.{next(iter(listed))} is no token with its id"


def test_without_special_tokens_none_is_added(tmp_path: Path) -> None:
    made, _ = find_tokenizer(write(tmp_path, added_tokens_decoder={}))
    assert isinstance(made, bytes)
    assert Tokenizer.from_str(made.decode()).get_vocab_size() == len(ranks())


# --- classes of transformers ----------------------------------------------------------------------


def with_class(folder: Path, model_type: str = "llama", **settings: Any) -> Path:
    """A folder that names a class, with code that must not run beside it."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_x.py").write_text("raise SystemExit('imported')")
    return folder


SENTENCES = {
    "The king said unto him, in the beginning": [
        332, 343, 341, 339, 285, 267, 345, 347, 350, 296, 338, 335, 356, 297, 263, 300, 359, 265,
        346, 285,
    ],
    "\u00e9 \u4e2d\u6587 x\n\ny": [
        340, 199, 173, 340, 232, 188, 177, 234, 154, 139, 340, 124, 14, 14, 357,
    ],
    "a": [262],
    "": [],
}  # fmt: skip
"""Ids by the package sentencepiece 0.2.3 with tests/data/sentencepiece.model."""


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_a_sentencepiece_model_is_read_as_sentencepiece_reads_it(tmp_path: Path, name: str) -> None:
    """No package but transformers' own is needed, and no code of the folder runs."""
    auto = {"AutoTokenizer": ["tokenization_x.X", None]}
    folder = with_class(tmp_path, tokenizer_class=name, add_bos_token=True, auto_map=auto)
    (folder / "tokenizer.model").write_bytes((DATA / "sentencepiece.model").read_bytes())
    made, note = find_tokenizer(folder)
    assert isinstance(made, bytes)
    assert note == "tokenizer.json was made from tokenizer.model"
    tokenizer = Tokenizer.from_str(made.decode())
    for text, ids in SENTENCES.items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a").ids == [tokenizer.token_to_id("<s>"), 262]
    assert tokenizer.encode("[INST]", add_special_tokens=False).ids == [3]


def test_a_vocabulary_with_merges_is_read_by_the_class_of_the_model_type(tmp_path: Path) -> None:
    given = TINY_CHECKPOINT / "tokenizer.json"
    pairs = json.loads(given.read_text())["model"]
    folder = with_class(tmp_path, "starcoder2", tokenizer_class="SomeoneElses")
    (folder / "vocab.json").write_text(json.dumps(pairs["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in pairs["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    made, note = find_tokenizer(folder)
    assert isinstance(made, bytes)
    assert note == "tokenizer.json was made from vocab.json"
    ours, theirs = Tokenizer.from_file(str(given)), Tokenizer.from_str(made.decode())
    for text in TEXTS:
        wanted = ours.encode(text, add_special_tokens=False).ids
        assert theirs.encode(text, add_special_tokens=False).ids == wanted


@pytest.mark.parametrize(
    ("files", "settings", "words"),
    [
        (["tokenizer.model"], {"tokenizer_class": "X"}, "transformers has no tokenizer_class 'X'"),
        (["tokenizer.model"], {"tokenizer_class": "LlamaTokenizer"}, "LlamaTokenizer cannot read"),
        (["tekken.json"], {}, "tekken.json is not read"),
    ],
)
def test_what_cannot_be_converted_is_said_with_what_to_do(
    tmp_path: Path, files: list[str], settings: dict[str, Any], words: str
) -> None:
    folder = with_class(tmp_path, "deepseek_v3", **settings)
    for name in files:
        (folder / name).write_bytes(b"\xff\x00 no model")
    made, note = find_tokenizer(folder)
    assert made is None
    assert words in note
    assert "once a tokenizer.json lies beside it" in note
