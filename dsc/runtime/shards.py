"""Write weights as checkpoints have them: safetensors files of limited size, and their index.

Weights stream block by block, so that no file and no weight is in memory. Each is hashed as it is
made; what the disk then holds of a whole file is read and hashed again.
Wider elements come first in a file, so that each tensor starts at a multiple of its elements.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsc.errors import FileError
from dsc.ir.safetensors import INDEX_FILE
from dsc.ir.weights import WeightSource
from dsc.runtime.contents import Stored, nbytes
from dsc.runtime.emission import Progress
from dsc.runtime.packing import Told, Written, damaged, table, write_tensors

SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


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


def shard_names(count: int) -> list[str]:
    """What so many files are called, as in checkpoints.

    >>> shard_names(2)
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_of(weight_map: Mapping[str, str], total: int) -> bytes:
    """The index of several files: the file of each tensor, and the bytes of all tensors."""
    found = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(found, indent=2).encode() + b"\n"


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
    weight_map, done = dict[str, str](), 0

    def told(name: str, size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(f"{what}: {name}", done, whole)

    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        _write(folder / name, shard, source, told)
        weight_map |= {key: name for key, _ in shard}
    (folder / INDEX_FILE).write_bytes(index_of(weight_map, whole))


def _write(path: Path, shard: Sequence[Stored], source: WeightSource, told: Told) -> None:
    """Write one file, and read it back from the disk. Raises `FileError`."""
    placed = sorted(shard, key=lambda each: -each[1].type.dtype.itemsize)
    header, _ = table(placed)
    with path.open("wb") as file:
        file.write(header)
        digests = write_tensors(file, placed, source, told)
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # else the memory that it was written from is read
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if wrong := damaged(path, Written(path.stat().st_size, header, digests).facts):
        raise FileError(
            f"what lies in the file is not what was written there: {wrong}",
            path.name, "the disk or the memory may be faulty: try again, or another disk",
        )  # fmt: skip
