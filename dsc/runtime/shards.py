"""Write weights as checkpoints have them: safetensors files of limited size, and their index.

Weights stream block by block, so that no file and no weight is in memory. Each is hashed as it is
made; a file that is whole is opened as any other would be, and what lies in it is hashed again.
Wider elements come first in a file, so that each tensor starts at a multiple of its elements.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsc.errors import FileError
from dsc.ir.safetensors import INDEX_FILE, SafetensorsFile
from dsc.ir.weights import WeightSource
from dsc.runtime.emission import Progress
from dsc.runtime.packing import RELEASE_BYTES, Reader, Stored, nbytes, table

SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
Told = Callable[[str, int], None]
"""Takes the name of a tensor and how many bytes of it were written now."""


def cut(stored: Sequence[Stored], limit: int) -> list[list[Stored]]:
    """The tensors of each file, in order: `limit` bytes at most, or one tensor that is larger."""
    shards: list[list[Stored]] = [[]]
    held = 0
    for name, expr in stored:
        size = nbytes(expr.type)
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append((name, expr))
        held += size
    return shards


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[Stored]],
    source: WeightSource,
    what: str,
    progress: Progress | None = None,
) -> None:
    """Write the files and their index into a folder; `what` is done, for `progress`.

    Raises:
        CheckpointError: a weight is not what its type says, or must not have its values.
        FileError: what lies in a file is not what was written.
    """
    whole = sum(nbytes(expr.type) for shard in shards for _, expr in shard)
    reader, weight_map, done = Reader(source), dict[str, str](), 0

    def told(name: str, size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(f"{what}: {name}", done, whole)

    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard, reader, told)
        weight_map |= {key: name for key, _ in shard}
    index = {"metadata": {"total_size": whole}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write(path: Path, shard: Sequence[Stored], reader: Reader, told: Told) -> None:
    """Write one file, each block while the next is made, and read it back. Raises `FileError`."""
    placed = sorted(shard, key=lambda each: -each[1].type.dtype.itemsize)
    header, _ = table(placed)
    digests = {name: hashlib.sha256() for name, _ in placed}

    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:

        def put(name: str, block: Any) -> None:
            digests[name].update(block)
            file.write(block)

        file.write(header)
        last: Future[None] | None = None
        for name, expr in placed:
            for block in reader.contents(name, expr):
                if last is not None:
                    last.result()
                last = beside.submit(put, name, block)
                told(name, len(block))
        if last is not None:
            last.result()
    _check(path, header, {name: digest.digest() for name, digest in digests.items()})


def _check(path: Path, header: bytes, digests: Mapping[str, bytes]) -> None:
    """Raise `FileError` unless a file has this header, and each tensor its SHA-256."""
    with path.open("rb") as file:
        wrong = [] if file.read(len(header)) == header else ["the header"]
    if not wrong:
        written, held = SafetensorsFile.open(path), 0
        for name, digest in digests.items():
            data = written.raw(name)
            wrong += [name] if hashlib.sha256(data).digest() != digest else []
            held += len(data)
            if held > RELEASE_BYTES:
                written.release()
                held = 0
    if wrong:
        raise FileError(
            f"what lies in the file is not what was written there: {wrong[0]}",
            path.name, "the disk or the memory may be faulty: try again, or another disk",
        )  # fmt: skip
