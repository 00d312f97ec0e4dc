"""The interpreting process, whose `main` reads the artifact's folder and its weights' file.

It speaks frames over its standard streams: one line of JSON, then the raw bytes of the arrays that
the line lists. Its parent is `client.py`; nothing else connects to it and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from dsc.ir.arrays import Array, array_of, tensor_of
from dsc.ir.lazy import torch
from dsc.ir.types import DType
from dsc.runtime.plan import Plan

if TYPE_CHECKING:
    from dsc.backends.triton.interpret import InterpretedProgram

INTERPRETED = "interpret/plan.json"
"""The plan of what the interpreter runs, in the backend's folder of an artifact."""


def write_frame(stream: IO[bytes], header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Send a header and arrays by name."""
    table = [[k, DType.of(x.dtype).value, list(x.shape)] for k, x in arrays.items()]
    stream.write(json.dumps({**header, "arrays": table}).encode() + b"\n")
    for array in arrays.values():
        stream.write(array.tobytes())
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, Array]] | None:
    """Receive a header and arrays, or `None` when the other side has ended, be it amid a frame."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    header = json.loads(line)
    arrays: dict[str, Array] = {}
    for name, dtype, shape in header["arrays"]:
        kind = DType(dtype)
        size = math.prod(shape) * kind.itemsize
        data = bytearray(stream.read(size))
        if len(data) < size:
            return None
        arrays[name] = np.frombuffer(data, np.uint8).view(kind.numpy).reshape(shape)
    return header, arrays


def serve(
    folder: Path,
    weights: Path,
    source: IO[bytes],
    sink: IO[bytes],
    place: str,
    make: type[InterpretedProgram] | None = None,
) -> None:
    """Answer run requests until the parent closes the pipe.

    The plan is in `place`, `make` is the kind of program.
    """
    from safetensors.torch import load_file

    from dsc.backends.triton.interpret import InterpretedProgram, Kernels
    from dsc.backends.triton.launch import runnable

    torch.set_num_threads(1)
    # Kernels are imported when they are first launched, and the folder may be another's by then.
    own = tempfile.TemporaryDirectory(prefix="dsc-kernels-")
    shutil.copytree(folder / "kernels", own.name, dirs_exist_ok=True)
    plan = Plan.from_json((folder / place).read_bytes())
    tensors = load_file(weights) if weights.is_file() else {}
    launches, kernels = runnable(plan), Kernels(Path(own.name))
    program = (make or InterpretedProgram)(launches, kernels, tensors)
    write_frame(sink, {"ready": True}, {})
    while (frame := read_frame(source)) is not None:
        header, arrays = frame
        inputs = {name: tensor_of(x) for name, x in arrays.items()}
        try:
            outputs, times = program.run(header["entry"], header["sizes"], inputs)
        except Exception:
            write_frame(sink, {"error": traceback.format_exc()}, {})
            continue
        told = {"times": times, **program.told()}
        write_frame(sink, told, {name: array_of(x) for name, x in outputs.items()})


def main(make: type[InterpretedProgram] | None = None) -> None:
    """Serve on the standard streams; whatever kernels print goes to standard error."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    folder, weights, place = sys.argv[1:]
    serve(Path(folder), Path(weights), sys.stdin.buffer, sink, place, make)
