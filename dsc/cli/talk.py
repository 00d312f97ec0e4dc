"""The turns of `dsc chat`: lines in, answers out, commands, and what an interrupt means."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from unicodedata import category

from dsc.cli import console
from dsc.errors import DscError, FileError, UsageError, one_of
from dsc.files import no_text, read_text, write_text
from dsc.strict_json import parse_object

if TYPE_CHECKING:
    from dsc.chat import Conversation
    from dsc.chat_template import Message

PROMPT, MORE = ">>> ", "... "
BLOCK = '"""'
MAX_SAVED = 64 << 20
ROLES = ("system", "user", "assistant", "tool")
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Talk:
    """One user at a terminal, or the lines of a pipe, and one conversation."""

    def __init__(self, conversation: Conversation, hide_thinking: bool = False) -> None:
        self.conversation = conversation
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._hide = hide_thinking
        self._left = False
        self._own: set[Path] = set()
        """Files that hold this conversation, as it was loaded or saved."""
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/save": ("FILE  write the conversation, as JSON", self.save),
            "/save!": ("FILE  the same over a file that is there", self.replace),
            "/load": ("FILE  go on with one that was written", self.load),
            "/reset": ("forget what was said", self.reset),
            "/stats": ("tokens and rates of the last answer", self.stats),
            "/help": ("this list", self.help),
            "/exit": ("leave; so does Ctrl-D", self.leave),
        }

    def run(self) -> None:
        """Take turns until the user leaves or there are no more lines."""
        if self.terminal:
            with suppress(ImportError):
                import readline  # noqa: F401 - lines can be edited, and come again
        asked_twice = False
        while not self._left:
            try:
                text = self._read()
            except KeyboardInterrupt:
                if asked_twice:
                    return
                asked_twice = True
                self._remark("\nCtrl-C once more, or /exit, leaves")
                continue
            if text is None:
                return
            asked_twice = False
            if text.strip():
                self.turn(text)

    def turn(self, text: str) -> None:
        """Run a command, or have the model answer; what is wrong is said, and the talk goes on."""
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._command(text)
            else:
                self._answer(text.removeprefix("/") if text.startswith("//") else text)
        except DscError as refused:
            from dsc.cli import as_typed

            if not self.terminal:
                raise
            self._remark(as_typed(str(refused)))

    def _command(self, text: str) -> None:
        name, _, rest = text.strip().partition(" ")
        if name not in self.commands:
            raise UsageError(
                f"there is no command {name}",
                hint=f"{one_of(name, self.commands)}; // begins a text with a /",
            )
        self.commands[name][1](rest.strip())

    def _answer(self, text: str) -> None:
        place = "text"
        with self._interrupts():
            for kind, piece in self.conversation.ask(text):
                if kind != place:
                    self._between(kind)
                    place = kind
                if kind == "text":
                    self._write(piece)
                elif not self._hide:
                    self._think(piece)
        if place == "thinking":
            self._between("text")
        self._write("\n")
        if self.conversation.finish_reason == "interrupted":
            self._remark("(ended; what came of it is kept)")
        elif self.conversation.finish_reason == "length":
            self._remark(f"(ended at {self._end()})")

    def _end(self) -> str:
        """Which limit an answer met."""
        held, most = len(self.conversation.sequence.tokens) + 1, self.conversation.session
        full = held >= most.max_context
        return f"--max-context {most.max_context}: /reset begins anew" if full else (
            f"--max-new-tokens {self.conversation.max_new_tokens}"
        )  # fmt: skip

    def _think(self, piece: str) -> None:
        stream = sys.stdout if self.terminal else sys.stderr
        stream.write(_harmless(piece) if self.terminal else piece)
        stream.flush()

    def _between(self, kind: str) -> None:
        """Where thinking begins and ends: dim on a terminal, elsewhere another stream."""
        if self._hide:
            return
        if self.terminal:
            self._write(
                "" if kind == "thinking" else "\n", f"{DIM if kind == 'thinking' else PLAIN}"
            )
        elif kind == "text":
            sys.stderr.write("\n")

    def _write(self, text: str, code: str = "") -> None:
        sys.stdout.write((_harmless(text) if self.terminal else text) + code)
        sys.stdout.flush()

    def _remark(self, text: str) -> None:
        console.stderr().print(text, markup=False)

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """While an answer comes, Ctrl-C ends it after its next token; the third time, the talk."""
        times = 0

        def interrupt(_: int, __: FrameType | None) -> None:
            nonlocal times
            times += 1
            self.conversation.interrupt()
            if times == 3:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            if self.terminal:
                sys.stdout.write(PLAIN)

    # --- lines ------------------------------------------------------------------------------------

    def _read(self) -> str | None:
        """The next turn's text; `None` where there is none any more."""
        line = self._line(PROMPT)
        if line is None:
            return None
        if line.lstrip().startswith(BLOCK):
            return self._block(line.lstrip().removeprefix(BLOCK))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            more = self._line(MORE)
            if more is None:
                break
            lines.append(more)
        return "\n".join(lines)

    def _block(self, line: str | None) -> str:
        """Lines up to one that ends with three double quotes."""
        lines: list[str] = []
        while line is not None:
            if line.rstrip().endswith(BLOCK):
                return "\n".join([*lines, line.rstrip().removesuffix(BLOCK)]).strip("\n")
            lines.append(line)
            line = self._line(MORE)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        if self.terminal:
            try:
                return _text(input(prompt))
            except EOFError:
                print()
                return None
            except UnicodeDecodeError as problem:
                raise UsageError(no_text(problem), "the terminal", "type text in UTF-8") from None
        data = sys.stdin.buffer.readline()
        try:
            return data.decode("utf-8").rstrip("\r\n") if data else None
        except UnicodeDecodeError as problem:
            raise UsageError(no_text(problem), "standard input", "give text in UTF-8") from None

    # --- commands ---------------------------------------------------------------------------------

    def save(self, place: str) -> None:
        """Write the messages as JSON. Raises `FileError` for a file that holds something else."""
        file = _named(place, "/save")
        if os.path.lexists(file) and file.resolve() not in self._own:
            raise FileError(f"{file} exists already", hint=f"/save! {place} replaces it")
        self.replace(place)

    def replace(self, place: str) -> None:
        """Write the messages as JSON, whatever the file held."""
        file = _named(place, "/save!")
        if not file.absolute().parent.is_dir():
            raise FileError(f"there is no folder {file.parent}", hint="make it, or name another")
        self._own.add(file.resolve())
        write_text(file, json.dumps({"messages": self.conversation.messages}, indent=1) + "\n")
        self._remark(f"{file}: {len(self.conversation.messages)} messages")

    def load(self, place: str | Path) -> None:
        """Go on with messages that were saved."""
        file = _named(place, "/load")
        self.conversation.messages = read_messages(file)
        self._own.add(file.resolve())
        self._remark(f"{file}: {len(self.conversation.messages)} messages")

    def reset(self, _: str) -> None:
        """Forget what was said."""
        self.conversation.reset()
        self._remark("a new conversation")

    def stats(self, _: str) -> None:
        """Say what the last answer took."""
        sequence, session = self.conversation.sequence, self.conversation.session
        lines = [f"cache {len(sequence.tokens)} of {session.max_context} tokens"]
        counted = {**self.conversation.last.summary(), "reused_tokens": sequence.reused}
        self._remark("\n".join([*lines, *(f"{n} {v:.6g}" for n, v in counted.items())]))

    def help(self, _: str) -> None:
        """List the commands."""
        lines = [f"{name:7} {what}" for name, (what, _) in self.commands.items()]
        self._remark("\n".join([*lines, f"{BLOCK:7} begins and ends a text of several lines"]))

    def leave(self, _: str) -> None:
        """End the talk."""
        self._left = True


def read_messages(file: Path) -> list[Message]:
    """Messages that /save wrote, or somebody else. Raises `UsageError` and `FileError`."""
    text = read_text(file)
    if len(text) > MAX_SAVED:
        raise FileError(f"larger than the limit of {MAX_SAVED} bytes", str(file))
    held = parse_object(text.encode(), str(file), UsageError).get("messages")
    known = isinstance(held, list) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
        for m in held
    )
    if not known:
        raise UsageError(
            "it holds no conversation",
            str(file),
            'it must be {"messages": [{"role": "user", "content": "…"}, …]}',
        )
    assert isinstance(held, list)
    return held


def _named(place: str | Path, command: str) -> Path:
    if not str(place):
        raise UsageError(f"{command} FILE", hint="name a file")
    return Path(place).expanduser()


def _text(line: str) -> str:
    """A typed line. Raises `UnicodeDecodeError` for bytes that Python took over as surrogates."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8")


def _harmless(text: str) -> str:
    """A text without the characters that command a terminal."""
    return "".join(c if c in "\n\t" or category(c) != "Cc" else "\ufffd" for c in text)
