"""What run.py holds, part by part: numbers of a plan, what a step admits, weights, and the loop."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from dsc.runtime import standalone
from dsc.runtime.standalone import Array, Compiled, described, mapped_weights, number

SIZES = {"B": 3, "S": 9}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (7, 7),
        ([], 0),
        ([[5]], 5),
        ([[2, "B"], [5]], 11),
        ([[2, "B", "S"], [-1, "S"]], 45),
        ([[3, [[[1, "S"]], 4]]], 6),
        ([[1, [[[1, "S"], [-1]], [[1, "B"], [-1]]]]], 4),
    ],
)
def test_a_number_is_a_sum_of_products_of_sizes_and_quotients(value: Any, found: int) -> None:
    assert number(value, SIZES) == found


CONTEXT, CHUNK = 20, 4
TOKENS = [
    ["input_ids", "i64", [[[1, "B"]], [[1, "S"]]]],
    ["positions", "i64", [[[1, "B"]], [[1, "S"]]]],
    ["lengths", "i64", [[[1, "B"]]]],
    ["logits_at", "i64", [[[1, "B"]], [[1, "L"]]]],
    ["cache", "f32", [[[1, "B"]], [[1, "C"]]]],
]


class Watched(Compiled):
    """Notes what it is asked to run; answers with `logits`."""

    logits: Array = np.zeros((1, 1, 2), np.float32)

    def run(self, entry: str, sizes: Mapping[str, int], tokens: dict[str, Array]) -> Array:
        self.ran = entry, dict(sizes), tokens
        return self.logits


@pytest.fixture
def model(tmp_path: Path) -> Watched:
    """Return a model of two entries: one takes a token of two sequences below 8 tokens."""
    entry = {"inputs": TOKENS}
    manifest = {
        "files": {},
        "limits": {"prefill_chunk": CHUNK, "max_context": CONTEXT},
        "guards": [
            ["unseen", {"step": 99}],
            ["decode", {"step": 1, "batch": 2, "context": 8}],
            ["main", {}],
        ],
        "checks": [
            ["input_ids", 0, 8, "a token"],
            ["logits_at", 0, [[1, "S"], [-1]], "a new token"],
            ["table", 5, 6, "a page"],
        ],
    }
    (tmp_path / "dsc.json").write_text(json.dumps(manifest))
    (tmp_path / "plan.json").write_text(json.dumps({"entries": {"decode": entry, "main": entry}}))
    made = Watched(tmp_path)
    made.sizes = {"C": 30}
    return made


def given(batch: int, new: int, held: int, count: int = 1) -> list[Array]:
    """A step of zeros: new tokens of sequences that hold some."""
    ids = np.zeros((batch, new), np.int64)
    positions = held + np.arange(new) + ids
    return [ids, positions, np.full(batch, held), np.full((batch, count), new - 1)]


@pytest.mark.parametrize(
    ("batch", "new", "held", "entry"),
    [
        (2, 1, 7, "decode"),
        (1, 1, 0, "decode"),
        (3, 1, 7, "main"),
        (2, 2, 6, "main"),
        (2, 1, 8, "main"),
        (1, CHUNK, CONTEXT - CHUNK, "main"),
    ],
)
def test_the_first_entry_that_takes_a_step_runs_it(
    batch: int, new: int, held: int, entry: str, model: Watched
) -> None:
    model.step(*given(batch, new, held))
    name, sizes, tokens = model.ran
    assert (name, sizes) == (entry, {"B": batch, "S": new, "L": 1, "C": 30})
    assert list(tokens) == ["input_ids", "positions", "lengths", "logits_at"]


def test_the_tokens_of_the_longest_sequence_count(model: Watched) -> None:
    """A sequence that gets padding alone may be full; the shortest gets at least the new ones."""
    step = given(2, 1, 3)
    step[2] = np.array([7, 2])
    model.step(*step)
    assert model.ran[0] == "decode"
    step[2] = np.array([9, 2])
    model.step(*step)
    assert model.ran[0] == "main"
    step[2] = np.array([CONTEXT, CONTEXT - 1])
    model.step(*step)
    step[2] = np.array([CONTEXT, CONTEXT])
    with pytest.raises(ValueError, match=f"more than {CONTEXT} tokens, or {CHUNK} at once"):
        model.step(*step)


def test_logits_of_more_tokens_than_are_new_count_as_a_wider_step(model: Watched) -> None:
    step = given(1, 1, 0, count=2)
    model.step(*step)
    assert model.ran[:2] == ("main", {"B": 1, "S": 1, "L": 2, "C": 30})
    with pytest.raises(ValueError, match="at once"):
        model.step(*given(1, 1, 0, count=CHUNK + 1))


def changed(place: int, array: Any) -> list[Array]:
    step = given(2, 3, 4)
    step[place] = np.asarray(array)
    return step


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (changed(0, [0, 0, 0]), "input_ids must be i64 [B, S], logits_at i64 [B, L]"),
        (changed(3, [0, 0]), "input_ids must be i64 [B, S], logits_at i64 [B, L]"),
        (changed(0, np.zeros((2, 3))), "input_ids must be i64 of shape [2, 3], and not empty"),
        (changed(0, np.zeros((2, 0), np.int64)), "input_ids must be i64 of shape [2, 0], and not"),
        (changed(1, [[4, 5, 6]]), "positions must be i64 of shape [2, 3], and not empty"),
        (changed(2, [4, 4, 4]), "lengths must be i64 of shape [2], and not empty"),
        (changed(3, [[2]]), "logits_at must be i64 of shape [2, 1], and not empty"),
        (given(2, CHUNK + 1, 0), "more than 20 tokens, or 4 at once"),
        (given(2, 2, CONTEXT - 1), "more than 20 tokens, or 4 at once"),
        (changed(0, [[0, 8, 9], [0, 0, 0]]), "input_ids: each is a token, 0 to 8 here"),
        (changed(0, [[0, 8, -1], [0, 0, 0]]), "input_ids: each is a token, 0 to 8 here"),
        (changed(3, [[2], [3]]), "logits_at: each is a new token, 0 to 2 here"),
        (given(0, 1, 0), "input_ids must be i64 of shape [0, 1], and not empty"),
    ],
)
def test_a_step_that_was_not_compiled_for_is_refused(
    step: list[Array], words: str, model: Watched
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        model.step(*step)
    assert not hasattr(model, "ran")


def test_a_step_at_every_limit_is_admitted(model: Watched) -> None:
    for step in (changed(0, [[0, 8, 0], [8, 0, 0]]), changed(3, [[0], [2]])):
        model.step(*step)
        found = model.ran[2].values()
        assert all(np.array_equal(a, b) for a, b in zip(found, step, strict=True))


def test_logits_are_float32_whatever_was_computed(model: Watched) -> None:
    model.logits = np.array([[[1.5, -2.0]]], np.float32)
    assert model.step(*given(1, 1, 0)) is model.logits
    model.logits = np.array([[[0x3FC0, 0xC000]]], np.uint16)  # bf16
    found = model.step(*given(1, 1, 0))
    assert (found.dtype, found.tolist()) == (np.float32, [[[1.5, -2.0]]])
    model.logits = np.array([[[1.5, -2.0]]], np.float16)
    found = model.step(*given(1, 1, 0))
    assert (found.dtype, found.tolist()) == (np.float32, [[[1.5, -2.0]]])


def weights(path: Path, cut: int = 0) -> Path:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
    }
    text = json.dumps(header).encode()
    whole = struct.pack("<Q", len(text)) + text + bytes([1, 2, 3, 4, 5])
    path.write_bytes(whole[: 8 + len(text) - cut] if cut else whole)
    return path


def test_weights_are_mapped_where_the_header_says(tmp_path: Path) -> None:
    content, places = mapped_weights(weights(tmp_path / "w"))
    assert (content.tolist(), places) == ([1, 2, 3, 4, 5], {"a": 0, "b": 3})
    with pytest.raises(ValueError, match="its header is cut"):
        mapped_weights(weights(tmp_path / "cut", cut=1))


def test_a_file_without_weights_is_all_header(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(struct.pack("<Q", 2) + b"{}")
    content, places = mapped_weights(tmp_path / "w")
    assert (content.tolist(), places) == ([], {})


def test_the_script_alone_may_have_another_size(tmp_path: Path) -> None:
    facts = {"run.py": {"bytes": 1}, "other": {"bytes": 2}}
    (tmp_path / "dsc.json").write_text(json.dumps({"files": facts}))
    (tmp_path / "run.py").write_text("longer")
    (tmp_path / "other").write_text("12")
    assert described(tmp_path) == {"files": facts}
    (tmp_path / "other").write_text("1")
    with pytest.raises(ValueError, match="other has 1 bytes, 2 recorded: compile or copy it again"):
        described(tmp_path)


class Counting:
    """After n tokens the likeliest is n; `steps` are how many each step had."""

    chunk = 4

    def __init__(self, folder: object = None) -> None:
        self.steps: list[int] = []

    def step(self, ids: Array, positions: Array, lengths: Array, logits_at: Array) -> Array:
        new, held = ids.shape[1], sum(self.steps)
        assert positions.tolist() == [list(range(held, held + new))]
        assert (lengths.tolist(), logits_at.tolist()) == ([held], [[new - 1]])
        self.steps.append(new)
        logits = np.zeros((1, 2, 50), np.float32)  # of which the last row counts
        logits[0, 0, 49], logits[0, 1, held + new] = 2, 1
        return logits


@pytest.mark.parametrize(
    ("prompt", "most", "tokens", "steps"),
    [
        (1, 3, [1, 2, 3], [1, 1, 1]),
        (4, 2, [4, 5], [4, 1]),
        (5, 2, [5, 6], [4, 1, 1]),
        (9, 1, [9], [4, 4, 1]),
        (5, 9, [5, 6, 7], [4, 1, 1, 1, 1]),
        (8, 9, [], [4, 4]),
        (5, 0, [], []),
    ],
)
def test_a_prompt_runs_by_chunks_and_each_token_once(
    prompt: int, most: int, tokens: list[int], steps: list[int]
) -> None:
    model = Counting()
    assert list(standalone.generate(model, [7] * prompt, most, {8})) == tokens
    assert model.steps == steps


def test_a_text_is_told_in_whole_characters() -> None:
    """Tokens are bytes here; the last is told even where its character is not whole."""

    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def told(tokens: bytes) -> list[str]:
        return list(standalone.spell(decode, list(b"in "), iter(tokens)))

    assert told("né語!".encode()) == ["n", "é", "語", "!", ""]
    assert told("né".encode()[:-1]) == ["n", "\N{REPLACEMENT CHARACTER}"]
    assert told(b"") == [""]


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an artifact of which run.py is a part; words are w0 to w49."""
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(50)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    told = {"limits": {"max_context": 7}, "generation": {"eos_token_id": [6]}, "files": {}}
    (tmp_path / "dsc.json").write_text(json.dumps(told))
    monkeypatch.setattr(standalone, "__file__", str(tmp_path / "run.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("prompt", "options", "shown", "reason"),
    [
        ("w1 w2", ["--max-new-tokens", "3"], "w1 w2 w2 w3 w4", "length"),
        ("w1 w2", ["--max-new-tokens", "4"], "w1 w2 w2 w3 w4 w5", "length"),
        ("w1 w2", ["--max-new-tokens", "5"], "w1 w2 w2 w3 w4 w5", "stop"),
        ("w1 w2", ["--max-new-tokens", "1"], "w1 w2 w2", "length"),
        ("w1 w2", [], "w1 w2 w2 w3 w4 w5", "stop"),
        (" ".join(["w1"] * 6), [], " ".join(["w1"] * 6), "stop"),
        (" ".join(["w1"] * 5), ["--max-new-tokens", "1"], " ".join(["w1"] * 5) + " w5", "length"),
    ],
)
def test_a_run_tells_the_text_and_why_it_ended(
    prompt: str,
    options: list[str],
    shown: str,
    reason: str,
    beside: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", prompt, *options])
    standalone.main(Counting)
    assert capsys.readouterr() == (f"{shown}\n", f"{reason}\n")


def test_without_a_limit_of_tokens_there_are_64(
    beside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"limits": {"max_context": 70}, "generation": {"eos_token_id": []}, "files": {}}
    (beside / "dsc.json").write_text(json.dumps(told))
    asked: list[int] = []

    def generate(model: Any, ids: Sequence[int], most: int, stop: Sequence[int]) -> Iterator[int]:
        asked.append(most)
        return iter(())

    monkeypatch.setattr(standalone, "generate", generate)
    for words in (1, 6, 7):
        monkeypatch.setattr(sys, "argv", ["run.py", " ".join(["w1"] * words)])
        standalone.main(Counting)
    assert asked == [64, 64, 63]


@pytest.mark.parametrize("words", [7, 8])
def test_a_prompt_that_fills_the_context_is_refused(
    words: int,
    beside: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", " ".join(["w1"] * words)])
    with pytest.raises(SystemExit) as ended:
        standalone.main(Counting)
    assert ended.value.code == 2
    assert f"the prompt has {words} tokens, and the text may have 7 with" in capsys.readouterr().err


def test_each_piece_is_shown_before_the_next_is_made(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    shown: list[bytes] = []

    class Looking(Counting):
        def step(self, *given: Array) -> Array:
            shown.append(raw.getvalue())
            return super().step(*given)

    monkeypatch.setattr(sys, "argv", ["run.py", "w1 w2", "--max-new-tokens", "3"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))
    standalone.main(Looking)
    assert shown == [b"w1 w2", b"w1 w2 w2", b"w1 w2 w2 w3"]
    assert raw.getvalue() == b"w1 w2 w2 w3 w4\n"
