"""The loop of run.py: it streams, ends for a reason, and says what is wrong in words.

The loop is the same whatever backend's half stands before it; here that half plays back tokens.
"""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import symtable
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from dsc.runtime.artifact import run_script

PLAYER = '''"""Plays tokens back."""

import json
import os
import pathlib
import sys

import numpy as np

from dsc.runtime.standalone import main


class Model:
    """After n tokens of prompt and answer, token n of the list is the likeliest."""

    chunk = 4

    def __init__(self, folder):
        self.facts = json.loads((folder / "player.json").read_text())
        self.length = 0

    def step(self, input_ids, positions, lengths, logits_at):
        """Check that the step is the next one; logits [1, 1, vocab]."""
        new = input_ids.shape[1]
        assert int(lengths[0]) == self.length and 1 <= new <= self.chunk
        assert positions.tolist() == [list(range(self.length, self.length + new))]
        assert logits_at.tolist() == [[new - 1]]
        self.length += new
        if self.length > self.facts["most"]:
            os.abort()  # past the cache
        logits = np.zeros((1, 1, 2048), np.float32)
        logits[0, 0, self.facts["tokens"][self.length]] = self.facts["largest"]
        return logits
'''
TEXT = "In the beginning — naïve 語 and 😀 God created the heaven"
Done = subprocess.CompletedProcess[bytes]


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    """Return tiny-v3's tokenizer, whose tokens split characters."""
    return Tokenizer.from_file(str(root / "models" / "tiny-v3" / "tokenizer.json"))


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Return an artifact that answers with the rest of `TEXT`."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "run.py").write_text(run_script(PLAYER))
    describe(tmp_path, tokenizer.encode(TEXT).ids)
    return tmp_path


def describe(
    folder: Path,
    tokens: Sequence[int],
    *,
    context: int = 1000,
    stop: Sequence[int] = (1,),
    largest: float = 1.0,
) -> None:
    """Write what the model plays, and what its manifest says."""
    played = {"tokens": [*tokens, 1, 1], "most": context, "largest": largest}
    player = json.dumps(played)
    (folder / "player.json").write_text(player)
    manifest = {
        "files": {"player.json": {"bytes": len(player)}},
        "limits": {"max_context": context, "prefill_chunk": 4},
        "generation": {"eos_token_id": list(stop)},
    }
    (folder / "dsc.json").write_text(json.dumps(manifest))


def run(folder: Path, *arguments: str, **how: Any) -> Done:
    """Run the script as a user does."""
    line = [sys.executable, str(folder / "run.py"), *arguments]
    how = {"stdout": subprocess.PIPE, **how}
    return subprocess.run(line, stderr=subprocess.PIPE, timeout=60, check=False, **how)


def refused(done: Done) -> str:
    """The one message of a run that ended by a mistake, not by a traceback."""
    said = done.stderr.decode()
    assert done.returncode == 2
    assert "Traceback" not in said
    assert "Exception" not in said
    return said.rpartition("run.py: error: ")[2].strip()


def test_the_whole_text_comes_until_the_stop_id(folder: Path) -> None:
    done = run(folder, "In the beginning")
    assert done.stdout.decode() == TEXT + "\n"
    assert done.stderr.decode() == "stop\n"


@pytest.mark.parametrize("most", ["0", "-3"])
def test_no_tokens_at_all_are_refused(most: str, folder: Path) -> None:
    said = refused(run(folder, "In the beginning", "--max-new-tokens", most))
    assert said == f"--max-new-tokens {most}: give at least 1"


def test_the_help_says_how_many_tokens_come_by_default(folder: Path) -> None:
    assert b"(default: 64)" in run(folder, "--help").stdout


def test_a_tokenizer_that_is_damaged_is_told(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", 1000)
    said = refused(run(folder, "In the beginning"))
    assert "tokenizer.json is damaged" in said
    assert "compile again" in said


def test_a_file_of_another_size_than_recorded_is_told(folder: Path) -> None:
    size = (folder / "player.json").stat().st_size
    with (folder / "player.json").open("a") as file:
        file.write("  ")
    done = run(folder, "In the beginning")
    told = f"player.json has {size + 2} bytes, {size} recorded: compile or copy it again"
    assert refused(done) == told
    assert b"usage:" not in done.stderr, "which is for arguments"


def test_the_text_streams_whole_characters(folder: Path) -> None:
    line = [sys.executable, "-c", WATCH, str(folder)]
    done = subprocess.run(line, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    pieces = json.loads(done.stdout)
    assert "".join(pieces) == TEXT.removeprefix("In the beginning")
    assert "😀" in "".join(p for p in pieces if len(p) < 8)
    assert len(pieces) > 10


WATCH = """
import json, sys
sys.path.insert(0, sys.argv[1])
import run
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
ids = tokenizer.encode("In the beginning").ids
model = run.Model(run.pathlib.Path(sys.argv[1]))
asked = []
def tokens():
    for token in run.generate(model, ids, 100, [1]):
        asked.append(token)
        yield token
pieces = []
for piece in run.spell(tokenizer.decode, ids, tokens()):
    assert not piece or asked, "before its tokens"
    pieces.append(piece)
print(json.dumps([p for p in pieces if p]))
"""


@pytest.mark.parametrize(("most", "context"), [(5, 1000), (1560, 9)])
def test_a_limit_ends_the_text_and_no_step_passes_the_context(
    most: int, context: int, folder: Path, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(TEXT).ids
    describe(folder, ids, context=context)
    done = run(folder, "In the beginning", "--max-new-tokens", str(most))
    assert done.returncode == 0
    assert done.stderr.decode() == "length\n"
    prompt = len(tokenizer.encode("In the beginning").ids)
    shown = min(prompt + most, context)
    assert done.stdout.decode() == tokenizer.decode(ids[:shown]) + "\n"


def test_any_of_several_stop_ids_ends_the_text(folder: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).ids
    describe(folder, ids, stop=[1, ids[-2]])
    assert run(folder, "In the beginning").stdout.decode() == tokenizer.decode(ids[:-2]) + "\n"


def test_a_prompt_that_cannot_be_continued_is_refused(folder: Path) -> None:
    describe(folder, [1] * 20, context=4)
    assert refused(run(folder, "")) == "the prompt holds no token; give a text to continue"
    said = refused(run(folder, TEXT))
    assert "the text may have 4 with the answer: shorten it, or compile with a larger" in said
    surrogate = os.fsdecode(b"In \xff")
    assert refused(run(folder, surrogate))


def test_logits_that_are_no_numbers_end_the_run(folder: Path) -> None:
    describe(folder, [1] * 20, largest=float("nan"))
    assert "dsc verify OUT --hashes" in refused(run(folder, "In"))


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(run(folder, "In"))
    (folder / "tokenizers.py").write_text("raise ImportError('no tokenizers')")
    assert "no tokenizers" in refused(run(folder, "In"))
    (folder / "tokenizers.py").unlink()
    (folder / "dsc.json").unlink()
    assert "dsc.json" in refused(run(folder, "In"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_message_and_a_closed_pipe_none(folder: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        assert "No space left" in refused(run(folder, "In the beginning", stdout=full))
    reading, writing = os.pipe()
    os.close(reading)
    done = run(folder, "In the beginning", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def runners() -> dict[str, Path]:
    """What each backend puts before the loop."""
    from dsc.backends import onnxruntime, triton, tvm

    folders = {"onnxruntime": onnxruntime, "triton": triton, "tvm": tvm}
    return {n: Path(m.__path__[0]) / "runner.py" for n, m in folders.items()}


@pytest.mark.parametrize("backend", ["onnxruntime", "triton", "tvm"])
def test_a_script_defines_every_name_that_it_uses_and_reads_nothing_of_dsc(backend: str) -> None:
    text = run_script(runners()[backend].read_text())
    assert "import dsc" not in text
    assert "from dsc" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert undefined(text) == set()
    assert "eval" not in text


def test_a_name_that_no_part_of_a_script_defines_is_noticed() -> None:
    text = run_script(PLAYER)
    assert undefined(text) == set()
    assert undefined(text.replace("import sys\n", "")) == {"sys"}


def undefined(text: str) -> set[str]:
    """Names that a module reads, in any of its functions, and neither defines nor gets built in."""
    module = symtable.symtable(text, "run.py", "exec")
    known = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
    known |= {*dir(builtins), "__file__"}
    tables, read = [module], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        read |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
    return read - known
