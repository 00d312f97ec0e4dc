"""The compiling process, fed and read by `workers`.

A request is a function of this tree and its arguments, the answer what it gives or why it failed.
TVM's compiler is loaded here and not in the process that asks: it takes a second and hundreds of
megabytes, and LLVM ends its process where it finds no room.
"""

from __future__ import annotations

import importlib
import pickle
import select
import struct
import sys
import traceback
from contextlib import suppress
from typing import IO, Any

from dsc.errors import DscError

IDLE = 60
"""Seconds without a request after which the process ends."""
VALUE, REFUSED, FAILED = "value", "refused", "failed"


def receive(stream: IO[bytes]) -> Any:
    """The next message of one of our own processes. Raises `EOFError` where it has ended."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<q", head)
    return pickle.loads(stream.read(size))


def send(stream: IO[bytes], message: Any) -> None:
    """Write a message."""
    data = pickle.dumps(message)
    stream.write(struct.pack("<q", len(data)) + data)
    stream.flush()


def called(place: str, arguments: tuple[Any, ...]) -> Any:
    """What the function at `module:name` gives."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)(*arguments)


def main() -> None:
    """Serve standard input; what else is printed goes to standard error."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # TVM would load it
    with suppress(Exception):  # what is wrong is told to the first request
        importlib.import_module("dsc.backends.tvm.build")
    while select.select([requests], [], [], IDLE)[0]:
        try:
            place, arguments = receive(requests)
        except EOFError:
            return
        try:
            answer = (VALUE, called(place, arguments))
        except DscError as refusal:
            answer = (REFUSED, refusal)
        except Exception:
            answer = (FAILED, traceback.format_exc())
        send(answers, answer)
