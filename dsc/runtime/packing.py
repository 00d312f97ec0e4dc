"""Stream the weights of a program into safetensors files, block by block.

Every tensor starts on a 64-byte boundary: small `U8` tensors named `__pad.N` fill the gaps, since
the format allows no holes. A file mapped into memory then serves vector loads and DMA as it is.
One of a megabyte or more may start on a page of its own (`page`), by which it can be mapped alone.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from dsc.errors import CheckpointError
from dsc.hardware import cpu
from dsc.ir.arrays import Array
from dsc.ir.program import Program
from dsc.ir.safetensors import Entry, SafetensorsFile, open_safetensors
from dsc.ir.types import SAFETENSORS
from dsc.ir.weights import WeightExpr, WeightSource, parts
from dsc.runtime.contents import WORKERS, Stored, contents, nbytes
from dsc.runtime.emission import Progress

ALIGNMENT = 64
LARGE = 1 << 20
"""Bytes from which on a tensor starts on a page, where pages are asked for."""
PAD = "__pad."
NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}
Places: TypeAlias = dict[str, tuple[int, int]]
Told: TypeAlias = Callable[[str, int], None]
"""Takes the name of a tensor and how many bytes of it are written now."""


def stored_of(program: Program) -> list[Stored]:
    """What is stored of the weights, by name and in order."""
    return [part for name, expr in program.weights.items() for part in parts(name, expr)]


def layout(program: Program) -> tuple[bytes, Places]:
    """The file's header, and where each weight will lie."""
    return table(stored_of(program), ALIGNMENT)


def table(stored: Sequence[Stored], alignment: int = 1, page: int = 1) -> tuple[bytes, Places]:
    """The header of a file of these tensors, and where each will lie: byte and size.

    Tensors start at multiples of `alignment`, large ones at multiples of `page`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: Places = {}
    at = 0
    grains = [_grain(expr, alignment, page) for _, expr in stored]
    after = [*grains[1:], alignment][: len(grains)]
    for (name, expr), following in zip(stored, after, strict=True):
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
        gap = -at % following
        if gap:
            pad = f"{PAD}{len(header)}"
            header[pad] = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
            at += gap
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % max(ALIGNMENT, *grains, 1))
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {k: (start + o, n) for k, (o, n) in places.items()}


def _grain(expr: WeightExpr, alignment: int, page: int) -> int:
    """Of which number a tensor's place is a multiple."""
    return max(alignment, page) if nbytes(expr.type) >= LARGE else alignment


@dataclass(frozen=True)
class Written:
    """A file of weights that was written: its size, its header, and the SHA-256 of each tensor."""

    size: int
    header: bytes
    tensors: Mapping[str, bytes]

    @property
    def facts(self) -> dict[str, Any]:
        """As a manifest has it; `sha256` is that of the header and the digests, by name."""
        ordered = b"".join(self.tensors[name] for name in sorted(self.tensors))
        whole = hashlib.sha256(self.header + ordered).hexdigest()
        tensors = {name: digest.hex() for name, digest in self.tensors.items()}
        return {"bytes": self.size, "sha256": whole, "tensors": tensors}


def pack(program: Program, path: Path, progress: Progress | None = None) -> Written:
    """Evaluate every weight and write all to one file."""
    stored = stored_of(program)
    header, places = table(stored, ALIGNMENT)
    told = Telling(progress, sum(size for _, size in places.values()))
    written = write_file(path, stored, header, places, program.source, told)
    told.end()
    return written


class Telling:
    """Tells `progress` how many of the bytes of all weights are written."""

    def __init__(self, progress: Progress | None, whole: int) -> None:
        self._progress, self._whole, self._done = progress, whole, 0

    def __call__(self, name: str, size: int) -> None:
        """A block of a tensor is about to be written."""
        if self._progress is not None:
            self._progress(f"weights: {name}", self._done, self._whole)
        self._done += size

    def end(self) -> None:
        """All are."""
        if self._progress is not None:
            self._progress("weights", self._whole, self._whole)


def write_file(
    path: Path,
    stored: Sequence[Stored],
    header: bytes,
    places: Places,
    source: WeightSource,
    told: Told,
) -> Written:
    """Write a file of these tensors, whose header and places `table` gave."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        digests = write_tensors(file, stored, source, told, places)
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        size = file.tell()
    return Written(size, header, digests)


def write_tensors(
    file: BinaryIO,
    stored: Sequence[Stored],
    source: WeightSource,
    told: Told,
    places: Places | None = None,
) -> dict[str, bytes]:
    """Write tensors to a file, each block while it is hashed and the next are made.

    They lie one behind the other, or at `places`. `told` hears of each block, before it is written.
    Returns the SHA-256 of each.
    """
    digests = {name: hashlib.sha256() for name, _ in stored}
    with closing(contents(stored, source)) as parts, ThreadPoolExecutor(1) as beside:
        for name, data in parts:
            hashed = beside.submit(digests[name].update, data)
            told(name, len(data))
            if places is not None:
                file.write(b"\0" * (places[name][0] - file.tell()))
            file.write(data)
            hashed.result()
    return {name: digest.digest() for name, digest in digests.items()}


@dataclass(frozen=True)
class Other:
    """A tensor of a file that is not what its weight's expression says of the source.

    `at` is the first element that differs, which is `found` and should be `expected`; `count` of
    them do.
    """

    tensor: str
    at: tuple[int, ...]
    found: Any
    expected: Any
    count: int

    def __str__(self) -> str:
        """What is wrong, in words."""
        place = f" at {list(self.at)}" if self.at else ""
        return (
            f"{self.tensor} is {self.found}{place}, {self.expected} by the source"
            f" ({self.count} of its values differ)"
        )


def others(program: Program, path: Path, progress: Progress | None = None) -> list[Other]:
    """The tensors of packed files that are not what a program's weights are, bit for bit.

    Weights are made from the program's source again, as `pack` does it, and held against the files
    block by block. `path` is the file, or the index of several. Raises `CheckpointError` for files
    that have not these tensors.
    """
    stored = stored_of(program)
    opened, done = open_safetensors(path), 0
    whole = sum(nbytes(expr.type) for _, expr in stored)
    for name, expr in stored:
        file = opened.files.get(name)
        entry = None if file is None else file.entries[name]
        if entry is None or (entry.dtype, entry.shape) != (expr.type.dtype, expr.type.shape):
            raise CheckpointError(f"{path.name} does not hold it as {expr.type}", where=name)
    found: dict[str, Other] = {}
    at, last = 0, ""
    with closing(contents(stored, program.source)) as made:
        for name, data in made:
            file = opened.files[name]
            if name != last:
                opened.release()
                at, last = 0, name
            if progress is not None:
                progress(f"comparing weights: {name}", done, whole)
            there = np.frombuffer(file.raw(name), np.uint8)[at : at + len(data)]
            if len(data) and not np.array_equal(there, data):
                found[name] = _other(name, file.entries[name], at, there, data, found.get(name))
            at, done = at + len(data), done + len(data)
    return list(found.values())


def _other(
    name: str, entry: Entry, at: int, there: Array, made: Array, before: Other | None
) -> Other:
    """What differs in a block that starts at byte `at`, behind what did `before`."""
    there, made = there.view(entry.dtype.numpy), made.view(entry.dtype.numpy)
    width = entry.dtype.numpy.itemsize
    bits = (x.view(np.uint8).reshape(-1, width) for x in (there, made))
    apart = np.flatnonzero(np.not_equal(*bits).any(axis=1))
    if before is not None:
        return replace(before, count=before.count + len(apart))
    first = int(apart[0])
    index = np.unravel_index(at // width + first, entry.shape)
    where = tuple(map(int, index))
    return Other(name, where, there[first].item(), made[first].item(), len(apart))


def damaged(path: Path, facts: Mapping[str, Any]) -> str:
    """The first tensor of a file that is not what was packed, or what else; empty if nothing is.

    `facts` are those of `Written`.
    """
    try:
        file = SafetensorsFile.open(path)
    except CheckpointError:
        return "the header"
    with path.open("rb") as stream:
        length = stream.read(8)
        header = length + stream.read(int.from_bytes(length, "little"))

    def digest(name: str) -> bytes:
        found = hashlib.sha256(file.raw(name)).digest() if name in file.entries else b""
        file.release()
        return found

    tensors: Mapping[str, str] = facts["tensors"]
    with ThreadPoolExecutor(min(cpu().cores, WORKERS)) as pool:
        found = dict(zip(tensors, pool.map(digest, tensors), strict=True))
    if wrong := [name for name, digest in found.items() if digest.hex() != tensors[name]]:
        return wrong[0]
    if Written(0, header, found).facts["sha256"] != facts["sha256"]:
        return "the header"
    places = sorted((file.entries[name].begin, file.entries[name].end) for name in tensors)
    return "" if _is_padded(path, [(0, len(header)), *places]) else "the padding"


def _is_padded(path: Path, places: Sequence[tuple[int, int]]) -> bool:
    """Whether a file has zeros between these places, in order, and behind the last."""
    ends, begins = [end for _, end in places], [begin for begin, _ in places[1:]]
    with path.open("rb") as stream:
        for end, begin in zip(ends, [*begins, path.stat().st_size], strict=True):
            stream.seek(end)
            if stream.read(begin - end).strip(b"\0"):
                return False
    return True
