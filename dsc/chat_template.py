"""Chat templates: programs in Jinja that came with a model, run where they can do no harm.

A template is run as transformers runs it (`utils/chat_template_utils.py`: an immutable sandbox,
`raise_exception`, `strftime_now`, `tojson`, `generation` blocks, loop controls), but in a process
of its own that may open no file for writing, start nothing, and use so much memory and time
(`dsc/template_process.py`): a sandbox bounds what a template reaches, and not how long it loops.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsc.errors import ArtifactError, UsageError
from dsc.processes import child_environment
from dsc.strict_json import parse_object

CHAT = "chat_template.json"
"""Where an artifact keeps its templates and the texts of special tokens."""
DEFAULT = "default"
MAX_TEMPLATE_BYTES = 1 << 20
MAX_FILE_BYTES = 8 * MAX_TEMPLATE_BYTES
SECONDS = 10.0
"""What one rendering may take, on the clock."""
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
"""Special tokens whose texts templates read."""
THOUGHT = ("reasoning_content", "thinking", "reasoning")
"""Under which of its names a message may hold what was thought; the first counts."""
Message = dict[str, Any]
"""`role`, `content`, and what else a template reads: `reasoning_content`, `tool_calls`."""


@dataclass
class ChatTemplate:
    """A model's template with the special tokens that it writes.

    `render` starts a process that stays for the next rendering; `close` ends it.
    """

    text: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The text of a conversation, by default with the beginning of the model's answer.

        `options` are variables of the template, such as `tools`, `enable_thinking`, `documents`.

        Raises:
            UsageError: the template refuses the conversation, is no template, or does too much.
        """
        values = {"tools": None, "documents": None, **self.tokens, **options}
        values |= {
            "messages": [*map(_thought, messages)],
            "add_generation_prompt": add_generation_prompt,
        }
        answer = self._asked(json.dumps({"template": self.text, "values": values}).encode())
        if "error" in answer:
            raise UsageError(
                f"the chat template refuses: {answer['error']}",
                hint="say it otherwise, or give a template of your own: --chat-template FILE",
            )
        return str(answer["text"])

    def close(self) -> None:
        """End the process, where there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _asked(self, request: bytes) -> dict[str, Any]:
        """What the process answers to one line. Raises `UsageError` where it does not."""
        process = self._process = self._process or _started()
        assert process.stdin is not None, "it is started with pipes"
        try:
            process.stdin.write(request + b"\n")
            process.stdin.flush()
            line = _line_of(process, time.monotonic() + SECONDS)
        except BrokenPipeError:
            line = b""
        except BaseException:
            self.close()  # an answer that comes later would be taken for the next one's
            raise
        if line.endswith(b"\n"):
            found: dict[str, Any] = json.loads(line)
            return found
        self.close()
        raise UsageError(
            f"the chat template takes more than {SECONDS:g} s or more memory than it may",
            hint="give a template of your own: --chat-template FILE",
        )


def _thought(message: Message) -> Message:
    """A message whose thinking has both names that templates read, as transformers gives it them.

    >>> _thought({"role": "assistant", "content": "4", "reasoning": "2 + 2"})["thinking"]
    '2 + 2'
    """
    told = [message[name] for name in THOUGHT if message.get(name) is not None]
    return {"thinking": told[0], **message, "reasoning_content": told[0]} if told else message


def _started() -> subprocess.Popen[bytes]:
    # In a session of its own Ctrl-C is not for it, and it ends with our end of its pipes.
    return subprocess.Popen(
        [sys.executable, "-c", "from dsc.template_process import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(),
        start_new_session=True,
    )


def _line_of(process: subprocess.Popen[bytes], until: float) -> bytes:
    """What the process writes up to the end of a line, its own end, or a point in time."""
    assert process.stdout is not None, "it is started with pipes"
    parts: list[bytes] = []
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while not parts or not parts[-1].endswith(b"\n"):
            if not waiting.select(max(0.0, until - time.monotonic())):
                return b""
            part = process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
            if not part:
                return b""
            parts.append(part)
    return b"".join(parts)


def parse_chat(found: Path | bytes) -> ChatTemplate:
    """What an artifact keeps of its templates. Raises `ArtifactError` where that is damaged."""
    where = CHAT if isinstance(found, bytes) else str(found)
    try:
        data = found if isinstance(found, bytes) else found.read_bytes()
    except OSError as problem:
        raise ArtifactError(f"cannot be read: {problem.strerror}", where) from None
    if len(data) > MAX_FILE_BYTES:
        raise ArtifactError(f"larger than the limit of {MAX_FILE_BYTES} bytes", where)
    held = parse_object(data, where, ArtifactError)
    templates, tokens = held.get("templates"), held.get("tokens")
    if not (_texts(templates) and _texts(tokens)) or not templates:
        raise ArtifactError("holds no templates and tokens", where, "compile the model again")
    assert isinstance(templates, dict)
    assert isinstance(tokens, dict)
    return ChatTemplate(templates.get(DEFAULT) or next(iter(templates.values())), tokens)


def _texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
