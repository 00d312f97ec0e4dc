"""Stream the weights of a program into one safetensors file, block by block.

Every tensor starts on a 64-byte boundary: small `U8` tensors named `__pad.N` fill the gaps, since
the format allows no holes. A file mapped into memory then serves vector loads and DMA as it is.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dsc.errors import CheckpointError
from dsc.ir.arrays import array_of
from dsc.ir.program import Program
from dsc.ir.streams import blocks
from dsc.ir.types import SAFETENSORS, TensorType
from dsc.ir.weights import WeightExpr, WeightSource, parts, sources
from dsc.runtime.emission import Progress

ALIGNMENT = 64
PAD = "__pad."
RELEASE_BYTES = 128 << 20
"""Bytes that are packed before the pages of the checkpoint that they came from are given back."""
NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}
Stored: TypeAlias = tuple[str, WeightExpr]
"""A tensor of a file, by name."""
Places: TypeAlias = dict[str, tuple[int, int]]


def _stored(program: Program) -> list[Stored]:
    """What is stored of the weights, by name and in order."""
    return [part for name, expr in program.weights.items() for part in parts(name, expr)]


def layout(program: Program) -> tuple[bytes, Places]:
    """The file's header, and where each weight will lie."""
    return table(_stored(program), ALIGNMENT)


def table(stored: Iterable[Stored], alignment: int = 1) -> tuple[bytes, Places]:
    """The header of a file of these tensors, and where each will lie: byte and size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: Places = {}
    at = 0
    for name, expr in stored:
        t = expr.type
        if name in places:
            raise CheckpointError("a weight is called as a part of another", where=name)
        if t.dtype not in NAMES:
            raise CheckpointError(f"no safetensors type for {t}", where=name)
        size = nbytes(t)
        header[name] = {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, at + size],
        }
        places[name] = (at, size)
        at += size
        gap = -at % alignment
        if gap:
            pad = f"{PAD}{len(header)}"
            header[pad] = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
            at += gap
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {k: (start + o, n) for k, (o, n) in places.items()}


def pack(
    program: Program,
    path: Path,
    progress: Progress | None = None,
) -> str:
    """Evaluate every weight and write the file. Returns its SHA-256."""
    header, places = layout(program)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = max((offset + size for offset, size in places.values()), default=0)
    digest = hashlib.sha256(header)
    reader = Reader(program.source)
    with path.open("wb") as file:
        file.write(header)
        at = len(header)

        def write(block: Any) -> int:
            digest.update(block)
            return file.write(block)

        for name, expr in _stored(program):
            if progress is not None:
                progress(f"weights: {name}", at, whole)
            offset, _ = places[name]
            write(b"\0" * (offset - at))
            at = offset + sum(map(write, reader.contents(name, expr)))
        tail = b"\0" * (-at % ALIGNMENT)
        write(tail)
    if progress is not None:
        progress("weights", whole, whole)
    return digest.hexdigest()


class Reader:
    """Reads weights one after another, and gives pages of a checkpoint back now and then."""

    def __init__(self, source: WeightSource) -> None:
        self.source, self._held = source, 0.0

    def contents(self, name: str, expr: WeightExpr) -> Iterator[Any]:
        """The bytes that are stored of a weight, block by block.

        Raises `CheckpointError`, with the name, where they are not what its type says.
        """
        size, read = nbytes(expr.type), 0
        each = max(1.0, sum(nbytes(leaf.type) for leaf in sources(expr)) / max(1, size))
        try:
            for block in blocks(expr, self.source):
                data = bytes_of(block, expr.type)
                yield data
                read += len(data)
                self._held += len(data) * each
                if self._held > RELEASE_BYTES:
                    self.source.release()
                    self._held = 0.0
        except CheckpointError as error:
            error.where = error.where or name
            raise
        if read != size:
            raise CheckpointError(f"{read} bytes for {expr.type}", where=name)


def bytes_of(block: Any, declared: TensorType) -> Any:
    """The bytes of an array or a tensor, which must be of this element type."""
    array = np.ascontiguousarray(array_of(block))
    if array.dtype != declared.dtype.numpy:
        raise CheckpointError(f"a weight of {array.dtype} for {declared}")
    return array.reshape(-1).view(np.uint8) if array.size else b""


def nbytes(t: TensorType) -> int:
    """The bytes of a tensor that is there."""
    if not isinstance(t.nbytes, int):
        raise CheckpointError(f"a weight of symbolic shape {t}")
    return t.nbytes
