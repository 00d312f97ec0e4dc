"""The interpreting process, whose `main` reads the artifact's folder and its weights' file.

It speaks frames over its standard streams: one line of JSON, then the raw bytes of the tensors that
the line lists. Its parent is `client.py`; nothing else connects to it and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from dsc.ir.lazy import torch
from dsc.ir.types import DType
from dsc.runtime.plan import Plan

INTERPRETED = "interpret/plan.json"
"""The plan of what the interpreter runs, in the backend's folder of an artifact."""


def write_frame(
    stream: IO[bytes], header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Send a header and tensors by name."""
    dense = {k: v.detach().contiguous() for k, v in tensors.items()}
    table = [[k, DType.of(v.dtype).value, list(v.shape)] for k, v in dense.items()]
    stream.write(json.dumps({**header, "tensors": table}).encode() + b"\n")
    for tensor in dense.values():
        stream.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """Receive a header and tensors, or `None` when the other side has closed."""
    line = stream.readline()
    if not line:
        return None
    header = json.loads(line)
    tensors: dict[str, torch.Tensor] = {}
    for name, dtype, shape in header["tensors"]:
        kind = DType(dtype).torch
        empty = torch.empty(shape, dtype=kind)
        size = empty.numel() * empty.element_size()
        if size:
            data = bytearray(stream.read(size))
            empty = torch.frombuffer(data, dtype=kind).reshape(shape)
        tensors[name] = empty
    return header, tensors


def serve(folder: Path, weights: Path, source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer run requests until the parent closes the pipe."""
    from safetensors.torch import load_file

    from dsc.backends.triton.interpret import InterpretedProgram, Kernels
    from dsc.backends.triton.launch import LaunchProgram

    torch.set_num_threads(1)
    # Kernels are imported when they are first launched, and the folder may be another's by then.
    own = tempfile.TemporaryDirectory(prefix="dsc-kernels-")
    shutil.copytree(folder / "kernels", own.name, dirs_exist_ok=True)
    plan = Plan.from_json((folder / INTERPRETED).read_bytes())
    tensors = load_file(weights) if weights.is_file() else {}
    launches, kernels = LaunchProgram.of(plan), Kernels(Path(own.name))
    program = InterpretedProgram(launches, kernels, tensors)
    write_frame(sink, {"ready": True}, {})
    while (frame := read_frame(source)) is not None:
        header, inputs = frame
        try:
            outputs, times = program.run(header["entry"], header["sizes"], inputs)
        except Exception:
            write_frame(sink, {"error": traceback.format_exc()}, {})
            continue
        write_frame(sink, {"times": times}, outputs)


def main() -> None:
    """Serve on the standard streams; whatever kernels print goes to standard error."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    serve(Path(sys.argv[1]), Path(sys.argv[2]), sys.stdin.buffer, sink)
