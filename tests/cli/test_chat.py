"""`dsc chat` as a user has it: at a terminal, in a pipe, with a model and with an artifact."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsc
from dsc.errors import DscError
from dsc.models.configs import TINY_CHECKPOINT

from .conftest import FakeApi, Invoke

TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- m.content.split('</think>')[-1] ~ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}
{%- if thinking is not defined or thinking %}<think>{% endif %}"""
LINE = [sys.executable, "-m", "dsc", "chat"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny checkpoint with a template, compiled."""
    folder = tmp_path_factory.mktemp("tiny")
    for file in TINY_CHECKPOINT.iterdir():
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    out = folder.with_name("out")
    return dsc.compile(folder, backend="onnxruntime", dtype="fp32", max_context=512).save(out)


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*LINE, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.ours, text.encode())

    def until(self, words: str, seconds: float = 60) -> str:
        """What is shown up to some words, which must come."""
        end = time.monotonic() + seconds
        while words not in self.shown:
            ready, _, _ = select.select([self.ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{words!r} did not come: {self.shown!r}"
            try:
                data = os.read(self.ours, 4096)
            except OSError:  # how Linux says that nobody writes there any more
                data = b""
            assert data, f"ended before {words!r}: {self.shown!r}"
            self.shown += data.decode(errors="replace").replace("\r\n", "\n")
        before, _, self.shown = self.shown.partition(words)
        return before

    def interrupt(self) -> None:
        """Press Ctrl-C at a prompt, when it waits for keys.

        CPython's readline shows the prompt first, and a signal between the two waits for a key.
        """
        time.sleep(0.3)
        self.type("\x03")

    def status(self) -> int:
        """How it ended, once it has."""
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.interrupt()
            return self.process.wait(30)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


@pytest.fixture
def terminal(tiny: Path) -> Iterator[Terminal]:
    """The compiled model at a terminal, asked for its first line."""
    found = Terminal(str(tiny), "--stop", "the LORD")
    found.until(">>> ")
    yield found
    found.close()


def test_a_talk_at_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    """Thinking is dim, Ctrl-C ends the answer and not the talk, commands work, twice leaves."""
    terminal.type("In the beginning\n")
    terminal.until("In the beginning\n\x1b[2m")
    terminal.until("e")
    terminal.type("\x03")
    terminal.until("(ended; what came of it is kept)")
    terminal.until(">>> ")
    terminal.type(f"/save {tmp_path}/talk\n")
    terminal.until("2 messages\n")
    saved = json.loads((tmp_path / "talk").read_text())["messages"]
    assert [m["role"] for m in saved] == ["user", "assistant"]
    assert saved[1]["content"] == ""
    assert saved[1]["reasoning_content"]
    terminal.until(">>> ")
    terminal.type('"""And\nit came to pass"""\n')
    terminal.until("... ")
    terminal.until("\x1b[2m")
    terminal.type("\x03")
    terminal.until(">>> ")
    terminal.type("/stats\n")
    terminal.until("cache ")
    terminal.until("reused_tokens")
    terminal.type("/nothing\n")
    terminal.until("there is no command /nothing")
    terminal.type(f"/reset\n/load {tmp_path}/talk\n/help\n")
    terminal.until("a new conversation")
    terminal.until("2 messages")
    terminal.until("/exit")
    terminal.until(">>> ")
    terminal.interrupt()
    terminal.until("Ctrl-C once more, or /exit, leaves")
    terminal.until(">>> ")
    terminal.interrupt()
    assert terminal.status() == 0


def test_in_a_pipe_each_line_is_a_turn(tiny: Path, invoke: Invoke, tmp_path: Path) -> None:
    saved = tmp_path / "talk"
    line = ("chat", str(tiny), "--set=thinking=false", "--max-new-tokens=8", "--stop=the LORD")
    lines = f"In the beginning\n\nAnd God said\n/save {saved}\n/exit\nmore\n"
    done = invoke(*line, "--system=Hear.", typed=lines.encode())
    told = json.loads(saved.read_text())["messages"]
    answers = [m["content"] for m in told if m["role"] == "assistant"]
    assert done.stdout == "".join(answer + "\n" for answer in answers)
    assert [m["content"] for m in told if m["role"] != "assistant"] == [
        "Hear.", "In the beginning", "And God said",
    ]  # fmt: skip
    assert "512 tokens, greedily" in done.stderr
    thought = invoke("chat", str(tiny), "--max-new-tokens=4", typed=b"In the beginning\n")
    assert thought.stdout == "\n"
    assert thought.stderr.count("(ended at --max-new-tokens 4)") == 1
    invoke(*line, "--load", str(saved), typed=f"Amen\n/save {saved}\n".encode())
    assert len(json.loads(saved.read_text())["messages"]) == 7


def test_a_model_is_compiled_first_and_one_without_a_template_continues_texts(
    invoke: Invoke,
) -> None:
    asked = ("--backend=reference", "--max-context=64", "--max-new-tokens=4")
    done = invoke("chat", str(TINY_CHECKPOINT), *asked, typed=b"In the beginning\n")
    assert f"compiling {TINY_CHECKPOINT}, for this once" in done.stderr
    assert "64 tokens, greedily" in done.stderr
    assert "without a chat template" in done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "typed", "words"),
    [
        (["--backend", "tvm"], b"", "--backend: for models"),
        (["--greedy", "--top-p=0.5"], b"", "--greedy draws nothing"),
        (["--set", "a"], b"", "give NAME=VALUE"),
        (["--set", "messages=1"], b"", "the conversation's own"),
        (["--chat-template=refuses"], b"a\n", "the chat template refuses: no"),
        (["--load=refuses"], b"", "not valid JSON"),
        (["--load=nothing"], b"", "holds no conversation"),
        ([], b"/save\n", "/save FILE"),
        ([], b"/save nothing\n", "nothing exists already"),
        ([], b"/save no/where\n", "there is no folder no"),
        ([], b"/save! nothing\n/save nothing\n/load nothing\n/else\n", "no command /else"),
        ([], b"/nothing\n", "there is no command /nothing"),
        ([], b"a" * 4000 + b"\n", r"compiled for 512 \(max_context\)"),
        ([], b"\xff\n", "no UTF-8 text"),
    ],
)
def test_what_is_wrong_ends_a_pipe_with_one_message(
    tiny: Path,
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    typed: bytes,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("refuses").write_text("{{ raise_exception('no') }}")
    Path("nothing").write_text('{"messages": [1]}')
    with pytest.raises(DscError, match=words):
        invoke("chat", str(tiny), *arguments, typed=typed)


def test_a_model_that_is_given_is_kept_where_asked(
    invoke: Invoke, tmp_path: Path, api: FakeApi
) -> None:
    """`dsc generate` takes models as `dsc chat` does."""
    line = ("generate", "a.dsc", "--prompt", "abc", "--backend", "reference", "--quant", "int8")
    assert invoke(*line, "-o", f"{tmp_path}/kept").stdout == "defg\n"
    assert api.asked[0]["quant"] == "int8"
    assert api.loaded == [{"path": tmp_path / "kept", "trust": False}]
