"""Weights of a checkpoint folder: safetensors files, mapped into memory and never copied.

A safetensors file is 8 bytes of header length (little endian), a JSON header that gives each
tensor a dtype, a shape and a byte range, and then the bytes. A large checkpoint is several such
files with an index, `model.safetensors.index.json`, whose `weight_map` names the file of each
tensor. Both come from outside, so every number is checked against the file before a byte of data
is touched. Pickles (`.bin`, `.pt`, `.pkl`) run code when they are opened and never are.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np

from dsc.errors import CheckpointError, UsageError
from dsc.files import is_led_out, why_no_file
from dsc.ir.arrays import Array, tensor_of
from dsc.ir.lazy import torch
from dsc.ir.types import MAX_RANK, SAFETENSORS, DType, TensorType
from dsc.ir.weights import WeightSource
from dsc.strict_json import JsonObject, parse_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference reader."""
MAX_INDEX_BYTES = 256 << 20
MAX_EXTENT = 1 << 40
MAX_NAME = 255
CUT = "the file is cut short, or is no safetensors file: get it again"

_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its type and its bytes `begin <= i < end` from the file's start."""

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """One file: a checked table of tensors, and the bytes, mapped read-only.

    A file that takes its place later changes nothing; a private writable mapping would count as
    memory in use.
    """

    path: Path
    entries: Mapping[str, Entry]
    _bytes: mmap.mmap

    @staticmethod
    def open(path: Path) -> SafetensorsFile:
        """Read and check the header. Raises `CheckpointError` for any damage or contradiction."""
        where = str(path)
        size = path.stat().st_size
        if size < 8:
            raise CheckpointError(f"only {size} bytes", where, CUT)
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"the header claims {length} bytes in a file of {size}", where, CUT
                )
            header = parse_object(stream.read(length), where, CheckpointError)
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + length
        entries = {
            name: _entry(fields, start, size, f"{where}: {name}")
            for name, fields in header.items()
            if name != "__metadata__"
        }
        _refuse_overlap(entries, where)
        return SafetensorsFile(path, entries, mapped)

    def release(self) -> None:
        """Give the pages that were read back: they can be read again."""
        self._bytes.madvise(mmap.MADV_DONTNEED)

    def raw(self, key: str) -> memoryview:
        """The bytes of the tensor `key`, a read-only view of the file."""
        entry = self.entries[key]
        return memoryview(self._bytes)[entry.begin : entry.end]

    def array(self, key: str) -> Array:
        """The tensor `key`, a read-only view of the file."""
        entry = self.entries[key]
        flat = np.frombuffer(self.raw(key), np.uint8)
        if entry.begin % entry.dtype.itemsize:
            flat = flat.copy()  # a wider type must not start at an odd address
        return flat.view(entry.dtype.numpy).reshape(entry.shape)


class SafetensorsSource(WeightSource):
    """All tensors of a checkpoint, each in the file that holds it."""

    def __init__(self, files: Mapping[str, SafetensorsFile]) -> None:
        self.files = files
        entries = ((key, file.entries[key]) for key, file in files.items())
        self.types = {key: TensorType(each.dtype, each.shape) for key, each in entries}

    def load(self, key: str) -> torch.Tensor:
        """The tensor, a view of its mapped file: writing to it faults. `KeyError`."""
        return tensor_of(self.array(key))

    def array(self, key: str, rows: slice = slice(None)) -> Array:
        """The array, or rows of its leading axis: no other bytes are touched. `KeyError`."""
        found = self.files[key].array(key)
        if rows == slice(None):
            return found
        if not found.shape or not 0 <= rows.start <= rows.stop <= found.shape[0]:
            told = f"rows {rows.start}:{rows.stop} of a tensor of shape {list(found.shape)}"
            raise UsageError(told, key)
        return found[rows]

    def release(self) -> None:
        """Give pages of all files back."""
        for file in {id(f): f for f in self.files.values()}.values():
            file.release()


def open_safetensors(path: Path | str) -> SafetensorsSource:
    """Open the weights of a checkpoint folder, one `.safetensors` file, or the index of several.

    A folder with `model.safetensors.index.json` is read by its index, otherwise it must hold
    `model.safetensors`, or safetensors files of any name that share no tensor.

    Raises:
        CheckpointError: no safetensors files, a damaged file, or an index that contradicts them.
    """
    path = Path(path)
    if path.is_file():
        return _indexed(path.parent) if path.name == INDEX_FILE else _union([path])
    if not path.is_dir():
        raise CheckpointError("no such file or folder", str(path))
    if os.path.lexists(path / INDEX_FILE):
        return _indexed(path)
    if os.path.lexists(path / SINGLE_FILE):
        return _union([inside(path, SINGLE_FILE, str(path))])
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if found:
        return _union([inside(path, name, str(path)) for name in found])
    pickled = sorted(file.name for pattern in _UNSAFE for file in path.glob(pattern))
    what = f"only pickled weights ({pickled[0]}), which run code when opened" if pickled else (
        "no *.safetensors files"
    )  # fmt: skip
    raise CheckpointError(what, str(path), "convert the checkpoint with save_pretrained")


def _union(paths: Iterable[Path]) -> SafetensorsSource:
    """Files without an index: no two may hold the same tensor."""
    files: dict[str, SafetensorsFile] = {}
    for file in map(SafetensorsFile.open, paths):
        for key in file.entries:
            if key in files:
                raise CheckpointError(
                    f"the tensor lies in {files[key].path.name} and in {file.path.name}", key
                )
            files[key] = file
    return SafetensorsSource(files)


def _indexed(folder: Path) -> SafetensorsSource:
    """A sharded checkpoint: every entry of the index must hold, all failures told at once."""
    where = str(folder / INDEX_FILE)
    path = inside(folder, INDEX_FILE, where)
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"larger than the limit of {MAX_INDEX_BYTES} bytes", where)
    weight_map = parse_object(path.read_bytes(), where, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("weight_map must be an object that is not empty", where)
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError("weight_map must give file names", where)
    names = sorted(set(weight_map.values()))
    shards = {name: SafetensorsFile.open(inside(folder, name, where)) for name in names}
    absent = [key for key, name in weight_map.items() if key not in shards[name].entries]
    if absent:
        raise CheckpointError(
            f"{len(absent)} tensors are not in the shard that the index names: "
            + _few(f"{key} in {weight_map[key]}" for key in absent),
            where,
        )
    return SafetensorsSource({key: shards[name] for key, name in weight_map.items()})


def inside(folder: Path, name: str, where: str) -> Path:
    """`folder / name`, if that is a file and no link leads out of the folder (`is_led_out`)."""
    if len(name) > MAX_NAME:
        told = f"a file name of {len(name)} characters, {name[:40]!r}…; at most {MAX_NAME} are read"
        raise CheckpointError(told, where, "give the file a shorter name, in the index too")
    if Path(name).name != name or name in {"", ".", ".."}:
        raise CheckpointError(f"the file name {name[:80]!r} leaves the checkpoint folder", where)
    path = folder / name
    if reason := why_no_file(path):
        raise CheckpointError(f"{name!r} {reason}", where, "download it, or repair links")
    if is_led_out(folder, path):
        raise CheckpointError(f"the link {name} leads out of the checkpoint folder", where)
    return path


def _entry(fields: object, start: int, size: int, where: str) -> Entry:
    """Check one tensor's header: known dtype, sane shape, bytes in the file and of that shape."""
    if not isinstance(fields, dict):
        raise CheckpointError("a tensor's header must be an object", where)
    name = fields.get("dtype")
    dtype = SAFETENSORS.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise CheckpointError(
            f"unknown dtype {name!r:.60}", where, f"known: {', '.join(SAFETENSORS)}"
        )
    shape = _integers(fields, "shape", where)
    if len(shape) > MAX_RANK:
        raise CheckpointError(f"{len(shape)} axes, at most {MAX_RANK} are read", where)
    offsets = _integers(fields, "data_offsets", where)
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
        raise CheckpointError(
            f"data_offsets {offsets!s:.60} do not lie in the file's {size - start} bytes of data",
            where,
            CUT,
        )
    found, needed = offsets[1] - offsets[0], prod(shape) * dtype.itemsize
    if found != needed:
        raise CheckpointError(
            f"{found} bytes for {name} of shape {shape}, which takes {needed}", where
        )
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _integers(fields: JsonObject, name: str, where: str) -> list[int]:
    values = fields.get(name)
    if isinstance(values, list) and all(type(v) is int and 0 <= v <= MAX_EXTENT for v in values):
        return values
    raise CheckpointError(f"{name} is no list of non-negative integers: {str(values)[:60]}", where)


def _refuse_overlap(entries: Mapping[str, Entry], where: str) -> None:
    """Two tensors that share bytes are a damaged header, or one that hides something."""
    placed = sorted((e.begin, e.end, name) for name, e in entries.items() if e.end > e.begin)
    for (_, end, first), (begin, _, second) in pairwise(placed):
        if begin < end:
            raise CheckpointError(f"the bytes of {first} and {second} overlap", where)


def _few(lines: Iterable[str], limit: int = 5) -> str:
    shown = list(lines)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more
